"""Accuracy and unweighted average recall of classification by free text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .label_parser import LabelParser
from .row_metric import RowMetric, reference_lists


class Classification(RowMetric):
    """Accuracy and unweighted average recall (UAR: the mean over classes of their recall).

    A prediction counts as a class when it names that class and no other one (see `LabelParser`); anything else is
    unparsable: it is wrong for both scores and reported as `unparsable_rate`. The classes are `labels` and whatever
    the references name. UAR averages over the classes that occur in the references.
    """

    names = ("accuracy", "uar")
    averaged = ("accuracy",)

    def row_statistics(
        self, predictions: Sequence[str], references: Sequence[str | Sequence[str]], labels: Sequence[str] = ()
    ) -> np.ndarray:
        """`(examples, 2)`: index of the true class, index of the predicted one or -1.

        Raises:
            ValueError: an example has more than one reference class, or an empty one.
        """
        truths = [_only(options, index) for index, options in enumerate(reference_lists(references))]
        parser = LabelParser(dict.fromkeys([*labels, *sorted(truths)]))
        parsed = [(parser.index_of(truth), parser(text)) for truth, text in zip(truths, predictions, strict=True)]
        return np.array(parsed, dtype=np.float64)

    def aggregate(self, rows: np.ndarray) -> dict[str, float]:
        """`{"accuracy", "uar", "unparsable_rate"}` of a set of examples."""
        truths, predicted = rows.T  # (examples,) each
        right = truths == predicted
        _, classes = np.unique(truths, return_inverse=True)
        # counts of each class: `recall_score` of scikit-learn takes 5 ms, for each of 1000 resamples
        recall = np.bincount(classes, weights=right) / np.bincount(classes)  # (classes that occur,)
        return {
            "accuracy": float(right.mean()),
            "uar": float(recall.mean()),
            "unparsable_rate": float((predicted < 0).mean()),
        }


def _only(options: list[str], index: int) -> str:
    if len(options) != 1:
        raise ValueError(f"example {index} has {len(options)} reference classes {options}; give exactly one")
    return options[0]
