"""Processes that are forked from one in which the imports are done.

A new interpreter imports torch and transformers anew, which takes longer than the work of most tests. A process that is
forked has its own memory, output and working folder all the same, and starts with nothing but imported modules.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from fixtures_servers import free_port
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

MOST_SECONDS = 600
READ_AT_IMPORT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # no network, one thread
_METHOD = "forkserver"
multiprocessing.get_context(_METHOD).set_forkserver_preload(["listen.training", "listen.evaluation"])


def run_processes(work: Callable[..., None], processes: int, *arguments: Any) -> None:
    """`work(rank, processes, *arguments)` in each process. If one fails, the others end, and its error is raised."""
    with mock.patch.dict(os.environ, READ_AT_IMPORT):  # the first call starts the process with the imports
        start_processes(work, (processes, *arguments), nprocs=processes, start_method=_METHOD)


def place(rank: int, processes: int, port: int) -> dict[str, str]:
    """The variables that tell a process its place in a distributed run, as `torchrun` sets them."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return {name: str(number) for name, number in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_script(
    script: str | Path, *arguments: str | Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None,
    processes: int = 1,
) -> str:  # fmt: skip
    """What a script prints. A failure shows what it wrote.

    Args:
        script: Path of the script.
        arguments: Its arguments.
        cwd: Its working folder.
        environment: Variables beside those of this process.
        processes: Processes of a distributed run.
    """
    words = [str(word) for word in (script, *arguments)]
    variables = {**os.environ, **READ_AT_IMPORT, **(environment or {})}
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_processes(_run, processes, words, str(cwd or Path.cwd()), variables, free_port(), folder)
        except (ProcessExitedException, ProcessRaisedException) as error:
            raise AssertionError(
                "\n".join([" ".join(words), _written(folder, "out"), _written(folder, "err")])
            ) from error
        return _written(folder, "out")


def _run(
    rank: int, processes: int, words: list[str], cwd: str, variables: dict[str, str], port: int, folder: str
) -> None:
    """The main function of a process: the script as `python SCRIPT` runs it, its output in files."""
    signal.alarm(MOST_SECONDS)
    os.environ.clear()
    os.environ.update(variables | (place(rank, processes, port) if processes > 1 else {}))
    for kind, stream in (("out", sys.stdout), ("err", sys.stderr)):
        stream.flush()
        os.dup2(os.open(f"{folder}/{rank}.{kind}", os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.chdir(cwd)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    runpy.run_path(words[0], run_name="__main__")


def _written(folder: str, kind: str) -> str:
    """What all processes wrote to one stream."""
    return "".join(path.read_text() for path in sorted(Path(folder).glob(f"*.{kind}")))


__all__ = ["place", "run_processes", "run_script"]
