"""Answers with feeling: each emotion draws another answer, and rules tell how well an answer fits."""

from __future__ import annotations

import numpy as np
import pytest

from listen.data.corpus.grammar import draw_sentence, parse_sentence
from listen.data.corpus.prosody import EMOTIONS
from listen.data.corpus.responses import describe, rate_response, respond
from listen.data.tasks import get_task

SENTENCES = [draw_sentence(np.random.default_rng(seed), "dev") for seed in range(40)]


def test_a_sentence_is_parsed_to_what_it_was_drawn_with() -> None:
    for sentence in SENTENCES:
        assert parse_sentence(sentence.text) == sentence


def test_what_the_grammar_does_not_write_is_refused() -> None:
    with pytest.raises(ValueError, match="no sentence of the corpus"):
        parse_sentence("the king slept")


def test_every_emotion_draws_another_answer_and_no_emotion_that_of_a_neutral_voice() -> None:
    for sentence in SENTENCES:
        answers = {emotion: respond(sentence, emotion) for emotion in EMOTIONS}
        assert len(set(answers.values())) == len(EMOTIONS)
        assert respond(sentence, None) == answers["neutral"]
        assert len({describe(sentence, emotion) for emotion in (*EMOTIONS, None)}) == len(EMOTIONS) + 1


def test_every_emotion_is_a_class_of_the_recognition_task() -> None:
    assert set(EMOTIONS) <= set(get_task("ser").labels)


def test_the_right_answer_gets_full_marks_and_only_its_own_emotion_does() -> None:
    sentence = SENTENCES[0]
    for emotion in EMOTIONS:
        answer = respond(sentence, emotion)
        for voice in EMOTIONS:
            assert rate_response(answer, sentence.text, voice) == (10.0, 10.0 if voice == emotion else 1.0)


def test_wrong_facts_cost_quality_and_no_opening_shows_no_emotion() -> None:
    first, second = (next(s for s in SENTENCES if "object" in s.facts and s.facts["person"] == p) for p in _persons())
    quality, emotion = rate_response(respond(first, "happy"), second.text, "happy")
    assert 1.0 < quality < 10.0 and emotion == 10.0
    assert rate_response("", first.text, "neutral") == (1.0, 1.0)


def _persons() -> list[str]:
    return sorted({s.facts["person"] for s in SENTENCES if "object" in s.facts})[:2]
