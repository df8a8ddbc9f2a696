"""The command `listen`: what it lists, how it ends, and what its scripts and recipes share."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_model
from fixtures_repository import PACKAGE, RECIPES, ROOT

import listen_command
from listen.commands.help import ArgumentFormatter
from listen.commands.train import parameter_counts, start_table
from listen.training import ArgumentError, ModelArguments
from listen.training.build import build_model
from listen.training.parsing import find_recipe, read_config, recipe_files


def test_help_lists_each_command_and_imports_no_torch() -> None:
    program = "import sys, listen_command; listen_command.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    modules = {path.stem for path in (PACKAGE / "commands").glob("*.py")} - {"__init__", "help", "published_checkpoint"}
    named = {listen_command.MODULES.get(name, name.replace("-", "_")) for name in listen_command.COMMANDS}
    assert named == modules
    assert all(f"  {name} " in done.stdout for name in listen_command.COMMANDS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["listen", "pre"], ["precompute"]),
        pytest.param(
            ["listen", "train", "--data.mix"],
            ["--data.mixing", "--data.mixing_temperature", "--data.mixing_weights"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["listen", "check-data", "--max"], ["--max-problems"], marks=pytest.mark.slow),
        (["listen", "check-data", "my"], []),
    ],
)
def test_bash_completes_commands_and_options(words: list[str], expected: list[str], tmp_path: Path) -> None:
    program = tmp_path / "listen"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "listen_command.py"} "$@"\n')
    program.chmod(0o755)
    line = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _listen {program}; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", f'eval "$({program} --completion)"; {line}'], capture_output=True, text=True)
    assert done.stdout.split() == expected, done.stderr


@pytest.mark.parametrize("name", listen_command.COMMANDS)
def test_each_command_shows_its_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["listen"])
    try:
        listen_command.main([name, "--help"])
    except SystemExit as ended:
        assert ended.code == 0
    assert f"listen {name} " in capsys.readouterr().out


def test_help_names_types_and_defaults_and_no_key_of_the_environment() -> None:
    parser = argparse.ArgumentParser(prog="listen", formatter_class=ArgumentFormatter)
    parser.add_argument("source", type=Path, help="file to read")
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch")
    parser.add_argument("--name", help="name of a run")
    parser.add_argument("--kinds", nargs="+", default=["a", "b"], choices=["a", "b", "c"], help="what to write")
    parser.add_argument("--key", default="secret", help="its key; default: KEY")
    parser.add_argument("--quick", action="store_true", help="skip checks")
    words = " ".join(parser.format_help().split())
    assert "file to read (type: Path)" in words and "skip checks" in words and "secret" not in words
    assert "rows of a batch (type: int, default: 8)" in words and "name of a run (type: str, default: none)" in words
    assert "what to write (default: a b)" in words and "skip checks (" not in words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tarin"], "error: there is no command 'tarin'; did you mean train?"),
        (["convert"], "error: there is no command 'convert'; did you mean convert-beats or convert-salmonn?"),
        (["train", "--config", "no-such-recipe"], "error: No such file or recipe 'no-such-recipe'"),
        (["train", "--model.preset", "none", "--training.use_cpu"], "error: name model.speech_encoder"),
        (["check-data", "none.yaml"], "error: No such file or recipe 'none.yaml'"),
        (["eval", "--model", "none"], "error: no data to evaluate on"),
        (["serve", "--model", "none", "--engine", "vllm"], "error: --engine vllm and --engine-url go together"),
        (
            ["demo", "--url", "http://a/v1", "--dtype", "float32"],
            "error: --adapter, --dtype and --max-audio-seconds",
        ),
        (["demo", "--adapter", "a=b", "--adapter", "a=c"], "error: --adapter a=b a=c: two adapters have one name"),
    ],
)
def test_an_error_of_use_is_one_line(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["listen"])
    monkeypatch.delenv("LISTEN_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as ended:
        listen_command.main(words)
    assert str(ended.value.code).startswith(message) and "\n" not in str(ended.value.code)


_TARGETS = ["targets", "--data", "a.jsonl", "--output", "none", "--llm", "none"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ask", "a.wav", "Who?", "--dtype", "bf16"], "choose from auto, float32, bfloat16, float16"),
        (["ask", "a.wav", "Who?", "--batch-size", "4"], "--batch-size needs --jsonl"),
        (
            [*_TARGETS, "--endpoint", "http://a/v1", "--revision", "v1"],
            "--revision is an option of an LLM in this process",
        ),
        ([*_TARGETS, "--timeout", "5"], "--timeout is an option of requests to an --endpoint"),
        ([*_TARGETS, "--kinds", "repeat", "--options", "sad"], "--options are those of the kind ser"),
        ([*_TARGETS, "--decoding", "max_new_tokens=5"], "by --max-new-tokens, not by --decoding"),
    ],
)
def test_what_nothing_would_read_is_refused(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["listen"])
    with pytest.raises(SystemExit, match="2"):
        listen_command.main(words)
    assert message in capsys.readouterr().err.replace("'", "")


@pytest.mark.parametrize(("module", "caught"), [("wandb.errors", SystemExit), ("listen.training", RuntimeError)])
def test_errors_of_trackers_are_one_line_and_those_of_the_code_are_not(
    module: str, caught: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise type("UsageError", (RuntimeError,), {"__module__": module})("nobody is logged in")

    monkeypatch.delenv("LISTEN_TRACEBACK", raising=False)
    monkeypatch.setattr("listen.commands.cost.main", fail)
    monkeypatch.setattr(sys, "argv", ["listen"])
    with pytest.raises(caught, match="nobody is logged in"):
        listen_command.main(["cost"])


def test_recipes_are_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {path.resolve() for path in recipe_files()} == {path.resolve() for path in RECIPES}
    monkeypatch.chdir(tmp_path)
    assert read_config("listen-llama3-8b") == read_config(ROOT / "examples" / "configs" / "listen-llama3-8b.yaml")
    assert read_config("speech_emotion/v2")["model"]
    (tmp_path / "demo.yaml").write_text("model: {dtype: float32}\n")
    assert find_recipe("demo.yaml") == Path("demo.yaml")  # a file of the user's comes first
    with pytest.raises(FileNotFoundError, match=r"'listen-lama3-8b'; did you mean listen-llama3-8b\?"):
        find_recipe("listen-lama3-8b")


def test_a_pool_smaller_than_the_presets_k_is_refused_before_anything_loads() -> None:
    names = {"speech_encoder": "none/at-all", "language_model": "none/at-all", "preset": "listen-llama3-8b"}
    with pytest.raises(ArgumentError, match=r"model.prompt_pool: num_prompts=\d+ must lie in 1..pool_size=5"):
        build_model(ModelArguments(**names, prompt_pool={"pool_size": 5}))


def test_the_table_at_the_start_counts_each_parameter_once() -> None:
    model = tiny_model()
    counts = parameter_counts(model)
    assert sum(total for total, _ in counts.values()) == sum(p.numel() for p in model.parameters())
    assert {part for part, (_, trainable) in counts.items() if trainable} == {"adapters"}
    assert start_table(model, {"asr": 3}, steps=7).row_count == len(counts) + 1 < 10
