"""Cost of a training run: parameters, time of a step, peak memory."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.files import write_json

COST_FILE = "cost.json"


class CostCallback(TrainerCallback):
    """Measures the optimiser steps of a run, also of one that is interrupted and resumed.

    Args:
        folder: keeps the figures with the checkpoints, in `cost.json`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / COST_FILE
        known = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        self.step_seconds: list[float] = known.get("step_seconds", [])
        self.peak_bytes: int = known.get("peak_memory_bytes", 0)
        self.started = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock: the batch is loaded already."""
        self.started = _now(args)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock."""
        self.step_seconds.append(round(_now(args) - self.started, 6))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the figures with the checkpoint."""
        self._write(args)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the figures before evaluation adds to the memory."""
        self._write(args)

    def figures(self) -> dict[str, float]:
        """`seconds_per_step`, the median over all steps without waiting for data; `train_seconds`, their sum; and
        `peak_memory_bytes`."""
        seconds = self.step_seconds
        times = {"seconds_per_step": statistics.median(seconds), "train_seconds": sum(seconds)} if seconds else {}
        return {**times, "peak_memory_bytes": float(self.peak_bytes)}

    def _write(self, args: TrainingArguments) -> None:
        self.peak_bytes = max(self.peak_bytes, peak_memory(args.device))
        write_json(self.path, {"step_seconds": self.step_seconds, "peak_memory_bytes": self.peak_bytes})


def parameter_counts(model: torch.nn.Module) -> dict[str, int]:
    """`trainable_parameters` of a model, and `parameters_beside_connector`: those of them outside the connector."""
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    beside = sum(count for name, count in trainable.items() if "connector" not in name.split("."))
    return {"trainable_parameters": sum(trainable.values()), "parameters_beside_connector": beside}


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch allocated on a GPU, or the most memory of this process on a CPU; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _now(args: TrainingArguments) -> float:
    if args.device.type == "cuda":
        torch.cuda.synchronize(args.device)
    return time.perf_counter()
