"""bf16 in training: whether the device of a run computes it in hardware."""

from __future__ import annotations

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, logging

from ..generation_listen import cpu_computes, cpu_has_bf16, warn_of_slow_weights
from .values import ArgumentError

logger = logging.get_logger(__name__)


def choose_bf16(value: bool | str, use_cpu: bool) -> bool:
    """The value of `training.bf16`, where `auto` is whether the device has bf16 in hardware.

    Raises:
        ArgumentError: another text than `auto`.
    """
    if isinstance(value, bool):
        return value
    if value != "auto":
        raise ArgumentError(f"training.bf16={value!r} must be true, false or auto")
    on_cpu = use_cpu or not torch.accelerator.is_available()
    return cpu_has_bf16() if on_cpu else is_torch_bf16_gpu_available()


def warn_of_slow_bf16(model: nn.Module, arguments: TrainingArguments) -> None:
    """Say so if training computes in bf16, or over weights in fp16, on a CPU without instructions for it."""
    if arguments.device.type != "cpu":
        return
    slow = [dtype for dtype in {parameter.dtype for parameter in model.parameters()} if not cpu_computes(dtype)]
    if slow:
        warn_of_slow_weights(slow[0])  # evaluation by generation would say it again
    elif arguments.bf16 and not cpu_has_bf16():
        logger.warning("this CPU computes bf16 in software, many times slower than float32; set training.bf16=false")


__all__ = ["choose_bf16", "warn_of_slow_bf16"]
