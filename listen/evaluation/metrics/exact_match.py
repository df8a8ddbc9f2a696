"""Exact match of short answers, as in SQuAD."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .label_parser import plain_words
from .row_metric import RowMetric, reference_lists

_ARTICLES = {"a", "an", "the"}


class ExactMatch(RowMetric):
    """Share of answers equal to one of their references, case, punctuation and articles aside (arXiv 1606.05250)."""

    names = ("exact_match",)
    averaged = ("exact_match",)

    def row_statistics(self, predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> np.ndarray:
        """`(examples, 1)`: 1 for a match, else 0."""
        pairs = zip(predictions, reference_lists(references), strict=True)
        hits = [any(_answer(text) == _answer(option) for option in options) for text, options in pairs]
        return np.array(hits, dtype=np.float64)[:, None]

    def aggregate(self, rows: np.ndarray) -> dict[str, float]:
        """`{"exact_match"}` of a set of examples, a fraction."""
        return {"exact_match": float(rows.mean())}


def _answer(text: str) -> list[str]:
    words = plain_words(text).split()
    # an answer that is nothing but an article or signs stays itself
    return [word for word in words if word not in _ARTICLES] or words or [text.strip()]
