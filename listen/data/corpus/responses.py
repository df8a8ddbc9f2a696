"""Responses to sentences of the corpus, and captions of them: both depend on the emotion.

A text model trained on these answers has, in miniature, the property that SpeechEmotionLlama (arXiv 2410.01162) uses in
a large one: the same words get another answer after `<sad>` than after `<happy>`.
"""

from __future__ import annotations

from ..tasks import tagged_text
from .grammar import Sentence, parse_sentence

OPENINGS = {
    "neutral": "i see.",
    "happy": "that is wonderful!",
    "sad": "that must be hard.",
    "angry": "please calm down.",
    "fearful": "do not be afraid.",
}
_ABOUT_OBJECTS = {
    "neutral": "so the {person} {action} the {colour} {object}.",
    "happy": "the {person} must love that {colour} {object}!",
    "sad": "do you miss the {colour} {object}?",
    "angry": "we will talk to the {person} about the {object}.",
    "fearful": "you are safe here, and so is the {person}.",
}
_ABOUT_NUMBERS = {
    "neutral": "so the number is {number}.",
    "happy": "{number} must be a lucky number!",
    "sad": "does number {number} bring back memories?",
    "angry": "we will talk to the {person} about number {number}.",
    "fearful": "nobody will call number {number} now.",
}


def respond(sentence: Sentence, emotion: str | None) -> str:
    """The answer to `sentence` in the voice of `emotion`; without one, the answer in a neutral voice.

    Raises:
        KeyError: the corpus has no such emotion.
    """
    emotion = emotion or "neutral"
    about = _ABOUT_NUMBERS if "number" in sentence.facts else _ABOUT_OBJECTS
    return f"{OPENINGS[emotion]} {about[emotion].format(**sentence.facts)}"


def describe(sentence: Sentence, emotion: str | None) -> str:
    """A caption of the scene in which `sentence` is said in the voice of `emotion`, if that is known."""
    facts = sentence.facts
    said = f"{facts['call']} number {facts['number']}" if "number" in facts else (
        f"{facts['action']} the {facts['colour']} {facts['object']}"
    )  # fmt: skip
    return f"{article(emotion)} person says that the {facts['person']} {said}"


def rate_response(answer: str, transcript: str, emotion: str) -> tuple[float, float]:
    """Rate an answer by the rules that the text model was trained on: quality and emotion, each from 1 to 10.

    Quality is the share of words that match the answer for the emotion that it shows; an answer that shows none is
    compared with that for a neutral voice. Emotion is 10 if it shows `emotion`, else 1.

    Raises:
        ValueError: `transcript` is not a sentence of the corpus.
    """
    shown = next((name for name, opening in OPENINGS.items() if answer.startswith(opening)), None)
    expected, words = respond(parse_sentence(transcript), shown).split(), answer.split()
    right = sum(word == wanted for word, wanted in zip(words, expected, strict=False))
    return 1.0 + 9.0 * right / max(len(expected), len(words)), 10.0 if shown == emotion else 1.0


def article(emotion: str | None) -> str:
    """`a sad`, `an angry`; `a` without an emotion."""
    if not emotion:
        return "a"
    return f"an {emotion}" if emotion[0] in "aeiou" else f"a {emotion}"


def response_words() -> list[str]:
    """Words and tags of responses and captions beyond those of the sentences, for a tokenizer."""
    texts = [*OPENINGS.values(), *_ABOUT_OBJECTS.values(), *_ABOUT_NUMBERS.values(), "a an person says that the"]
    return [*texts, *(tagged_text("", emotion) for emotion in OPENINGS)]
