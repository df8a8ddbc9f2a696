"""Plots of a comparison. Every function returns a matplotlib `Figure`; no display is needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..analysis.escape import plot_text
from ..analysis.plots import COLOURS
from .comparison import Cell, Comparison, method_names, seed_interval, tasks_of
from .scoring import score_title

_BAR, _REFERENCE, _GREY = COLOURS[5], "#BBBBBB", "#666666"
_LINES = ("-", "--", ":", "-.")


def plot_scores(cells: Sequence[Cell], comparisons: Sequence[Comparison], reference: str) -> Figure:
    """Bars of each method, one panel per task: mean, 95 % interval over seeds, and a point for each seed.

    `*` marks bars that differ significantly from the reference, whose bar is grey.
    """
    methods, tasks = method_names(cells), tasks_of(cells)
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    size = (1.6 + 3.2 * columns, rows * (1.0 + 0.26 * len(methods)))
    figure = Figure(figsize=size, layout="constrained")
    for place, task in enumerate(tasks):
        axes = figure.add_subplot(rows, columns, place + 1)
        differing = {
            {one.first, one.second}.difference({reference}).pop()
            for one in comparisons
            if one.task == task and one.better is not None and reference in (one.first, one.second)
        }
        _plot_task(axes, cells, methods, task, reference, differing)
        if place % columns:
            axes.set_yticklabels([])
    title = f"Mean over seeds, 95 % intervals; * differs significantly from {plot_text(reference)}"
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _plot_task(
    axes: Axes, cells: Sequence[Cell], methods: Sequence[str], task: str, reference: str, differing: set[str]
) -> None:
    metric = next(cell.items[task].name for cell in cells if task in cell.items)
    for row, method in enumerate(methods):
        values = [cell.value(task) for cell in cells if cell.method == method and task in cell.items]
        if not values:
            continue
        mean, interval = float(np.mean(values)), seed_interval(values)
        axes.barh(row, mean, height=0.7, color=_REFERENCE if method == reference else _BAR)
        if interval is not None:
            axes.plot(interval, (row, row), color="black", linewidth=1.2)
        axes.plot(values, [row] * len(values), linestyle="", marker="o", markersize=2.5, color=_GREY)
        if method in differing:
            end = max([*values, *(interval or ())])
            axes.annotate("*", (end, row), xytext=(3, -4), textcoords="offset points")
    axes.set_yticks(range(len(methods)), [plot_text(method) for method in methods], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_title(plot_text(f"{task}: {score_title(metric)}"), loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def plot_curves(cells: Sequence[Cell]) -> Figure:
    """Learning curves: training LM loss over steps, mean over the seeds of each method, the range as a band."""
    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for place, method in enumerate(method_names(cells)):
        curves = [_curve(cell) for cell in cells if cell.method == method]
        steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
        if not steps:
            continue
        losses = np.array([[curve[step] for step in steps] for curve in curves])  # (seeds, steps)
        style = {"color": COLOURS[place % len(COLOURS)], "linestyle": _LINES[place // len(COLOURS) % len(_LINES)]}
        axes.plot(steps, losses.mean(axis=0), label=plot_text(method), linewidth=1.3, **style)
        axes.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=style["color"], alpha=0.12, linewidth=0)
    axes.set(xlabel="step", ylabel="LM loss in training", yscale="log")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _curve(cell: Cell) -> dict[int, float]:
    return {int(entry["step"]): entry["lm_loss"] for entry in cell.history if "lm_loss" in entry and "step" in entry}
