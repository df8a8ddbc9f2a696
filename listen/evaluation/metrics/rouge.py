"""ROUGE of answers, captions and responses (rouge-score)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from .row_metric import RowMetric, reference_lists

_TYPES = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}  # our names and the library's


class Rouge(RowMetric):
    """Mean ROUGE-1, ROUGE-2 and ROUGE-L F1 (Lin 2004) as rouge-score computes them, without stemming.

    Of several references each of the three takes the best one. The library reads ASCII letters and figures only: a
    reference without any is refused, as it could never be met.
    """

    names = tuple(_TYPES)

    def row_statistics(self, predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> np.ndarray:
        """`(examples, 3)`: F1 of each example.

        Raises:
            ValueError: a reference holds no ASCII letter or figure.
        """
        scorer = RougeScorer(list(_TYPES.values()))
        rows = []
        for index, (text, options) in enumerate(zip(predictions, reference_lists(references), strict=True)):
            if not all(any(c.isascii() and c.isalnum() for c in option) for option in options):
                raise ValueError(f"example {index}: ROUGE cannot read the reference {options}; use another metric")
            scores = scorer.score_multi(options, text)
            rows.append([scores[name].fmeasure for name in _TYPES.values()])
        return np.array(rows, dtype=np.float64)

    def aggregate(self, rows: np.ndarray) -> dict[str, float]:
        """`{"rouge_1", "rouge_2", "rouge_l"}` of a set of examples, fractions."""
        return {name: float(value) for name, value in zip(_TYPES, rows.mean(axis=0), strict=True)}
