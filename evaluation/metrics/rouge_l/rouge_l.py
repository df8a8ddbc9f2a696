"""ROUGE-L of answers and captions (rouge-score)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from listen.evaluation.metrics.row_metric import RowMetric, reference_lists


class RougeL(RowMetric):
    """Mean ROUGE-L F1 (Lin 2004) as rouge-score computes it, without stemming, against the best of the references.

    The library reads ASCII letters and figures only: a reference without any is refused, as it could never be met.
    """

    names = ("rouge_l",)

    def row_statistics(self, predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> np.ndarray:
        """`(examples, 1)`: F1 of each example.

        Raises:
            ValueError: a reference holds no ASCII letter or figure.
        """
        scorer = RougeScorer(["rougeL"])
        rows = []
        for index, (text, options) in enumerate(zip(predictions, reference_lists(references), strict=True)):
            if not all(any(c.isascii() and c.isalnum() for c in option) for option in options):
                raise ValueError(f"example {index}: ROUGE-L cannot read the reference {options}; use another metric")
            rows.append(scorer.score_multi(options, text)["rougeL"].fmeasure)
        return np.array(rows, dtype=np.float64)[:, None]

    def aggregate(self, rows: np.ndarray) -> dict[str, float]:
        """`{"rouge_l"}` of a set of examples, a fraction."""
        return {"rouge_l": float(rows.mean())}
