"""Side-by-side measurement: variants of one computation, run in turns in one process, as ratios to the first.

Absolute times belong to a machine; a ratio within one run says what a choice costs. Variants take turns (a, b, a, b),
so a busy machine slows all of them equally, and the first round is discarded. Ratios are taken within each round.

With one thread on the CPU, time is the processor time of this process, so other processes on the machine add nothing
to it but what they take from shared caches. Otherwise it is wall time.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

MIB = 2**20
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Measurement:
    """The cost of one variant.

    Attributes:
        name: The variant.
        rounds: Seconds of each run.
        peak_bytes: Maximum memory of a run beyond what was in use before; `None` where it is unknown.
    """

    name: str
    rounds: tuple[float, ...]
    peak_bytes: int | None = None

    @property
    def seconds(self) -> float:
        """Median time of a run."""
        return statistics.median(self.rounds)

    @property
    def fastest(self) -> float:
        """Shortest run."""
        return min(self.rounds)

    @property
    def slowest(self) -> float:
        """Longest run."""
        return max(self.rounds)


@dataclass(frozen=True)
class Figure:
    """One result.

    Attributes:
        name: `benchmark.variant`, with `.memory` for peaks.
        ours: Median of our variant.
        baseline: Median of the baseline.
        ratio: `ours / baseline`, the median over rounds: below 1 is faster or smaller, but above 1 for rates.
        low: Lowest ratio of a round.
        high: Highest ratio of a round.
        unit: Of `ours` and `baseline`: `"s"`, `"MiB"`, `"exponent"`, or a rate: `"tokens/s"`, `"TFLOP/s"`.
        goal: Maximum ratio that is aimed at, minimum for a rate; `None` without a goal.
    """

    name: str
    ours: float
    baseline: float
    ratio: float
    low: float
    high: float
    unit: str = "s"
    goal: float | None = None


def compare(
    variants: dict[str, Callable[[], object]],
    device: str,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Measurement]:
    """Measure all variants in turns.

    Args:
        variants: What to run, by name.
        device: Where the work happens.
        repeats: Measured runs of each, after one that warms up.
        clock: Counts seconds: wall time, or `time.process_time` for work of one thread on the CPU.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, list[int | None]] = {name: [] for name in variants}
    gc.collect()
    gc.freeze()  # what lives by now need not be looked at before every run
    for turn in range(repeats + 1):
        for name, run in variants.items():
            duration, peak = _run_once(run, device, clock)
            if turn:
                seconds[name].append(duration)
                peaks[name].append(peak)
    gc.unfreeze()
    return [Measurement(name, tuple(times), _largest(peaks[name])) for name, times in seconds.items()]


def time_figure(name: str, ours: Measurement, baseline: Measurement, goal: float | None = None) -> Figure:
    """Times of two variants that ran in the same rounds."""
    ratios = [mine / theirs for mine, theirs in zip(ours.rounds, baseline.rounds, strict=True)]
    return Figure(name, ours.seconds, baseline.seconds, statistics.median(ratios), min(ratios), max(ratios), "s", goal)


def memory_figure(name: str, ours: Measurement, baseline: Measurement, goal: float | None = None) -> list[Figure]:
    """Peak memory of two variants; empty where it is unknown."""
    if not ours.peak_bytes or not baseline.peak_bytes:
        return []
    ratio = ours.peak_bytes / baseline.peak_bytes
    mine, theirs = ours.peak_bytes / MIB, baseline.peak_bytes / MIB
    return [Figure(f"{name}.memory", mine, theirs, ratio, ratio, ratio, "MiB", goal)]


def both_figures(name: str, ours: Measurement, baseline: Measurement, goal: float | None = None) -> list[Figure]:
    """Time and peak memory of two variants."""
    return [time_figure(name, ours, baseline, goal), *memory_figure(name, ours, baseline)]


def rate_figure(
    name: str,
    work: float,
    ours: Measurement,
    base_work: float,
    baseline: Measurement,
    unit: str,
    goal: float | None = None,
) -> Figure:
    """Work per second of two variants that ran in the same rounds; `work` and `base_work` are that of one run."""
    share = work / base_work
    ratios = [share * theirs / mine for mine, theirs in zip(ours.rounds, baseline.rounds, strict=True)]
    rates = work / ours.seconds, base_work / baseline.seconds
    return Figure(name, *rates, statistics.median(ratios), min(ratios), max(ratios), unit, goal)


def report(title: str, figures: list[Figure], device: str) -> None:
    """Print a table of results; ratios below 1 are faster or smaller than the baseline, above 1 for rates."""
    table = Table(title=title, caption=machine(device), caption_justify="left", title_justify="left")
    for heading in ("figure", "ours", "baseline", "ratio", "min .. max", "goal"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for figure in figures:
        table.add_row(
            figure.name,
            f"{figure.ours:.4g} {figure.unit}",
            f"{figure.baseline:.4g} {figure.unit}",
            f"{figure.ratio:.3f}",
            f"{figure.low:.3f} .. {figure.high:.3f}",
            "" if figure.goal is None else f"{'>=' if figure.unit.endswith('/s') else '<='} {figure.goal:.2f}",
        )
    Console(width=120).print(table)


def machine(device: str) -> str:
    """Names what the figures belong to."""
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{platform.machine()} CPU"
    threads = torch.get_num_threads()
    versions = f"torch {torch.__version__}, Python {sys.version.split()[0]}"
    return f"{where}, {threads} threads, {versions}, {time.strftime('%Y-%m-%d')}"


def _run_once(run: Callable[[], object], device: str, clock: Callable[[], float]) -> tuple[float, int | None]:
    gc.collect()
    before = start_peak(device)
    start = clock()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    duration = clock() - start
    peak = read_peak(device)
    return duration, None if peak is None or before is None else max(peak - before, 0)


def start_peak(device: str) -> int | None:
    """Reset the memory peak and return the bytes in use."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not _CLEAR_REFS.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # gives freed memory back, so that this run has to ask for its own
    _CLEAR_REFS.write_text("5")  # resets the resident peak, see proc(5)
    return _resident("VmRSS")


def read_peak(device: str) -> int | None:
    """Return the peak of memory in use since `start_peak`, in bytes."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM") if _CLEAR_REFS.exists() else None


def _resident(field: str) -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _largest(peaks: list[int | None]) -> int | None:
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else None
