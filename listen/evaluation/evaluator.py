"""Evaluation of a model over all tasks of a data set."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from ..analysis import PoolAnalysis, analyse_pool, task_names
from ..data.manifest import extra_fields
from ..data.processes import launched_processes
from ..data.revision import code_version
from ..data.tasks import get_task
from .batches import BatchOptions, split_options
from .generate import GREEDY, Prediction, generate_predictions
from .result import EvaluationResult
from .scoring import TaskScores, check_references, score_task


def evaluate_model(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: Dataset,
    tasks: Sequence[str] | None = None,
    max_examples: int | None = None,
    spelling_mapping: Mapping[str, str] | None = None,
    num_resamples: int = 1000,
    **options: Any,
) -> EvaluationResult:
    """Generate a model's answers to a data set and score them task by task.

    Under `accelerate launch` each process answers its share and all return the whole result; save it on the main
    process only.

    Args:
        model: a LiSTEN model.
        processor: its processor.
        dataset: rows of `listen.data.manifest`.
        tasks: evaluate only these tasks.
        max_examples: max examples per task, the first ones.
        spelling_mapping: British to American spellings for the word error rate, see `WordErrorRate`.
        num_resamples: bootstrap resamples behind the intervals; 0 for none.
        **options: fields of `BatchOptions`; all others go to `model.generate`, which is greedy and writes at most 200
            tokens by default.

    Raises:
        ValueError: no rows are left, or a reference that a metric cannot use, found before generation starts.
        UnknownTaskError: the data holds a task that is not registered.
    """
    dataset = select_rows(dataset, tasks, max_examples)
    examples = _examples(dataset)
    for name in task_names(dataset["task"]):
        check_references(get_task(name), [example for example in examples if example["task"] == name])
    batch, generate_kwargs = split_options({**GREEDY, **options})
    predictions = generate_predictions(model, processor, dataset, **batch, **generate_kwargs)
    result = EvaluationResult(predictions=[_record(e, p) for e, p in zip(examples, predictions, strict=True)])
    _score(result, examples, predictions, spelling_mapping, num_resamples)
    result.rows = dataset
    result.pool = _analyse(extract_model_from_parallel(model), examples, predictions)
    result.settings = _settings(model, result.pool, predictions, BatchOptions(**batch).batch_size, generate_kwargs)
    return result


def select_rows(dataset: Dataset, tasks: Sequence[str] | None = None, max_examples: int | None = None) -> Dataset:
    """Rows of the named tasks, with max examples per task.

    Raises:
        ValueError: no rows are left, or none of a named task.
    """
    column, kept, counts = dataset["task"], [], {}
    absent = set(tasks or ()) - set(column)
    if absent:
        raise ValueError(f"the data has no rows of {sorted(absent)}; it holds {', '.join(sorted(set(column)))}")
    for row, task in enumerate(column):
        counts[task] = counts.get(task, 0) + 1
        if (tasks is None or task in tasks) and (max_examples is None or counts[task] <= max_examples):
            kept.append(row)
    if not kept:
        raise ValueError(f"nothing to evaluate: {len(dataset)} rows in the data, max_examples={max_examples}")
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


def _examples(dataset: Dataset) -> list[dict[str, Any]]:
    """Rows without the bytes of their audio, and with the fields beyond the schema unpacked."""
    examples = []
    for row in dataset:
        paths = [clip["path"] for clip in row["audio"]]
        examples.append({**extra_fields(row), **{k: v for k, v in row.items() if k != "extra"}, "audio": paths})
    return examples


def _record(example: Mapping[str, Any], prediction: Prediction) -> dict[str, Any]:
    """One line of `predictions.jsonl`."""
    source = {name: example[name] for name in ("id", "task", "audio", "question") if example.get(name)}
    if example.get("events") is not None:  # the references of event F1
        source["events"] = example["events"]
    return {
        "index": prediction.index,
        **source,
        "instruction": prediction.instruction,
        "references": example["response"],
        "prediction": prediction.text,
        "prompt_indices": prediction.prompt_indices,
        "prompt_scores": [round(score, 6) for score in prediction.prompt_scores],
    }


def _score(
    result: EvaluationResult,
    examples: Sequence[Mapping[str, Any]],
    predictions: Sequence[Prediction],
    spelling_mapping: Mapping[str, str] | None,
    num_resamples: int,
) -> None:
    """Fill in metrics and intervals of every task, and the scores of each row."""
    for name in task_names(example["task"] for example in examples):
        task, places = get_task(name), [i for i, example in enumerate(examples) if example["task"] == name]
        scores: TaskScores = score_task(
            task,
            [examples[i] for i in places],
            [predictions[i].text for i in places],
            [predictions[i].yes_no_score for i in places],
            spelling_mapping=spelling_mapping,
            num_resamples=num_resamples,
        )
        result.metrics[name] = {**scores.values, "n": scores.num_examples}
        result.intervals[name] = scores.intervals
        for place, row_values in zip(places, scores.row_values, strict=True):
            result.predictions[place]["scores"] = row_values
            if "eer" in task.metrics:
                result.predictions[place]["yes_no_score"] = predictions[place].yes_no_score


def _analyse(
    model: PreTrainedModel, examples: Sequence[Mapping[str, Any]], predictions: Sequence[Prediction]
) -> PoolAnalysis | None:
    adapter = dict(model.adapters).get(model.active_adapter)
    if adapter is None or adapter.prompt_pool is None or not any(p.prompt_indices for p in predictions):
        return None
    queries = [prediction.query for prediction in predictions]
    return analyse_pool(
        adapter.prompt_pool,
        [example["task"] for example in examples],
        [prediction.prompt_indices for prediction in predictions],
        None if any(query is None for query in queries) else np.stack(queries),
    )


def _settings(
    model: PreTrainedModel,
    pool: PoolAnalysis | None,
    predictions: Sequence[Prediction],
    batch_size: int,
    generate_kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    model = extract_model_from_parallel(model)
    return {
        "model": model.config.name_or_path or type(model).__name__,
        "code": code_version(),
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
        "adapter": model.active_adapter,
        "num_prompts": max(len(prediction.prompt_indices) for prediction in predictions),
        "pool_size": None if pool is None else pool.usage.shares.shape[1],
        "batch_size": batch_size,
        "num_processes": launched_processes().num_processes,
        "dtype": str(model.dtype).removeprefix("torch."),
        "generation": dict(generate_kwargs),
    }
