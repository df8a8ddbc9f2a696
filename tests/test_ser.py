"""Constrained answers: their likelihoods are those of training, and the best is what constrained decoding finds."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from datasets import Dataset, concatenate_datasets
from fixtures_training import tiny_processor, write_clip, write_manifest

from listen.data.collator import ListenCollator
from listen.data.manifest import extra_fields, load_manifest
from listen.data.tasks import get_task
from listen.evaluation.ser import EmotionScores, emotion_rows, recognise_emotions, score_answers, scores_of

CLASSES = ["sad", "happy", "sadly amused", "calm"]  # one begins with another


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Five recordings, the first in two rows, the last without an emotion."""
    folder = tmp_path_factory.mktemp("emotions")
    for i in range(5):
        write_clip(folder / f"{i}.wav", 0.4 + 0.3 * (i % 3), seed=i)
    rows = [
        {"audio": "0.wav", "task": "asr", "response": "hello", "emotion": "happy"},
        {"audio": "0.wav", "task": "er", "response": "happy"},
        {"audio": "1.wav", "task": "ser", "response": "Sad"},
        {"audio": "2.wav", "task": "response", "response": "well", "emotion": "sadly amused", "speaker": 7},
        {"audio": "3.wav", "task": "er", "response": "calm"},
        {"audio": "4.wav", "task": "asr", "response": "bye"},
    ]
    return load_manifest(write_manifest(folder / "test.jsonl", rows))


@pytest.fixture(scope="module")
def setup() -> tuple:
    model = tiny_model()
    return model, tiny_processor(model.config)


@pytest.fixture(scope="module")
def scores(setup: tuple, dataset: Dataset) -> EmotionScores:
    return recognise_emotions(*setup, dataset, CLASSES, num_resamples=20, progress=False)


def test_rows_ask_for_each_emotion_once_with_the_classes_as_options(dataset: Dataset) -> None:
    rows = emotion_rows(dataset, CLASSES)
    assert [Path(row["audio"][0]["path"]).name for row in rows] == ["0.wav", "1.wav", "2.wav", "3.wav"]
    assert rows["response"] == [["happy"], ["sad"], ["sadly amused"], ["calm"]] and set(rows["task"]) == {"ser"}
    assert extra_fields(rows[2]) == {"emotion": "sadly amused", "speaker": 7, "options": CLASSES}


def test_classes_are_those_of_the_rows_or_of_the_task(dataset: Dataset) -> None:
    known = dataset.select([0, 2])
    assert extra_fields(emotion_rows(known)[0])["options"] == list(get_task("ser").labels)
    again = emotion_rows(emotion_rows(known, ["sad", "happy"]))
    assert extra_fields(again[0])["options"] == ["sad", "happy"]
    other = dataset.select([0, 1])  # rows of other tasks, for the same recording
    both = concatenate_datasets([other, emotion_rows(other, ["sad", "happy"])])
    assert [extra_fields(row)["options"] for row in emotion_rows(both)] == [["sad", "happy"]]


def test_rows_that_cannot_be_asked_are_refused(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="\\['calm', 'sadly amused'\\].*classes="):
        emotion_rows(dataset, ["sad", "happy"])
    with pytest.raises(ValueError, match="no row has an emotion"):
        emotion_rows(dataset.select([5]))
    with pytest.raises(ValueError, match="'Sad'.*rename"):
        emotion_rows(dataset, ["happy", "sad", "Sad"])
    number = Dataset.from_list([{**dataset[5], "extra": '{"emotion": 3}'}], dataset.features)
    with pytest.raises(ValueError, match="emotion=3 .*write it as text"):
        emotion_rows(number)


def test_a_likelihood_is_that_of_the_training_loss(setup: tuple, dataset: Dataset, scores: EmotionScores) -> None:
    model, processor = setup
    collator, rows = ListenCollator(processor), emotion_rows(dataset, CLASSES)
    for place, row in enumerate(rows):
        for column, name in enumerate(CLASSES):
            batch = collator([{**row, "response": [name]}])
            with torch.no_grad():
                loss = model(**batch).lm_loss
            tokens = int((batch["labels"] != -100).sum())
            assert tokens == len(name) + 1  # one a character, and the end of the turn
            assert scores.log_likelihoods[place, column] == pytest.approx(-float(loss) * tokens, abs=1e-4)


def test_the_best_answer_is_that_of_constrained_beam_search(
    setup: tuple, dataset: Dataset, scores: EmotionScores
) -> None:
    model, processor = setup
    tokenizer, rows = processor.tokenizer, emotion_rows(dataset, CLASSES)
    trie = [tokenizer(name + "</s>", add_special_tokens=False)["input_ids"] for name in CLASSES]
    for place, row in enumerate(rows):
        inputs = ListenCollator(processor, for_generation=True)([row])
        inputs.pop("rows")
        start = inputs["input_ids"].shape[1]

        def allowed(_: int, ids: torch.Tensor) -> list[int]:
            # processors do not see placeholders: what was written stands behind the last "A:"
            written = ids.tolist()
            marker = tokenizer("A:", add_special_tokens=False)["input_ids"]
            begin = max(i for i in range(len(written)) if written[i : i + 2] == marker) + 2
            tail = written[begin:]
            following = {name[len(tail)] for name in trie if len(name) > len(tail) and name[: len(tail)] == tail}
            return sorted(following) or [tokenizer.eos_token_id]

        found = model.generate(
            **inputs, num_beams=8, length_penalty=0.0, max_new_tokens=20, do_sample=False,
            prefix_allowed_tokens_fn=allowed, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        text = processor.batch_decode(found.sequences[:, start:], skip_special_tokens=True)[0]
        assert text == scores.answers[place]
        assert float(found.sequences_scores[0]) == pytest.approx(scores.log_likelihoods[place].max(), abs=1e-4)


def test_likelihoods_do_not_depend_on_batches_or_the_order_of_rows(setup: tuple, dataset: Dataset) -> None:
    rows = emotion_rows(dataset, CLASSES)
    whole, single = (score_answers(*setup, rows, CLASSES, batch_size=n, progress=False) for n in (4, 1))
    backward = score_answers(*setup, rows.select([3, 2, 1, 0]), CLASSES[::-1], progress=False)
    assert np.allclose(whole, single, atol=1e-4) and np.allclose(whole, backward[::-1, ::-1], atol=1e-4)
    assert len(np.unique(whole.round(4))) == whole.size


def test_scores_are_those_of_the_answers(scores: EmotionScores) -> None:
    assert scores.truths == ["happy", "sad", "sadly amused", "calm"]  # in the spelling of the classes
    right = [answer == truth for answer, truth in zip(scores.answers, scores.truths, strict=True)]
    assert scores.values == {"accuracy": np.mean(right), "uar": np.mean(right)}  # one recording a class
    assert set(scores.intervals) == {"accuracy", "uar"}
    assert scores.probabilities.sum(axis=1) == pytest.approx(np.ones(4))
    assert np.exp(scores.log_likelihoods).sum(axis=1).max() <= 1.0
    assert scores.probabilities.argmax(axis=1).tolist() == [CLASSES.index(answer) for answer in scores.answers]


def test_the_instruction_lists_the_classes(setup: tuple, dataset: Dataset) -> None:
    fewer = score_answers(*setup, emotion_rows(dataset.select([2]), ["sad", "happy"]), ["sad", "happy"], progress=False)
    more = score_answers(*setup, emotion_rows(dataset.select([2]), CLASSES), ["sad", "happy"], progress=False)
    assert not np.allclose(fewer, more, atol=1e-3)


def test_answers_of_a_classifier_are_scored_alike(dataset: Dataset) -> None:
    rows = emotion_rows(dataset, CLASSES)
    found = scores_of(rows, ["Happy", "calm", "sadly amused", "sad"], num_resamples=0)
    assert found.answers == ["happy", "calm", "sadly amused", "sad"] and found.values["accuracy"] == 0.5
    assert found.probabilities.max(axis=1).tolist() == [1.0] * 4
    with pytest.raises(ValueError, match="4 answers for 4 rows.*\\['glad'\\].*classes"):
        scores_of(rows, ["glad", "sad", "sad", "sad"])
    with pytest.raises(ValueError, match="1 answers for 4 rows"):
        scores_of(rows, ["sad"])


@pytest.mark.parametrize("answers", [["sad"], ["sad", "sad"], []])
def test_answers_must_differ(setup: tuple, dataset: Dataset, answers: list[str]) -> None:
    with pytest.raises(ValueError, match="two or more different"):
        score_answers(*setup, dataset, answers, progress=False)


def test_a_model_without_pool_weighs_answers_too(dataset: Dataset) -> None:
    model = tiny_model(prompt_pool_config=None)
    rows = emotion_rows(dataset, CLASSES)
    found = score_answers(model, tiny_processor(model.config), rows, CLASSES, progress=False)
    assert found.shape == (4, 4) and (found < 0).all() and not math.isnan(found.sum())
