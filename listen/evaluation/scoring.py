"""From predictions and references to the metrics of a task."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data.tasks import Task
from .confidence import bootstrap_intervals
from .metrics import (
    CiderD,
    Classification,
    EventF1,
    ExactMatch,
    Rouge,
    RowMetric,
    Translation,
    Verification,
    WordErrorRate,
)

logger = logging.getLogger(__name__)

METRICS: tuple[type[RowMetric], ...] = (
    WordErrorRate,
    Translation,
    Classification,
    Verification,
    ExactMatch,
    Rouge,
    CiderD,
    EventF1,
)
LOWER_IS_BETTER = frozenset({"wer", "cer", "eer", "unparsable_rate", "eval_lm_loss"})
SCORE_TITLES = {
    "wer": "word error rate",
    "cer": "character error rate",
    "eer": "equal error rate",
    "uar": "unweighted average recall",
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "bleu": "BLEU",
    "chrf": "chrF",
    "cider": "CIDEr-D",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "event_f1": "event F1",
    "event_f1_macro": "event F1, mean over events",
    "unparsable_rate": "answers that name no class",
}
_TRANSLATION_TOKENIZERS = {"zh": "zh"}


@dataclass
class TaskScores:
    """Scores of one task.

    Attributes:
        values: every metric of the task, then its metrics' diagnostics such as `unparsable_rate`; `nan` if undefined.
        intervals: 95 % bootstrap interval of each value that has one.
        row_values: the same values for each single example, where they are defined.
        num_examples: examples scored.
    """

    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    row_values: list[dict[str, float]] = field(default_factory=list)
    num_examples: int = 0


def score_arrow(metric: str) -> str:
    """The better direction of a score as an arrow."""
    return "↓" if metric in LOWER_IS_BETTER else "↑"


def score_title(metric: str) -> str:
    """Readable name of a score with its better direction, such as `word error rate ↓`."""
    return f"{SCORE_TITLES.get(metric, metric)} {score_arrow(metric)}"


def metrics_for(task: Task) -> list[type[RowMetric]]:
    """The metric classes that compute a task's metrics, the one that computes most of them first.

    Raises:
        ValueError: no class computes one of the names.
    """
    wanted, chosen = set(task.metrics), []
    while wanted:
        best = max(METRICS, key=lambda metric: len(wanted & set(metric.names)))
        if not wanted & set(best.names):
            known = sorted({name for metric in METRICS for name in metric.names})
            raise ValueError(f"task {task.name!r} names unknown metrics {sorted(wanted)}; known: {', '.join(known)}")
        chosen.append(best)
        wanted -= set(best.names)
    return chosen


def score_task(
    task: Task,
    examples: Sequence[Mapping[str, Any]],
    predictions: Sequence[str],
    yes_no_scores: Sequence[float] | None = None,
    spelling_mapping: Mapping[str, str] | None = None,
    num_resamples: int = 1000,
) -> TaskScores:
    """Score the predictions of one task.

    Args:
        task: names the metrics, labels and language.
        examples: rows of the data with `response` and, for `event_f1`, `events`.
        predictions: the model's answers, one per example.
        yes_no_scores: preference for yes of each example, for `eer`.
        spelling_mapping: British to American spellings for the word error rate.
        num_resamples: bootstrap resamples; 0 for no intervals.

    Returns:
        The scores. `event_f1` is left out if the data names no events, and the log says so.

    Raises:
        ValueError: nothing to score, or references that a metric cannot use; the message names the example.
    """
    if not examples:
        raise ValueError(f"task {task.name!r} has no examples to score")
    scores = TaskScores(num_examples=len(examples), row_values=[{} for _ in examples])
    for metric, references in _metrics(task, examples):
        options = _options(type(metric), task, yes_no_scores, spelling_mapping)
        _add(scores, metric, metric.row_statistics(predictions, references, **options), task, num_resamples)
    if "event_f1" in task.metrics and "event_f1" not in scores.values:
        logger.warning("%s: examples without 'events', so no event_f1", task.name)
    named = {name: scores.values[name] for name in task.metrics if name in scores.values}
    scores.values = {**named, **scores.values}  # the task's own order first
    return scores


def check_references(task: Task, examples: Sequence[Mapping[str, Any]]) -> None:
    """Check, before answers are generated, that `score_task` can use the references.

    Raises:
        ValueError: as `score_task`.
    """
    empty = [""] * len(examples)
    for metric, references in _metrics(task, examples):
        try:
            metric.row_statistics(empty, references, **_options(type(metric), task, None, None))
        except ValueError as error:
            raise ValueError(f"task {task.name!r}: {error}") from error


def leading_statistics(
    task: Task,
    examples: Sequence[Mapping[str, Any]],
    predictions: Sequence[str],
    yes_no_scores: Sequence[float] | None = None,
) -> tuple[str, RowMetric, np.ndarray]:
    """The task's leading metric, for resampling of examples.

    Args:
        task: see `score_task`.
        examples: see `score_task`.
        predictions: see `score_task`.
        yes_no_scores: see `score_task`.

    Returns:
        Its name, the metric that computes it, and `(examples, statistics)` for `RowMetric.aggregate`.

    Raises:
        ValueError: references that the metric cannot use, or no metric that the examples allow.
    """
    available = {name: (metric, refs) for metric, refs in _metrics(task, examples) for name in metric.names}
    name = next((name for name in task.metrics if name in available), None)
    if name is None:
        raise ValueError(f"task {task.name!r}: the examples allow none of its metrics {task.metrics}")
    metric, references = available[name]
    options = _options(type(metric), task, yes_no_scores, None)
    return name, metric, metric.row_statistics(predictions, references, **options)


def _metrics(task: Task, examples: Sequence[Mapping[str, Any]]) -> Iterator[tuple[RowMetric, list[Any]]]:
    """The metrics of a task, each with its references."""
    for metric_class in metrics_for(task):
        references = [example["response"] for example in examples]
        if metric_class is EventF1:
            references = [example.get("events") for example in examples]
            if any(events is None for events in references) or not any(references):
                continue
        yield metric_class(), references


def _options(
    metric: type[RowMetric],
    task: Task,
    yes_no_scores: Sequence[float] | None,
    spelling_mapping: Mapping[str, str] | None,
) -> dict[str, Any]:
    if metric is WordErrorRate:
        normalizer = "english" if task.language == "en" else "basic"
        return {"normalizer": normalizer, "spelling_mapping": spelling_mapping}
    if metric is Translation:
        return {"tokenize": _TRANSLATION_TOKENIZERS.get(task.language, "13a")}
    if metric is Classification:
        return {"labels": task.labels}
    if metric is Verification:
        return {"scores": yes_no_scores}
    return {}


def _add(scores: TaskScores, metric: RowMetric, rows: np.ndarray, task: Task, num_resamples: int) -> None:
    """Add a metric's values to `scores`: those of the task and diagnostics, not the others."""
    kept = [name for name in metric.aggregate(rows) if name in task.metrics or name not in metric.names]
    scores.values |= {name: value for name, value in metric.aggregate(rows).items() if name in kept}
    if num_resamples:
        intervals = bootstrap_intervals(metric, rows, num_resamples)
        scores.intervals |= {name: interval for name, interval in intervals.items() if name in kept}
    for place, row_values in enumerate(scores.row_values):
        single = metric.aggregate(rows[place : place + 1])
        row_values |= {name: single[name] for name in task.metrics if not math.isnan(single.get(name, math.nan))}
