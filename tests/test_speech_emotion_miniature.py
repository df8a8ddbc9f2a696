"""`model_cards/speech-emotion-miniature`: it loads as it is, and hears how a sentence is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from listen import ListenForConditionalGeneration, ListenPipeline, ListenProcessor
from listen.data.corpus.grammar import parse_sentence
from listen.data.corpus.responses import respond
from listen.evaluation.orderings import count_orderings
from listen.evaluation.response_table import markdown_table, orderings_of, read_scores

ROOT = Path(__file__).parents[1]
CARD = ROOT / "model_cards" / "speech-emotion-miniature"
SENTENCE = "the friendly doctor lost a white hammer under the bridge"


@pytest.fixture(scope="module")
def listen() -> ListenPipeline:
    model = ListenForConditionalGeneration.from_pretrained(CARD)
    return ListenPipeline(model=model, processor=ListenProcessor.from_pretrained(CARD))


@pytest.mark.parametrize("emotion", ["sad", "angry"])
def test_one_sentence_in_two_emotions_gets_the_two_answers_of_the_docs(listen: ListenPipeline, emotion: str) -> None:
    answer = listen(str(CARD / "samples" / f"{emotion}.wav"), task="response")[0]["generated_text"]
    assert answer == respond(parse_sentence(SENTENCE), emotion)
    assert f"\n{answer}\n" in (ROOT / "docs" / "alignment.md").read_text(encoding="utf-8")


def test_it_still_hears_the_words_and_names_the_emotion(listen: ListenPipeline) -> None:
    clip = str(CARD / "samples" / "sad.wav")
    assert listen(clip, task="repeat")[0]["generated_text"] == SENTENCE
    assert listen(clip, task="ser")[0]["generated_text"] == "sad"


def test_its_llm_is_the_one_it_started_from(listen: ListenPipeline) -> None:
    base = AutoModelForCausalLM.from_pretrained(CARD / "backbones" / "language_model")
    text = listen.processor("<happy> the king found a red table")
    with torch.no_grad():
        assert torch.equal(listen.model(**text).logits, base(**text).logits)


def test_the_card_shows_the_table_and_the_orderings_that_were_measured() -> None:
    card = (CARD / "README.md").read_text(encoding="utf-8")
    table = (CARD / "table.md").read_text(encoding="utf-8")
    assert [line for line in table.splitlines() if line not in card] == []
    systems = read_scores(CARD / "table.csv")
    assert table == markdown_table(systems)
    orderings = json.loads((CARD / "orderings.json").read_text(encoding="utf-8"))
    assert orderings["counts"] == count_orderings(orderings_of(systems))
    counts = orderings["counts"]
    assert f"{counts['agree']} of {counts['orderings']}" in (ROOT / "docs" / "alignment.md").read_text(encoding="utf-8")
