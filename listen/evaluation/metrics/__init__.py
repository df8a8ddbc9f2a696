"""LiSTEN's metrics: `evaluate.Metric` modules that work offline and wrap well-kept libraries.

Each file is a module for `evaluate.load(file)` and can be imported:

    >>> from listen.evaluation.metrics import WordErrorRate
    >>> WordErrorRate().compute(predictions=["a cat sat"], references=["the cat sat"])["wer"]
    0.3333333333333333
"""

from __future__ import annotations

from .cider_d import CiderD
from .classification import Classification
from .event_f1 import EventF1
from .exact_match import ExactMatch
from .rouge import Rouge
from .row_metric import RowMetric
from .translation import Translation
from .verification import Verification
from .word_error_rate import WordErrorRate

__all__ = [
    "CiderD",
    "Classification",
    "EventF1",
    "ExactMatch",
    "Rouge",
    "RowMetric",
    "Translation",
    "Verification",
    "WordErrorRate",
]
