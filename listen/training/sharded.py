"""Training with the weights divided among processes.

Checkpoints of FSDP2 runs hold the trainable parameters and the state of the optimiser, not the frozen LLM. Under
DeepSpeed ZeRO-3, models are built whole, and divided when training starts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers.integrations import deepspeed
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from .push import ModelFolderTrainer


@contextmanager
def undivided() -> Iterator[None]:
    """Build a model with whole weights also under DeepSpeed ZeRO-3; `deepspeed.initialize` divides them later.

    Upstream's `from_pretrained` divides the weights at once, so that a new adapter would read an empty embedding table.
    """
    config = deepspeed._hf_deepspeed_config_weak_ref  # there is no public way to read it
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


class ShardedTrainer(ModelFolderTrainer):
    """A Trainer that under FSDP2 reads and writes the same `model.safetensors` as in one process.

    Upstream adds the weights of the whole model to each checkpoint, unless it is a model of PEFT.
    """

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.accelerator.is_fsdp2:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.accelerator.is_fsdp2:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        file = Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME
        state = load_file(file) if self.accelerator.is_main_process else {}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(self.model if model is None else model, state, options=options)

    def _load_best_model(self) -> None:
        if self.accelerator.is_fsdp2:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()


__all__ = ["ShardedTrainer", "undivided"]
