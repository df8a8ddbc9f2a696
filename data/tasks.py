"""Task registry: how each task is worded, which answers it knows and how it is scored.

A task owns several wordings of its instruction for training, so that a model learns the task and not one sentence, and
exactly one for test, so that figures can be compared (LiSTEN, Interspeech 2025, section 3). The wordings are plain
ASCII English. A wording may hold `{question}`, which each row of the data then has to bring.

    >>> from listen.data.tasks import get_task
    >>> get_task("asr").instruction()
    'What is being said?'
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterable
from dataclasses import dataclass

_QUESTION_FIELD = "{question}"


class UnknownTaskError(KeyError):
    """A task name that nobody registered; the message names the known ones."""

    def __str__(self) -> str:
        """The message itself: `KeyError` would show it quoted."""
        return str(self.args[0])


@dataclass(frozen=True)
class Task:
    """One thing to do with audio.

    Attributes:
        name: short identifier, as in the `task` field of a manifest.
        title: readable name for reports and plots.
        instructions_train: wordings drawn at random while training.
        instruction_test: the one wording used for evaluation.
        labels: the closed set of answers; empty when answers are free text or when the data set defines the classes.
        metrics: names of the scores that evaluation reports, the leading one first.
        language: ISO 639-1 code of the response.
    """

    name: str
    title: str
    instructions_train: tuple[str, ...]
    instruction_test: str
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    language: str = "en"

    def __post_init__(self) -> None:
        """Check the wordings.

        Raises:
            ValueError: no training wording, or `{question}` in some wordings only.
        """
        if not self.name or not self.instructions_train or not self.instruction_test:
            raise ValueError(f"task {self.name!r} needs a name, a training wording or more and one test wording")
        asking = {_QUESTION_FIELD in wording for wording in (*self.instructions_train, self.instruction_test)}
        if len(asking) > 1:
            raise ValueError(f"task {self.name!r}: {_QUESTION_FIELD} must stand in all of its wordings or in none")

    @property
    def needs_question(self) -> bool:
        """Whether every row of this task has to bring a question."""
        return _QUESTION_FIELD in self.instruction_test

    def instruction(self, question: str | None = None, rng: random.Random | None = None) -> str:
        """The instruction for one row.

        Args:
            question: fills `{question}`; ignored by tasks that ask none.
            rng: draws among the training wordings; without it the test wording is taken.

        Returns:
            The instruction as plain text.

        Raises:
            ValueError: the task needs a question and the row has none.
        """
        wording = self.instruction_test if rng is None else rng.choice(self.instructions_train)
        if not self.needs_question:
            return wording
        if not question:
            raise ValueError(f"task {self.name!r} needs a 'question' in each row")
        return wording.replace(_QUESTION_FIELD, question)


_TASKS: dict[str, Task] = {}


def register_task(task: Task, overwrite: bool = False) -> Task:
    """Make a task known by its name.

    Raises:
        ValueError: the name is taken by a different task and `overwrite` is false.
    """
    known = _TASKS.get(task.name)
    if known is not None and known != task and not overwrite:
        raise ValueError(f"task {task.name!r} is registered already; pass overwrite=True to replace it")
    _TASKS[task.name] = task
    return task


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UnknownTaskError: nobody registered it; the known names and the closest one are in the message.
    """
    if name in _TASKS:
        return _TASKS[name]
    close = difflib.get_close_matches(str(name), _TASKS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UnknownTaskError(
        f"unknown task {name!r}.{hint} Known: {', '.join(sorted(_TASKS))}. Add one with register_task(Task(...))."
    )


def list_tasks() -> tuple[str, ...]:
    """Names of all registered tasks, in order of registration."""
    return tuple(_TASKS)


def wordings(names: Iterable[str] | None = None) -> list[str]:
    """Every instruction wording of the named tasks (default: all), training and test, without repeats.

    Useful to build a tokenizer or a text pretraining set that knows all of them.
    """
    tasks = [get_task(name) for name in (list_tasks() if names is None else names)]
    return list(dict.fromkeys(w for task in tasks for w in (*task.instructions_train, task.instruction_test)))


ASR = register_task(
    Task(
        name="asr",
        title="Speech recognition",
        instructions_train=(
            "What is being said?",
            "Write down what the speaker says.",
            "Transcribe the speech.",
            "Which words are spoken?",
            "Turn the speech into text.",
        ),
        instruction_test="What is being said?",
        metrics=("wer", "cer"),
    )
)

ER = register_task(
    Task(
        name="er",
        title="Emotion recognition",
        instructions_train=(
            "Which emotion does the speaker show?",
            "How does the speaker feel?",
            "Name the emotion in the voice.",
            "What is the mood of the speaker?",
            "Describe the emotion of the speaker in one word.",
        ),
        instruction_test="Which emotion does the speaker show?",
        metrics=("accuracy", "uar"),
    )
)

SV = register_task(
    Task(
        name="sv",
        title="Speaker verification",
        instructions_train=(
            "Do both recordings come from the same speaker? Answer yes or no.",
            "Is it the same person speaking both times? Answer yes or no.",
            "Are the two voices one and the same? Answer yes or no.",
            "Does one person speak in both parts? Answer yes or no.",
            "Compare the two voices. Same speaker, yes or no?",
        ),
        instruction_test="Do both recordings come from the same speaker? Answer yes or no.",
        metrics=("accuracy", "eer"),
        labels=("yes", "no"),
    )
)

SQA = register_task(
    Task(
        name="sqa",
        title="Spoken question answering",
        instructions_train=(
            "{question}",
            "Listen and answer: {question}",
            "Answer the question about the speech. {question}",
            "{question} Answer from what you hear.",
            "Here is a question about the recording: {question}",
        ),
        instruction_test="{question}",
        metrics=("exact_match", "rouge_l"),
    )
)

EN2ZH = register_task(
    Task(
        name="en2zh",
        title="Speech translation, English to Chinese",
        instructions_train=(
            "Translate the speech into Chinese.",
            "What does the speaker say? Answer in Chinese.",
            "Say in Chinese what you hear.",
            "Turn the English speech into Chinese text.",
            "Write the Chinese translation of the speech.",
        ),
        instruction_test="Translate the speech into Chinese.",
        metrics=("bleu", "chrf"),
        language="zh",
    )
)

ACAP = register_task(
    Task(
        name="acap",
        title="Audio captioning",
        instructions_train=(
            "Describe the sounds.",
            "What can be heard?",
            "Write a caption for this recording.",
            "Which sounds are in the recording?",
            "Tell me what happens in this sound scene.",
        ),
        instruction_test="Describe the sounds.",
        metrics=("cider", "rouge_l", "event_f1"),
    )
)

VOICE = register_task(
    Task(
        name="voice",
        title="Voice description",
        instructions_train=(
            "Describe the voice.",
            "What does the voice sound like?",
            "Describe the voice of the speaker.",
            "What kind of voice is speaking?",
        ),
        instruction_test="Describe the voice.",
        metrics=("exact_match", "rouge_l"),
    )
)

__all__ = [
    "ACAP",
    "ASR",
    "EN2ZH",
    "ER",
    "SQA",
    "SV",
    "Task",
    "UnknownTaskError",
    "VOICE",
    "get_task",
    "list_tasks",
    "register_task",
    "wordings",
]
