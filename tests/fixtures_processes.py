"""Processes that are forked from one in which the imports are done.

A new interpreter imports torch and transformers anew, which takes longer than the work of most tests. A process that is
forked has its own memory, output and working folder all the same, and starts with nothing but imported modules.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

START_METHOD = "forkserver"
MOST_SECONDS = 600
_SERVER = multiprocessing.get_context(START_METHOD)
_SERVER.set_forkserver_preload(["listen.training", "listen.evaluation"])


def run_script(
    script: str | Path, *arguments: str | Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None,
    processes: int = 1,
) -> str:  # fmt: skip
    """What a script prints. A failure shows its errors.

    Args:
        script: Path of the script.
        arguments: Its arguments.
        cwd: Its working folder.
        environment: Variables beside those of this process.
        processes: Processes of a distributed run, which find each other as those of `torchrun` do.
    """
    words = [str(word) for word in (script, *arguments)]
    with tempfile.TemporaryDirectory() as name:
        outputs = [Path(name) / str(rank) for rank in range(processes)]
        variables = [{**os.environ, **(environment or {}), **place} for place in places(processes)]
        started = [
            _SERVER.Process(target=_run, args=(words, str(cwd or Path.cwd()), *pair))
            for pair in zip(variables, outputs, strict=True)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(MOST_SECONDS)
            process.kill()
        errors = "".join(output.with_suffix(".err").read_text() for output in outputs)
        assert [process.exitcode for process in started] == [0] * processes, f"{words}\n{errors[-6000:]}"
        return "".join(output.with_suffix(".out").read_text() for output in outputs)


def places(processes: int) -> list[dict[str, str]]:
    """The variables that tell each process of a distributed run its place; none for a single process."""
    if processes == 1:
        return [{}]
    size, port = str(processes), str(free_port())
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in range(processes)]


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]


def _run(words: list[str], cwd: str, variables: dict[str, str], output: Path) -> None:
    """The main function of a process: the script as `python SCRIPT` runs it, its output in files."""
    os.environ.clear()
    os.environ.update(variables)
    for suffix, stream in ((".out", sys.stdout), (".err", sys.stderr)):
        stream.flush()
        os.dup2(os.open(output.with_suffix(suffix), os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.chdir(cwd)
    warnings.simplefilter("ignore")
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    runpy.run_path(words[0], run_name="__main__")


__all__ = ["START_METHOD", "free_port", "places", "run_script"]
