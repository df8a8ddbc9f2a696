"""Runs in a process of their own that can be killed, and the comparison of finished ones."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

_FORK = multiprocessing.get_context("fork")


def history(folder: Path) -> list[dict[str, float]]:
    """Log entries of the training steps of a finished run."""
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in entries if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Saved weights of a finished run."""
    return load_file(folder / "model" / "model.safetensors")


def assert_same_run(one: Path, two: Path) -> None:
    """Weights and log of two finished runs are equal to the bit."""
    other = weights(two)
    assert all(torch.equal(weight, other[name]) for name, weight in weights(one).items())
    assert history(one) == history(two)
    losses = [json.loads((folder / "train_results.json").read_text())["train_loss"] for folder in (one, two)]
    assert losses[0] == losses[1]


def seconds_of(work: Callable[[], object]) -> float:
    """Do the work in a process of its own, which has to end well; how long that took."""
    started = time.perf_counter()
    process = _FORK.Process(target=_with_own_lock, args=(work,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return time.perf_counter() - started


def kill_after(work: Callable[[], object], seconds: float) -> bool:
    """Do the work in a process of its own and kill it after that time; whether it was still at work."""
    process = _FORK.Process(target=_with_own_lock, args=(work,))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -9)
    return process.exitcode == -9


def _with_own_lock(work: Callable[[], object]) -> None:
    """Do the work of a forked process: a kill must not leave the lock of the parent's progress bars taken."""
    tqdm.set_lock(threading.RLock())
    work()


__all__ = ["assert_same_run", "history", "kill_after", "seconds_of", "weights"]
