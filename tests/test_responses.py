"""Evaluation of responses end to end on a tiny random model: scores are those of the written records."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_model
from datasets import Dataset
from fixtures_endpoint import serve_chat
from fixtures_processes import run_script
from fixtures_training import tiny_processor, write_clip, write_manifest
from test_bert_score import (
    bert,  # noqa: F401 (a fixture)
    word_tokenizer,
)
from transformers import BertModel

from listen.data.chat_models import EndpointChatModel
from listen.data.collator import ListenCollator
from listen.data.manifest import load_manifest
from listen.evaluation.bert_score import BertScore
from listen.evaluation.embeddings import pooled_embeddings
from listen.evaluation.generate import first_forward
from listen.evaluation.judge import JudgeItem, judge_by_rules, judge_responses
from listen.evaluation.metrics import Rouge
from listen.evaluation.response_table import load_scores
from listen.evaluation.responses import ResponseEvaluation, evaluate_responses
from listen.evaluation.ser import emotion_rows

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ["happy", "sad"]
TEXTS = ["the king found a red table", "the doctor sold a yellow guitar"]
OPTIONS = {"classes": CLASSES, "max_new_tokens": 6, "num_resamples": 20, "progress": False}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight recordings of two speakers in two emotions; half of them are to be answered."""
    folder, rows = tmp_path_factory.mktemp("responses"), []
    for i in range(8):
        write_clip(folder / f"{i}.wav", 0.4 + 0.1 * (i % 3), seed=i)
        row = {"audio": f"{i}.wav", "emotion": CLASSES[i % 2], "speaker": f"s{i // 4}", "transcript": TEXTS[i % 2]}
        task = {"task": "response", "response": "so it is."} if i < 4 else {"task": "asr", "response": TEXTS[i % 2]}
        rows.append({**row, **task})
    return write_manifest(folder / "test.jsonl", rows)


@pytest.fixture(scope="module")
def dataset(manifest: Path) -> Dataset:
    return load_manifest(manifest)


@pytest.fixture(scope="module")
def setup() -> tuple:
    model = tiny_model()
    return model, tiny_processor(model.config)


@pytest.fixture(scope="module")
def result(setup: tuple, dataset: Dataset, bert: BertModel) -> ResponseEvaluation:  # noqa: F811
    with serve_chat(lambda body: (200, "Score: 4")) as server:
        judge = partial(judge_responses, EndpointChatModel(server.url, "judge"), num_resamples=20, progress=False)
        return evaluate_responses(
            *setup, dataset, "tiny", bert_score=BertScore(bert, word_tokenizer()), judge=judge, **OPTIONS
        )


def test_values_are_those_of_the_records(result: ResponseEvaluation) -> None:
    texts = [record["prediction"] for record in result.responses]
    references = [record["references"] for record in result.responses]
    assert len(texts) == 4 and references == [["so it is."]] * 4
    assert {name: result.values[name] for name in Rouge.names} == Rouge().compute(
        predictions=texts, references=references
    )
    for name in ("bertscore", "rouge_l"):
        assert result.values[name] == pytest.approx(np.mean([r[name] for r in result.responses]), abs=1e-5)
    assert (result.values["quality"], result.values["emotion"]) == (4.0, 4.0)
    assert result.settings["judge"]["unparsable"] == {"quality": 0, "emotion": 0}
    right = [record["answer"] == record["emotion"] for record in result.emotions]
    assert len(right) == 8 and result.values["ser_accuracy"] == np.mean(right)
    assert result.values["probe_chance"] == 0.5 and 0 <= result.values["probe_accuracy"] <= 1
    assert result.settings["probe"] == {"learned_from": "other speakers of the same rows", "num_train": 4}
    for name, (low, high) in result.intervals.items():
        assert low <= result.values[name] <= high


def test_files_are_those_that_the_table_reads(result: ResponseEvaluation, tmp_path: Path) -> None:
    result.save(tmp_path / "new")
    files = {path.name for path in (tmp_path / "new").iterdir()}
    assert files == {"metrics.json", "responses.jsonl", "emotions.jsonl", "embeddings.png"}
    scores = load_scores(tmp_path / "new")
    assert scores.name == "tiny" and scores.values["emotion"] == 4.0 and len(scores.values) == 8
    assert scores.intervals["ser_accuracy"] == result.intervals["ser_accuracy"]
    lines = (tmp_path / "new" / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == result.responses


def test_embeddings_are_the_means_of_what_the_llm_is_given(setup: tuple, dataset: Dataset) -> None:
    model, processor = setup
    pooled = pooled_embeddings(model, processor, dataset, batch_size=3, progress=False)
    assert pooled.shape == (8, 48) and pooled.dtype == np.float32
    for place in (0, 5):
        inputs = ListenCollator(processor, for_generation=True, num_prompts=0)([dataset[place]])
        inputs.pop("rows")
        is_audio = inputs["input_ids"] == model.config.audio_token_id
        names = ("input_features", "input_features_mask", "input_values", "input_values_mask")
        encoded = model.encode_audio(**{name: inputs[name] for name in names})
        given, _ = model.embed(inputs["input_ids"], inputs["attention_mask"], encoded)  # (1, sequence, width)
        assert np.allclose(pooled[place], given[is_audio].mean(0).detach().numpy(), atol=1e-5)


def test_a_cascade_writes_its_tags_and_answers_for_the_emotions(setup: tuple, dataset: Dataset) -> None:
    asked = []

    def recognise(rows: Dataset) -> list[str]:
        asked.append(rows)
        return ["sad"] * len(rows)

    plain = evaluate_responses(*setup, dataset, **OPTIONS)
    tagged = evaluate_responses(*setup, dataset, recognise=recognise, **OPTIONS)
    assert tagged.values["ser_accuracy"] == 0.5 and "probe_accuracy" not in tagged.values
    assert {record["answer"] for record in tagged.emotions} == {"sad"} and tagged.embeddings is None
    assert [len(rows) for rows in asked] == [8, 4]
    assert [r["prediction"] for r in plain.responses] != [r["prediction"] for r in tagged.responses]


def test_a_probe_learns_from_other_rows_where_they_are_given(setup: tuple, dataset: Dataset) -> None:
    train, test = dataset.select(range(4)), dataset.select(range(4, 8))
    found = evaluate_responses(*setup, test, probe_train=train, **OPTIONS)
    assert found.settings["probe"] == {"learned_from": "other rows", "num_train": 4}
    known = evaluate_responses(*setup, test, probe_train=dataset, **OPTIONS)
    assert known.settings["probe"]["shared_speakers"] == 1  # told, as it flatters the probe
    assert "rouge_l" not in found.values and found.settings["num_responses"] == 0
    assert emotion_rows(train, CLASSES)["response"] == [["happy"], ["sad"]] * 2


def test_references_take_the_place_of_rows_to_answer(setup: tuple, dataset: Dataset) -> None:
    found = evaluate_responses(*setup, dataset.select(range(4, 8)), references=dataset.select([2]), **OPTIONS)
    assert len(found.responses) == 1 and len(found.emotions) == 4


def test_what_cannot_be_evaluated_is_refused(setup: tuple, dataset: Dataset) -> None:
    bare = dataset.remove_columns("extra").add_column("extra", [None] * 8)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate_responses(*setup, bare.select([5]), **OPTIONS)
    with pytest.raises(ValueError, match="'transcript'.*judge.*add"):
        evaluate_responses(*setup, bare.select([0]), judge=judge_by_rules, **OPTIONS)
    with pytest.raises(ValueError, match="4 references.*'response'.*give"):
        evaluate_responses(*setup, dataset, references=dataset.select(range(4, 8)), **OPTIONS)
    with first_forward(setup[0]) as asked:
        with pytest.raises(ValueError, match="\\['angry'\\] none of the classes"):
            evaluate_responses(*setup, dataset, recognise=lambda rows: ["angry"] * len(rows), **OPTIONS)
        with pytest.raises(ValueError, match="\\['sad'\\].*classes="):
            evaluate_responses(*setup, dataset, **{**OPTIONS, "classes": ["happy", "angry"]})
        with pytest.raises(ValueError, match="ROUGE cannot read the reference"):
            evaluate_responses(*setup, _but(dataset, response=["你好"]), **OPTIONS)
    assert asked.output is None  # neither waits for the answers


def _but(dataset: Dataset, **values: object) -> Dataset:
    """The rows with other values in the first of them."""
    return Dataset.from_list([{**dataset[0], **values}, *dataset.select(range(1, len(dataset)))], dataset.features)


@pytest.mark.parametrize(
    ("places", "extra", "reason"),
    [
        ([0, 4], None, "a probe needs two classes to train on"),  # one class
        ([0, 5], None, "no class has two examples"),
        (range(8), json.dumps({"emotion": "sad", "transcript": "a"}), "1 of 8 examples name no speaker"),
    ],
)
def test_what_is_too_little_for_a_probe_leaves_the_other_scores(
    setup: tuple, dataset: Dataset, caplog: pytest.LogCaptureFixture, places: list[int], extra: str | None, reason: str
) -> None:
    rows = dataset.select(places)
    found = evaluate_responses(*setup, _but(rows, extra=extra) if extra else rows, **OPTIONS)
    assert reason in caplog.text and "probe_accuracy" not in found.values
    assert {"rouge_l", "ser_accuracy"} <= set(found.values)


def test_a_judge_that_cannot_be_reached_costs_no_other_score(setup: tuple, dataset: Dataset) -> None:
    with serve_chat(lambda body: (401, "who are you?")) as server:
        judge = partial(judge_responses, EndpointChatModel(server.url, "judge"), progress=False)
        found = evaluate_responses(*setup, dataset, judge=judge, **OPTIONS)
    assert "check the URL" in found.settings["judge"]["error"] and "quality" not in found.values
    assert {"rouge_l", "ser_accuracy", "probe_accuracy"} <= set(found.values)


def test_rules_of_the_corpus_judge_exactly() -> None:
    right = JudgeItem(TEXTS[0], "sad", "that must be hard. do you miss the red table?")
    wrong = JudgeItem(TEXTS[0], "sad", "please calm down.")
    found = judge_by_rules([right, wrong], num_resamples=0)
    assert found.scores[0].tolist() == [10.0, 10.0] and found.scores[1, 1] == 1.0 and found.scores[1, 0] < 10


@pytest.mark.slow
def test_the_script_evaluates_and_makes_the_table(manifest: Path, tmp_path: Path) -> None:
    model = tiny_model()
    processor = tiny_processor(model.config)
    model.save_pretrained(tmp_path / "model", save_full=True)
    processor.save_pretrained(tmp_path / "model")
    call = partial(run_script, ROOT / "examples" / "evaluate_responses.py", cwd=tmp_path)
    options = ["--data", str(manifest), "--classes", *CLASSES, "--judge", "rules", "--max-new-tokens", "4"]
    for name in ("v1", "v2"):
        call("--model", tmp_path / "model", "--system", name, "--output", tmp_path / name, *options)
    printed = call("--table", tmp_path / "v1", tmp_path / "v2", "--output", tmp_path / "table")
    assert "\n| v2 | 0." in printed and "Of 6 strict pairwise orderings of the paper's table, " in printed
    assert (tmp_path / "table" / "table.png").is_file()
