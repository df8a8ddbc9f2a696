"""Something done to every row of a data set: in batches, shared by processes, given back in the order of the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data import audio
from ..data.collator import ListenCollator
from ..data.features import store_info
from ..data.processes import launched_processes

Result = TypeVar("Result")


def map_rows(
    step: Callable[[Sequence[int], dict[str, Any]], Sequence[Result]],
    model: PreTrainedModel,
    collator: ListenCollator | Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
    dataset: Dataset,
    batch_size: int,
    num_workers: int = 0,
    progress: bool = True,
    description: str = "rows",
) -> list[Result]:
    """Call `step` on batches that hold each row once, the model in eval mode and without autograd.

    Rows are sorted by task and length, so that a batch holds little padding and answers of like length, and dealt out
    to the processes that `accelerate launch` started. All processes return all results in the data set's order.

    Args:
        step: takes the numbers of the rows of a batch and the model inputs that `collator` makes of them; gives one
            result a row.
        model: its mode is restored afterwards.
        collator: of prompts, with the store of encoder features if there is one; or of other inputs.
        dataset: rows of `listen.data.manifest`.
        batch_size: rows of a batch, in each process.
        num_workers: processes that read audio ahead, for each process.
        progress: whether the main process shows a progress bar.
        description: what the bar says.

    Raises:
        ValueError: `batch_size` below 1, or a row that cannot be read; the message names it.
        FeatureStoreError: the features were computed by other encoders or settings, or lack a recording.
    """
    state = launched_processes()
    if getattr(collator, "features", None) is not None:
        extractor = collator.processor.feature_extractor
        collator.features.check(store_info(model, extractor, collator.join_silence_seconds))
    batches = plan_batches(dataset, batch_size)[state.process_index :: state.num_processes]
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collator, num_workers=num_workers)
    bar = tqdm(total=len(batches), desc=description, unit="batch", disable=not (progress and state.is_main_process))
    results: list[tuple[int, Result]] = []
    with bar, _evaluating(model):
        for indices, inputs in zip(batches, loader, strict=True):
            results += zip(indices, step(indices, inputs), strict=True)
            bar.update()
    gathered = gather_object(results) if state.num_processes > 1 else results
    return [result for _, result in sorted(gathered, key=lambda numbered: numbered[0])]


def plan_batches(dataset: Dataset, batch_size: int) -> list[list[int]]:
    """Row numbers of each batch: sorted by task, then from long to short, each row exactly once.

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
    """Length of a clip read from its header; 0 where the header is out of reach, as for URLs and mp4."""
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
