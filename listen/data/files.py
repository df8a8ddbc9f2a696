"""Files that are complete or absent, and folders that only one run writes to."""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, SoftFileLease, Timeout

_LEASE_SECONDS = 60.0
_LOOK_SECONDS = 5.0  # between two looks at a lease without an owner
_RELEASE_SECONDS = 20.0  # data loader workers of a killed process keep its lock until they notice its end


class FolderInUseError(ValueError):
    """A folder that another process writes to; the message names it."""


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON in UTF-8; text with lone surrogates, which UTF-8 cannot hold, is escaped instead."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file beside its place and rename it: readers and later runs find the old content or the whole new one.

    Raises:
        OSError: the disk is full, or the folder cannot be written; nothing is left behind.
    """
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        partial.write_bytes(content)
        rename_complete(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write text in UTF-8 by `write_bytes`; lone surrogates become question marks."""
    write_bytes(path, text.encode("utf-8", "replace"))


def rename_complete(partial: Path, path: Path) -> None:
    """Give a complete file its name, once its content is on the disk."""
    with partial.open("r+b") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write an indented JSON file by `write_text`."""
    write_text(path, json_text(value, indent=2) + "\n")


def write_json_once(path: Path, value: Any, lock: Path) -> None:
    """Write a JSON file unless it is there, under a lease: of several runs one is first.

    What killed runs left of the file is removed.
    """
    with lease(lock):
        if not path.is_file():
            for partial in path.parent.glob(f".{path.name}.*.tmp"):
                partial.unlink(missing_ok=True)
            write_json(path, value)


def write_json_lines(path: str | os.PathLike[str], records: Iterable[Any]) -> None:
    """Write one JSON object a line by `write_text`."""
    write_text(path, "".join(json_text(record) + "\n" for record in records))


def lease(path: str | os.PathLike[str]) -> SoftFileLease:
    """A lock between processes on any machines that share a folder.

    It is a file with its owner, created at once or not at all, so that the file system needs no locks of its own. The
    owner renews it from a thread. It is free again when its owner has died: at once on the same machine, else after
    `_LEASE_SECONDS` without renewal. An owner that was suspended for longer may go on beside the next one, so a lease
    saves work, but does not replace complete files under names of their own.

    Args:
        path: the file; its folder is created.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return _Lease(path, lease_duration=_LEASE_SECONDS, poll_interval=0.2)


class _Lease(SoftFileLease):
    """Taken over, too, from a run that was killed between creating the file and writing its owner."""

    def acquire(self, timeout: float | None = None, **options: Any) -> AcquireReturnProxy:
        """As upstream."""
        timeout = self.timeout if timeout is None else timeout
        end = math.inf if timeout < 0 else time.monotonic() + timeout
        while True:
            _mark_abandoned(self.lock_file)
            left = max(end - time.monotonic(), 0.0)
            try:
                return super().acquire(min(left, _LOOK_SECONDS), **options)
            except Timeout:
                if left <= _LOOK_SECONDS:
                    raise


def _mark_abandoned(path: str) -> None:
    """Add an empty line to an old file without an owner: upstream waits for empty ones, but takes over damaged ones.

    Of several runs, one takes it over; removing the file could remove the next owner's.
    """
    with suppress(FileNotFoundError):
        found = os.stat(path)
        if not found.st_size and time.time() - found.st_mtime > _LEASE_SECONDS:
            file = os.open(path, os.O_WRONLY | os.O_APPEND)  # an owner that is written meanwhile stays valid
            try:
                os.write(file, b"\n")
            finally:
                os.close(file)


@contextmanager
def hold_folder(folder: str | os.PathLike[str], work: str) -> Iterator[None]:
    """Keep other processes from the same work in a folder; the lock of a process that died is free again.

    Args:
        folder: created if absent.
        work: name of the work, such as `training`; part of the lock's file name and of the message.

    Raises:
        FolderInUseError: another process holds the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    holder, lock = folder / f".{work}.json", FileLock(folder / f".{work}.lock")
    try:
        lock.acquire(timeout=_RELEASE_SECONDS if _has_died(_read_holder(holder)) else 0)
    except Timeout as error:
        raise FolderInUseError(
            f"{folder} is in use: {work} by {_describe(_read_holder(holder))}; wait for its end, stop it, or choose "
            "another folder"
        ) from error
    try:
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "started": started})
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _read_holder(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # not written yet
        return {}


def _has_died(holder: dict[str, Any]) -> bool:
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    if sys.platform == "win32":  # signal 0 is Ctrl-C there
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:  # a process of another user
        return False
    return False


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('started')}"
