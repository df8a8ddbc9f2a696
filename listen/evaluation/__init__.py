"""Evaluation: answers to a data set, metrics with intervals, and reports.

>>> from listen.data.manifest import load_manifest
>>> from listen.evaluation import evaluate_model
>>> result = evaluate_model(model, processor, load_manifest("test.jsonl"))  # doctest: +SKIP
>>> result.save("runs/eval")  # doctest: +SKIP
"""

from __future__ import annotations

from ..data.extras import extra
from ..data.processes import launched_processes

with extra("eval"):
    from .evaluator import evaluate_model, select_rows
    from .generate import Prediction, generate_predictions
    from .probe import Probe, plot_embeddings, probe_groups, probe_split
    from .report import metrics_table, write_report
    from .result import EvaluationResult
    from .scoring import TaskScores, score_task
    from .sweep import Sweep, default_counts, sweep_num_prompts

__all__ = [
    "EvaluationResult",
    "Prediction",
    "Probe",
    "Sweep",
    "TaskScores",
    "default_counts",
    "evaluate_model",
    "generate_predictions",
    "launched_processes",
    "metrics_table",
    "plot_embeddings",
    "probe_groups",
    "probe_split",
    "score_task",
    "select_rows",
    "sweep_num_prompts",
    "write_report",
]
