"""Questions about sequences of spoken digits, made from the Free Spoken Digit Dataset."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .base import Corpus, Records
from .speech import DIGITS, FSDD, read_fsdd

_NUMBER = {"train": 1350, "test": 150}
_LENGTHS = (3, 5)


def read_fsdd_questions(root: Path, split: str, seed: int = 0) -> Records:
    """Three to five digits of one speaker, joined to one recording, and a question with one exact answer.

    Args:
        root: the folder of the Free Spoken Digit Dataset.
        split: `train` or `test`, as the recordings are split there.
        seed: seed of the draws.
    """
    takes: dict[str, list[dict[str, Any]]] = {}
    for _, fields in read_fsdd(root, split):
        takes.setdefault(fields["speaker"], []).append(fields)
    speakers, draw = sorted(takes), random.Random(f"{seed} {split}")
    for number in range(_NUMBER[split] if takes else 0):
        speaker = draw.choice(speakers)
        clips = draw.choices(takes[speaker], k=draw.randint(*_LENGTHS))
        words = [clip["transcript"] for clip in clips]
        question, answer = _question(words, draw)
        fields = {"id": f"{split}_{number}", "audio": [clip["audio"] for clip in clips], "join": "concatenate"}
        said = {"speaker": speaker, "transcript": " ".join(words)}
        yield f"{root}, question {number}", {**fields, **said, "question": question, "answer": answer}


def _question(words: Sequence[str], draw: random.Random) -> tuple[str, str]:
    """One of five kinds of question about the digits, and its answer."""
    place, asked = draw.randrange(len(words)), draw.choice([draw.choice(words), draw.choice(DIGITS)])
    values = [DIGITS.index(word) for word in words]
    return draw.choice(
        [
            ("How many digits are there?", str(len(words))),
            ("Which digit is the largest?", DIGITS[max(values)]),
            ("What do the first and the last digit add up to?", str(values[0] + values[-1])),
            (f"Does the speaker say {asked}?", "yes" if asked in words else "no"),
            (f"Which digit comes at place {place + 1}?", words[place]),
        ]
    )


FSDD_QUESTIONS = Corpus(
    name="fsdd_questions",
    title="Questions about spoken digits",
    licence=FSDD.licence,
    homepage=FSDD.homepage,
    splits=_NUMBER,
    answers={"sqa": "answer"},
    text="the questions are made by the reader, not by the authors of the recordings",
    read=read_fsdd_questions,
)

__all__ = ["FSDD_QUESTIONS"]
