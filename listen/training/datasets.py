"""From arguments to data: sources are read, joined, filtered, mixed and measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets
from transformers.utils import logging

from ..data.audio import row_seconds
from ..data.manifest import FEATURES, ManifestError
from ..data.mixing import mix_datasets, split_by_task, subset_per_task
from ..data.sources import DataSource, load_rows
from .arguments import DataArguments
from .values import ArgumentError

logger = logging.get_logger(__name__)

_BYTES_PER_TOKEN = 4  # of UTF-8: about one token for a Chinese character, which counts as three bytes


def build_train_dataset(
    arguments: DataArguments, seed: int, embeddings_per_second: float | None = None
) -> Dataset | IterableDataset:
    """The mixture of all training sources.

    Args:
        arguments: section `data`.
        seed: fixes order and subsets.
        embeddings_per_second: of audio, to add a `length` column for length-grouped batches; `None` adds no column.

    Returns:
        Rows of the manifest schema; iterable if a source streams.

    Raises:
        ArgumentError: no training source, a source without rows, or no row is left after filtering.
        ManifestError: a row that cannot be used.
    """
    if not arguments.train:
        raise ArgumentError("data.train names no source; give a manifest, an annotation file or a data set")
    longest = None if arguments.long_audio == "cut" else arguments.max_audio_seconds
    parts: dict[str, list[Dataset | IterableDataset]] = {}
    for source in arguments.train:
        rows = _answered(load(source, arguments, seed))
        for task, part in _tasks_of(rows, source).items():
            parts.setdefault(task, []).append(_short_enough(part, longest, task))
    by_task = {task: _concatenate(task, group) for task, group in parts.items()}
    mixed = mix_datasets(
        by_task,
        strategy=arguments.mixing,
        temperature=arguments.mixing_temperature,
        weights=arguments.mixing_weights,
        seed=seed,
    )
    if isinstance(mixed, Dataset) and not len(mixed):
        raise ArgumentError("no training row is left; see the sources and max_audio_seconds")
    return mixed if embeddings_per_second is None else add_lengths(mixed, embeddings_per_second)


def build_eval_dataset(
    arguments: DataArguments, seed: int, embeddings_per_second: float | None = None
) -> Dataset | None:
    """All evaluation sources, concatenated, with at most `max_eval_rows` rows per task; `None` without a source.

    Raises:
        ArgumentError: a source streams, so that its rows cannot be counted.
        ManifestError: a row that cannot be used.
    """
    if not arguments.eval:
        return None
    parts = [_answered(load(source, arguments, seed)) for source in arguments.eval]
    if any(isinstance(part, IterableDataset) for part in parts):
        raise ArgumentError("data.eval cannot stream; give streaming=false and max_rows")
    dataset = concatenate_datasets(parts)
    if arguments.max_eval_rows is not None:
        dataset = subset_per_task(dataset, arguments.max_eval_rows, seed)
    return dataset if embeddings_per_second is None else add_lengths(dataset, embeddings_per_second)


def load(source: DataSource, arguments: DataArguments, seed: int = 0) -> Dataset | IterableDataset:
    """Read one source, keep the requested tasks and rows, and join the clips of tasks in `join_tasks`.

    Raises:
        ArgumentError: it has no row left.
        ManifestError: a row that cannot be used.
    """
    dataset = load_rows(source, arguments.check_files)
    if source.tasks:
        wanted = set(source.tasks)
        dataset = dataset.filter(lambda task: task in wanted, input_columns="task")
        absent = wanted - set(dataset["task"]) if isinstance(dataset, Dataset) else set()
        if absent and len(dataset):
            logger.warning(
                f"{source.label} has no row of {', '.join(sorted(absent))}, which tasks={source.tasks} names"
            )
    if source.max_rows is not None:
        dataset = _first(dataset.shuffle(seed=seed), source.max_rows)
    if isinstance(dataset, Dataset) and not len(dataset):
        limits = f" with tasks={source.tasks} and max_rows={source.max_rows}" if source.tasks or source.max_rows else ""
        raise ArgumentError(f"{source.label} gives no row{limits}; fill it, or remove it")
    return join_clips(dataset, arguments.join_tasks)


def join_clips(dataset: Dataset | IterableDataset, tasks: list[str]) -> Dataset | IterableDataset:
    """Put the clips of rows of these tasks into one recording each."""
    joined = set(tasks)
    if not joined:
        return dataset

    def join(row: Mapping[str, Any]) -> dict[str, Any]:
        return {"join": "concatenate" if row["task"] in joined and len(row["audio"]) > 1 else row["join"]}

    return dataset.map(join, features=FEATURES)


def add_lengths(dataset: Dataset | IterableDataset, embeddings_per_second: float) -> Dataset | IterableDataset:
    """Add `length`, the approximate number of tokens of a row; streams are unchanged, as nothing groups them."""
    if isinstance(dataset, IterableDataset):
        return dataset

    def measure(row: Mapping[str, Any]) -> dict[str, int]:
        text = len(row["response"][0].encode()) // _BYTES_PER_TOKEN
        return {"length": round(embeddings_per_second * (row_seconds(row) or 0.0)) + text + 1}

    return dataset.map(measure, features=Features({**FEATURES, "length": Value("int64")}))


def count_tasks(dataset: Dataset | IterableDataset | None) -> dict[str, int]:
    """Rows of each task; empty for streams."""
    return dict(Counter(dataset["task"])) if isinstance(dataset, Dataset) else {}


def _answered(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The same rows, after a check that no response is empty; streams are checked as they are read."""
    rows = zip(dataset["id"], dataset["response"], strict=True) if isinstance(dataset, Dataset) else ()
    empty = [name for name, responses in rows if not all(response.strip() for response in responses)]
    if empty:
        raise ManifestError(f"the rows {empty[:5]} ({len(empty)} in all) have an empty response; take them out")
    return dataset


def _tasks_of(dataset: Dataset | IterableDataset, source: DataSource) -> dict[str, Dataset | IterableDataset]:
    if isinstance(dataset, Dataset):
        return split_by_task(dataset)
    return {source.task or source.label: dataset}


def _concatenate(task: str, parts: list[Dataset | IterableDataset]) -> Dataset | IterableDataset:
    if len({type(part) for part in parts}) > 1:
        raise ArgumentError(f"task {task!r} has sources that stream and sources that do not; make them the same")
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _first(dataset: Dataset | IterableDataset, count: int) -> Dataset | IterableDataset:
    if isinstance(dataset, IterableDataset):
        return dataset.take(count)
    return dataset.select(range(min(count, len(dataset))))


def _short_enough(dataset: Dataset | IterableDataset, seconds: float | None, task: str) -> Dataset | IterableDataset:
    if seconds is None:
        return dataset
    kept = dataset.filter(lambda clips: (row_seconds({"audio": clips}) or 0.0) <= seconds, input_columns="audio")
    if isinstance(dataset, Dataset) and len(kept) < len(dataset):
        logger.warning(f"task {task!r}: left out {len(dataset) - len(kept)} of {len(dataset)} rows over {seconds} s")
    return kept
