"""Which version of the code is running."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_DISTRIBUTION = "listen-audio-llm"


def git_revision(folder: Path) -> dict[str, Any] | None:
    """Commit of the code in that folder and whether files differ from it; `None` where git does not track the code."""
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")  # fails for a package inside another repository
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "modified": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def code_version() -> str:
    """Short commit of the code, such as `1a2b3c4` or `1a2b3c4 (modified)`; the release where there is no commit."""
    revision = git_revision(Path(__file__).resolve().parent)
    if revision is not None:
        return revision["commit"][:7] + (" (modified)" if revision["modified"] else "")
    try:
        return f"version {metadata.version(_DISTRIBUTION)}"
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _git(folder: Path, *command: str) -> str:
    result = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True)
    return result.stdout.strip()
