"""Base of LiSTEN's metrics: an `evaluate.Metric` whose value is a function of one row of numbers per example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import evaluate
import numpy as np
from datasets import Features, Value
from datasets import Sequence as ListOf


class RowMetric(evaluate.Metric, ABC):
    """A metric in two steps: numbers for each example, then one aggregate over any set of examples.

    The split makes every metric, corpus-level ones included, fit for resampling: a bootstrap draws rows and aggregates
    them again without reading a text twice. All metrics work offline and keep their data in memory.

    Conventions shared by all metrics: a reference is a string or a list of equally good strings; an empty prediction
    is a wrong answer, never an error; a value that the examples leave undefined is `nan`; malformed input raises.

    Attributes:
        names: the values that `compute` returns under a task's metric names; others it returns are diagnostics.
        averaged: those of `names` that are the mean of the values of the single examples.
    """

    names: ClassVar[tuple[str, ...]] = ()
    averaged: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"keep_in_memory": True, **kwargs})

    @abstractmethod
    def row_statistics(
        self, predictions: Sequence[str], references: Sequence[str | Sequence[str]], **options: Any
    ) -> np.ndarray:
        """Numbers of each example, `(examples, statistics)` float64."""

    @abstractmethod
    def aggregate(self, rows: np.ndarray) -> dict[str, float]:
        """Values of a set of examples from their `row_statistics`."""

    def compute(
        self,
        *,
        predictions: Sequence[str] | None = None,
        references: Sequence[str | Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> dict[str, float] | None:
        """Values over all examples, as `evaluate.Metric.compute`.

        Raises:
            ValueError: there is nothing to score, an example has no reference, or the lengths differ.
        """
        if predictions is not None and len(predictions) == 0:
            raise ValueError(f"{type(self).__name__} got no predictions; give at least one example")
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        text = Value("string")
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions: list of str; references: list of str, or of lists of str.",
            features=[
                Features({"predictions": text, "references": ListOf(text)}),
                Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(self, predictions: list[str], references: list, **options: Any) -> dict[str, float]:
        return self.aggregate(self.row_statistics(predictions, references, **options))


def reference_lists(references: Sequence[str | Sequence[str]]) -> list[list[str]]:
    """Every example's references as a list.

    Raises:
        ValueError: an example has no reference; the message names its place.
    """
    lists = [[reference] if isinstance(reference, str) else list(reference) for reference in references]
    for index, options in enumerate(lists):
        if not options:
            raise ValueError(f"example {index} has no reference; give a string or a non-empty list of strings")
    return lists
