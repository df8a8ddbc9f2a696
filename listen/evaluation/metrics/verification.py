"""Accuracy and equal error rate of yes/no verification (scikit-learn)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import roc_curve

from .label_parser import LabelParser
from .row_metric import RowMetric, reference_lists

_LABELS = ("no", "yes")


class Verification(RowMetric):
    """Accuracy of the written yes or no, and the equal error rate of the model's preference for yes.

    `scores` are one number an example, larger for yes: the logit of yes minus that of no at the first position of the
    response. The EER is where the false acceptance and false rejection rates meet, interpolated linearly on the ROC
    curve; it is `nan` without scores, and where only yes or only no is asked for. An answer that names neither or
    both is unparsable: wrong for the accuracy, reported as `unparsable_rate`.
    """

    names = ("accuracy", "eer")
    averaged = ("accuracy",)

    def row_statistics(
        self,
        predictions: Sequence[str],
        references: Sequence[str | Sequence[str]],
        scores: Sequence[float] | None = None,
    ) -> np.ndarray:
        """`(examples, 3)`: truth (1 yes, 0 no), answer (-1 unparsable), score (`nan` if there is none).

        Raises:
            ValueError: a reference is not yes or no, or there are not as many scores as predictions.
        """
        if scores is None:
            scores = [float("nan")] * len(predictions)
        if len(scores) != len(predictions):
            raise ValueError(f"got {len(scores)} scores for {len(predictions)} predictions; give one each")
        parser = LabelParser(_LABELS)
        truths = [parser(options[0]) for options in reference_lists(references)]
        for index, truth in enumerate(truths):
            if truth < 0:
                raise ValueError(f"example {index}: reference {references[index]!r} is neither yes nor no")
        return np.array([truths, [parser(text) for text in predictions], scores], dtype=np.float64).T

    def aggregate(self, rows: np.ndarray) -> dict[str, float]:
        """`{"accuracy", "eer", "unparsable_rate"}` of a set of examples."""
        truths, answers, scores = rows.T  # (examples,) each
        return {
            "accuracy": float((truths == answers).mean()),
            "eer": equal_error_rate(truths, scores),
            "unparsable_rate": float((answers < 0).mean()),
        }


def equal_error_rate(truths: np.ndarray, scores: np.ndarray) -> float:
    """Rate at which false acceptances equal false rejections.

    Args:
        truths: `(examples,)` 1 for yes, 0 for no.
        scores: `(examples,)` larger for yes.

    Returns:
        A fraction; `nan` where a score is `nan` or one of the two classes is missing.
    """
    if np.isnan(scores).any() or truths.min() == truths.max():
        return float("nan")
    acceptances, hits, _ = roc_curve(truths, scores, drop_intermediate=False)  # (thresholds,)
    gaps = (1 - hits) - acceptances  # false rejections minus false acceptances: falls from 1 to -1
    after = int(np.argmax(gaps <= 0))
    share = gaps[after - 1] / (gaps[after - 1] - gaps[after])
    return float(acceptances[after - 1] + share * (acceptances[after] - acceptances[after - 1]))
