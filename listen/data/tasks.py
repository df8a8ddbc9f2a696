"""Task registry: the instructions, answers and metrics of each task.

A task has several wordings of its instruction for training, so that a model learns the task and not one sentence, and
exactly one for test, so that results can be compared (LiSTEN, Interspeech 2025, section 3). The wordings are plain
ASCII English. A wording may hold `{question}`, which each row of the data then has to give; `{options}`, the classes
to choose from; and `{input}`, the position of the recording, or of a text in place of it. Without `{input}` the
recording comes first. The last tasks are those of behavioural alignment (SpeechEmotionLlama, arXiv 2410.01162), with
the same wording in training and test.

    >>> from listen.data.tasks import get_task
    >>> get_task("asr").instruction()
    'What is being said?'
"""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..chat_listen import INPUT_FIELD, place_input
from ..tasks_listen import SER_EMOTIONS, SER_INSTRUCTION, TASK_ALIASES, TASK_INSTRUCTIONS, known_tasks

_QUESTION_FIELD = "{question}"
_OPTIONS_FIELD = "{options}"


class UnknownTaskError(KeyError):
    """A task name that is not registered; the message lists the known ones."""

    def __str__(self) -> str:
        """The message itself: `KeyError` would show it quoted."""
        return str(self.args[0])


@dataclass(frozen=True)
class Task:
    """An audio task.

    Attributes:
        name: short identifier, as in the `task` field of a manifest.
        title: readable name for reports and plots.
        instructions_train: wordings drawn at random in training.
        instruction_test: the one wording used for evaluation.
        metrics: names of the metrics that evaluation reports, the main one first.
        labels: the closed set of answers; empty when answers are free text or when the data set defines the classes.
            They fill `{options}` for rows without a list of their own.
        language: ISO 639-1 code of the response.
        target_instruction: instruction, with the transcript at `{input}`, by which the LLM writes the target response
            for a recording; `None` to use the task's own wording.
        tagged: whether that transcript starts with the emotion, as `<happy> i am here`.
        clips: clips of one question, 2 where it compares them.
    """

    name: str
    title: str
    instructions_train: tuple[str, ...]
    instruction_test: str
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    language: str = "en"
    target_instruction: str | None = None
    tagged: bool = False
    clips: int = 1

    def __post_init__(self) -> None:
        """Check the wordings.

        Raises:
            ValueError: no training wording, `{question}` in some wordings only, `{input}` twice in one, or
                `{options}` without labels.
        """
        if not self.name or not self.instructions_train or not self.instruction_test:
            raise ValueError(f"task {self.name!r} needs a name, at least one training wording and one test wording")
        asking = {_QUESTION_FIELD in wording for wording in (*self.instructions_train, self.instruction_test)}
        if len(asking) > 1:
            raise ValueError(f"task {self.name!r}: {_QUESTION_FIELD} must be in all of its wordings or in none")
        for wording in self._all_wordings():
            if wording.count(INPUT_FIELD) > 1:
                raise ValueError(f"task {self.name!r}: {INPUT_FIELD} occurs twice in {wording!r}; keep one")
            if _OPTIONS_FIELD in wording and not self.labels:
                raise ValueError(f"task {self.name!r}: {_OPTIONS_FIELD} needs labels to choose from")
        if self.target_instruction is not None and INPUT_FIELD not in self.target_instruction:
            raise ValueError(f"task {self.name!r}: target_instruction needs {INPUT_FIELD}, the position of the text")

    @property
    def needs_question(self) -> bool:
        """Whether every row of this task needs a question."""
        return _QUESTION_FIELD in self.instruction_test

    def instruction(
        self,
        question: str | None = None,
        rng: random.Random | None = None,
        options: Sequence[str] | None = None,
    ) -> str:
        """The instruction for one row.

        Args:
            question: fills `{question}`; ignored by tasks without one.
            rng: draws one of the training wordings; without it the test wording is used.
            options: classes to choose from, in place of `labels`; ignored by tasks without `{options}`.

        Returns:
            The instruction as plain text; `{input}` is kept and marks the position of the recording.

        Raises:
            ValueError: the task needs a question and the row has none, or `options` is one text.
        """
        wording = self.instruction_test if rng is None else rng.choice(self.instructions_train)
        if _OPTIONS_FIELD in wording:
            if isinstance(options, str):
                raise ValueError(f"options={options!r} must be a list with one text for each class")
            wording = wording.replace(_OPTIONS_FIELD, ", ".join(map(str, options or self.labels)))
        if not self.needs_question:
            return wording
        if not question:
            raise ValueError(f"task {self.name!r} needs a 'question' in each row")
        return wording.replace(_QUESTION_FIELD, question)

    def text_prompt(
        self,
        transcript: str,
        emotion: str | None = None,
        question: str | None = None,
        options: Sequence[str] | None = None,
    ) -> str:
        """The prompt by which a text LLM writes the target response for a recording.

        Args:
            transcript: the words of the recording.
            emotion: of the speaker; written before the words where the task is `tagged`.
            question: see `instruction`.
            options: see `instruction`.

        Raises:
            ValueError: see `instruction`.
        """
        text = tagged_text(transcript, emotion if self.tagged else None)
        wording = self.target_instruction or self.instruction(question, options=options)
        return place_input(wording, text, separator="\n")

    def _all_wordings(self) -> tuple[str, ...]:
        extra = (self.target_instruction,) if self.target_instruction else ()
        return (*self.instructions_train, self.instruction_test, *extra)


def tagged_text(text: str, emotion: str | None) -> str:
    """The words with the emotion before them, in the format of SpeechEmotionLlama: `<happy> i am here`."""
    return f"<{emotion}> {text}" if emotion else text


_TASKS: dict[str, Task] = {}


def register_task(task: Task, overwrite: bool = False) -> Task:
    """Add a task to the registry.

    Raises:
        ValueError: a different task has this name and `overwrite` is false.
    """
    known = _TASKS.get(task.name)
    if known is not None and known != task and not overwrite:
        raise ValueError(f"task {task.name!r} is registered already; pass overwrite=True to replace it")
    _TASKS[task.name] = task
    return task


def get_task(name: str) -> Task:
    """The task of that name, or of that alias (`TASK_ALIASES`).

    Raises:
        UnknownTaskError: it is not registered; the message lists the known names and the closest one.
    """
    if name in _TASKS:
        return _TASKS[name]
    if TASK_ALIASES.get(name) in _TASKS:
        return _TASKS[TASK_ALIASES[name]]
    close = difflib.get_close_matches(str(name), known_tasks(_TASKS), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UnknownTaskError(
        f"unknown task {name!r}.{hint} Known: {', '.join(sorted(_TASKS))}. Add one with register_task(Task(...))."
    )


def row_instruction(row: Mapping[str, Any], rng: random.Random | None = None) -> str:
    """The instruction of a row of the manifest schema: its own where it has one, else a wording of its task.

    Args:
        row: its `question`, and `options` among its extra fields, fill the wording.
        rng: see `Task.instruction`.

    Raises:
        UnknownTaskError: the task is not registered.
        ValueError: see `Task.instruction`.
    """
    if row.get("instruction"):
        return row["instruction"]
    try:
        return get_task(row["task"]).instruction(row.get("question"), rng, extra_fields(row).get("options"))
    except ValueError as error:
        raise ValueError(f"row {row.get('id')!r}: {error}") from error


def extra_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a row beyond the manifest schema, such as `options`, `speaker` or `label`."""
    return json.loads(row["extra"]) if row.get("extra") else {}


def list_tasks() -> tuple[str, ...]:
    """Names of all registered tasks, in order of registration."""
    return tuple(_TASKS)


def wordings(names: Iterable[str] | None = None) -> list[str]:
    """Every instruction wording of the named tasks (default: all), without repeats.

    Wordings of training, of test and of target generation, with the task's own options filled in. Useful to build a
    tokenizer or a text pretraining set that covers all of them.
    """
    tasks = [get_task(name) for name in (list_tasks() if names is None else names)]
    filled = (w.replace(_OPTIONS_FIELD, ", ".join(task.labels)) for task in tasks for w in task._all_wordings())
    return list(dict.fromkeys(filled))


def _register_shipped(
    name: str, title: str, metrics: tuple[str, ...], also_in_training: tuple[str, ...] = (), **fields: Any
) -> None:
    """Register a task whose test wording, the first one of training too, is the processor's."""
    wording = fields.pop("wording", TASK_INSTRUCTIONS[name])
    register_task(Task(name, title, (wording, *also_in_training), wording, metrics, **fields))


_register_shipped(
    "asr",
    "Speech recognition",
    ("wer", "cer"),
    (
        "Write down what the speaker says.",
        "Transcribe the speech.",
        "Which words are spoken?",
        "Turn the speech into text.",
    ),
)
_register_shipped(
    "er",
    "Emotion recognition",
    ("accuracy", "uar"),
    (
        "How does the speaker feel?",
        "Name the emotion in the voice.",
        "What is the mood of the speaker?",
        "Describe the emotion of the speaker in one word.",
    ),
)
_register_shipped(
    "sv",
    "Speaker verification",
    ("accuracy", "eer"),
    (
        "Is it the same person speaking both times? Answer yes or no.",
        "Are the two voices one and the same? Answer yes or no.",
        "Does one person speak in both parts? Answer yes or no.",
        "Compare the two voices. Same speaker, yes or no?",
    ),
    labels=("yes", "no"),
    clips=2,
)
_register_shipped(
    "sqa",
    "Spoken question answering",
    ("exact_match", "rouge_l"),
    (
        "Listen and answer: {question}",
        "Answer the question about the speech. {question}",
        "{question} Answer from what you hear.",
        "Here is a question about the recording: {question}",
    ),
)
_register_shipped(
    "en2zh",
    "Speech translation, English to Chinese",
    ("bleu", "chrf"),
    (
        "What does the speaker say? Answer in Chinese.",
        "Say in Chinese what you hear.",
        "Turn the English speech into Chinese text.",
        "Write the Chinese translation of the speech.",
    ),
    language="zh",
)
_register_shipped(
    "acap",
    "Audio captioning",
    ("cider", "rouge_l", "event_f1"),
    (
        "What can be heard?",
        "Write a caption for this recording.",
        "Which sounds are in the recording?",
        "Tell me what happens in this sound scene.",
    ),
)
_register_shipped(
    "voice",
    "Voice description",
    ("exact_match", "rouge_l"),
    (
        "What does the voice sound like?",
        "Describe the voice of the speaker.",
        "What kind of voice is speaking?",
    ),
)
_register_shipped(
    "first_sound",
    "First sound",
    ("exact_match", "rouge_l"),
    (
        "Name the first sound.",
        "What is heard before all else?",
        "What does the recording begin with?",
    ),
)
_register_shipped(
    "response",
    "Spoken dialogue",
    ("rouge_l",),
    target_instruction=(
        "Respond as if you are a natural conversation companion. Do not apologize, and do not refer to the fact "
        "that you are a large language model or an AI. If the user input indicates an emotion, respond as if you "
        "are being spoken to in that emotion: {input}"
    ),
    tagged=True,
)
_register_shipped("repeat", "Repetition", ("wer", "cer"))
_register_shipped("speech_caption", "Speech captioning", ("rouge_l",), tagged=True)
_register_shipped(
    "ser",
    "Emotion recognition among options",
    ("accuracy", "uar"),
    wording=SER_INSTRUCTION,
    labels=SER_EMOTIONS,
    tagged=True,
)

__all__ = [
    "Task",
    "UnknownTaskError",
    "extra_fields",
    "get_task",
    "list_tasks",
    "register_task",
    "row_instruction",
    "tagged_text",
    "wordings",
]
