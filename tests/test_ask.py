"""The command `listen ask`: one question about some clips, many files as JSON lines, and the microphone."""

from __future__ import annotations

import json
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import listen_command
from listen.commands import ask

FOLDER = Path(__file__).parents[1] / "model_cards" / "listen-tiny"
SPEECH, OTHER, SCENE = (str(FOLDER / "samples" / name) for name in ("speech.wav", "other_voice.flac", "scene.wav"))
SAID = "the doctor found a yellow guitar yesterday"
INSTRUCTIONS = {"asr": "What is being said?", "sqa": "{question}"}

needs_miniature = pytest.mark.skipif(not (FOLDER / "config.json").exists(), reason="model_cards/listen-tiny is absent")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> object:
    """Runs `listen ask` with some words; its output and what it exits with, `None` for success."""
    monkeypatch.delenv("LISTEN_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["listen"])

    def runs(*words: str) -> tuple[str, object]:
        try:
            listen_command.main(["ask", *words])
        except SystemExit as ended:
            return capsys.readouterr().out, ended.code
        return capsys.readouterr().out, None

    return runs


@needs_miniature
def test_it_answers_about_one_clip_or_two(run: object) -> None:
    assert run(SPEECH, "What is being said?") == (f"{SAID}\n", None)
    assert run(SPEECH, "--task", "sv", SPEECH) == ("yes\n", None)
    printed, _ = run(SPEECH, "--task", "asr", "--show-prompts", "--num-prompts", "2")
    answer, *prompts = printed.splitlines()
    assert answer == SAID
    assert [line.split()[0] for line in prompts] == ["prompt", "prompt"]


@needs_miniature
def test_an_answer_that_the_output_cannot_encode_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows gives files and pipes the code page of the system."""
    output = BytesIO()
    monkeypatch.setattr(sys, "argv", ["listen"])
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(output, encoding="cp1252"))
    listen_command.main(["ask", SPEECH, "--task", "en2zh"])
    sys.stdout.flush()
    assert output.getvalue().startswith(b"\\u")


@needs_miniature
@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_each_file_gives_a_line_and_a_broken_one_stops_none(run: object, tmp_path: Path, batch_size: str) -> None:
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF, but no audio")
    files = [SPEECH, str(broken), SPEECH, "none.wav"]
    printed, ended = run("--task", "asr", *files, "--jsonl", "--show-prompts", "--batch-size", batch_size)
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["file"] for line in lines] == files
    assert [line.get("answer") for line in lines] == [SAID, None, SAID, None]
    assert [len(line.get("prompts", [])) for line in lines] == [4, 0, 4, 0]
    assert ["error" in line for line in lines] == [False, True, False, True]
    assert "no audio file at 'none.wav'" in lines[3]["error"]
    assert ended == "error: 2 of 4 files failed; their lines carry the error"


@pytest.mark.parametrize("words", [["--seconds", "3"], ["--microphone", "--seconds", "0"]])
def test_seconds_are_those_of_a_recording(run: object, words: list[str]) -> None:
    assert run(SPEECH, "What is being said?", *words) == ("", 2)


@needs_miniature
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([SPEECH, OTHER], "is where the question should be"),
        ([SPEECH, "misspelt.wav"], "'misspelt.wav' is where the question should be"),
        ([SPEECH, "--task", "trancribe"], "task 'trancribe' is unknown; did you mean 'transcribe'?"),
        (["What is being said?"], "no sound file before the question"),
        ([SPEECH, "--task", "asf"], "task 'asf' is unknown; did you mean 'asr'?"),
        ([SPEECH, OTHER, "--task", "sv", "--jsonl"], "task 'sv' compares 2 clips"),
        (["--microphone", "--task", "asr"], "the input is no terminal"),
    ],
)
def test_wrong_use_is_one_line(run: object, words: list[str], message: str) -> None:
    printed, ended = run(*words)
    assert printed == ""
    assert message in ended and ended.startswith("error: ") and "\n" not in ended


def test_the_question_stands_last_where_the_task_needs_one() -> None:
    assert ask.split_inputs(["a.wav", "b.wav"], "asr", INSTRUCTIONS) == (["a.wav", "b.wav"], None)
    for task in (None, "sqa", "question"):
        assert ask.split_inputs(["a.wav", "Who?"], task, INSTRUCTIONS) == (["a.wav"], "Who?")


class Microphone:
    """A device that delivers two blocks of one channel when it is opened; hardware is not at hand."""

    PortAudioError = type("PortAudioError", (Exception,), {})

    def __init__(self, rate: int, channels: int, dtype: str, callback: object) -> None:
        for level in (0.25, 0.5):
            callback(np.full((80, channels), level, dtype), 80, None, None)

    def __enter__(self) -> Microphone:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def test_a_recording_holds_all_blocks_at_the_rate_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(
        InputStream=Microphone,
        PortAudioError=Microphone.PortAudioError,
        query_devices=lambda kind: {"default_samplerate": 44100.0},
    )
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    clip = ask.record(seconds=0)
    assert clip["sampling_rate"] == 44100
    np.testing.assert_array_equal(clip["array"], np.repeat(np.float32([0.25, 0.5]), 80))


def test_a_missing_package_or_microphone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(ImportError, match=r"sounddevice is not installed; .* 'listen-audio-llm\[microphone\]'"):
        ask.record(seconds=1)

    def no_device(kind: str) -> None:
        raise Microphone.PortAudioError(f"no {kind} device")

    device = SimpleNamespace(PortAudioError=Microphone.PortAudioError, query_devices=no_device)
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    with pytest.raises(OSError, match="the microphone cannot be opened: no input device; connect one"):
        ask.record(seconds=1)
