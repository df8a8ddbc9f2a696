"""What README.md shows is run, and what it names exists."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile

from listen.data import get_task, list_tasks, load_manifest
from listen.presets_listen import PRESETS
from listen.training import parse_arguments

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MINIATURE = ROOT / "model_cards" / "listen-tiny"
SHORTER = {  # the same commands over fewer rows and steps
    "examples/evaluate.py": ["--max-examples", "2", "--max-new-tokens", "16"],
    "examples/train.py": ["--training.max_steps", "2", "--training.keys_from_rows", "8"],
}
ROWS = 4
MOST_SECONDS = 600

needs_miniature = pytest.mark.skipif(
    not (MINIATURE / "config.json").exists(), reason="model_cards/listen-tiny is absent"
)


@dataclass(frozen=True)
class Block:
    """A fenced block of the README; `reason` says why it cannot run here, `None` if it can."""

    language: str
    text: str
    reason: str | None


def blocks(language: str) -> list[Block]:
    """All fenced blocks of one language, in order."""
    pattern = r"(?:<!-- not run: ([^\n]+?) -->\n)?^```(\w+)\n(.*?)^```"
    found = re.findall(pattern, README, flags=re.MULTILINE | re.DOTALL)
    return [Block(name, text, reason or None) for reason, name, text in found if name == language]


def commands(*, run: bool) -> list[str]:
    """Shell commands that can run here, or those that cannot."""
    chosen = [block for block in blocks("bash") if (block.reason is None) == run]
    return [line for block in chosen for line in block.text.splitlines() if line and not line.startswith("make ")]


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


def run(words: list[str], cwd: Path) -> str:
    """Runs one command as a user would, without network; a failure shows what it wrote."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=MOST_SECONDS)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_readme_opens_with_five_lines_and_two_commands() -> None:
    opening = README.split("# LiSTEN\n\n")[1].split("\n\n```bash\n")[0]
    assert len(opening.splitlines()) == 5
    assert blocks("bash")[0].text == "make demo\nmake test\n"


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_knows_the_commands(target: str) -> None:
    planned = run(["make", "--dry-run", target], cwd=ROOT)
    assert {"demo": "examples/demo.py", "test": "-m pytest"}[target] in planned


@needs_miniature
@pytest.mark.slow
def test_python_blocks_run_one_after_the_other(workplace: Path) -> None:
    for number, block in enumerate(blocks("python")):
        assert block.reason is None, f"Python block {number} is marked as not run"
    program = workplace / "readme.py"
    program.write_text("\n".join(block.text for block in blocks("python")), encoding="utf-8")
    assert "generated_text" in run([sys.executable, program.name], cwd=workplace)


@needs_miniature
@pytest.mark.slow
@pytest.mark.parametrize("command", [line for line in commands(run=True) if not line.startswith("make")])
def test_command_runs(command: str, workplace: Path) -> None:
    program, script, *rest = shlex.split(command)
    assert program == "python"
    run([sys.executable, script, *rest, *SHORTER.get(script, [])], cwd=workplace)


@pytest.mark.parametrize("command", commands(run=False))
def test_command_that_cannot_run_here_is_right(command: str) -> None:
    words = shlex.split(command)
    (script,) = (word for word in words if word.endswith(".py"))
    assert (ROOT / script).is_file()
    if script == "examples/train.py":
        parse_arguments([*words[words.index(script) + 1 :], "--training.use_cpu"])  # there may be no GPU here


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.text.split()[2])
def test_settings_are_known(block: Block, tmp_path: Path) -> None:
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
    named = set(re.findall(r"`([\w./-]+\.(?:py|yaml)|[\w-]+(?:/[\w.-]+)+/?|[a-z_]+/)`", README))
    assert len(named) > 20
    places = (ROOT, ROOT / "examples" / "configs", ROOT / "examples" / "configs" / "speech_emotion")
    written_by_runs = {name for name in named if name.startswith("runs/")}
    if not MINIATURE.exists():
        written_by_runs |= {name for name in named if name.startswith("model_cards")}
    missing = [name for name in named - written_by_runs if not any((place / name).exists() for place in places)]
    assert missing == []


def test_tables_name_every_module_and_task() -> None:
    flat = {path.name for path in ROOT.glob("*_*.py") if path.stem != "__init__"}
    assert flat - set(re.findall(r"`(\w+\.py)`", README)) == set()
    rows = re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)
    assert set(rows) <= set(list_tasks())
    assert all(get_task(name).title for name in rows)


def test_results_are_those_of_the_metrics_file() -> None:
    """Rows such as `| asr | wer | 0.081 |` repeat what evaluation wrote for the miniature."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\d\.\d{3}|\d+\.\d) \|", README, flags=re.MULTILINE)
    metrics = MINIATURE / "metrics.json"
    if not metrics.exists():
        assert rows == [], "the README gives results that no metrics.json holds"
        return
    scores = json.loads(metrics.read_text(encoding="utf-8"))
    for task, metric, shown in rows:
        digits = len(shown.split(".")[1])
        assert f"{scores[task][metric]:.{digits}f}" == shown, f"{task} {metric}"
