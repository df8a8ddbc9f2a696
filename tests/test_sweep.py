"""Scores over the number of prompts, from evaluations whose scores are given."""

from __future__ import annotations

import json
import math

import pytest

from listen.evaluation import EvaluationResult, Sweep, default_counts, sweep_num_prompts


def result(wer: float, accuracy: float) -> EvaluationResult:
    """An evaluation whose intervals are 0.05 to either side; emotion recognition has none."""
    return EvaluationResult(
        metrics={"asr": {"wer": wer, "cer": 0.0, "n": 5}, "er": {"accuracy": accuracy, "n": 5}},
        intervals={"asr": {"wer": (wer - 0.05, wer + 0.05)}, "er": {}},
    )


def test_sweep_evaluates_each_k_once_and_finds_where_it_saturates(tmp_path):
    wers, asked = {0: 0.95, 1: 0.9, 2: 0.34, 4: 0.3}, []

    def evaluate(num_prompts, **options):
        asked.append((num_prompts, options))
        return result(wers[num_prompts], 0.5 if num_prompts < 4 else 0.6)

    sweep = sweep_num_prompts(evaluate, [4, 1, 2, 2], batch_size=3)
    assert asked == [(k, {"batch_size": 3}) for k in (0, 1, 2, 4)]
    assert sweep.metrics == {"asr": "wer", "er": "accuracy"}
    assert sweep.value("asr", 2) == 0.34 and sweep.interval("er", 2) == (0.5, 0.5)
    assert sweep.saturation("asr") == 2 and sweep.saturation("er") == 4
    sweep.save(tmp_path / "sweep")
    table = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert table["num_prompts"]["4"] == {"asr": 0.3, "er": 0.6} and table["saturation"] == {"asr": 2, "er": 4}
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 1000


def test_a_score_that_is_undefined_is_null_and_saturates_last(tmp_path):
    sweep = sweep_num_prompts(lambda num_prompts: result(0.3, math.nan), [2, 4])
    sweep.save(tmp_path)
    table = json.loads((tmp_path / "sweep.json").read_text(), parse_constant=pytest.fail)
    assert table["num_prompts"]["2"] == {"asr": 0.3, "er": None} and table["saturation"] == {"asr": 0, "er": 4}


def test_sweep_refuses_no_counts():
    with pytest.raises(ValueError, match="counts=\\[\\]"):
        sweep_num_prompts(lambda num_prompts: result(0, 0), [])


@pytest.mark.parametrize(
    ("most", "counts"), [(0, [0]), (1, [0, 1]), (2, [0, 2]), (10, [0, 2, 4, 8, 10]), (16, [0, 2, 4, 8, 16])]
)
def test_default_counts_double_up_to_the_most(most, counts):
    assert default_counts(most) == counts


def test_a_sweep_with_k_of_zero_can_be_drawn(tmp_path):
    sweep = Sweep()
    for k in (0, 2):
        sweep.add(k, result(0.5, 0.5))
    sweep.save(tmp_path)
    assert (tmp_path / "sweep.png").exists()


def test_the_report_shows_the_scores_without_prompts(tmp_path):
    accuracy = {0: 0.25, 4: 0.75}
    sweep = sweep_num_prompts(lambda num_prompts: result(0.3, accuracy[num_prompts]), [4])
    shown = result(0.3, 0.75)
    shown.predictions = [{"task": task, "references": ["a"], "prediction": "a", "scores": {}} for task in ("asr", "er")]
    shown.without_prompts = sweep.without_prompts
    shown.save(tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["details"]["without_prompts"]["er"] == {"accuracy": 0.25}
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| k = 0 |" in report and "| 0.750 | 0.250 |" in report
    assert "0.250" in (tmp_path / "report.html").read_text(encoding="utf-8")
    shown.without_prompts = {}
    shown.save(tmp_path)
    assert "k = 0" not in (tmp_path / "report.md").read_text(encoding="utf-8")
