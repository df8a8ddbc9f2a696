"""Evaluation: answers to a data set, metrics with intervals, and reports.

>>> from listen.data.manifest import load_manifest
>>> from listen.evaluation import evaluate_model
>>> result = evaluate_model(model, processor, load_manifest("test.jsonl"))  # doctest: +SKIP
>>> result.save("runs/eval")  # doctest: +SKIP
"""

from __future__ import annotations

from listen.data.processes import launched_processes

from .evaluator import EvaluationResult, evaluate_model, select_rows
from .generate import Prediction, generate_predictions
from .report import metrics_table, write_report
from .scoring import TaskScores, score_task

__all__ = [
    "EvaluationResult",
    "Prediction",
    "TaskScores",
    "evaluate_model",
    "generate_predictions",
    "launched_processes",
    "metrics_table",
    "score_task",
    "select_rows",
    "write_report",
]
