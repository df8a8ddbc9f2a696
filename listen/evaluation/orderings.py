"""Which orderings of Table I of SpeechEmotionLlama (arXiv 2410.01162) a measured table reproduces: all are counted.

An ordering is a column and two systems with different figures in that column of the paper. It agrees if the measured
figures are ordered the same way. Equal measured figures do not agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PAPER_COLUMNS = (
    "rouge_1",
    "rouge_2",
    "rouge_l",
    "bertscore",
    "quality",
    "emotion",
    "ser_accuracy",
    "probe_accuracy",
)
PAPER_TABLE: dict[str, tuple[float | None, ...]] = {
    "Baseline 1": (0.314, 0.112, 0.213, 0.9464, 5.46, 4.13, 0.2045, 0.2508),
    "Cascade + Baseline 1": (0.325, 0.122, 0.224, 0.9464, 5.58, 4.58, 0.8081, None),
    "Baseline 2": (0.375, 0.145, 0.245, 0.9473, 7.57, 5.59, 0.1389, 0.3120),
    "Cascade + Baseline 2": (0.381, 0.151, 0.250, 0.9478, 7.63, 5.83, 0.8081, None),
    "v1": (0.437, 0.214, 0.309, 0.9476, 7.79, 7.56, 0.4126, 0.6815),
    "v2": (0.439, 0.218, 0.312, 0.9475, 7.79, 7.45, 0.5995, 0.7315),
    "v3": (0.446, 0.224, 0.318, 0.9479, 7.74, 7.54, 0.8151, 0.7840),
}
"""Table I of the paper: system -> its figures in the order of `PAPER_COLUMNS`."""


@dataclass(frozen=True)
class Ordering:
    """Two systems that the paper orders in one column, and their measured figures.

    Attributes:
        column: name of the value.
        higher: system with the higher figure in the paper.
        lower: the other system.
        values: measured figures of `higher` and `lower`.
        overlap: whether their measured 95 % intervals overlap; `None` without intervals.
    """

    column: str
    higher: str
    lower: str
    values: tuple[float, float]
    overlap: bool | None = None

    @property
    def agrees(self) -> bool:
        """Whether the measured figures are ordered as in the paper."""
        return self.values[0] > self.values[1]


Figures = Mapping[str, Mapping[str, float]]
Intervals = Mapping[str, Mapping[str, tuple[float, float]]]


def check_orderings(values: Figures, intervals: Intervals) -> list[Ordering]:
    """All strict pairwise orderings of the paper's table whose two figures were measured.

    Args:
        values: `{system: {column: figure}}`, the names as in `PAPER_TABLE` up to case and spaces.
        intervals: `{system: {column: (low, high)}}`, 95 % intervals.

    Returns:
        The orderings, pair after pair of systems, each pair column after column.
    """
    measured = {plain_name(name): name for name in values}
    known = [name for name in PAPER_TABLE if plain_name(name) in measured]
    found = []
    for pair in itertools.combinations(known, 2):
        for place, column in enumerate(PAPER_COLUMNS):
            paper = [PAPER_TABLE[name][place] for name in pair]
            own = [measured[plain_name(name)] for name in pair]
            if None in paper or paper[0] == paper[1] or any(column not in values[name] for name in own):
                continue
            order = (0, 1) if paper[0] > paper[1] else (1, 0)
            ends = [intervals.get(own[i], {}).get(column) for i in order]
            figures = (values[own[order[0]]][column], values[own[order[1]]][column])
            found.append(Ordering(column, pair[order[0]], pair[order[1]], figures, _overlap(ends)))
    return found


def count_orderings(orderings: Sequence[Ordering]) -> dict[str, Any]:
    """How many agree, are equal and are reversed, and how many of each have intervals that do not overlap."""
    groups = {
        "agree": [o for o in orderings if o.agrees],
        "equal": [o for o in orderings if o.values[0] == o.values[1]],
        "reversed": [o for o in orderings if o.values[0] < o.values[1]],
    }
    counts = {name: len(group) for name, group in groups.items()}
    clear = {f"{name}_without_overlap": sum(o.overlap is False for o in group) for name, group in groups.items()}
    return {"orderings": len(orderings), **counts, **clear}


def plain_name(name: str) -> str:
    """A system's name without case and spaces."""
    return "".join(name.lower().split())


def _overlap(ends: Sequence[tuple[float, float] | None]) -> bool | None:
    first, second = ends
    if first is None or second is None:
        return None
    return first[0] <= second[1] and second[0] <= first[1]
