"""Plots of a trained prompt pool. Every function returns a matplotlib `Figure`; no display is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from .escape import plot_text
from .queries import QueryClusters
from .usage import PromptUsage, task_names

# Okabe & Ito's palette, safe for colour-blind readers; the markers repeat the distinction
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
_MARKERS = "os^DvPX*"
_MAX_TICKS = 40
_GREY = "#666666"
_SEQUENTIAL, _DIVERGING = "Blues", "RdBu_r"


def plot_usage(usage: PromptUsage) -> Figure:
    """Heat map of how often each task selects each prompt in use, ordered as `PromptUsage.by_owner`."""
    order = usage.by_owner()
    figure, axes = _panel(width=max(6.0, min(14.0, 2.5 + 0.22 * len(order))), height=1.6 + 0.38 * len(usage.tasks))
    image = _heat_map(axes, usage.shares[:, order], usage.tasks, order, cmap=_SEQUENTIAL, vmin=0, vmax=1)
    pool_size = usage.shares.shape[1]
    axes.set_title(
        f"Prompts selected by task: {len(order)} of {pool_size} in use, entropy {usage.entropy():.2f}", loc="left"
    )
    axes.set_xlabel("prompt: shared ones first, then by the task that selects it most")
    _colour_bar(figure, image, "share of examples")
    return figure


def plot_overlap(usage: PromptUsage) -> Figure:
    """Matrix of the weighted Jaccard overlap between the prompts of every two tasks."""
    overlap, n = usage.weighted_jaccard(), len(usage.tasks)
    figure, axes = _panel(width=3.0 + 0.55 * n, height=1.6 + 0.5 * n)
    image = _heat_map(axes, overlap, usage.tasks, usage.tasks, cmap=_SEQUENTIAL, vmin=0, vmax=1)
    for row, column in np.ndindex(n, n):
        shade = "white" if overlap[row, column] > 0.6 else "black"
        axes.text(column, row, f"{overlap[row, column]:.2f}", ha="center", va="center", color=shade, fontsize=8)
    axes.set_title("Overlap of the tasks' prompts", loc="left")
    _colour_bar(figure, image, "weighted Jaccard")
    return figure


def plot_query_keys(tasks: Sequence[str], similarity: np.ndarray, order: np.ndarray) -> Figure:
    """Heat map of the mean cosine `(tasks, pool)` between a task's queries and the keys `order`, as in `plot_usage`."""
    limit = max(float(np.abs(similarity).max()), 1e-6)
    figure, axes = _panel(width=max(6.0, min(14.0, 2.5 + 0.22 * len(order))), height=1.6 + 0.38 * len(tasks))
    image = _heat_map(axes, similarity[:, order], tasks, order, cmap=_DIVERGING, vmin=-limit, vmax=limit)
    axes.set_title("Similarity of queries and keys", loc="left")
    axes.set_xlabel("key of the prompts in use, in the same order as in the plot of selections")
    _colour_bar(figure, image, "mean cosine")
    return figure


def plot_query_map(points: np.ndarray, tasks: Sequence[str], clusters: QueryClusters) -> Figure:
    """Scatter of projected queries `(examples, 2)`, one colour and marker per task."""
    title = (
        f"Queries (t-SNE): silhouette {clusters.silhouette:.2f}, "
        f"nearest neighbour of the same task {clusters.neighbour_accuracy:.0%}"
    )
    return plot_map(points, tasks, task_names(tasks), title)


def plot_map(points: np.ndarray, labels: Sequence[str], names: Sequence[str], title: str) -> Figure:
    """Scatter of points `(examples, 2)`, one colour and marker per label, the legend in the order of `names`."""
    figure, axes = _panel(width=7.0, height=5.2)
    of_label = np.asarray(labels)
    for place, name in enumerate(names):
        x, y = points[of_label == name].T
        axes.scatter(x, y, s=22, alpha=0.8, linewidths=0, label=plot_text(name), **_style(place))
    axes.set_title(title, loc="left", fontsize=10)
    axes.set(xticks=[], yticks=[])
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _panel(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(place: int) -> Mapping[str, str]:
    """Colour and marker of the entry at `place`; no two of the first 64 share both."""
    shift = place // len(COLOURS)
    return {"color": COLOURS[place % len(COLOURS)], "marker": _MARKERS[(place + shift) % len(_MARKERS)]}


def _heat_map(
    axes: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[object], **colours: object
) -> AxesImage:
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **colours)
    axes.set_yticks(range(len(rows)), [plot_text(row) for row in rows])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    step = -(-len(columns) // _MAX_TICKS) or 1
    places = range(0, len(columns), step)
    axes.set_xticks(places, [plot_text(columns[place]) for place in places], fontsize=7, rotation=90 if step > 1 else 0)
    return image


def _colour_bar(figure: Figure, image: AxesImage, label: str) -> None:
    bar = figure.colorbar(image, shrink=0.9, pad=0.02)
    bar.set_label(label, color=_GREY)
    bar.outline.set_visible(False)
