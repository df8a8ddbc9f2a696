"""Ask a LiSTEN model about sound files, or about a recording of the microphone.

listen ask some.wav "What is being said?"
listen ask one.wav other.wav --task sv
listen ask --task asr --jsonl *.wav > answers.jsonl
listen ask --microphone "What is being said?"
listen ask some.wav "Who is late?" --model my/checkpoint --num-prompts 5 --show-prompts

Several files are the clips of one question. With --jsonl each file is asked about on its own and gives one line of
JSON: "file", "answer", with --show-prompts "prompts"; or "file" and "error" where the file fails. The exit status is
then 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import ListenForConditionalGeneration, ListenPipeline, ListenProcessor
from ..data.audio import AUDIO_SUFFIXES
from ..data.extras import extra
from ..data.files import json_text
from ..data.tasks import get_task, list_tasks
from ..tasks_listen import TASK_ALIASES
from .help import DTYPES, ArgumentFormatter

TINY = Path(__file__).resolve().parents[2] / "model_cards" / "listen-tiny"
_CLIP_ERRORS = (ValueError, OSError, RuntimeError)  # of a file, or of a clip that exceeds context or memory


def add_model_argument(parser: argparse._ActionsContainer, required: bool = not TINY.exists()) -> None:
    """The argument that names the model. The miniature is part of the repository, not of the package."""
    parser.add_argument(
        "--model",
        default=str(TINY) if TINY.exists() else None,
        required=required,
        help="folder or Hub id of a LiSTEN model (default in the repository: listen-tiny)",
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ArgumentFormatter)
    parser.add_argument("inputs", nargs="*", metavar="FILE ... QUESTION", help="sound files or URLs, then the question")
    add_model_argument(parser)
    parser.add_argument("--task", help="name of a task in place of a question: asr, er, sv, en2zh, acap ...")
    parser.add_argument("--num-prompts", type=int, help="prompts to select from the pool (default: the model's)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the backbones")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="max new tokens of the answer")
    parser.add_argument("--max-audio-seconds", type=float, help="truncate longer files (default: no limit)")
    parser.add_argument("--number-clips", action="store_true", help="write `Clip 1:`, `Clip 2:` ... before the files")
    parser.add_argument("--show-prompts", action="store_true", help="also print which prompts were selected")
    parser.add_argument("--jsonl", action="store_true", help="ask about each file on its own; print one JSON line each")
    parser.add_argument("--batch-size", type=int, default=1, help="files of one batch, with --jsonl")
    parser.add_argument("--microphone", action="store_true", help="record a clip, until Enter is pressed")
    parser.add_argument("--seconds", type=float, help="length of the recording, in place of pressing Enter")
    arguments = parser.parse_intermixed_args()
    if arguments.batch_size < 1:
        parser.error(f"--batch-size {arguments.batch_size} must be at least 1")
    if arguments.batch_size > 1 and not arguments.jsonl:
        parser.error("--batch-size needs --jsonl, which asks about each file on its own")
    if arguments.seconds is not None and (not arguments.microphone or not 0 < arguments.seconds < float("inf")):
        parser.error(f"--seconds {arguments.seconds:g} must be above 0, and needs --microphone")
    if not arguments.inputs and not arguments.microphone:
        parser.error("name a sound file, or record one with --microphone")
    return arguments


def split_inputs(words: list[str], task: str | None, instructions: dict[str, str]) -> tuple[list[str], str | None]:
    """Sound files and the question, which comes last where the task, or the lack of one, asks for it."""
    task = task if task in instructions else TASK_ALIASES.get(task or "", task)
    if task is not None and "{question}" not in instructions.get(task, ""):
        return words, None
    if not words or os.path.isfile(words[-1]) or _names_a_file(words[-1]):
        raise ValueError(
            f"{words[-1] if words else ''!r} is where the question should be: ask FILE ... QUESTION, or give --task"
        )
    return words[:-1], words[-1]


def _names_a_file(word: str) -> bool:
    """Whether a word can only be a sound file or a URL, which may be misspelt, and no question."""
    return len(word.split()) == 1 and ("://" in word or Path(word).suffix.lower() in AUDIO_SUFFIXES)


def main() -> None:
    """Load the model, ask, print the answer."""
    arguments = parse_arguments()
    processor = ListenProcessor.from_pretrained(arguments.model)
    files, question = split_inputs(arguments.inputs, arguments.task, processor.task_instructions)
    if arguments.task is not None:
        processor.instruction(arguments.task, question)  # raises before the model is loaded
    if not files and not arguments.microphone:
        raise ValueError(f"no sound file before the question {question!r}: ask FILE ... QUESTION")
    model = ListenForConditionalGeneration.from_pretrained(arguments.model, dtype=arguments.dtype)
    listen = ListenPipeline(model=model, processor=processor)
    options = {
        "text": question,
        "task": arguments.task,
        "num_prompts": arguments.num_prompts,
        "max_audio_seconds": arguments.max_audio_seconds,
        "number_clips": arguments.number_clips,
        "return_prompts": arguments.show_prompts,
        "max_new_tokens": arguments.max_new_tokens,
    }
    clips: list[tuple[str, Any]] = [(file, file) for file in files]
    if arguments.microphone:
        clips.append(("microphone", record(arguments.seconds)))
    if arguments.jsonl:
        print_lines(listen, clips, arguments.batch_size, options)
    else:
        print_answer(listen, [clip for _, clip in clips], options)


# ---------------------------------------------------------------------- answers


def print_answer(listen: ListenPipeline, clips: list[Any], options: dict[str, Any]) -> None:
    """Print the answer about all clips while it is generated, then the prompts if they are asked for."""
    printed = ""
    for answer in listen.stream({"audio": clips}, **options):
        text = answer["generated_text"]
        print(text[len(printed) :], end="", flush=True)
        printed = text
    print()
    for prompt in answer.get("prompts", []):
        print(f"prompt {prompt['index']:>4}  score {prompt['score']:.3f}")


def print_lines(listen: ListenPipeline, clips: list[tuple[str, Any]], batch_size: int, options: dict[str, Any]) -> None:
    """Print a JSON line for each named clip. Clips that fail do not stop the others.

    Raises:
        SystemExit: with status 1, at least one clip failed.
        ValueError: the task compares clips.
    """
    task = TASK_ALIASES.get(options["task"], options["task"])
    if task in list_tasks() and get_task(task).clips > 1:
        raise ValueError(f"task {task!r} compares {get_task(task).clips} clips, --jsonl asks about each file alone")

    def ask(batch: list[Any]) -> list[dict[str, Any]]:
        return [one for (one,) in listen([{"audio": clip} for clip in batch], batch_size=len(batch), **options)]

    failed, count = 0, len(clips)
    answers = each_answer(ask, [clip for _, clip in clips], batch_size)
    bar = tqdm(answers, total=count, unit="file", disable=count == 1 or None)  # None: off where stderr is redirected
    for (name, _), answer in zip(clips, bar, strict=True):
        failed += isinstance(answer, Exception)
        with tqdm.external_write_mode():
            print(json_text({"file": name, **line_of(answer)}), flush=True)
    if failed:
        sys.exit(f"error: {failed} of {count} files failed; their lines carry the error")


def each_answer(
    ask: Callable[[list[Any]], list[dict[str, Any]]], clips: list[Any], batch_size: int
) -> Iterator[dict[str, Any] | Exception]:
    """The answer about each clip, or the error it raises. A batch that fails is repeated clip by clip."""
    for start in range(0, len(clips), batch_size):
        batch = clips[start : start + batch_size]
        try:
            yield from ask(batch)
        except _CLIP_ERRORS as error:
            if len(batch) == 1:
                yield error
            else:
                yield from each_answer(ask, batch, 1)


def line_of(answer: dict[str, Any] | Exception) -> dict[str, Any]:
    """The fields of a line beside the file."""
    if isinstance(answer, Exception):
        return {"error": str(answer) or type(answer).__name__}
    return {"answer": answer["generated_text"]} | {name: answer[name] for name in ("prompts",) if name in answer}


# ---------------------------------------------------------------------- microphone


def record(seconds: float | None = None) -> dict[str, Any]:
    """Record the default microphone.

    Args:
        seconds: Length; until Enter is pressed by default.

    Returns:
        `"array"` `(samples,)` float32 and `"sampling_rate"`, which is that of the device.

    Raises:
        ImportError: sounddevice is not installed.
        OSError: PortAudio is not installed, or there is no microphone.
        ValueError: Enter cannot be pressed as the input is no terminal, or nothing was recorded.
    """
    if seconds is None and not sys.stdin.isatty():
        raise ValueError("the input is no terminal, so Enter cannot end the recording; give its length with --seconds")
    sounddevice = load_sounddevice()
    blocks: list[np.ndarray] = []

    def keep(block: np.ndarray, _frames: int, _time: Any, status: Any) -> None:
        if status:
            warnings.warn(f"samples of the microphone were lost: {status}", stacklevel=2)
        blocks.append(block[:, 0].copy())  # (frames, 1) -> (frames,)

    try:
        rate = int(sounddevice.query_devices(kind="input")["default_samplerate"])
        with sounddevice.InputStream(rate, channels=1, dtype="float32", callback=keep):
            if seconds is None:
                input("Recording; press Enter to stop. ")
            else:
                time.sleep(seconds)
    except sounddevice.PortAudioError as error:
        raise OSError(f"the microphone cannot be opened: {error}; connect one, or give a file") from error
    if not blocks:
        raise ValueError("nothing was recorded; record for longer")
    return {"array": np.concatenate(blocks), "sampling_rate": rate}


def load_sounddevice() -> Any:
    """The module `sounddevice`; see `record`."""
    try:
        with extra("microphone"):
            import sounddevice
    except OSError as error:  # raised where the wheel brings no PortAudio
        raise OSError(f"{error}; install it, on Debian by: apt install libportaudio2") from error
    return sounddevice
