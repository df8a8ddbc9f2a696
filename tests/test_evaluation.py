"""Evaluation end to end on a tiny random model: every row once, in order, whatever the batches and processes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from fixtures_processes import run_script
from fixtures_training import tiny_processor, write_clip, write_manifest

from listen.data.collator import ListenCollator
from listen.data.manifest import load_manifest
from listen.data.tasks import Task, get_task
from listen.evaluation import evaluate_model, generate_predictions, metrics_table, score_task
from listen.evaluation.batches import clip_seconds, plan_batches
from listen.evaluation.confidence import bootstrap_intervals
from listen.evaluation.generate import answer_ids, first_forward
from listen.evaluation.metrics import ExactMatch, Verification
from listen.evaluation.scoring import metrics_for

ROOT = Path(__file__).resolve().parents[1]
RESPONSES = {
    "asr": ["the cat sat", "a tall <b>tree</b>"],
    "er": ["happy", "sad"],
    "sv": ["yes", "no"],
    "sqa": ["garden", "two | three"],
    "en2zh": ["我爱你", "他在家"],
    "acap": [["a dog barks", "a dog"], ["rain falls", "it rains"]],
}
METRICS = {
    "asr": ["wer", "cer"],
    "er": ["accuracy", "uar"],
    "sv": ["accuracy", "eer"],
    "sqa": ["exact_match", "rouge_l"],
    "en2zh": ["bleu", "chrf"],
    "acap": ["cider", "rouge_l", "event_f1"],
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Two rows of each task, of different lengths; the two clips of verification are two recordings."""
    folder, rows = tmp_path_factory.mktemp("corpus"), []
    for place in range(2):
        for number, task in enumerate(RESPONSES):
            name = f"{task}-{place}.wav"
            write_clip(folder / name, 0.4 + 0.17 * ((number + 3 * place) % 5), seed=number + 7 * place)
            row = {"audio": name, "task": task, "response": RESPONSES[task][place], "id": f"{task}-{place}"}
            row |= {"audio": [name, "asr-0.wav"]} if task == "sv" else {}
            row |= {"question": "where?"} if task == "sqa" else {}
            row |= {"events": [["dog"], ["rain"]][place]} if task == "acap" else {}
            rows.append(row)
    return write_manifest(folder / "test.jsonl", rows)


@pytest.fixture(scope="module")
def dataset(manifest):
    return load_manifest(manifest)


@pytest.fixture(scope="module")
def setup():
    model = tiny_model()
    return model, tiny_processor(model.config)


@pytest.fixture(scope="module")
def result(setup, dataset):
    return evaluate_model(*setup, dataset, batch_size=5, max_new_tokens=6, num_resamples=50, progress=False)


@pytest.fixture(scope="module")
def saved(result, tmp_path_factory):
    return result.save(tmp_path_factory.mktemp("eval") / "new", extra={"train_seconds": 12.5})


def answers(setup, dataset, **options):
    options = {"progress": False, "max_new_tokens": 6, "do_sample": False, **options}
    return generate_predictions(*setup, dataset, **options)


# generation


def test_each_row_is_in_one_batch_sorted_by_task_and_from_long_to_short(dataset):
    batches = plan_batches(dataset, 5)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(dataset))) and [len(batch) for batch in batches] == [5, 5, 2]
    keys = [(dataset[i]["task"], -sum(map(clip_seconds, dataset[i]["audio"]))) for i in order]
    assert keys == sorted(keys)
    with pytest.raises(ValueError, match="batch_size=0"):
        plan_batches(dataset, 0)


def test_clip_seconds_of_files_bytes_and_what_has_no_header(tmp_path):
    path = write_clip(tmp_path / "a.wav", 0.75)
    assert clip_seconds({"path": str(path), "bytes": None}) == pytest.approx(0.75)
    assert clip_seconds({"path": None, "bytes": path.read_bytes()}) == pytest.approx(0.75)
    assert clip_seconds({"path": "https://example.org/a.wav", "bytes": None}) == 0.0


def test_answers_do_not_depend_on_batches_and_come_in_order(setup, dataset):
    whole, single = answers(setup, dataset, batch_size=5), answers(setup, dataset, batch_size=1)
    assert [p.index for p in whole] == [p.index for p in single] == list(range(len(dataset)))
    for a, b in zip(whole, single, strict=True):
        assert (a.text, a.prompt_indices, a.instruction) == (b.text, b.prompt_indices, b.instruction)
        assert a.yes_no_score == pytest.approx(b.yes_no_score, abs=1e-4)
        assert np.allclose(a.prompt_scores, b.prompt_scores, atol=1e-5) and np.allclose(a.query, b.query, atol=1e-5)
    assert len({p.text for p in whole}) > 1


def test_answers_follow_their_rows_when_the_data_is_reversed(setup, dataset):
    forward = answers(setup, dataset, batch_size=3)
    backward = answers(setup, dataset.select(range(len(dataset) - 1, -1, -1)), batch_size=3)
    assert [p.text for p in forward] == [p.text for p in reversed(backward)]


def test_an_answer_equals_a_direct_call_of_the_model(setup, dataset):
    model, processor = setup
    inputs = ListenCollator(processor, for_generation=True)([dataset[3]])
    instruction = inputs.pop("rows")[0]["instruction"]
    prediction = answers(setup, dataset.select([3]))[0]
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    with torch.no_grad():
        output = model(**inputs)
    assert prediction.text == processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert prediction.instruction == instruction
    assert prediction.prompt_indices == output.prompt_indices[0].tolist()
    assert np.allclose(prediction.prompt_scores, output.prompt_scores[0], atol=1e-6)
    logits = output.logits[0, -1, processor.tokenizer.convert_tokens_to_ids(["y", "n"])].tolist()
    assert prediction.yes_no_score == pytest.approx(logits[0] - logits[1], abs=1e-4)


def test_beams_pick_the_same_prompts_for_the_same_rows(setup, dataset):
    greedy, beams = answers(setup, dataset, batch_size=5), answers(setup, dataset, batch_size=5, num_beams=3)
    assert [p.prompt_indices for p in beams] == [p.prompt_indices for p in greedy]
    assert [p.yes_no_score for p in beams] == pytest.approx([p.yes_no_score for p in greedy], abs=1e-4)


def test_several_answers_a_row_are_refused(setup, dataset):
    with pytest.raises(ValueError, match="10 answers for 5 rows"):
        answers(setup, dataset, batch_size=5, num_beams=2, num_return_sequences=2)


@pytest.mark.parametrize("k", [0, 2, 12])
def test_num_prompts_is_heeded(setup, dataset, k):
    predictions = answers(setup, dataset.select(range(3)), num_prompts=k)
    assert [len(p.prompt_indices) for p in predictions] == [k] * 3 == [len(p.prompt_scores) for p in predictions]


def test_training_mode_is_restored_and_no_hook_stays(setup, dataset):
    model = tiny_model()
    model.train()
    hooks = len(model._forward_hooks)
    answers((model, setup[1]), dataset.select([0]))
    assert model.training and len(model._forward_hooks) == hooks
    model.eval()
    with pytest.raises(RuntimeError), first_forward(model):
        raise RuntimeError
    assert len(model._forward_hooks) == hooks


def test_yes_and_no_that_begin_alike_give_no_score(setup):
    collator = ListenCollator(setup[1], for_generation=True)
    assert answer_ids(collator) == tuple(setup[1].tokenizer.convert_tokens_to_ids(["y", "n"]))
    # a template that puts a space in front of every answer, which this tokenizer reads as a token of its own
    spaced = tiny_processor(setup[0].config, chat_template=setup[1].chat_template.replace("'A:' +", "'A: ' +"))
    assert answer_ids(ListenCollator(spaced, for_generation=True)) is None


# scores


def test_every_task_has_the_metrics_that_its_registration_names():
    for task, names in METRICS.items():
        assert list(get_task(task).metrics) == names
        assert set(names) <= {name for metric in metrics_for(get_task(task)) for name in metric.names}
    assert Verification in metrics_for(get_task("sv"))  # accuracy here reads yes and no
    unknown = Task("x", "X", ("Do.",), "Do.", metrics=("wer", "loudness"))
    with pytest.raises(ValueError, match="loudness.*known: .*accuracy"):
        metrics_for(unknown)


def test_scores_of_known_answers_by_hand():
    examples = [{"response": ["yes"]}, {"response": ["no"]}, {"response": ["no"]}, {"response": ["yes"]}]
    scores = score_task(get_task("sv"), examples, ["yes", "no", "yes", "?"], [2.0, -1.0, 1.0, 0.0], num_resamples=0)
    assert scores.values == pytest.approx({"accuracy": 0.5, "eer": 0.5, "unparsable_rate": 0.25})
    assert list(scores.values)[:2] == ["accuracy", "eer"] and scores.intervals == {} and scores.num_examples == 4
    assert scores.row_values == [{"accuracy": 1.0}, {"accuracy": 1.0}, {"accuracy": 0.0}, {"accuracy": 0.0}]


def test_captions_without_events_have_no_event_f1(caplog):
    examples = [{"response": ["a dog barks"]}, {"response": ["rain falls"]}]
    scores = score_task(get_task("acap"), examples, ["a dog", "rain"], num_resamples=0)
    assert set(scores.values) == {"cider", "rouge_l"} and "without 'events'" in caplog.text
    named = [{**example, "events": [event]} for example, event in zip(examples, ["dog", "rain"], strict=True)]
    assert score_task(get_task("acap"), named, ["a dog", "a dog"], num_resamples=0).values["event_f1"] == 0.5
    empty = [{**example, "events": []} for example in examples]
    assert set(score_task(get_task("acap"), empty, ["a dog", "rain"], num_resamples=0).values) == {"cider", "rouge_l"}


@pytest.mark.parametrize(
    ("name", "response", "message"),
    [("sqa", "医生", "'sqa': example 1: ROUGE cannot read"), ("er", "Happy", "'er': label 'happy'.*rename it")],
)
def test_references_that_a_metric_refuses_are_found_before_the_model_is_asked(setup, dataset, name, response, message):
    rows = dataset.filter(lambda row: row["task"] == name)
    changed = [rows[0], {**rows[1], "response": [response]}]
    with first_forward(setup[0]) as prefill, pytest.raises(ValueError, match=message):
        evaluate_model(*setup, Dataset.from_list(changed, features=rows.features), max_new_tokens=2, progress=False)
    assert prefill.output is None


def test_a_metric_gives_only_what_the_task_asks_for():
    task = Task("t", "T", ("Do.",), "Do.", metrics=("chrf",), language="zh")
    assert set(score_task(task, [{"response": ["我"]}], ["我"], num_resamples=0).values) == {"chrf"}


def test_bootstrap_interval_of_a_share_is_the_normal_one():
    rows = np.repeat([1.0, 0.0], [140, 60])[:, None]
    low, high = bootstrap_intervals(ExactMatch(), rows, num_resamples=4000)["exact_match"]
    half = 1.96 * math.sqrt(0.7 * 0.3 / 200)
    assert (low, high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.01)
    assert bootstrap_intervals(ExactMatch(), rows, num_resamples=50) == bootstrap_intervals(
        ExactMatch(), rows, num_resamples=50
    )


def test_bootstrap_leaves_out_what_is_undefined_and_refuses_bad_settings():
    rows = Verification().row_statistics(["yes", "no"], ["yes", "no"])
    assert set(bootstrap_intervals(Verification(), rows, num_resamples=20)) == {"accuracy", "unparsable_rate"}
    with pytest.raises(ValueError, match="num_resamples=0"):
        bootstrap_intervals(Verification(), rows, num_resamples=0)
    assert bootstrap_intervals(Verification(), rows[:1], num_resamples=20) == {}  # one example tells no spread


# evaluation


def test_result_holds_all_tasks_with_their_metrics(result, dataset):
    assert {task: [n for n in v if n in METRICS[task]] for task, v in result.metrics.items()} == METRICS
    assert all(next(iter(v)) == METRICS[task][0] and v["n"] == 2 for task, v in result.metrics.items())
    assert [record["id"] for record in result.predictions] == dataset["id"]
    assert result.settings["num_prompts"] == 4 and result.settings["pool_size"] == 12
    assert result.pool.usage.tasks == list(METRICS) and result.pool.queries.shape == (12, 48)
    assert np.allclose(result.pool.usage.shares.sum(axis=1), 4)


def test_metrics_are_those_of_the_written_predictions(result):
    by_task = {task: [r for r in result.predictions if r["task"] == task] for task in METRICS}
    for task, records in by_task.items():
        examples = [{"response": r["references"], "events": [["dog"], ["rain"]][i]} for i, r in enumerate(records)]
        scores = [r.get("yes_no_score", math.nan) for r in records]
        again = score_task(get_task(task), examples, [r["prediction"] for r in records], scores, num_resamples=0)
        assert {**again.values, "n": 2} == pytest.approx(result.metrics[task], nan_ok=True)


def test_files_are_written_and_valid(result, saved):
    folder = saved  # made by save
    assert {path.name for path in folder.iterdir()} == {
        "metrics.json",
        "predictions.jsonl",
        "report.md",
        "report.html",
        "pool",
    }
    metrics = json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)  # no NaN in it
    assert metrics["train_seconds"] == 12.5 and set(metrics) == {*METRICS, "train_seconds", "details"}
    assert metrics["asr"]["wer"] == result.metrics["asr"]["wer"]
    low, high = metrics["details"]["confidence_95"]["asr"]["wer"]
    assert low <= metrics["asr"]["wer"] <= high
    records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert records == result.predictions and all(len(record["prompt_indices"]) == 4 for record in records)
    assert all("instruction" in record and "scores" in record for record in records)


def test_report_is_readable_and_needs_no_other_file(saved):
    markdown, html = ((saved / name).read_text(encoding="utf-8") for name in ("report.md", "report.html"))
    for task in METRICS:
        assert get_task(task).title in markdown and get_task(task).title in html
    assert "two \\| three" in markdown  # a cell's bar would break the table
    assert "&lt;b&gt;tree" in markdown  # a tag would not be shown
    assert "<b>tree" not in html and "&lt;b&gt;tree" in html
    assert "我爱你" in markdown and "我爱你" in html
    assert html.count("data:image/png;base64,") == 4 and 'src="http' not in html and "href" not in html
    assert all((saved / link.split(")")[0]).is_file() for link in markdown.split("](")[1:])


def test_undefined_values_are_null_and_named_in_the_report(setup, dataset, tmp_path):
    one = evaluate_model(*setup, dataset.select([2]), max_new_tokens=2, progress=False)
    assert math.isnan(one.metrics["sv"]["eer"])
    folder = one.save(tmp_path)
    assert json.loads((folder / "metrics.json").read_text())["sv"]["eer"] is None
    assert "undefined" in (folder / "report.md").read_text()
    assert ("sv", "eer", "undefined", "1") in metrics_table(one.metrics)


def test_tasks_and_examples_are_selected(setup, dataset):
    some = evaluate_model(
        *setup, dataset, tasks=["er", "asr"], max_examples=1, max_new_tokens=2, num_resamples=0, progress=False
    )
    assert set(some.metrics) == {"asr", "er"} and [r["id"] for r in some.predictions] == ["asr-0", "er-0"]
    assert some.intervals == {"asr": {}, "er": {}}
    with pytest.raises(ValueError, match="no rows of \\['music'\\]; it holds acap, asr"):
        evaluate_model(*setup, dataset, tasks=["music"])
    with pytest.raises(ValueError, match="max_examples=0"):
        evaluate_model(*setup, dataset, max_examples=0)


def test_a_model_without_pool_is_evaluated(dataset, tmp_path):
    model = tiny_model(prompt_pool_config=None)
    plain = evaluate_model(
        model, tiny_processor(model.config), dataset.select(range(2)), max_new_tokens=2, num_resamples=0, progress=False
    )
    assert plain.pool is None and plain.settings["num_prompts"] == 0
    assert "prompt pool" not in (plain.save(tmp_path) / "report.md").read_text() and not (tmp_path / "pool").exists()


def test_answers_from_stored_encoder_features_equal_those_from_audio(setup, dataset, tmp_path):
    from listen.data.features import (
        EncodedRecording,
        FeatureStore,
        recording_keys,
        store_info,
        write_shard,
        write_store_info,
    )

    model, processor = setup
    rows, folder = dataset.select([0, 1]), tmp_path / "features"
    write_store_info(folder, store_info(model, processor.feature_extractor))
    stored = []
    for row in rows:
        inputs = ListenCollator(processor, for_generation=True)([row])
        audio = {name: inputs[name] for name in inputs if name.startswith("input_") and name != "input_ids"}
        with torch.no_grad():
            encoded = model.encode_audio(**audio)
        speech = encoded.speech_hidden_states[encoded.speech_hidden_states_mask.bool()]
        sound = encoded.audio_hidden_states[encoded.audio_hidden_states_mask.bool()]
        samples = round(clip_seconds(row["audio"][0]) * 16000)
        recording = EncodedRecording(samples, speech, (len(speech),), sound, (len(sound),))
        stored.append((recording_keys(row, folder)[0], recording))
    write_shard(folder / "shard-0.arrow", iter(stored))
    live, cached = answers(setup, rows), answers(setup, rows, features=FeatureStore(folder))
    assert [p.text for p in live] == [p.text for p in cached]
    assert [p.prompt_indices for p in live] == [p.prompt_indices for p in cached]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(setup, manifest, result, tmp_path):
    model, processor = setup
    model.save_pretrained(tmp_path / "model", save_full=True)
    processor.save_pretrained(tmp_path / "model")
    arguments = ["--data", manifest, "--model", tmp_path / "model", "--output", tmp_path / "eval"]
    options = ["--batch-size", "5", "--max-new-tokens", "6", "--sweep"]
    variables = {"CUDA_VISIBLE_DEVICES": ""}
    script = ROOT / "examples" / "evaluate_tasks.py"
    printed = run_script(script, *arguments, *options, environment=variables, processes=2)
    records = [json.loads(line) for line in (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()]
    assert [(r["id"], r["prediction"]) for r in records] == [(r["id"], r["prediction"]) for r in result.predictions]
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    for task in METRICS:
        assert metrics[task] == pytest.approx(result.metrics[task], rel=1e-3)
    assert metrics["details"]["settings"]["num_processes"] == 2
    assert json.loads((tmp_path / "eval" / "sweep" / "sweep.json").read_text())["num_prompts"].keys() == {"0", "2", "4"}
    assert printed.count("report.html") == 1
