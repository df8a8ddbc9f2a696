"""Where the page gets its answers from: what it needs, and a model in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from .. import ListenForConditionalGeneration, ListenPipeline, ListenProcessor

_AUDIO_SUFFIXES = {".wav", ".flac", ".mp3", ".ogg"}


class Question(NamedTuple):
    """One question about clips.

    Attributes:
        clips: paths, in order.
        text: the question; `None` where the task has its own wording.
        task: name of a task; `None` for a free question.
        adapter: name of an adapter.
        num_prompts: k.
        max_new_tokens: of the answer.
    """

    clips: list[str]
    text: str | None
    task: str | None
    adapter: str
    num_prompts: int
    max_new_tokens: int = 128


class Example(NamedTuple):
    """Clips to try.

    Attributes:
        clips: paths, in order.
        task: name of a task that fits; `None` for the one that is chosen at the start.
    """

    clips: list[str]
    task: str | None = None


class Answers(Protocol):
    """What the page needs.

    Attributes:
        title: name of the model.
        adapters: names of the adapters, the first one chosen at the start.
        instructions: wording of each task.
        num_prompts: k at the start.
        examples: clips to try.
        reports_prompts: whether answers come with the prompts that were selected.
        at_once: questions that are answered at the same time; others wait.
    """

    title: str
    adapters: list[str]
    instructions: Mapping[str, str]
    num_prompts: int
    examples: list[Example]
    reports_prompts: bool
    at_once: int

    def most_prompts(self, adapter: str) -> int:
        """The largest k of an adapter."""

    def stream(self, question: Question) -> Iterator[dict[str, Any]]:
        """The answer while it is generated: items of `ListenPipeline.stream`, `"prompts"` in the last where
        they are reported."""


class LocalAnswers:
    """Answers of a model in this process; see `Answers`.

    Args:
        model: Folder or Hub id.
        adapters: Folders or Hub ids of further adapters, by name.
        max_audio_seconds: Longer clips are truncated to it; no limit by default.
        dtype: Of the backbones; that of each checkpoint by default.

    Raises:
        ValueError: an adapter does not fit the model.
        OSError: a model or adapter is not found.
    """

    def __init__(
        self,
        model: str,
        adapters: Mapping[str, str] | None = None,
        max_audio_seconds: float | None = None,
        dtype: str = "auto",
    ) -> None:
        self._model = ListenForConditionalGeneration.from_pretrained(model, dtype=dtype)
        for name, source in (adapters or {}).items():
            self._model.load_adapter(source, name)
        self._processor = ListenProcessor.from_pretrained(model)
        self._pipeline = ListenPipeline(model=self._model, processor=self._processor)
        self._max_audio_seconds = max_audio_seconds
        self.title = Path(model).name
        self.adapters = [*self._model.adapters]
        self.instructions = self._processor.task_instructions
        self.num_prompts = self._processor.num_prompts
        self.examples = read_examples(model)
        self.reports_prompts = True
        self.at_once = 1  # side by side, each would take twice as long

    def most_prompts(self, adapter: str) -> int:
        """The largest k of an adapter: the size of its pool, 0 without one."""
        pool = self._model.adapters.named(adapter).prompt_pool
        return pool.config.pool_size if pool is not None else 0

    def stream(self, question: Question) -> Iterator[dict[str, Any]]:
        """See `Answers`."""
        return self._pipeline.stream(
            {"audio": question.clips, "text": question.text, "task": question.task},
            num_prompts=question.num_prompts,
            max_audio_seconds=self._max_audio_seconds,
            adapter_names=[question.adapter],
            max_new_tokens=question.max_new_tokens,
            return_prompts=True,
        )


def read_examples(model: str) -> list[Example]:
    """The examples in the folder `samples` of a model, local or on the Hub; none where it has no such folder.

    Its file `examples.json` lists them: `[{"clips": ["a.wav", "b.wav"], "task": "sv"}, ...]`. Without it, each audio
    file is an example.

    Raises:
        ValueError: the file has another form.
    """
    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model, allow_patterns="samples/*"))
        except (HfHubHTTPError, LocalEntryNotFoundError):  # the model was loaded: it is cached, its samples are not
            return []
    folder = folder / "samples"
    listed = folder / "examples.json"
    if not listed.exists():
        return [Example([str(path)]) for path in sorted(folder.glob("*")) if path.suffix.lower() in _AUDIO_SUFFIXES]
    try:
        rows = json.loads(listed.read_text(encoding="utf-8"))
        return [Example([str(folder / clip) for clip in row["clips"]], row["task"]) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{listed} must be a list such as [{{"clips": ["a.wav"], "task": "asr"}}]') from error


__all__ = ["Answers", "Example", "LocalAnswers", "Question", "read_examples"]
