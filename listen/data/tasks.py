"""Task registry: how each task is worded, which answers it knows and how it is scored.

A task owns several wordings of its instruction for training, so that a model learns the task and not one sentence, and
exactly one for test, so that figures can be compared (LiSTEN, Interspeech 2025, section 3). The wordings are plain
ASCII English. A wording may hold `{question}`, which each row of the data then has to bring; `{options}`, the classes
to choose from; and `{input}`, the place of the recording, or of a text in its stead. Without `{input}` the recording
comes first. The last tasks are those of behavioural alignment (SpeechEmotionLlama, arXiv 2410.01162), in its own words,
the same in training and test.

    >>> from listen.data.tasks import get_task
    >>> get_task("asr").instruction()
    'What is being said?'
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..chat_listen import INPUT_FIELD, place_input

_QUESTION_FIELD = "{question}"
_OPTIONS_FIELD = "{options}"


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
        metrics: names of the scores that evaluation reports, the leading one first.
        labels: the closed set of answers; empty when answers are free text or when the data set defines the classes.
            They fill `{options}` of rows that bring no list of their own.
        language: ISO 639-1 code of the response.
        target_instruction: what the LLM is told, with a text at `{input}`, to write the response that the recording
            shall get; `None` where that is the task's own wording.
        tagged: whether the text that stands for the recording there names the emotion, as `<happy> i am here`.
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

    def __post_init__(self) -> None:
        """Check the wordings.

        Raises:
            ValueError: no training wording, `{question}` in some wordings only, `{input}` twice in one, or
                `{options}` without labels.
        """
        if not self.name or not self.instructions_train or not self.instruction_test:
            raise ValueError(f"task {self.name!r} needs a name, a training wording or more and one test wording")
        asking = {_QUESTION_FIELD in wording for wording in (*self.instructions_train, self.instruction_test)}
        if len(asking) > 1:
            raise ValueError(f"task {self.name!r}: {_QUESTION_FIELD} must stand in all of its wordings or in none")
        for wording in self._all_wordings():
            if wording.count(INPUT_FIELD) > 1:
                raise ValueError(f"task {self.name!r}: {INPUT_FIELD} stands twice in {wording!r}; keep one")
            if _OPTIONS_FIELD in wording and not self.labels:
                raise ValueError(f"task {self.name!r}: {_OPTIONS_FIELD} needs labels to choose from")
        if self.target_instruction is not None and INPUT_FIELD not in self.target_instruction:
            raise ValueError(f"task {self.name!r}: target_instruction needs {INPUT_FIELD}, the place of the text")

    @property
    def needs_question(self) -> bool:
        """Whether every row of this task has to bring a question."""
        return _QUESTION_FIELD in self.instruction_test

    def instruction(
        self,
        question: str | None = None,
        rng: random.Random | None = None,
        options: Sequence[str] | None = None,
    ) -> str:
        """The instruction for one row.

        Args:
            question: fills `{question}`; ignored by tasks that ask none.
            rng: draws among the training wordings; without it the test wording is taken.
            options: classes to choose from, in place of `labels`; ignored by tasks that list none.

        Returns:
            The instruction as plain text, in which `{input}` is left to mark the place of the recording.

        Raises:
            ValueError: the task needs a question and the row has none, or `options` is one text.
        """
        if isinstance(options, str):
            raise ValueError(f"options={options!r} must be a list, a text for each class")
        wording = self.instruction_test if rng is None else rng.choice(self.instructions_train)
        wording = wording.replace(_OPTIONS_FIELD, ", ".join(options or self.labels))
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
        """What a text LLM is told so that its answer is the one that the recording shall get.

        Args:
            transcript: the words of the recording.
            emotion: how they are said; written before them where the task is `tagged`.
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
    """The words with the emotion before them as SpeechEmotionLlama writes it: `<happy> i am here`."""
    return f"<{emotion}> {text}" if emotion else text


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
    """Every instruction wording of the named tasks (default: all), without repeats.

    They are those of training, of test and of the making of targets, with the task's own options filled in. Useful to
    build a tokenizer or a text pretraining set that knows all of them.
    """
    tasks = [get_task(name) for name in (list_tasks() if names is None else names)]
    filled = (w.replace(_OPTIONS_FIELD, ", ".join(task.labels)) for task in tasks for w in task._all_wordings())
    return list(dict.fromkeys(filled))


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

RESPONSE = register_task(
    Task(
        name="response",
        title="Spoken dialogue",
        instructions_train=("{input}",),
        instruction_test="{input}",
        metrics=("rouge_l",),
        target_instruction=(
            "Respond as if you are a natural conversation companion. Do not apologize, and do not refer to the fact "
            "that you are a large language model or an AI. If the user input indicates an emotion, respond as if you "
            "are being spoken to in that emotion: {input}"
        ),
        tagged=True,
    )
)

REPEAT = register_task(
    Task(
        name="repeat",
        title="Repetition",
        instructions_train=("Repeat after me in English: {input}",),
        instruction_test="Repeat after me in English: {input}",
        metrics=("wer", "cer"),
    )
)

_SPEECH_CAPTION = (
    "You will hear a speech utterance spoken by a person. In natural language, provide a caption that faithfully "
    "describes the scenario in which the speech utterance is being spoken. Pay attention to the spoken content, and "
    "make sure to incorporate any emotions expressed in the speech into the caption as needed: {input}"
)
SPEECH_CAPTION = register_task(
    Task(
        name="speech_caption",
        title="Speech captioning",
        instructions_train=(_SPEECH_CAPTION,),
        instruction_test=_SPEECH_CAPTION,
        metrics=("rouge_l",),
        tagged=True,
    )
)

_SER = (
    "Identify the emotional tone of the utterance that is provided. Select from the following options: {options}: "
    "{input}"
)
SER = register_task(
    Task(
        name="ser",
        title="Emotion recognition among options",
        instructions_train=(_SER,),
        instruction_test=_SER,
        metrics=("accuracy", "uar"),
        labels=(
            "neutral",
            "angry",
            "disgusted",
            "fearful",
            "happy",
            "sad",
            "surprised",
            "bored",
            "confused",
            "interested",
            "sarcastic",
            "laughing",
            "projected",
            "sleepy",
            "whisper",
        ),
        tagged=True,
    )
)

__all__ = [
    "ACAP",
    "ASR",
    "EN2ZH",
    "ER",
    "REPEAT",
    "RESPONSE",
    "SER",
    "SPEECH_CAPTION",
    "SQA",
    "SV",
    "Task",
    "UnknownTaskError",
    "VOICE",
    "get_task",
    "list_tasks",
    "register_task",
    "tagged_text",
    "wordings",
]
