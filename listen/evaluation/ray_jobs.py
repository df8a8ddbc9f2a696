"""Long work on a Ray cluster: encoder features, answers and targets, with the results of one process. Extra `ray`.

Ray Data starts the workers and repeats what a worker was doing when it died. Workers load their model once, from a
function that the cluster can pickle.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from datasets import Dataset

from ..data.chat_models import Answer, ChatModel, Conversation
from ..data.extras import extra
from ..data.features import FeatureStore
from ..data.precompute import precompute_features
from .generate import Prediction, generate_predictions

Load = Callable[[], tuple[Any, Any]]
"""Loads a model and its processor on the device of the worker that calls it."""
_BLOCKS_PER_WORKER = 16  # what a worker that died had done of its block is repeated


class _Worker:
    """A process of the cluster, which works on pickled items."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._work = make()

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        return {"result": pickle.dumps(self._work(pickle.loads(row["item"])))}


def ray_map(
    make: Callable[[], Callable[[Any], Any]], items: Sequence[Any], workers: int = 2, **resources: Any
) -> Iterator[Any]:
    """Apply a function to items on the workers of a cluster, that of `ray.init` or of the variable `RAY_ADDRESS`.

    Args:
        make: makes the function; called once in each worker.
        items: anything that pickles.
        workers: number of workers.
        **resources: of each worker, such as `num_gpus=1` or `num_cpus=4`.

    Yields:
        The result of each item, in order, as soon as it and those before it exist.

    Raises:
        ImportError: Ray is not installed.
        ray.exceptions.RayTaskError: the function raised an exception.
    """
    with extra("ray"):
        import ray.data
    if not items:
        return
    blocks = min(len(items), _BLOCKS_PER_WORKER * workers)
    rows = ray.data.from_items([{"item": pickle.dumps(item)} for item in items], override_num_blocks=blocks)
    rows.context.execution_options.preserve_order = True
    pool = ray.data.ActorPoolStrategy(size=workers)
    for row in rows.map(_Worker, fn_constructor_args=(make,), compute=pool, **resources).iter_rows():
        yield pickle.loads(row["result"])


def precompute_on_ray(
    load: Load,
    dataset: Dataset,
    folder: str | os.PathLike[str],
    workers: int = 2,
    num_gpus: float = 0.0,
    **options: Any,
) -> FeatureStore:
    """`precompute_features` on a Ray cluster; each worker encodes one shard after another.

    Args:
        load: loads the encoders and the processor.
        dataset: see `precompute_features`.
        folder: of the store, on a file system that all machines share.
        workers: number of workers.
        num_gpus: GPUs of each worker.
        **options: of `precompute_features`.

    Raises:
        ImportError: Ray is not installed.
    """
    make = partial(_encoder, load, dataset, os.path.abspath(folder), options)
    for _ in ray_map(make, range(workers), workers, num_gpus=num_gpus):
        pass
    return FeatureStore(folder)


def _encoder(load: Load, dataset: Dataset, folder: str, options: dict[str, Any]) -> Callable[[int], int]:
    model, processor = load()
    return lambda _: len(precompute_features(model, processor, dataset, folder, progress=False, **options))


def answer_on_ray(
    load: Load, dataset: Dataset, workers: int = 2, rows_per_item: int = 64, num_gpus: float = 0.0, **options: Any
) -> list[Prediction]:
    """`generate_predictions` on a Ray cluster, in the order of the rows.

    Args:
        load: loads the model and the processor.
        dataset: see `generate_predictions`.
        workers: number of workers.
        rows_per_item: rows that a worker takes at a time, and divides into batches of similar length.
        num_gpus: GPUs of each worker.
        **options: of `generate_predictions`.

    Raises:
        ImportError: Ray is not installed.
    """
    starts = range(0, len(dataset), rows_per_item)
    items = [dataset.select(range(start, min(start + rows_per_item, len(dataset)))) for start in starts]
    parts = ray_map(partial(_answerer, load, options), [item.to_list() for item in items], workers, num_gpus=num_gpus)
    pairs = ((start, found) for start, part in zip(starts, parts, strict=True) for found in part)
    return [replace(found, index=start + found.index) for start, found in pairs]


def _answerer(load: Load, options: dict[str, Any]) -> Callable[[list[dict[str, Any]]], list[Prediction]]:
    model, processor = load()

    def answer(rows: list[dict[str, Any]]) -> list[Prediction]:
        return generate_predictions(model, processor, Dataset.from_list(rows), progress=False, **options)

    return answer


class RayChatModel:
    """A chat model on each worker of a Ray cluster, for `generate_targets`.

    Args:
        load: loads the chat model.
        workers: number of workers.
        num_gpus: GPUs of each worker.
    """

    def __init__(self, load: Callable[[], ChatModel], workers: int = 2, num_gpus: float = 0.0) -> None:
        self.load = load
        self.workers = workers
        self.num_gpus = num_gpus

    def answer(self, conversations: Sequence[Conversation], seed: int = 0) -> list[Answer]:
        """One answer for each conversation, in order, by one worker."""
        return next(self.answer_batches([(conversations, seed)]))

    def answer_batches(self, batches: Iterable[tuple[Sequence[Conversation], int]]) -> Iterator[list[Answer]]:
        """The answers to each batch of conversations with its seed, in order; workers share the batches."""
        return ray_map(partial(_answering, self.load), list(batches), self.workers, num_gpus=self.num_gpus)

    def describe(self) -> dict[str, Any]:
        """The description of the chat model, by a worker."""
        return next(ray_map(partial(_describing, self.load), [None], workers=1, num_gpus=self.num_gpus))


def _answering(load: Callable[[], ChatModel]) -> Callable[[tuple[Sequence[Conversation], int]], list[Answer]]:
    llm = load()
    return lambda batch: llm.answer(batch[0], seed=batch[1])


def _describing(load: Callable[[], ChatModel]) -> Callable[[None], dict[str, Any]]:
    return lambda _: load().describe()


__all__ = ["Load", "RayChatModel", "answer_on_ray", "precompute_on_ray", "ray_map"]
