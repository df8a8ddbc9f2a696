"""The table of SpeechEmotionLlama (arXiv 2410.01162, Table I) over any systems: Markdown, CSV and a picture.

Also which of that paper's orderings hold. Systems are identified by their names there: `Baseline 1`, `Cascade +
Baseline 1`, `Baseline 2`, `Cascade + Baseline 2`, `v1`, `v2`, `v3`; other systems are rows of the table only.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure


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


@dataclass(frozen=True)
class Ordering:
    """One claim of the paper, and whether the measured values support it.

    Attributes:
        claim: the claim in words.
        column: the value that it is about.
        higher: system that should have the higher value.
        lower: the other system.
        or_equal: whether equal values support it too.
        values: those of `higher` and `lower`; `None` where one was not measured.
        clear: whether their intervals do not overlap; `None` without intervals.
    """

    claim: str
    column: str
    higher: str
    lower: str
    or_equal: bool = False
    values: tuple[float, float] | None = None
    clear: bool | None = None

    @property
    def holds(self) -> bool | None:
        """Whether the claim holds; `None` where it was not measured."""
        if self.values is None:
            return None
        first, second = self.values
        return first > second or (self.or_equal and first == second)


ORDERINGS = (
    Ordering("targets told of the emotion beat untagged ones on emotion", "emotion", "v1", "Baseline 2"),
    Ordering("so they do with captions", "emotion", "v2", "Baseline 2"),
    Ordering("and with recognition", "emotion", "v3", "Baseline 2"),
    Ordering("captions raise the linear probe", "probe_accuracy", "v2", "v1"),
    Ordering("recognition raises the linear probe", "probe_accuracy", "v3", "v2"),
    Ordering("v3 recognises as well as the cascade", "ser_accuracy", "v3", "Cascade + Baseline 2", or_equal=True),
)


def load_scores(folder: str | Path) -> SystemScores:
    """Values that an evaluation of responses saved in a folder.

    Raises:
        FileNotFoundError: the folder has no `metrics.json`.
        ValueError: that file is from another kind of evaluation.
    """
    path = Path(folder) / "metrics.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if "system" not in content:
        raise ValueError(f"{path} was not written by examples/evaluate_responses.py: it names no system")
    values = {column.name: content[column.name] for column in COLUMNS if content.get(column.name) is not None}
    intervals = {name: tuple(ends) for name, ends in content["details"]["confidence_95"].items()}
    return SystemScores(content["system"], values, intervals)


def check_orderings(systems: Sequence[SystemScores]) -> list[Ordering]:
    """Each of the paper's orderings with the values of these systems."""
    by_name = {_plain(system.name): system for system in systems}
    found = []
    for ordering in ORDERINGS:
        pair = [by_name.get(_plain(name), SystemScores(name)) for name in (ordering.higher, ordering.lower)]
        values = [system.values.get(ordering.column, math.nan) for system in pair]
        ends = [system.intervals.get(ordering.column) for system in pair]
        clear = None if None in ends else ends[0][0] > ends[1][1] or ends[1][0] > ends[0][1]
        known = None if any(map(math.isnan, values)) else (values[0], values[1])
        found.append(_with_figures(ordering, known, clear))
    return found


def write_table(systems: Sequence[SystemScores], folder: str | Path) -> Path:
    """Write `table.md`, `table.csv`, `table.png` and `orderings.json` into a folder, created if needed.

    Raises:
        ValueError: no systems, or two of the same name.
    """
    names = [_plain(system.name) for system in systems]
    if not systems or len(set(names)) < len(names):
        raise ValueError(f"a table needs one or more systems of different names, got {[s.name for s in systems]}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(markdown_table(systems), encoding="utf-8")
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(_csv_rows(systems))
    plot_table(systems).savefig(folder / "table.png", dpi=150)
    records = [{**vars(ordering), "holds": ordering.holds} for ordering in check_orderings(systems)]
    (folder / "orderings.json").write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    return folder


def markdown_table(systems: Sequence[SystemScores]) -> str:
    """The table, its 95 % intervals, and the paper's orderings, as Markdown."""
    head = ["system", *(column.title for column in COLUMNS)]
    lines = [_line(head), _line(["---", *("---:" for _ in COLUMNS)])]
    lines += [_line([s.name, *(_value(s, column) for column in COLUMNS)]) for s in systems]
    lines += ["", "95 % intervals:", "", _line(head), _line(["---", *("---:" for _ in COLUMNS)])]
    lines += [_line([s.name, *(_interval(s, column) for column in COLUMNS)]) for s in systems]
    lines += ["", _line(["ordering of the paper", "column", "figures", "holds"]), _line(["---"] * 4)]
    lines += [_line(_ordering_cells(ordering)) for ordering in check_orderings(systems)]
    return "\n".join(lines) + "\n"


def plot_table(systems: Sequence[SystemScores]) -> Figure:
    """The table as a picture, the highest value of each column in bold."""
    figure = Figure(figsize=(11.0, 0.9 + 0.34 * len(systems)), layout="constrained")
    axes = figure.add_subplot()
    axes.axis("off")
    cells = [[system.name, *(_value(system, column) for column in COLUMNS)] for system in systems]
    heads = ["system", *(column.title for column in COLUMNS)]
    widths = [0.24, *(0.76 / len(COLUMNS) for _ in COLUMNS)]
    table = axes.table(cells, colLabels=heads, colWidths=widths, loc="center", edges="horizontal", cellLoc="right")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1.0, 1.4)
    for row in range(len(systems) + 1):
        table[row, 0].get_text().set_horizontalalignment("left")
    for place, column in enumerate(COLUMNS, start=1):
        values = [system.values.get(column.name, -math.inf) for system in systems]
        for row, value in enumerate(values, start=1):
            if value == max(values) > -math.inf:
                table[row, place].get_text().set_fontweight("bold")
    return figure


def _with_figures(ordering: Ordering, values: tuple[float, float] | None, clear: bool | None) -> Ordering:
    fields = {**vars(ordering), "values": values, "clear": None if values is None else clear}
    return Ordering(**fields)


def _plain(name: str) -> str:
    return "".join(name.lower().split())


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _value(system: SystemScores, column: Column) -> str:
    value = system.values.get(column.name)
    return ABSENT if value is None else f"{value * column.scale:.{column.digits}f}"


def _interval(system: SystemScores, column: Column) -> str:
    ends = system.intervals.get(column.name)
    return ABSENT if ends is None else " .. ".join(f"{end * column.scale:.{column.digits}f}" for end in ends)


def _ordering_cells(ordering: Ordering) -> list[str]:
    claim = f"{ordering.claim} ({ordering.higher} over {ordering.lower})"
    column = next(column for column in COLUMNS if column.name == ordering.column)
    if ordering.values is None:
        return [claim, column.title, ABSENT, "not measured"]
    figures = " against ".join(f"{value * column.scale:.{column.digits}f}" for value in ordering.values)
    verdict = "yes" if ordering.holds else "no"
    overlap = ", but the intervals overlap" if ordering.clear is False else ""
    return [claim, column.title, figures, verdict + overlap]


def _csv_rows(systems: Sequence[SystemScores]) -> list[list[object]]:
    """Plain numbers in the scale of `metrics.json`, each with the ends of its interval; empty where unmeasured."""
    head = ["system", *(f"{column.name}{end}" for column in COLUMNS for end in ("", "_low", "_high"))]
    rows: list[list[object]] = [head]
    for system in systems:
        cells: list[object] = [system.name]
        for column in COLUMNS:
            low, high = system.intervals.get(column.name, ("", ""))
            cells += [system.values.get(column.name, ""), low, high]
        rows.append(cells)
    return rows
