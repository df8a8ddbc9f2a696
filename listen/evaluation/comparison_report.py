"""A comparison as Markdown, CSV and plots."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.escape import csv_cell, markdown
from ..data.files import write_text
from .comparison import (
    CELL_FILE,
    EVALUATION_FOLDER,
    LOSS,
    SIGNIFICANCE,
    Cell,
    Comparison,
    compare,
    compare_losses,
    method_names,
    seed_interval,
    tasks_of,
)
from .comparison_plots import plot_curves, plot_scores
from .scoring import score_arrow


@dataclass(frozen=True)
class Figure:
    """A column about cost or loss.

    Attributes:
        name: in `Cell.figures`.
        title: its heading.
        format: of the shown mean over seeds.
        scale: factor of the shown value.
    """

    name: str
    title: str
    format: str
    scale: float = 1.0


FIGURES = (
    Figure("trainable_parameters", "trainable parameters", ",.0f"),
    Figure("parameters_beside_connector", "of these beside the connector", ",.0f"),
    Figure("seconds_per_step", "seconds a step", ".2f"),
    Figure("peak_memory_bytes", "peak memory, GB", ".2f", 1e-9),
    Figure("pool_used_share", "share of the prompts in use", ".2f"),
    Figure("pool_query_cosine", "cosine of queries", ".2f"),
    Figure("pool_key_cosine", "cosine of keys", ".2f"),
    Figure(LOSS, "eval LM loss", ".3f"),
)


def write_comparison(
    cells: Sequence[Cell], folder: str | Path, reference: str | None = None, notes: Sequence[str] = ()
) -> list[Comparison]:
    """Write `comparison.md`, `table.csv`, `pairs.csv`, `cells.csv`, `scores.png` and, with logs, `curves.png`.

    `losses.csv` holds the pairs of held-out LM losses, where methods have common seeds.

    Args:
        cells: evaluated runs, the methods in the order of the table.
        folder: created if needed.
        reference: method that the table and the plot mark differences from; the first one by default.
        notes: sentences for the end of the Markdown file.

    Returns:
        All pairwise comparisons.

    Raises:
        ValueError: no cells, an unknown reference, or runs that were evaluated on different examples.
    """
    methods = method_names(cells)
    reference = reference or (methods[0] if methods else None)
    if reference not in methods:
        raise ValueError(f"reference={reference!r} is no method of the comparison; choose one of {methods}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    comparisons, losses = compare(cells), compare_losses(cells)
    text = markdown_comparison(cells, comparisons, losses, reference, notes)
    write_text(folder / "comparison.md", text)
    _write_csv(folder / "table.csv", _table_rows(cells))
    _write_csv(folder / "pairs.csv", [_pair_row(comparison) for comparison in comparisons])
    _write_csv(folder / "cells.csv", _cell_rows(cells))
    if losses:
        _write_csv(folder / "losses.csv", [_pair_row(loss) for loss in losses])
    plot_scores(cells, comparisons, reference).savefig(folder / "scores.png", dpi=150)
    if any("lm_loss" in entry for cell in cells for entry in cell.history):
        plot_curves(cells).savefig(folder / "curves.png", dpi=150)
    return comparisons


def markdown_comparison(
    cells: Sequence[Cell],
    comparisons: Sequence[Comparison],
    losses: Sequence[Comparison],
    reference: str,
    notes: Sequence[str] = (),
) -> str:
    """The table, the counts of all pairwise comparisons, the differences in held-out loss, and how to read them."""
    tasks = tasks_of(cells)
    heads = [f"{task} {_metric(cells, task)} {score_arrow(_metric(cells, task))}" for task in tasks]
    figures = [figure for figure in FIGURES if any(figure.name in cell.figures for cell in cells)]
    lines = [
        _line(["method", "seeds", *(figure.title for figure in figures), *heads]),
        _line(["---", *["---:"] * (1 + len(figures) + len(tasks))]),
    ]
    for method in method_names(cells):
        own = [cell for cell in cells if cell.method == method]
        costs = [_figure_cell(own, figure) for figure in figures]
        scores = [_score_cell(own, task, _mark(comparisons, task, reference, method)) for task in tasks]
        lines.append(_line([markdown(method), str(len(own)), *costs, *scores]))
    significant = sum(comparison.better is not None for comparison in comparisons)
    lines += [
        "",
        "Mean over seeds ± half of its 95 % interval (Student's t), which a single seed does not have. (+) and (-): "
        f"significantly better and worse than {markdown(reference)}.",
        "",
        f"All pairs of methods were compared on all tasks: of {len(comparisons)} comparisons {significant} are "
        f"significant at {SIGNIFICANCE} after Holm's correction for all {len(comparisons)} (paired bootstrap over "
        "examples, spread over seeds added). Tasks on which the method of the row is significantly better / worse / "
        "neither than that of the column:",
        "",
        *_pair_matrix(comparisons, method_names(cells)),
        *_loss_lines(losses),
    ]
    return "\n".join([*lines, *(f"\n{note}" for note in notes)]) + "\n"


def markdown_prompts(folder: str | Path, methods: Sequence[str], seeds: Container[int] | None = None) -> str:
    """Which tasks share prompts and queries, for every method with a pool, as means over its finished seeds.

    Args:
        folder: output folder of a comparison.
        methods: names of the methods, in order.
        seeds: those to include; all by default.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(Path(folder).glob(f"*/*/{CELL_FILE}")):  # not of cells that are still evaluated
        cell, pool = json.loads(path.read_text(encoding="utf-8")), path.parent / EVALUATION_FOLDER / "pool/pool.json"
        if pool.is_file() and (seeds is None or cell["seed"] in seeds):
            found.setdefault(cell["method"], []).append(json.loads(pool.read_text(encoding="utf-8")))
    lines = ["# Prompts and queries of the tasks"]
    for method in (name for name in methods if name in found):
        lines += ["", f"## {markdown(method)}"]
        for name, title in (
            ("weighted_jaccard", "Overlap of the prompts of two tasks: 1 for the same ones equally often, 0 for none"),
            ("query_cosines", "Mean cosine between the queries of two tasks"),
        ):
            matrices = [pool[name] for pool in found[method] if name in pool]
            lines += ["", f"{title}:", "", *_task_matrix(matrices)] if matrices else []
    return "\n".join(lines) + "\n"


def _task_matrix(matrices: Sequence[Mapping[str, Mapping[str, float]]]) -> list[str]:
    """The mean of matrices of tasks; the nearest other task of each row in bold."""
    tasks = list(matrices[0])
    lines = [_line(["", *tasks]), _line(["---", *["---:"] * len(tasks)])]
    for row in tasks:
        means = {task: float(np.mean([matrix[row][task] for matrix in matrices])) for task in tasks}
        nearest = max((task for task in tasks if task != row), key=means.__getitem__, default=row)
        shown = [f"**{means[task]:.2f}**" if task == nearest else f"{means[task]:.2f}" for task in tasks]
        lines.append(_line([row, *shown]))
    return lines


def markdown_pairs(comparisons: Sequence[Comparison]) -> str:
    """Comparisons one by one, for two evaluations."""
    heads = ["task", "metric", "first", "second", "difference", "95 % interval", "p", "p, Holm", "n", "better"]
    lines = [_line(heads), _line(["---", "---", *["---:"] * 7, "---"])]
    for one in comparisons:
        interval = " .. ".join(f"{end:.4g}" for end in one.interval)
        values = [f"{value:.4g}" for value in (*one.values, one.difference)]
        tail = [f"{one.p:.2g}", f"{one.p_holm:.2g}", str(one.num_items), markdown(one.better or "not decided")]
        lines.append(_line([one.task, f"{one.metric} {score_arrow(one.metric)}", *values, interval, *tail]))
    return "\n".join(lines) + "\n"


def _pair_matrix(comparisons: Sequence[Comparison], methods: Sequence[str]) -> list[str]:
    lines = [_line(["", *map(markdown, methods)]), _line(["---", *["---:"] * len(methods)])]
    for row in methods:
        cells = []
        for column in methods:
            own = [one for one in comparisons if {one.first, one.second} == {row, column} and row != column]
            wins = [one.better for one in own]
            counts = (wins.count(row), wins.count(column), wins.count(None))
            cells.append(" / ".join(map(str, counts)) if own else "")
        lines.append(_line([markdown(row), *cells]))
    return lines


def _loss_lines(losses: Sequence[Comparison]) -> list[str]:
    """The held-out LM losses of all pairs, a row minus a column."""
    if not losses:
        return []
    methods = list(dict.fromkeys(name for loss in losses for name in (loss.first, loss.second)))
    ends = {(one.first, one.second): (1, one) for one in losses} | {
        (one.second, one.first): (-1, one) for one in losses
    }
    lines = [
        "",
        "Held-out LM loss, row minus column, below 0 where the row is better: mean difference over the common seeds ± "
        "half of its 95 % interval (paired t test over seeds). (+) and (-): the row is significantly better and worse, "
        f"after Holm's correction for these {len(losses)} pairs.",
        "",
        _line(["", *map(markdown, methods)]),
        _line(["---", *["---:"] * len(methods)]),
    ]
    for row in methods:
        shown = [_loss_cell(row, *ends[row, column]) if (row, column) in ends else "" for column in methods]
        lines.append(_line([markdown(row), *shown]))
    return lines


def _loss_cell(row: str, sign: int, loss: Comparison) -> str:
    low, high = loss.interval
    mark = "" if loss.better is None else " (+)" if loss.better == row else " (-)"
    return f"{sign * loss.difference:.3f} ± {(high - low) / 2:.3f}{mark}"


def _mark(comparisons: Sequence[Comparison], task: str, reference: str, method: str) -> str:
    for one in comparisons:
        if one.task == task and {one.first, one.second} == {reference, method}:
            return {method: " (+)", reference: " (-)"}.get(one.better or "", "")
    return ""


def _score_cell(cells: Sequence[Cell], task: str, mark: str) -> str:
    values = [cell.value(task) for cell in cells if task in cell.items]
    return f"{_mean(values, '.3f')}{mark}" if values else "-"


def _figure_cell(cells: Sequence[Cell], figure: Figure) -> str:
    values = [cell.figures[figure.name] * figure.scale for cell in cells if figure.name in cell.figures]
    if not values:
        return "-"
    return _mean(values, figure.format) if figure.name == LOSS else format(np.mean(values), figure.format)


def _mean(values: Sequence[float], digits: str) -> str:
    interval = seed_interval(values)
    mean = format(float(np.mean(values)), digits)
    return mean if interval is None else f"{mean} ± {(interval[1] - interval[0]) / 2:{digits}}"


def _metric(cells: Sequence[Cell], task: str) -> str:
    return next(cell.items[task].name for cell in cells if task in cell.items)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One row for each method and value: mean and interval over seeds."""
    rows = []
    for method in method_names(cells):
        own = [cell for cell in cells if cell.method == method]
        for name, values in _values(own).items():
            low, high = seed_interval(values) or ("", "")
            row = {"method": method, "value": name, "mean": float(np.mean(values)), "low": low, "high": high}
            rows.append({**row, "seeds": len(values)})
    return rows


def _values(cells: Sequence[Cell]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in _cell_rows(cells):
        found.setdefault(row["value"], []).append(row["number"])
    return found


def _cell_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One row for each cell and value."""
    rows = []
    for cell in cells:
        values = {**cell.figures, **{f"{task} {items.name}": items.value() for task, items in cell.items.items()}}
        for name, number in values.items():
            rows.append({"method": cell.method, "seed": cell.seed, "value": name, "number": number})
    return rows


def _pair_row(comparison: Comparison) -> dict[str, Any]:
    (first, second), (low, high) = comparison.values, comparison.interval
    row = {**vars(comparison), "first_value": first, "second_value": second, "low": low, "high": high}
    return {name: value for name, value in row.items() if name not in ("values", "interval")} | {
        "better": comparison.better or ""
    }


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["method"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(v) if isinstance(v, str) else v for name, v in row.items()} for row in rows)
    write_text(path, text.getvalue())
