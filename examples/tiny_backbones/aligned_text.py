"""Text versions of the tasks of behavioural alignment: the answer depends on the emotion, named or in the voice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from listen.chat_listen import INPUT_FIELD
from listen.data.corpus.grammar import Sentence, draw_sentence
from listen.data.corpus.prosody import EMOTIONS
from listen.data.corpus.responses import describe, respond
from listen.data.tasks import get_task, tagged_text
from tiny_backbones.soft_text import CLIP_END, TASK_SHARES, Example, ExampleWriter, Position

ALIGNMENT_SHARES = {"response": 0.1, "repeat": 0.03, "speech_caption": 0.03, "ser": 0.03}
_ANSWERS: dict[str, Callable[[Sentence, str | None], str]] = {
    "response": respond,
    "repeat": lambda sentence, emotion: sentence.text,
    "speech_caption": describe,
    "ser": lambda sentence, emotion: str(emotion),
}


def _all_shares() -> dict[str, float]:
    left = 1.0 - sum(ALIGNMENT_SHARES.values())
    return {task: share * left for task, share in TASK_SHARES.items()} | ALIGNMENT_SHARES


@dataclass
class AlignedExampleWriter(ExampleWriter):
    """Draws those of `ExampleWriter` and, as text or as a clip, sentences that are to be answered with feeling."""

    tasks: dict[str, float] = field(default_factory=_all_shares)

    def draw(self, task: str | None = None) -> Example:
        """Draw an example of `task`, or of a random one."""
        task = task or self._any_task()
        return self._draw_aligned(task) if task in ALIGNMENT_SHARES else super().draw(task)

    def _draw_aligned(self, name: str) -> Example:
        sentence, emotion = draw_sentence(self.rng, "train"), str(self.rng.choice(list(EMOTIONS)))
        in_writing = name != "ser" and self.rng.random() < 0.5
        if in_writing:
            known = emotion if self.rng.random() < 0.8 else None
            parts: list[str | list[Position]] = [self._text(name, sentence, known)]
        else:
            known = emotion
            parts = self._spoken(name, sentence, emotion)
        return Example(name, parts, _ANSWERS[name](sentence, known), self._noise())

    def _text(self, name: str, sentence: Sentence, emotion: str | None) -> str:
        """The words with the emotion in front; bare, or under the instruction that asks for the answer."""
        task = get_task(name)
        if name == "response" and self.rng.random() < 0.75:
            return tagged_text(sentence.text, emotion)
        return task.text_prompt(sentence.text, emotion)

    def _spoken(self, name: str, sentence: Sentence, emotion: str) -> list[str | list[Position]]:
        """The task's own wording around a clip; at times the emotion is named before a clip that does not show it."""
        wording = get_task(name).instruction(options=list(EMOTIONS) if self.rng.random() < 0.5 else None)
        before, after = wording.split(INPUT_FIELD)
        if name in ("response", "speech_caption") and self.rng.random() < 0.25:
            clip = self._speech(sentence.words, emotion="neutral")
            return [before + tagged_text("", emotion), clip, CLIP_END + after]
        return [before, self._speech(sentence.words, emotion=emotion), CLIP_END + after]
