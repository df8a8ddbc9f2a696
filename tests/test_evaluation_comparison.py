"""Statistics of comparisons, on answers whose differences are known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from listen.evaluation.comparison import Cell, TaskItems, compare, compare_losses, holm, load_items, seed_interval
from listen.evaluation.comparison_plots import plot_scores
from listen.evaluation.comparison_report import _loss_lines
from listen.evaluation.metrics import Verification

LABELS = ("happy", "sad")


def write_evaluation(folder: Path, answers: dict[str, list[bool]], shuffle: int | None = None) -> Path:
    """An evaluation of emotion recognition or yes/no verification: which answers of each task are correct."""
    records, metrics = [], {}
    for task, correct in answers.items():
        truth, other = ("yes", "no") if task == "sv" else LABELS
        for place, is_correct in enumerate(correct):
            record = {"id": f"{task}-{place}", "task": task, "references": [truth]}
            records.append({**record, "prediction": truth if is_correct else other, "yes_no_score": None})
        metrics[task] = {"accuracy": sum(correct) / len(correct), "n": len(correct)}
    if shuffle is not None:
        records = [records[place] for place in np.random.default_rng(shuffle).permutation(len(records))]
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def draw(rate: float, seed: int, count: int = 200) -> list[bool]:
    return (np.random.default_rng(seed).random(count) < rate).tolist()


def cell(folder: Path, method: str, seed: int, **answers: list[bool]) -> Cell:
    return Cell(method, seed, load_items(write_evaluation(folder / f"{method}-{seed}", answers)))


def test_identical_answers_give_p_of_one(tmp_path: Path) -> None:
    correct = draw(0.7, 0)
    first, second = (
        write_evaluation(tmp_path / name, {"er": correct}, shuffle) for name, shuffle in (("a", 1), ("b", 2))
    )
    (found,) = compare([Cell("a", 0, load_items(first)), Cell("b", 0, load_items(second / "metrics.json"))])
    assert (found.p, found.p_holm, found.difference, found.better) == (1.0, 1.0, 0.0, None)
    assert found.interval == (0.0, 0.0) and found.num_items == 200 and found.num_seeds == 1


def test_a_constructed_difference_is_found_in_its_direction(tmp_path: Path) -> None:
    base = draw(0.6, 0)
    better = [value or place % 4 == 0 for place, value in enumerate(base)]  # correct wherever the other is, and more
    (found,) = compare([cell(tmp_path, "weak", 0, er=base), cell(tmp_path, "strong", 0, er=better)])
    assert found.better == "strong" and found.p < 1e-4
    assert found.difference == pytest.approx((sum(base) - sum(better)) / 200)
    assert found.interval[0] < found.difference < found.interval[1] < 0


def test_a_method_with_one_seed_is_drawn_with_its_mark(tmp_path: Path) -> None:
    cells = [cell(tmp_path, "weak", 0, er=draw(0.3, 0)), cell(tmp_path, "strong", 0, er=[True] * 200)]
    figure = plot_scores(cells, compare(cells), "weak")
    assert "*" in [text.get_text() for text in figure.axes[0].texts]


def test_the_standard_error_is_that_of_paired_differences(tmp_path: Path) -> None:
    """McNemar's variance: (discordant rate - difference squared) / n; unpaired, it would be far larger."""
    base = draw(0.5, 3, 400)
    other = [not value if place % 20 == 0 else value for place, value in enumerate(base)]
    (found,) = compare([cell(tmp_path, "a", 0, er=base), cell(tmp_path, "b", 0, er=other)], num_resamples=2000)
    expected = math.sqrt((20 / 400 - found.difference**2) / 400)
    half = (found.interval[1] - found.interval[0]) / 2
    assert half / 1.96 == pytest.approx(expected, rel=0.06)


def test_chance_differences_are_rarely_significant(tmp_path: Path) -> None:
    cells = [cell(tmp_path, f"m{number}", 0, er=draw(0.5, number, 100)) for number in range(12)]
    found = compare(cells)
    assert len(found) == 66 and all(one.better is None for one in found)
    raw = [one.p for one in found]
    assert 0.0 <= np.mean([p < 0.05 for p in raw]) < 0.2 and np.median(raw) > 0.2


def test_seeds_that_disagree_widen_the_interval(tmp_path: Path) -> None:
    rates = {"steady": ((0.8, 0.6),) * 3, "unsteady": ((0.99, 0.41), (0.8, 0.6), (0.61, 0.79))}
    widths = {}
    for name, pairs in rates.items():
        cells = [
            cell(tmp_path / name, method, seed, er=draw(pair[place], 10 * seed + place))
            for seed, pair in enumerate(pairs)
            for place, method in enumerate(("a", "b"))
        ]
        (found,) = compare(cells)
        assert found.num_seeds == 3
        widths[name] = found.interval[1] - found.interval[0]
        assert (found.better == "a") == (name == "steady")
    assert widths["unsteady"] > 3 * widths["steady"]


@pytest.mark.parametrize("num_methods", [2, 8])
def test_methods_that_differ_by_seeds_alone_are_rarely_told_apart(tmp_path: Path, num_methods: int) -> None:
    """The same expected rate, moved by the seed: without the spread over seeds most pairs would differ."""
    rng, p_values = np.random.default_rng(num_methods), []
    for trial in range(32 // num_methods):
        cells = [
            cell(tmp_path / str(trial), f"m{method}", seed, er=draw(rng.uniform(0.35, 0.65), rng.integers(2**31)))
            for method in range(num_methods)
            for seed in range(3)
        ]
        p_values += [one.p for one in compare(cells, num_resamples=50)]
    assert np.mean([p < 0.05 for p in p_values]) < 0.1


def test_a_difference_beyond_the_seeds_is_found_among_many(tmp_path: Path) -> None:
    """With eight methods the pooled spread decides what three seeds of two methods leave open."""
    rates = [0.5, 0.5, 0.52, 0.48, 0.5, 0.51, 0.49, 0.9]
    cells = [
        cell(tmp_path, f"m{method}", seed, er=draw(rate, 100 * seed + method))
        for method, rate in enumerate(rates)
        for seed in range(3)
    ]
    found = [one.better for one in compare(cells)]
    assert found.count("m7") == 7 and found.count(None) == 21


def test_only_seeds_that_both_have_are_compared(tmp_path: Path) -> None:
    cells = [cell(tmp_path, "a", seed, er=draw(0.5, seed)) for seed in (0, 1)]
    (found,) = compare([*cells, cell(tmp_path, "b", 1, er=draw(0.5, 1))])
    assert found.num_seeds == 1 and found.p == 1.0


def test_a_pair_with_one_common_seed_gets_the_spread_of_the_others(tmp_path: Path) -> None:
    """As in the table of a comparison whose cells are not all finished."""
    rates = np.random.default_rng(0).uniform(0.2, 0.8, size=(4, 3))
    cells = [
        cell(tmp_path, f"m{method}", seed, er=draw(rates[method, seed], 10 * method + seed))
        for method in range(4)
        for seed in range(3)
    ]
    late = [cell(tmp_path, name, 0, er=draw(rate, 100)) for name, rate in (("late", 0.4), ("later", 0.6))]
    (alone,) = compare(late)
    found = next(one for one in compare([*cells, *late]) if one.first == "late")
    assert found.num_seeds == 1 and found.difference == alone.difference
    assert alone.better == "later" and found.p > 0.1


def test_undefined_scores_are_not_tested() -> None:
    rows = np.array([[1.0, 1.0, math.nan], [0.0, 0.0, math.nan]] * 20)  # truth, answer, no score of yes against no
    items = TaskItems("eer", Verification(), tuple((str(place), "", 0) for place in range(40)), rows)
    known = replace(items, rows=np.nan_to_num(rows, nan=0.5))
    (found,) = compare([Cell("a", 0, {"sv": items}), Cell("b", 0, {"sv": known})])
    assert found.better is None and math.isnan(found.p) and math.isnan(found.p_holm)


def test_answers_may_hold_separators_of_lines(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "a", {"er": [True, False]})
    path = folder / "predictions.jsonl"
    path.write_text(path.read_text().replace('"prediction": "', '"prediction": "\u2028'), encoding="utf-8")
    assert load_items(folder)["er"].value() == 0.5


def test_all_pairs_and_tasks_are_tested_and_counted(tmp_path: Path) -> None:
    cells = [
        cell(tmp_path, method, 0, er=draw(rate, 1), sv=draw(rate, 2))
        for method, rate in (("a", 0.5), ("b", 0.6), ("c", 0.9))
    ]
    found = compare(cells)
    assert {(one.task, one.first, one.second) for one in found} == {
        (task, *pair) for task in ("er", "sv") for pair in (("a", "b"), ("a", "c"), ("b", "c"))
    }
    assert [one.p_holm for one in found] == holm([one.p for one in found])
    assert all(one.p_holm >= one.p for one in found)


def test_holm_on_a_known_case() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    corrected = holm([0.01, math.nan, 0.9])
    assert corrected[0] == pytest.approx(0.02) and math.isnan(corrected[1]) and corrected[2] == pytest.approx(0.9)
    assert holm([]) == []


def test_lower_word_error_rates_are_better(tmp_path: Path) -> None:
    for name, text in (("good", "a b c d"), ("bad", "a x c d")):
        folder = tmp_path / name
        folder.mkdir()
        wer = 0.0 if name == "good" else 0.25
        (folder / "metrics.json").write_text(json.dumps({"asr": {"wer": wer, "n": 30}}))
        record = {"task": "asr", "references": ["a b c d"], "prediction": text}
        lines = [json.dumps({**record, "id": str(i)}) + "\n" for i in range(30)]
        (folder / "predictions.jsonl").write_text("".join(lines))
    (found,) = compare([Cell(name, 0, load_items(tmp_path / name)) for name in ("bad", "good")])
    assert found.better == "good" and found.difference == 0.25
    assert found.p == pytest.approx(2 * 0.5**30)  # each example differs alike: a sign test


def test_resampled_means_are_those_of_the_metric(tmp_path: Path) -> None:
    for task in ("er", "sv"):
        items = load_items(write_evaluation(tmp_path / task, {task: draw(0.4, 7, 50)}))[task]
        draws = np.random.default_rng(0).integers(50, size=(5, 50))
        expected = [items.metric.aggregate(items.rows[places])["accuracy"] for places in draws]
        assert items.resampled(draws) == pytest.approx(expected)


def test_seed_interval_is_that_of_student() -> None:
    assert seed_interval([0.5]) is None
    low, high = seed_interval([0.4, 0.5, 0.6])
    assert (low + high) / 2 == pytest.approx(0.5) and (high - low) / 2 == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)


def test_other_examples_and_other_scores_are_refused(tmp_path: Path) -> None:
    cells = [cell(tmp_path, "a", 0, er=draw(0.5, 0, 20)), cell(tmp_path, "b", 0, er=draw(0.5, 0, 19))]
    with pytest.raises(
        ValueError, match="'er': 'b' with seed 0 was evaluated on other examples .1 differ, such as 'er-19'"
    ):
        compare(cells)
    (tmp_path / "a-0" / "metrics.json").write_text(json.dumps({"er": {"accuracy": 0.123}}))
    with pytest.raises(ValueError, match="er accuracy is 0.123 there, but the answers give"):
        load_items(tmp_path / "a-0")
    (tmp_path / "b-0" / "predictions.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="needs the answers beside metrics.json"):
        load_items(tmp_path / "b-0")


def test_held_out_losses_are_compared_within_seeds() -> None:
    """Seeds differ far more than methods do; the paired test is that of scipy, the better method has the lower loss."""
    noise = np.random.default_rng(0).normal(size=8)
    losses = {"a": noise, "b": noise + 0.1 + 0.01 * np.arange(8), "c": noise[:1], "d": noise + np.arange(8) % 2 - 0.5}
    cells = [
        Cell(name, seed, {}, {"eval_lm_loss": x}) for name, values in losses.items() for seed, x in enumerate(values)
    ]
    found = {(one.first, one.second): one for one in compare_losses([*cells, Cell("no loss", 0, {})])}
    assert set(found) == {("a", "b"), ("a", "d"), ("b", "d")}  # one common seed is not enough
    pair = found["a", "b"]
    assert pair.p == pytest.approx(stats.ttest_rel(losses["a"], losses["b"]).pvalue)
    assert pair.p_holm == pytest.approx(3 * pair.p) and pair.better == "a" and pair.num_seeds == 8
    assert pair.difference == pytest.approx(-0.135) and pair.interval[0] < -0.135 < pair.interval[1] < 0
    assert found["a", "d"].better is None
    assert [line.count("(+)") for line in _loss_lines(list(found.values()))[-3:]] == [1, 0, 0]


def test_losses_without_spread_are_not_decided_by_rounding() -> None:
    losses = {"a": [1.1, 2.1], "same": [1.1, 2.1], "shifted": [1.6, 2.6], "broken": [math.nan, 2.0]}
    cells = [
        Cell(name, seed, {}, {"eval_lm_loss": x}) for name, values in losses.items() for seed, x in enumerate(values)
    ]
    found = {(one.first, one.second): one for one in compare_losses(cells)}
    assert set(found) == {("a", "same"), ("a", "shifted"), ("same", "shifted")}
    assert found["a", "same"].p == 1.0 and found["a", "same"].interval == (0.0, 0.0)
    assert found["a", "shifted"].p == 0.5 and found["a", "shifted"].better is None
