"""One function applied to all rows of a data set: in batches, shared by processes, results in the order of the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ..data import audio
from ..data.collator import ListenCollator
from ..data.features import FeatureStore, store_info
from ..data.processes import launched_processes

Result = TypeVar("Result")


@dataclass(frozen=True)
class BatchOptions:
    """How rows of a data set become batches of a model: keyword arguments of all functions that run one over rows.

    Attributes:
        features: store of encoder features, used in place of audio.
        join_silence_seconds: silence between the clips of rows that join them, as in training.
        batch_size: rows of a batch, in each process.
        num_prompts: prompts k of each row; by default the processor's.
        num_workers: processes that load audio ahead, for each process.
        progress: whether the main process shows a progress bar.
    """

    features: FeatureStore | None = None
    join_silence_seconds: float = 0.0
    batch_size: int = 8
    num_prompts: int | None = None
    num_workers: int = 0
    progress: bool = True

    def collator(self, processor: ProcessorMixin) -> ListenCollator:
        """Collator of prompts that `generate` continues."""
        return ListenCollator(
            processor,
            for_generation=True,
            num_prompts=self.num_prompts,
            features=self.features,
            join_silence_seconds=self.join_silence_seconds,
        )


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide keyword arguments into fields of `BatchOptions` and arguments of `model.generate`."""
    names = {entry.name for entry in fields(BatchOptions)}
    batch = {name: value for name, value in options.items() if name in names}
    return batch, {name: value for name, value in options.items() if name not in names}


def map_rows(
    step: Callable[[Sequence[int], dict[str, Any]], Sequence[Result]],
    model: PreTrainedModel,
    collator: ListenCollator | Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
    dataset: Dataset,
    options: BatchOptions,
    description: str = "rows",
) -> list[Result]:
    """Call `step` on batches that hold each row once, the model in eval mode and without autograd.

    Rows are sorted by task and length, so that a batch holds little padding and answers of similar length, and divided
    among the processes that `accelerate launch` started. All processes return all results in the data set's order.

    Args:
        step: takes the row numbers of a batch and the model inputs that `collator` makes of the rows; returns one
            result per row.
        model: its mode is restored afterwards.
        collator: makes model inputs of rows; one of prompts may read stored encoder features.
        dataset: rows of `listen.data.manifest`.
        options: batch size, workers and progress bar.
        description: label of the progress bar.

    Raises:
        ValueError: `batch_size` below 1, or a row that cannot be read; the message names it.
        FeatureStoreError: the features were computed by other encoders or settings, or lack a recording.
    """
    state = launched_processes()
    if getattr(collator, "features", None) is not None:
        extractor = collator.processor.feature_extractor
        collator.features.check(store_info(model, extractor, collator.join_silence_seconds))
    batches = plan_batches(dataset, options.batch_size)[state.process_index :: state.num_processes]
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collator, num_workers=options.num_workers)
    hidden = not (options.progress and state.is_main_process)
    results: list[tuple[int, Result]] = []
    with tqdm(total=len(batches), desc=description, unit="batch", disable=hidden) as bar, _evaluating(model):
        for indices, inputs in zip(batches, loader, strict=True):
            results += zip(indices, step(indices, inputs), strict=True)
            bar.update()
    gathered = gather_object(results) if state.num_processes > 1 else results
    return [result for _, result in sorted(gathered, key=lambda numbered: numbered[0])]


def plan_batches(dataset: Dataset, batch_size: int) -> list[list[int]]:
    """Row numbers of each batch: sorted by task, then by decreasing length, each row exactly once.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    rows = dataset.select_columns(["task", "audio"])
    lengths = [(row["task"], -sum(map(clip_seconds, row["audio"]))) for row in rows]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def clip_seconds(clip: Mapping[str, Any]) -> float:
    """Length of a clip from its header; 0 if the header cannot be read, as for URLs and mp4."""
    return audio.clip_seconds(clip) or 0.0  # it only sorts: an unreadable clip is reported when it is decoded


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
