"""Side-by-side measurement: variants of one computation, run in turns in one process, as ratios to the first.

Absolute times belong to a machine; a ratio within one run says what a choice buys. Variants take turns (a, b, a, b),
so a busy machine slows all of them equally, and the first round is discarded.
"""

import argparse
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
    """One variant's cost.

    Attributes:
        name: The variant.
        seconds: Median wall time of a run.
        fastest: Shortest run.
        slowest: Longest run.
        peak_bytes: Memory a run needs at most beyond what was there before; `None` where it is unknown.
    """

    name: str
    seconds: float
    fastest: float
    slowest: float
    peak_bytes: int | None


def arguments(description: str, given: list[str] | None, **options: object) -> argparse.Namespace:
    """Parses the options that all benchmarks share and those of one benchmark.

    Args:
        description: Help text; the first paragraph of the script's docstring.
        given: Arguments in place of the command line's.
        **options: Name and default of each further option; a list takes several values.
    """
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10, help="measured runs of each variant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    for name, default in options.items():
        several = {"nargs": "+", "type": type(default[0])} if isinstance(default, list) else {"type": type(default)}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=f"default {default}", **several)
    parsed = parser.parse_args(given)
    torch.manual_seed(parsed.seed)
    torch.set_num_threads(parsed.threads)
    return parsed


def compare(variants: dict[str, Callable[[], object]], device: str, repeats: int) -> list[Measurement]:
    """Measures all variants in turns.

    Args:
        variants: What to run, by name; the first is the baseline.
        device: Where the work happens.
        repeats: Measured runs of each, after one that warms up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, list[int | None]] = {name: [] for name in variants}
    gc.collect()
    gc.freeze()  # what lives by now need not be looked at before every run
    for turn in range(repeats + 1):
        for name, run in variants.items():
            duration, peak = _run_once(run, device)
            if turn:
                seconds[name].append(duration)
                peaks[name].append(peak)
    gc.unfreeze()
    return [
        Measurement(name, statistics.median(times), min(times), max(times), _largest(peaks[name]))
        for name, times in seconds.items()
    ]


def report(title: str, rows: list[Measurement], device: str) -> None:
    """Prints a table; ratios above 1 mean faster or smaller than the baseline in the first row."""
    table = Table(title=title, caption=machine(device), caption_justify="left", title_justify="left")
    for heading in ("variant", "median", "min .. max", "speed-up", "peak memory", "saving"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.seconds * 1e3:.1f} ms",
            f"{row.fastest * 1e3:.1f} .. {row.slowest * 1e3:.1f}",
            f"{rows[0].seconds / row.seconds:.2f}x",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / MIB:.1f} MiB",
            f"{rows[0].peak_bytes / row.peak_bytes:.2f}x" if rows[0].peak_bytes and row.peak_bytes else "-",
        )
    Console(width=120).print(table)


def machine(device: str) -> str:
    """Names what the figures belong to."""
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{platform.machine()} CPU"
    return f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {sys.version.split()[0]}"


def _run_once(run: Callable[[], object], device: str) -> tuple[float, int | None]:
    gc.collect()
    before = _start_peak(device)
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    duration = time.perf_counter() - start
    peak = _read_peak(device)
    return duration, None if peak is None or before is None else max(peak - before, 0)


def _start_peak(device: str) -> int | None:
    """Resets the memory peak and returns the bytes in use."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not _CLEAR_REFS.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # gives freed memory back, so that this run has to ask for its own
    _CLEAR_REFS.write_text("5")  # resets the resident peak, see proc(5)
    return _resident("VmRSS")


def _read_peak(device: str) -> int | None:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM") if _CLEAR_REFS.exists() else None


def _resident(field: str) -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _largest(peaks: list[int | None]) -> int | None:
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else None
