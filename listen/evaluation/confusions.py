"""Which classes a model takes for which others, from its answers in free text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.tasks import Task
from .metrics.label_parser import LabelParser, plain_words


@dataclass(frozen=True)
class Confusions:
    """Counts of expected and answered classes.

    Attributes:
        labels: the classes.
        counts: `(classes, classes + 1)` examples by expected and answered class; the last column counts answers that
            name no class or several.
    """

    labels: list[str]
    counts: np.ndarray

    def frequent(self, most: int) -> list[tuple[str, str | None, int]]:
        """The most frequent confusions: expected class, answered class (`None` for no class), number of examples."""
        wrong = self.counts.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:most]
        cells = [np.unravel_index(place, wrong.shape) for place in order]
        names = [*self.labels, None]
        return [(names[row], names[column], int(wrong[row, column])) for row, column in cells if wrong[row, column]]


def count_confusions(task: Task, records: Sequence[Mapping[str, Any]]) -> Confusions | None:
    """Count the confusions of a task with `accuracy` among its metrics; `None` for other tasks.

    Args:
        task: its `labels` come first, then the other classes among the references.
        records: predictions of `EvaluationResult`, of this task alone.
    """
    if "accuracy" not in task.metrics:
        return None
    truths = [record["references"][0] for record in records]
    labels: dict[str, str] = {}
    for name in (*task.labels, *sorted(set(truths))):
        labels.setdefault(plain_words(name), name)  # "Yes." is "yes"
    parser = LabelParser(labels.values())
    counts = np.zeros((len(parser.labels), len(parser.labels) + 1), dtype=int)
    for truth, record in zip(truths, records, strict=True):
        counts[parser(truth), parser(record["prediction"])] += 1  # -1, no class, is the last column
    return Confusions(parser.labels, counts)
