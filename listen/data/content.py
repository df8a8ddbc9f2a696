"""What audio files hold, so that results of a file that was replaced are not taken for those of the new one.

The content of a file is written as `size:mtime:digest`, that of joined files by `+`. Equal size and modification time
are taken as equal content without reading the file. Else the digest decides: a copied file is still the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def audio_content(clips: Sequence[Mapping[str, Any]]) -> str | None:
    """Content of the files of a recording; `None` where one is given as bytes, whose key is their digest, or as URL.

    Raises:
        OSError: a file that cannot be read.
    """
    if any(clip.get("bytes") is not None or "://" in clip["path"] for clip in clips):
        return None
    # the time first: a file that is replaced meanwhile gets another one
    return "+".join(f"{_stamp(clip['path'])}:{_digest(clip['path'])}" for clip in clips)


def is_same_content(content: str | None, key: str, folder: Path, read: bool = False) -> bool:
    """Whether the files of a recording hold what they held.

    Args:
        content: see `audio_content`; unknown content is taken as the same.
        key: the paths of the files relative to `folder`, joined by `+`.
        folder: of the store.
        read: whether to compare digests even if size and time are equal.

    Returns:
        Whether all files that are still there have the same content.
    """
    if content is None:
        return True
    parts = content.split("+")
    paths = _split_key(key, len(parts), folder)
    return all(_is_same(part, path, read) for part, path in zip(parts, paths, strict=False))


def _split_key(key: str, count: int, folder: Path) -> list[Path]:
    """Paths of a key; a path may contain a `+` itself."""
    if count == 1:
        return [folder / key]
    names = key.split("+")
    return [folder / name for name in names] if len(names) == count else []


def _is_same(part: str, path: Path, read: bool) -> bool:
    size, _, rest = part.partition(":")
    time, _, digest = rest.partition(":")
    try:
        if not read and _stamp(path) == f"{size}:{time}":
            return True
        return path.stat().st_size == int(size) and _digest(path) == digest
    except FileNotFoundError:  # features are used without their audio
        return True


def _stamp(path: str | os.PathLike[str]) -> str:
    state = os.stat(path)
    return f"{state.st_size}:{state.st_mtime_ns}"


def _digest(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


__all__ = ["audio_content", "is_same_content"]
