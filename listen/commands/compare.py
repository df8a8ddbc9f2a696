"""Compare methods: train and evaluate each with several seeds, and test all differences.

    listen compare --config examples/configs/compare/miniature.yaml --jobs 2
    listen compare runs/a/eval/metrics.json runs/b/eval/metrics.json

With `--config` each cell, one method with one seed, is a process of its own, `--jobs` of them at a time, each on one
GPU in turn or on one CPU core. A finished cell is never run again; a cell that was interrupted goes on from its last
checkpoint; one that was started with other arguments is refused. Encoder features are computed once for all. The output
folder gets `comparison.md` (the table, the counts of all pairwise tests, and held-out losses in pairs by seed),
`table.csv`, `pairs.csv`, `losses.csv`, `cells.csv`, `scores.png`, `curves.png` and `prompts.md` (which tasks share
prompts and queries). `--table` writes these for the
finished cells and runs nothing. On a cluster, run cells as jobs of their own with `--cell METHOD SEED` after
`--prepare`, and `--table` at the end.

With two evaluations (their folders or `metrics.json`, the `predictions.jsonl` beside) it compares these on the examples
of each task.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..data.files import write_text
from ..evaluation.comparison import Cell as Evaluated
from ..evaluation.comparison import compare, load_cells, load_items
from ..evaluation.comparison_report import markdown_pairs, markdown_prompts, write_comparison
from ..training.comparison import (
    Cell,
    Comparison,
    is_finished,
    prepare,
    read_comparison,
    run_cell,
    unequal_arguments,
    unequal_machines,
)
from ..training.run_folder import describe_environment
from ..training.values import ArgumentError
from .help import ArgumentFormatter

LOG_FILE = "log.txt"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ArgumentFormatter)
    parser.add_argument("evaluations", nargs="*", type=Path, metavar="EVALUATION", help="two evaluations to compare")
    parser.add_argument("--config", type=Path, help="recipe of a comparison, such as those in examples/configs/compare")
    parser.add_argument("--jobs", type=int, default=1, help="cells that run at the same time")
    parser.add_argument("--output", type=Path, help="folder of the results; by default the recipe's")
    parser.add_argument(
        "--models",
        type=Path,
        default=os.environ.get("LISTEN_REAL_MODELS") or None,
        help="folder that backbones named by Hub id are read from, where it has them (default: LISTEN_REAL_MODELS)",
    )
    work = parser.add_mutually_exclusive_group()
    work.add_argument("--cell", nargs=2, metavar=("METHOD", "SEED"), help="run only this cell, in this process")
    work.add_argument("--prepare", action="store_true", help="only generate the corpus and compute the features")
    work.add_argument("--table", action="store_true", help="only write the table of the finished cells")
    arguments = parser.parse_args()
    if (arguments.config is None) == (not arguments.evaluations):
        parser.error("give --config, or two evaluations")
    if arguments.evaluations and len(arguments.evaluations) != 2:
        parser.error(f"give two evaluations, not {len(arguments.evaluations)}")
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs} must be at least 1")
    return arguments


def main() -> None:
    """Run a comparison, or compare two evaluations."""
    arguments = parse_arguments()
    try:
        if arguments.evaluations:
            compare_evaluations(arguments.evaluations, arguments.output)
        else:
            run_comparison(arguments)
    except (ArgumentError, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


def compare_evaluations(sources: Sequence[Path], output: Path | None) -> None:
    """Print the differences between two finished evaluations, and write them into `output` if given."""
    names = [str(source) for source in sources]
    if names[0] == names[1]:
        raise ArgumentError(f"{names[0]} is given twice; give two evaluations")
    cells = [Evaluated(name, 0, load_items(source)) for name, source in zip(names, sources, strict=True)]
    comparisons = compare(cells)
    if not comparisons:
        raise ArgumentError("the two evaluations have no task in common")
    print(markdown_pairs(comparisons))
    print("Two runs, not two methods: another seed may differ as much.")
    if output is not None:
        write_comparison(cells, output)
        print(f"written to {output}")


def run_comparison(arguments: argparse.Namespace) -> None:
    """Run what is left of a comparison, or the part that the arguments name."""
    comparison = read_comparison(arguments.config)
    output = arguments.output or Path(comparison.output)
    if arguments.cell:
        run_cell(comparison.cell(arguments.cell[0], int(arguments.cell[1])), output, arguments.models)
        return
    open_cells = [cell for cell in comparison.cells if not is_finished(cell, output)]  # all are checked first
    if not arguments.table and (open_cells or arguments.prepare):
        prepare(comparison, arguments.models)
    if arguments.prepare:
        return
    failed: list[Cell] = []
    for is_later in (False, True):  # cells that start from others come after these
        cells = [cell for cell in open_cells if (cell.start_from is not None) == is_later and not arguments.table]
        failed += run_cells(cells, arguments.config, output, arguments)
    if len(failed) < len(comparison.cells):
        write_table(comparison, output)
    if failed:
        logs = "\n".join(str(output / cell.folder / LOG_FILE) for cell in failed)
        sys.exit(f"{len(failed)} of {len(comparison.cells)} cells failed; see\n{logs}\nand run the same command again")


def write_table(comparison: Comparison, output: Path) -> None:
    """Write the results of the finished cells, in the order of the recipe."""
    planned = {(cell.method, cell.seed) for cell in comparison.cells}
    order = {method: place for place, method in enumerate(comparison.methods)}
    known = [cell for cell in load_cells(output) if (_method_of(cell.method, order), cell.seed) in planned]
    if not known:
        raise ArgumentError(f"{output} holds no finished cell of this recipe; run it, or give its --output")
    known.sort(key=lambda cell: (_place(cell.method, order), cell.seed))
    folders = [output / cell.folder for cell in comparison.cells if is_finished(cell, output)]
    about, reference = [*unequal_machines(folders), *notes(comparison, known)], comparison.reference
    if reference not in {cell.method for cell in known}:
        about.insert(0, f"No cell of the reference {reference!r} is finished; {known[0].method!r} stands in its place.")
        reference = known[0].method
    write_comparison(known, output, reference, about)
    write_text(output / "prompts.md", markdown_prompts(output, comparison.methods, {seed for _, seed in planned}))
    print(f"table: {output / 'comparison.md'}")


def _method_of(row: str, methods: Container[str]) -> str:
    """The method of a row of the table, which may be that method at another k."""
    return row if row in methods else row.rpartition(", k = ")[0]


def _place(row: str, order: dict[str, int]) -> tuple[int, int]:
    """Methods as in the recipe; their rows at another k follow them."""
    method = _method_of(row, order)
    return order[method], -1 if row == method else int(row.removeprefix(f"{method}, k = "))


def notes(comparison: Comparison, cells: Sequence[Evaluated]) -> list[str]:
    """What a reader of the table must know besides it."""
    finished = sum(", k = " not in cell.method for cell in cells)
    hours = sum(cell.figures.get("train_seconds", 0.0) for cell in cells) / 3600
    environment = describe_environment()
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    machine = f"{environment['platform']}, {', '.join(environment['devices'])}"
    lines = [
        f"{finished} of {len(comparison.cells)} cells are finished; their training steps took {hours:.2f} hours.",
        f"Table written on {machine}; {versions}.",
    ]
    return [*unequal_arguments(comparison), *lines]


def run_cells(cells: Sequence[Cell], config: Path, output: Path, arguments: argparse.Namespace) -> list[Cell]:
    """Run cells in processes of their own; those that failed are returned once all have ended."""
    slots: queue.Queue[int] = queue.Queue()
    for slot in range(arguments.jobs):
        slots.put(slot)
    running: dict[str, subprocess.Popen[bytes]] = {}
    devices, stopped = gpu_names(), False

    def run(cell: Cell) -> bool:
        slot = slots.get()
        try:
            if stopped:
                return False
            running[cell.folder] = start_cell(cell, config, output, arguments.models, environment_of(slot, devices))
            started, code = time.perf_counter(), running[cell.folder].wait()
            print(f"{cell.folder}: {'done' if code == 0 else 'failed'}, {time.perf_counter() - started:.0f} s")
            return code == 0
        finally:
            slots.put(slot)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; run the same command again to go on"))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            done = list(pool.map(run, cells))
        except BaseException:
            stopped = True
            for process in list(running.values()):
                process.terminate()
            raise
    return [cell for cell, success in zip(cells, done, strict=True) if not success]


def start_cell(
    cell: Cell, config: Path, output: Path, models: Path | None, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Start the process of a cell, its output in the cell's `log.txt`."""
    folder = output / cell.folder
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "listen", "compare", "--config", str(config), "--output", str(output)]
    command += ["--cell", cell.method, str(cell.seed), *(["--models", str(models)] if models else [])]
    with (folder / LOG_FILE).open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def gpu_names() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        [name for name in named.split(",") if name]
        if named is not None
        else [*map(str, range(torch.cuda.device_count()))]
    )


def environment_of(slot: int, devices: Sequence[str]) -> dict[str, str]:
    """Environment of the process in a slot: one core, and one GPU if there are any."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return environment
