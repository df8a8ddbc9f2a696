"""Scores of one model over the number of prompts k: how many does each task need?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..analysis.escape import plot_text
from ..analysis.plots import COLOURS
from ..data.files import write_json
from .result import EvaluationResult
from .scoring import score_title


@dataclass
class Sweep:
    """Scores over the number of prompts.

    Attributes:
        metrics: leading metric of each task.
        scores: for each k, `{task: value}` of that metric.
        intervals: for each k, `{task: (low, high)}`, the 95 % bootstrap interval, where there is one.
    """

    metrics: dict[str, str] = field(default_factory=dict)
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    intervals: dict[int, dict[str, tuple[float, float]]] = field(default_factory=dict)

    @property
    def num_prompts(self) -> list[int]:
        """The values of k, in order."""
        return sorted(self.scores)

    def value(self, task: str, k: int) -> float:
        """Leading metric of a task at k."""
        return self.scores[k][task]

    def interval(self, task: str, k: int) -> tuple[float, float]:
        """Its interval; the value twice where there is none."""
        return self.intervals[k].get(task, (self.scores[k][task],) * 2)

    @property
    def without_prompts(self) -> dict[str, dict[str, float]]:
        """The scores at k = 0 as `EvaluationResult.without_prompts`."""
        return {task: {name: self.scores[0][task]} for task, name in self.metrics.items()}

    def add(self, k: int, result: EvaluationResult) -> None:
        """Add the leading metrics of an evaluation at k."""
        self.metrics = {task: next(iter(scores)) for task, scores in result.metrics.items()}
        self.scores[k] = {task: result.metrics[task][name] for task, name in self.metrics.items()}
        found = {task: result.intervals[task].get(name) for task, name in self.metrics.items()}
        self.intervals[k] = {task: interval for task, interval in found.items() if interval is not None}

    def saturation(self, task: str) -> int:
        """The smallest k whose interval holds the score of the largest k: more prompts give no measurable gain.

        The largest k itself where its score is undefined.
        """
        last = self.value(task, self.num_prompts[-1])
        within = (k for k in self.num_prompts if self.interval(task, k)[0] <= last <= self.interval(task, k)[1])
        return next(within, self.num_prompts[-1])

    def save(self, folder: str | Path) -> None:
        """Write `sweep.json` and `sweep.png` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        table = {
            "metrics": self.metrics,
            "num_prompts": {str(k): _nulls(self.scores[k]) for k in self.num_prompts},
            "confidence_95": {str(k): self.intervals[k] for k in self.num_prompts},
            "saturation": {task: self.saturation(task) for task in self.metrics},
        }
        write_json(folder / "sweep.json", table)
        plot_sweep(self).savefig(folder / "sweep.png", dpi=120)


def _nulls(scores: dict[str, float]) -> dict[str, float | None]:
    """Scores with null for NaN, which JSON does not have."""
    return {task: None if math.isnan(value) else value for task, value in scores.items()}


def default_counts(num_prompts: int) -> list[int]:
    """0, 2, 4, 8, ... below `num_prompts`, then `num_prompts` itself."""
    powers = [2**power for power in range(1, 16) if 2**power < num_prompts]
    return sorted({0, *powers, num_prompts})


def sweep_num_prompts(evaluate: Callable[..., EvaluationResult], counts: Sequence[int], **options: Any) -> Sweep:
    """Evaluate once for each k, and without prompts, which shows what they contribute.

    Args:
        evaluate: called as `evaluate(num_prompts=k, **options)`, such as `functools.partial(evaluate_model, model,
            processor, dataset)`.
        counts: values of k; 0 is added.
        **options: passed on to `evaluate`.

    Raises:
        ValueError: no value of k, or one below 0.
    """
    if not counts or min(counts) < 0:
        raise ValueError(f"counts={list(counts)} must hold at least one k, none below 0")
    sweep = Sweep()
    for k in sorted({0, *counts}):
        sweep.add(k, evaluate(num_prompts=k, **options))
    return sweep


def plot_sweep(sweep: Sweep) -> Figure:
    """The leading metric of each task over the number of prompts k, with its 95 % interval; one panel per task."""
    names = list(sweep.metrics)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.7 * rows), layout="constrained")
    for place, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, place + 1)
        _plot_curve(axes, sweep, name)
    figure.suptitle("Scores over the number of prompts k", x=0.01, ha="left")
    return figure


def _plot_curve(axes: Axes, sweep: Sweep, task: str) -> None:
    counts = sweep.num_prompts
    low, high = np.array([sweep.interval(task, k) for k in counts]).T  # (counts,) each
    axes.fill_between(counts, low, high, color=COLOURS[0], alpha=0.15, linewidth=0)
    axes.plot(counts, [sweep.value(task, k) for k in counts], color=COLOURS[0], marker="o", markersize=4)
    axes.set_xscale("symlog", base=2, linthresh=1)  # logarithmic, with a place for 0
    axes.set_xticks(counts, [str(k) for k in counts])
    axes.minorticks_off()
    axes.set_title(plot_text(f"{task}: {score_title(sweep.metrics[task])}"), loc="left", fontsize=10)
    axes.set_xlabel("prompts k")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
