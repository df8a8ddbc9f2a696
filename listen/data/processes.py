"""The processes that a launcher started."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def launched_processes() -> PartialState:
    """The processes that a launcher started, the index of this one, and its device.

    accelerate treats processes on the CPU as single ones unless `cpu=True` is passed.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu)
