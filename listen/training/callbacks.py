"""What the Trainer needs so that a resumed run gets the same batches, wordings and k as an uninterrupted one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler


class HasEpoch(Protocol):
    """Draws new random values in each epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0."""
        ...


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """Groups rows of similar length, in an order that depends on seed and epoch alone.

    That of transformers draws from torch's global generator, whose state within an epoch is not the one at its start:
    a resumed run would get other batches.

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
        """Set the epoch, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Row numbers, each once."""
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class EpochCallback(TrainerCallback):
    """Sets the epoch of everything that draws random values in it.

    Args:
        listeners: the collator of the training data, and a sampler perhaps.
    """

    def __init__(self, *listeners: HasEpoch) -> None:
        self.listeners = list(listeners)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run starts within an epoch: `state.epoch` is then a fraction."""
        for listener in self.listeners:
            listener.set_epoch(int(round(state.epoch or 0.0, 6)))
