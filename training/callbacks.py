"""Callbacks of the Trainer that LiSTEN needs."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.collator import ListenCollator


class EpochCallback(TrainerCallback):
    """Tells the collator which epoch begins, so that wordings and k differ between epochs and repeat on resuming.

    Args:
        collator: the collator of the training data.
    """

    def __init__(self, collator: ListenCollator) -> None:
        self.collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run begins amid an epoch: `state.epoch` is then a fraction."""
        self.collator.set_epoch(int(round(state.epoch or 0.0, 6)))
