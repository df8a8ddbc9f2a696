"""Statistics of a comparison: several methods, each trained with several seeds and evaluated on the same examples.

The difference between two methods on a task is the mean over the seeds that both have, as runs of one seed share their
data order and their start. Its standard error has two parts:

- examples: a paired bootstrap, all runs on the same resampled examples, for any metric that is a function of a set of
  examples (word error rate, BLEU, event F1, accuracy)
- seeds: the spread of the difference between seeds, over the square root of their number. A few seeds give a poor
  estimate of it, so it is pooled over all methods of the table: the residual of a layout of methods by seeds, as in a
  randomised block design. Methods whose scores do not vary with the seed are left out, and where the spread of the two
  methods themselves is larger, that one is used. The degrees of freedom stay those of the pooled spread: methods are
  taken to vary about alike, and a pair that varies five times as much as the others is told apart too easily.

They are added in squares, and the quotient of difference and error is compared with a t distribution whose degrees of
freedom follow Satterthwaite (1946). Where the table has no spread over seeds, the second part is unknown: the test then
speaks of these two models and not of the methods. All pairs of methods are tested on all tasks, and the p values are
corrected for their number by Holm (1979). A score that is undefined is not tested.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ..data.tasks import get_task
from .metrics import RowMetric
from .scoring import LOWER_IS_BETTER, leading_statistics

CELL_FILE = "cell.json"
EVALUATION_FOLDER = "evaluation"
SIGNIFICANCE = 0.05
NUM_RESAMPLES = 500
LOSS = "eval_lm_loss"
Item = tuple[str, str, int]


@dataclass(frozen=True)
class TaskItems:
    """The scored examples of one task in one evaluation.

    Attributes:
        name: name of the task's leading metric.
        metric: computes it.
        keys: what identifies each example: id, question and number of the occurrence.
        rows: `(examples, statistics)`, the metric's `row_statistics`.
    """

    name: str
    metric: RowMetric
    keys: tuple[Item, ...]
    rows: np.ndarray

    def value(self) -> float:
        """The metric over all examples."""
        return self.metric.aggregate(self.rows)[self.name]

    def resampled(self, draws: np.ndarray) -> np.ndarray:
        """`(resamples,)` values over the examples at the places `draws` `(resamples, examples)`."""
        if self.name in self.metric.averaged:
            kinds, kind = np.unique(self.rows, axis=0, return_inverse=True)  # few, and an aggregate is slow
            values = np.array([self.metric.aggregate(row[None])[self.name] for row in kinds])  # (kinds,)
            return values[kind.ravel()[draws]].mean(axis=1)
        return np.array([self.metric.aggregate(self.rows[places])[self.name] for places in draws])


@dataclass(frozen=True)
class Cell:
    """One evaluated run.

    Attributes:
        method: name of the method.
        seed: seed of the run.
        items: scored examples of each task.
        figures: cost and losses of the run, such as `seconds_per_step` and `eval_lm_loss`.
        history: the training log, in order.
    """

    method: str
    seed: int
    items: dict[str, TaskItems]
    figures: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)

    def value(self, task: str) -> float:
        """Leading metric of a task."""
        return self.items[task].value()


@dataclass(frozen=True)
class Comparison:
    """Two methods on one task.

    Attributes:
        task: name of the task.
        metric: its leading metric.
        first: name of a method.
        second: name of another method.
        values: metric of both, each a mean over the seeds that both have.
        difference: of `first` minus `second`.
        interval: 95 % interval of the difference.
        p: p value of the difference, not corrected.
        p_holm: corrected for all comparisons of the table.
        num_items: examples that were resampled.
        num_seeds: seeds that both have.
    """

    task: str
    metric: str
    first: str
    second: str
    values: tuple[float, float]
    difference: float
    interval: tuple[float, float]
    p: float
    p_holm: float
    num_items: int
    num_seeds: int

    @property
    def better(self) -> str | None:
        """The method that is significantly better; `None` if neither is."""
        if not self.p_holm < SIGNIFICANCE or self.difference == 0.0:
            return None
        higher, lower = (self.first, self.second) if self.difference > 0 else (self.second, self.first)
        return lower if self.metric in LOWER_IS_BETTER else higher


def load_items(source: str | Path) -> dict[str, TaskItems]:
    """Scored examples of a finished evaluation, task by task.

    Args:
        source: folder with `metrics.json` and `predictions.jsonl`, or the path of that `metrics.json`.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the predictions do not give the scores of `metrics.json`.
    """
    path = Path(source) if Path(source).suffix == ".json" else Path(source) / "metrics.json"
    metrics = json.loads(path.read_text(encoding="utf-8"))
    predictions = path.parent / "predictions.jsonl"
    if not predictions.is_file():
        raise FileNotFoundError(f"{predictions} is missing; a comparison needs the answers beside {path.name}")
    by_task: dict[str, list[dict[str, Any]]] = {}
    with predictions.open(encoding="utf-8") as lines:  # str.splitlines would cut answers at U+2028
        for record in map(json.loads, lines):
            by_task.setdefault(record["task"], []).append(record)
    items = {task: _task_items(task, records) for task, records in by_task.items()}
    for task, found in items.items():
        _check_value(path, task, found, metrics.get(task, {}).get(found.name))
    return items


def load_cells(folder: str | Path) -> list[Cell]:
    """The finished cells of a comparison: each with its own k, and again for each further k that it was evaluated at.

    Args:
        folder: output folder of a comparison, with `METHOD/seed-N/cell.json` in it.

    Raises:
        ValueError: there is no finished cell.
    """
    cells = []
    for path in Path(folder).glob(f"*/*/{CELL_FILE}"):
        content = json.loads(path.read_text(encoding="utf-8"))
        method, seed = content["method"], content["seed"]
        items = load_items(path.parent / EVALUATION_FOLDER)
        cells.append(Cell(method, seed, items, content["figures"], content["history"]))
        for k in content["further_num_prompts"]:
            cells.append(Cell(f"{method}, k = {k}", seed, load_items(path.parent / f"{EVALUATION_FOLDER}-k{k}")))
    if not cells:
        raise ValueError(f"{folder} holds no finished cell (METHOD/seed-N/{CELL_FILE})")
    return sorted(cells, key=lambda cell: (cell.method, cell.seed))


def compare(cells: Sequence[Cell], num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> list[Comparison]:
    """Compare all pairs of methods on all tasks that both were evaluated on.

    Args:
        cells: evaluated runs.
        num_resamples: resampled sets of examples behind the standard errors.
        seed: seed of the draws.

    Returns:
        One comparison for each task and pair, the p values corrected for all of them.

    Raises:
        ValueError: two runs were evaluated on different examples of a task.
    """
    methods = method_names(cells)
    found: list[dict[str, Any]] = []
    for task in tasks_of(cells):
        runs = {(cell.method, cell.seed): cell.items[task] for cell in cells if task in cell.items}
        values = _resampled_values(task, runs, num_resamples, seed)
        spread = _pooled_spread({run: float(points[0]) for run, points in values.items()})
        for first, second in itertools.combinations(methods, 2):
            seeds = [number for name, number in runs if name == first and (second, number) in runs]
            if seeds:
                pair = [np.stack([values[name, number] for number in seeds]) for name in (first, second)]
                items = runs[first, seeds[0]]
                head = {"task": task, "metric": items.name, "first": first, "second": second}
                found.append({**head, **_test(*pair, spread, num_items=len(items.keys))})
    return _corrected(found)


def compare_losses(cells: Sequence[Cell]) -> list[Comparison]:
    """Compare the held-out LM losses of all pairs of methods with two common seeds, by a paired t test over seeds.

    Runs of one seed share their data order, their start and their held-out rows. The p values are corrected for the
    number of pairs; `num_items` is 0, as the examples are not tested one by one. Losses that are not finite are left
    out. Differences without any spread have the p value of a sign test.
    """
    losses: dict[str, dict[int, float]] = {}
    for cell in cells:
        if math.isfinite(cell.figures.get(LOSS, math.nan)):
            losses.setdefault(cell.method, {})[cell.seed] = cell.figures[LOSS]
    found: list[dict[str, Any]] = []
    for first, second in itertools.combinations(losses, 2):
        seeds = sorted(losses[first].keys() & losses[second].keys())
        if len(seeds) > 1:
            pair = np.array([[losses[name][number] for number in seeds] for name in (first, second)])  # (2, seeds)
            differences = pair[0] - pair[1]  # (seeds,)
            mean, p = float(differences.mean()), 2 * 0.5 ** len(seeds)
            interval = (mean, mean)
            if np.ptp(differences) > 1e-9 * np.abs(pair).max():  # else rounding would decide
                test = stats.ttest_1samp(differences, 0.0)
                interval, p = tuple(map(float, test.confidence_interval())), float(test.pvalue)
            elif mean == 0.0:
                p = 1.0
            head = {"task": "all", "metric": LOSS, "first": first, "second": second, "num_items": 0}
            values = {"values": tuple(pair.mean(axis=1).tolist()), "difference": mean}
            found.append({**head, **values, "interval": interval, "p": p, "num_seeds": len(seeds)})
    return _corrected(found)


def method_names(cells: Sequence[Cell]) -> list[str]:
    """The methods, in the order in which they first occur."""
    return list(dict.fromkeys(cell.method for cell in cells))


def tasks_of(cells: Sequence[Cell]) -> list[str]:
    """The tasks, in the order in which they first occur."""
    return list(dict.fromkeys(task for cell in cells for task in cell.items))


def seed_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of the mean over seeds; `None` for a single seed."""
    if len(values) < 2:
        return None
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * error)
    mean = float(np.mean(values))
    return mean - half, mean + half


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number, so that any false rejection at all has at most the chosen level.

    Holm, "A simple sequentially rejective multiple test procedure" (1979). Undefined values stay undefined and do not
    count.
    """
    p = np.asarray(p_values, dtype=float)
    order = [place for place in np.argsort(p) if not math.isnan(p[place])]
    corrected, highest = np.full(len(p), math.nan), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p[place]))
        corrected[place] = highest
    return corrected.tolist()


def _corrected(found: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    corrected = holm([entry["p"] for entry in found])
    return [Comparison(**entry, p_holm=p) for entry, p in zip(found, corrected, strict=True)]


def _task_items(task: str, records: Sequence[Mapping[str, Any]]) -> TaskItems:
    examples = [{**record, "response": record["references"]} for record in records]
    scores = [math.nan if record.get("yes_no_score") is None else record["yes_no_score"] for record in records]
    texts = [record["prediction"] for record in records]
    name, metric, rows = leading_statistics(get_task(task), examples, texts, scores)
    keys, seen = [], Counter()
    for record in records:
        item = (str(record.get("id") or record.get("audio")), str(record.get("question") or ""))
        keys.append((*item, seen[item]))
        seen[item] += 1
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return TaskItems(name, metric, tuple(keys[place] for place in order), rows[order])


def _check_value(path: Path, task: str, items: TaskItems, stored: float | None) -> None:
    value = items.value()
    if stored is not None and not math.isnan(value) and not math.isclose(stored, value, rel_tol=1e-6, abs_tol=1e-9):
        raise ValueError(
            f"{path}: {task} {items.name} is {stored} there, but the answers give {value}; evaluate again without "
            "--spelling-from and with this version"
        )


def _resampled_values(
    task: str, runs: Mapping[tuple[str, int], TaskItems], num_resamples: int, seed: int
) -> dict[tuple[str, int], np.ndarray]:
    """For each run `(1 + resamples,)`: the metric over all examples, then over each resampled set, the same for all."""
    first = next(iter(runs.values()))
    for (method, number), items in runs.items():
        if items.keys != first.keys:
            differing = sorted(set(items.keys) ^ set(first.keys))
            raise ValueError(
                f"task {task!r}: {method!r} with seed {number} was evaluated on other examples "
                f"({len(differing)} differ, such as {differing[0][0]!r}); evaluate all runs on the same rows"
            )
    rng, count = np.random.default_rng(seed), len(first.keys)
    draws = rng.integers(count, size=(num_resamples, count))  # (resamples, examples)
    return {run: np.array([items.value(), *items.resampled(draws)]) for run, items in runs.items()}


@dataclass(frozen=True)
class _Spread:
    """Variance over seeds of the difference between two methods, and the degrees of freedom of its estimate."""

    variance: float = 0.0
    freedom: int = 0


def _pooled_spread(values: Mapping[tuple[str, int], float]) -> _Spread:
    """Spread over seeds, pooled over methods; empty with fewer than two methods that vary or two seeds that all have.

    Args:
        values: score of each method and seed.
    """
    by_method: dict[str, dict[int, float]] = {}
    for (method, number), value in values.items():
        if not math.isnan(value):
            by_method.setdefault(method, {})[number] = value
    varying = [scores for scores in by_method.values() if len(scores) > 1 and len(set(scores.values())) > 1]
    seeds = sorted(set.intersection(*(set(scores) for scores in varying))) if varying else []
    if len(varying) < 2 or len(seeds) < 2:
        return _Spread()
    freedom = (len(varying) - 1) * (len(seeds) - 1)
    table = np.array([[scores[number] for number in seeds] for scores in varying])  # (methods, seeds)
    residuals = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0, keepdims=True) + table.mean()
    return _Spread(2 * float(np.square(residuals).sum()) / freedom, freedom)


def _test(first: np.ndarray, second: np.ndarray, spread: _Spread, num_items: int) -> dict[str, Any]:
    """Test the difference between two methods.

    Args:
        first: `(seeds, 1 + resamples)` values of a method, the first column over all examples.
        second: the same of the other method.
        spread: pooled over all methods.
        num_items: number of examples.
    """
    differences = first - second  # (seeds, 1 + resamples)
    num_seeds, point = len(differences), float(differences[:, 0].mean())
    resampled = differences[:, 1:].mean(axis=0)  # (resamples,)
    resampled = resampled[~np.isnan(resampled)]
    from_items = float(resampled.var(ddof=1)) if len(resampled) > 1 else math.nan
    own = float(differences[:, 0].var(ddof=1)) if num_seeds > 1 else 0.0
    from_seeds = max(own, spread.variance) / num_seeds
    seed_freedom = max(num_seeds - 1, spread.freedom)
    variance = from_items + from_seeds
    freedom = seed_freedom * (variance / from_seeds) ** 2 if from_seeds > 0 else math.inf
    error = math.sqrt(variance)
    if error > 0 or math.isnan(point):
        p = float(2 * stats.t.sf(abs(point) / error, freedom))
    else:  # every example differs by the same amount: the sign test of the examples
        p = 1.0 if point == 0 else 2 * 0.5**num_items
    half = float(stats.t.ppf(0.975, freedom)) * error
    return {
        "values": (float(first[:, 0].mean()), float(second[:, 0].mean())),
        "difference": point,
        "interval": (point - half, point + half),
        "p": float(np.minimum(1.0, p)),
        "num_items": num_items,
        "num_seeds": num_seeds,
    }
