"""Files that every run writes so that it can be understood and repeated: arguments, versions, seed, code."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"
_PACKAGES = ("listen", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "numpy")


def write_run_folder(
    folder: str | Path, arguments: Mapping[str, Any], seed: int, data: Mapping[str, Any] | None = None
) -> None:
    """Write `config.yaml`, which `--config` reads, and `run.json`.

    Args:
        folder: folder of the run; created.
        arguments: sections of the arguments, as given.
        seed: the run's seed.
        data: what is known about the data, such as rows of each task.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(json.loads(json.dumps(arguments, default=str)), sort_keys=False, allow_unicode=True)
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    run = {**describe_environment(), "seed": seed, "data": dict(data or {})}
    (folder / RUN_FILE).write_text(json.dumps(run, indent=2, default=str) + "\n", encoding="utf-8")


def describe_environment() -> dict[str, Any]:
    """Command, time, versions, devices and the revision of the code."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "devices": devices or ["cpu"],
        "threads": torch.get_num_threads(),
        "git": git_revision(Path(__file__).resolve().parent),
    }


def git_revision(folder: Path) -> dict[str, Any] | None:
    """Commit of the code in that folder and whether files differ from it; `None` outside a git repository."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "modified": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *command: str) -> str:
    result = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
