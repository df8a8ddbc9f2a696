"""What README.md and the pages of docs/ show is run, and what they name exists."""

import json
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from fixtures_processes import run_script

import listen
from listen.commands import serve
from listen.data import get_task, list_tasks, load_manifest
from listen.presets_listen import PRESETS
from listen.training import parse_arguments
from listen.training.comparison import read_comparison
from listen_command import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]  # their snippets run
PROSE = [  # their links resolve
    *(path for path in sorted(ROOT.glob("*.md"))),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
    *sorted((ROOT / "model_cards").glob("*/README.md")),
]
MINIATURE = ROOT / "model_cards" / "listen-tiny"
SHORTER = {  # the same commands over fewer rows and steps
    "examples/evaluate_tasks.py": ["--max-examples", "2", "--max-new-tokens", "16"],
    "examples/train.py": ["--training.max_steps", "2", "--training.keys_from_rows", "8"],
}
FOREIGN = ("curl", "vllm", "docker", "hf")  # programs of others, in commands for servers and the Hub
ROWS = 4

needs_miniature = pytest.mark.skipif(
    not (MINIATURE / "config.json").exists(), reason="model_cards/listen-tiny is absent"
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: path below the root.
        language: the word after the fence.
        text: its lines.
        reason: why it cannot run here, `None` if it can.
        output: the `text` block right after it, which shows what it prints; `None` without one.
    """

    page: str
    language: str
    text: str
    reason: str | None
    output: str | None


@cache
def text_of(path: Path) -> str:
    """Reads a page."""
    return path.read_text(encoding="utf-8")


@cache
def blocks(language: str) -> list[Block]:
    """All fenced blocks of one language, in order."""
    pattern = r"(?:<!-- not run: ([^\n]+?) -->\n)?^```(\w+)\n(.*?)^```(?:\n\n```text\n(.*?)^```)?"
    found = []
    for page in PAGES:
        for reason, name, text, output in re.findall(pattern, text_of(page), flags=re.MULTILINE | re.DOTALL):
            found.append(Block(str(page.relative_to(ROOT)), name, text, reason or None, output or None))
    return [block for block in found if block.language == language]


def commands_of(block: Block) -> list[str]:
    """Its commands; what `make` does is tested elsewhere."""
    return [line for line in block.text.splitlines() if line and not line.startswith("make ")]


def shell_blocks(*, run: bool) -> list[Block]:
    """Shell blocks with commands that can run here, or with those that cannot, each text once."""
    chosen = {block.text: block for block in blocks("bash") if (block.reason is None) == run and commands_of(block)}
    return list(chosen.values())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository after `make demo`, with a far smaller corpus."""
    from listen.data.corpus import CorpusSizes, SplitSizes, build_corpus

    folder = tmp_path_factory.mktemp("readme")
    for name in ("examples", "model_cards"):
        (folder / name).symlink_to(ROOT / name)
    corpus = folder / "runs" / "demo" / "corpus"
    sizes = (SplitSizes(count, scenes=ROWS, pairs=ROWS) for count in (290, 80, 80))  # fewer utterances hold no pairs
    build_corpus(corpus, CorpusSizes(*sizes), progress=False)
    for manifest in corpus.glob("*.jsonl"):
        keep_few(manifest)
    return folder


def keep_few(manifest: Path) -> None:
    """Cuts a manifest to `ROWS` rows of each task."""
    kept: dict[str, list[str]] = defaultdict(list)
    for line in manifest.read_text(encoding="utf-8").splitlines():
        rows = kept[json.loads(line)["task"]]
        rows += [line] if len(rows) < ROWS else []
    manifest.write_text("\n".join(line for rows in kept.values() for line in rows) + "\n", encoding="utf-8")


def test_readme_opens_with_five_lines_and_two_commands() -> None:
    opening = text_of(ROOT / "README.md").split("# LiSTEN\n\n")[1].split("\n\n```bash\n")[0]
    assert len(opening.splitlines()) == 5
    assert blocks("bash")[0].text == "make demo\nmake test\n"


def test_badges_state_the_versions_and_papers_of_setup_and_citation() -> None:
    readme = text_of(ROOT / "README.md")
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert f"python-{re.search(r'python_requires=.>=([0-9.]+)', setup)[1]}+-" in readme
    assert f"transformers-{re.search(r'transformers>=([0-9.]+)', setup)[1]}+-" in readme
    papers = re.findall(r"badge/arXiv-([\d.]+)-", readme)
    assert len(papers) == 2
    assert [f"arXiv:{paper}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8") for paper in papers] == [True, True]


def test_citation_names_the_version_and_the_licence_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == listen.__version__
    assert f'license="{citation["license"]}"' in (ROOT / "setup.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_knows_the_commands(target: str) -> None:
    planned = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"demo": "examples/demo.py", "test": "-m pytest"}[target] in planned


def test_only_shell_blocks_can_be_marked_as_not_run() -> None:
    assert [block.page for kind in ("python", "yaml", "json") for block in blocks(kind) if block.reason] == []


@needs_miniature
@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in blocks("python")}))
def test_python_blocks_of_a_page_run_one_after_the_other(page: str, workplace: Path) -> None:
    program = workplace / "page.py"
    text = "\n".join(block.text for block in blocks("python") if block.page == page)
    program.write_text(text, encoding="utf-8")
    printed = run_script(program, cwd=workplace)
    assert ("generated_text" in printed) == ("print(listen(" in text)


@needs_miniature
@pytest.mark.slow
@pytest.mark.parametrize("block", shell_blocks(run=True), ids=lambda block: commands_of(block)[0])
def test_commands_run_and_print_what_is_shown(block: Block, workplace: Path) -> None:
    printed = ""
    for command in commands_of(block):
        program, script, *rest = shlex.split(command)
        assert program == "python"
        printed += run_script(script, *rest, *SHORTER.get(script, []), cwd=workplace)
    if block.output is not None:
        assert printed == block.output


def test_scripts_of_all_commands_exist() -> None:
    commands = [words for run in (True, False) for block in shell_blocks(run=run) for words in whole_commands(block)]
    scripts = {word for words in commands for word in words if word.endswith(".py")}
    assert len(scripts) > 8
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


def whole_commands(block: Block) -> list[list[str]]:
    """Words of its commands, which may take several lines."""
    commands, open_lines = [], ""
    for line in commands_of(block):
        open_lines += line + "\n"
        try:
            commands.append(shlex.split(open_lines))
        except ValueError:  # a quotation goes on in the next line
            continue
        open_lines = ""
    assert not open_lines
    return commands


@pytest.mark.parametrize("words", [words for block in shell_blocks(run=False) for words in whole_commands(block)])
def test_command_that_cannot_run_here_is_right(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program = next(word for word in words if not re.match("[A-Z_]+=", word))  # variables may stand first
    if program == "listen":
        assert words[1] in COMMANDS
        if words[1] == "serve":
            monkeypatch.setattr(sys, "argv", words[1:])
            serve.parse_arguments()
        return
    if program in FOREIGN:
        files = [word for before, word in zip(words, words[1:], strict=False) if before in ("-f", "--file")]
        assert [name for name in files if not (ROOT / name).is_file()] == []
        return
    (script,) = (word for word in words if word.endswith(".py"))
    assert (ROOT / script).is_file()
    if script == "examples/train.py":
        parse_arguments([*words[words.index(script) + 1 :], "--training.use_cpu"])  # there may be no GPU here


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.text.split()[2])
def test_settings_are_known(block: Block, tmp_path: Path) -> None:
    if "methods:" in block.text:
        (tmp_path / "demo.yaml").symlink_to(ROOT / "examples" / "configs" / "demo.yaml")
        (tmp_path / "compare").mkdir()
        (tmp_path / "compare" / "settings.yaml").write_text(block.text, encoding="utf-8")
        assert len(read_comparison(tmp_path / "compare" / "settings.yaml").methods) > 1
        return
    (tmp_path / "settings.yaml").write_text(block.text, encoding="utf-8")
    run = parse_arguments(["--config", str(tmp_path / "settings.yaml"), "--training.use_cpu"])
    assert run.model.preset is None or run.model.preset in PRESETS


def test_manifest_lines_load(tmp_path: Path) -> None:
    (manifest,) = blocks("json")
    for name in re.findall(r"\w+\.flac", manifest.text):
        soundfile.write(tmp_path / name, np.zeros(1600), samplerate=16000)
    (tmp_path / "mine.jsonl").write_text(manifest.text, encoding="utf-8")
    rows = load_manifest(tmp_path / "mine.jsonl")
    assert len(rows) == len(manifest.text.splitlines())


def test_named_files_exist() -> None:
    pattern = r"`([\w./-]+\.(?:py|yaml)|[\w-]+(?:/[\w.-]+)+/?|[a-z_]+/)`"
    named = {name for page in PAGES for name in re.findall(pattern, text_of(page))}
    assert len(named) > 20
    recipes = ROOT / "examples" / "configs"
    places = (ROOT, ROOT / "listen", recipes, recipes / "speech_emotion", recipes / "compare", recipes / "accelerate")
    # made by users, or on the Hub
    elsewhere = {name for name in named if name.startswith(("runs/", "datasets/", "facebook/"))}
    if not MINIATURE.exists():
        elsewhere |= {name for name in named if name.startswith("model_cards")}
    missing = [name for name in named - elsewhere if not any((place / name).exists() for place in places)]
    assert missing == []


def test_named_symbols_stand_in_the_files_named_with_them() -> None:
    """Phrases such as "`STRATEGIES` in `listen/modeling_prompt_pool.py`"."""
    text = " ".join(" ".join(text_of(page).split()) for page in PAGES)
    named = re.findall(r"`(\w+)` in `([\w/]+\.py)`", text)
    assert len(named) > 8
    missing = [
        (name, file) for name, file in named if not re.search(rf"\b{name}\b", (ROOT / file).read_text(encoding="utf-8"))
    ]
    assert missing == []


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and the Hub give to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_files_and_headings() -> None:
    broken = []
    for page in PROSE:
        for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
            if link.startswith(("http://", "https://")):
                continue
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []


@pytest.mark.parametrize("index", ["README.md", "docs/README.md"])
def test_indexes_list_every_page(index: str) -> None:
    linked = {(ROOT / index).parent / link for link in re.findall(r"\]\(([\w./-]+\.md)", text_of(ROOT / index))}
    pages = {page for page in (ROOT / "docs").glob("*.md") if page.stem != "README"}
    assert pages - {link.resolve() for link in linked} == set()


def test_tables_name_every_module_and_task() -> None:
    root, flat = (
        {path.name for path in folder.glob("*_*.py") if path.stem != "__init__"} for folder in (ROOT, ROOT / "listen")
    )
    assert root - set(re.findall(r"`(\w+\.py)`", text_of(ROOT / "README.md"))) == set()
    assert flat == set(re.findall(r"`(\w+_\w+\.py)`", text_of(ROOT / "CONTRIBUTING.md")))
    rows = re.findall(r"^\| `(\w+)` \|", text_of(ROOT / "docs" / "evaluation.md"), flags=re.MULTILINE)
    assert {"asr", "en2zh", "er", "sv", "sqa", "acap"} <= set(rows) <= set(list_tasks())
    assert all(get_task(name).title for name in rows)


@pytest.mark.parametrize("page", ["README.md", "docs/evaluation.md"])
def test_results_are_those_of_the_metrics_file(page: str) -> None:
    """Rows such as `| asr | wer | 0.081 | 0.07 .. 0.09 | 0.9 |`, k = 0 last, repeat the evaluation of the miniature."""
    pattern = r"^\| `(\w+)` \| (\w+) \| (\d\.\d{3}|\d+\.\d) \| ([\d.]+) \.\. ([\d.]+) \| ([\d.]+) \|$"
    rows = re.findall(pattern, text_of(ROOT / page), flags=re.MULTILINE)
    metrics = MINIATURE / "metrics.json"
    if not metrics.exists():
        assert rows == [], f"{page} gives results that no metrics.json holds"
        return
    scores = json.loads(metrics.read_text(encoding="utf-8"))
    assert len(rows) >= 4
    for task, metric, *shown in rows:
        digits = len(shown[0].split(".")[1])
        details = scores["details"]
        values = [scores[task][metric], *details["confidence_95"][task][metric]]
        values.append(details["without_prompts"][task][metric])
        assert shown == [f"{value:.{digits}f}" for value in values], f"{task} {metric}"
