"""What the Trainer needs so that a resumed run sees the same batches, wordings and prompt counts as a straight one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler


class HasEpoch(Protocol):
    """Draws something anew in each epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch, counted from 0."""
        ...


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """Groups rows of like length, in an order that follows from seed and epoch.

    transformers' own draws from torch's global generator, whose state amid an epoch is not the one at its beginning:
    a resumed run would see other batches.

    Args:
        batch_size: rows of one optimiser step in one process.
        lengths: length of each row.
        seed: the same in all processes.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Row numbers, each once."""
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class EpochCallback(TrainerCallback):
    """Tells which epoch begins to all that draw anew in it.

    Args:
        listeners: the collator of the training data, and a sampler perhaps.
    """

    def __init__(self, *listeners: HasEpoch) -> None:
        self.listeners = list(listeners)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run begins amid an epoch: `state.epoch` is then a fraction."""
        for listener in self.listeners:
            listener.set_epoch(int(round(state.epoch or 0.0, 6)))
