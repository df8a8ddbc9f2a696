"""The table of SpeechEmotionLlama (arXiv 2410.01162, Table I) over any systems: Markdown, CSV and a picture.

Also how many of that table's pairwise orderings the measured figures reproduce. Systems are identified by their names
there: `Baseline 1`, `Cascade + Baseline 1`, `Baseline 2`, `Cascade + Baseline 2`, `v1`, `v2`, `v3`; other systems are
rows of the table only.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from itertools import chain
from pathlib import Path

from matplotlib.figure import Figure

from ..analysis.escape import csv_cell, markdown, plot_text, read_csv_cell
from ..data.files import json_text, write_text
from .orderings import Ordering, check_orderings, count_orderings, plain_name


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        name: of the value in `metrics.json`.
        title: its heading.
        scale: factor of the shown value.
        digits: decimals shown.
    """

    name: str
    title: str
    scale: float = 1.0
    digits: int = 2


COLUMNS = (
    Column("rouge_1", "R-1", digits=3),
    Column("rouge_2", "R-2", digits=3),
    Column("rouge_l", "R-L", digits=3),
    Column("bertscore", "BERTScore", scale=100),
    Column("quality", "quality"),
    Column("emotion", "emotion"),
    Column("ser_accuracy", "SER %", scale=100),
    Column("probe_accuracy", "linear probe %", scale=100),
)
ABSENT = "-"


@dataclass(frozen=True)
class SystemScores:
    """Figures of one system.

    Attributes:
        name: name in the table.
        values: by the names of `COLUMNS`; values that were not measured are missing.
        intervals: their 95 % intervals.
    """

    name: str
    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


def load_scores(folder: str | Path) -> SystemScores:
    """Values that an evaluation of responses saved in a folder.

    Raises:
        FileNotFoundError: the folder has no `metrics.json`.
        ValueError: that file is from another kind of evaluation.
    """
    path = Path(folder) / "metrics.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        values = {column.name: content[column.name] for column in COLUMNS if content.get(column.name) is not None}
        intervals = {name: (low, high) for name, (low, high) in content["details"]["confidence_95"].items()}
        system, numbers = content["system"], [*values.values(), *chain(*intervals.values())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} was not written by examples/evaluate_responses.py: it names no system with scores ({error!r})"
        ) from error
    odd = [value for value in numbers if isinstance(value, bool) or not isinstance(value, (int, float))]
    if odd or not all(map(math.isfinite, numbers)) or not isinstance(system, str):
        raise ValueError(f"{path} names the system {system!r} and the scores {values}: a text and numbers are needed")
    return SystemScores(system, values, intervals)


def read_scores(table: str | Path) -> list[SystemScores]:
    """Systems of a `table.csv` that `write_table` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has other columns.
    """
    with Path(table).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or list(rows[0]) != _csv_rows([])[0]:
        raise ValueError(f"{table} is not a table.csv of this version; its columns must be {_csv_rows([])[0]}")
    found = []
    for row in rows:
        names = [column.name for column in COLUMNS]
        values = {name: float(row[name]) for name in names if row[name]}
        ends = {name: (row[f"{name}_low"], row[f"{name}_high"]) for name in names if row[f"{name}_low"]}
        intervals = {name: (float(low), float(high)) for name, (low, high) in ends.items()}
        found.append(SystemScores(read_csv_cell(row["system"]), values, intervals))
    return found


def orderings_of(systems: Sequence[SystemScores]) -> list[Ordering]:
    """All strict pairwise orderings of the paper's table, with the figures of these systems."""
    return check_orderings({s.name: s.values for s in systems}, {s.name: s.intervals for s in systems})


def write_table(systems: Sequence[SystemScores], folder: str | Path) -> Path:
    """Write `table.md`, `table.csv`, `table.png` and `orderings.json` into a folder, created if needed.

    Raises:
        ValueError: no systems, or two of the same name.
    """
    names = [plain_name(system.name) for system in systems]
    if not systems or len(set(names)) < len(names):
        raise ValueError(f"a table needs one or more systems of different names, got {[s.name for s in systems]}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "table.md", markdown_table(systems))
    table = StringIO(newline="")
    csv.writer(table).writerows(_csv_rows(systems))
    write_text(folder / "table.csv", table.getvalue())
    plot_table(systems).savefig(folder / "table.png", dpi=150)
    orderings = orderings_of(systems)
    records = [{**vars(ordering), "agrees": ordering.agrees} for ordering in orderings]
    content = {"counts": count_orderings(orderings), "orderings": records}
    write_text(folder / "orderings.json", json_text(content, indent=1) + "\n")
    return folder


def markdown_table(systems: Sequence[SystemScores]) -> str:
    """The table, its 95 % intervals, and the paper's orderings, as Markdown."""
    head = ["system", *(column.title for column in COLUMNS)]
    lines = [_line(head), _line(["---", *("---:" for _ in COLUMNS)])]
    lines += [_line([s.name, *(_value(s, column) for column in COLUMNS)]) for s in systems]
    lines += ["", "95 % intervals:", "", _line(head), _line(["---", *("---:" for _ in COLUMNS)])]
    lines += [_line([s.name, *(_interval(s, column) for column in COLUMNS)]) for s in systems]
    orderings = orderings_of(systems)
    return "\n".join([*lines, *(orderings_lines(orderings) if orderings else [])]) + "\n"


def orderings_lines(orderings: Sequence[Ordering]) -> list[str]:
    """How many of the paper's orderings agree, and for each pair of systems which do not, as lines of Markdown."""
    counts = count_orderings(orderings)
    lines = [
        "",
        f"Of {counts['orderings']} strict pairwise orderings of the paper's table, {counts['agree']} agree "
        f"({counts['agree_without_overlap']} with intervals that do not overlap), {counts['equal']} are equal here and "
        f"{counts['reversed']} are reversed ({counts['reversed_without_overlap']} with intervals that do not overlap).",
        "",
        _line(["pair of systems", "agree", "orderings that do not agree"]),
        _line(["---", "---:", "---"]),
    ]
    pairs: dict[frozenset[str], list[Ordering]] = {}
    for ordering in orderings:
        pairs.setdefault(frozenset((ordering.higher, ordering.lower)), []).append(ordering)
    for group in pairs.values():
        share = f"{sum(ordering.agrees for ordering in group)} of {len(group)}"
        texts = [_ordering_text(o, named=o.higher != group[0].higher) for o in group if not o.agrees]
        lines.append(_line([f"{group[0].higher} over {group[0].lower}", share, "; ".join(texts)]))
    return lines


def plot_table(systems: Sequence[SystemScores]) -> Figure:
    """The table as a picture with 95 % intervals, the highest value of each column in bold."""
    figure = Figure(figsize=(12.0, 0.9 + 0.5 * len(systems)), layout="constrained")
    axes = figure.add_subplot()
    axes.axis("off")
    cells = [[plot_text(system.name), *(_pictured(system, column) for column in COLUMNS)] for system in systems]
    heads = ["system", *(f"{column.title} ↑" for column in COLUMNS)]
    widths = [0.24, *(0.76 / len(COLUMNS) for _ in COLUMNS)]
    table = axes.table(cells, colLabels=heads, colWidths=widths, loc="center", edges="horizontal", cellLoc="right")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1.0, 2.2)
    for row in range(len(systems) + 1):
        table[row, 0].get_text().set_horizontalalignment("left")
    for place, column in enumerate(COLUMNS, start=1):
        values = [system.values.get(column.name, -math.inf) for system in systems]
        for row, value in enumerate(values, start=1):
            if value == max(values) > -math.inf:
                table[row, place].get_text().set_fontweight("bold")
    return figure


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(markdown, cells))} |"


def _value(system: SystemScores, column: Column) -> str:
    value = system.values.get(column.name)
    return ABSENT if value is None else f"{value * column.scale:.{column.digits}f}"


def _interval(system: SystemScores, column: Column) -> str:
    ends = system.intervals.get(column.name)
    return ABSENT if ends is None else " .. ".join(f"{end * column.scale:.{column.digits}f}" for end in ends)


def _pictured(system: SystemScores, column: Column) -> str:
    """A value, and its interval on a second line."""
    interval = _interval(system, column)
    return _value(system, column) + ("" if interval == ABSENT else f"\n{interval}")


def _ordering_text(ordering: Ordering, named: bool) -> str:
    """One ordering that does not agree; `named` where the paper orders these two the other way than its row says."""
    column = next(column for column in COLUMNS if column.name == ordering.column)
    figures = " against ".join(f"{value * column.scale:.{column.digits}f}" for value in ordering.values)
    systems = f" of {ordering.higher} over {ordering.lower}" if named else ""
    overlap = ", no overlap" if ordering.overlap is False else ""
    return f"{column.title}{systems} ({figures}{overlap})"


def _csv_rows(systems: Sequence[SystemScores]) -> list[list[object]]:
    """Plain numbers in the scale of `metrics.json`, each with the ends of its interval; empty where unmeasured."""
    head = ["system", *(f"{column.name}{end}" for column in COLUMNS for end in ("", "_low", "_high"))]
    rows: list[list[object]] = [head]
    for system in systems:
        cells: list[object] = [csv_cell(system.name)]
        for column in COLUMNS:
            low, high = system.intervals.get(column.name, ("", ""))
            cells += [system.values.get(column.name, ""), low, high]
        rows.append(cells)
    return rows
