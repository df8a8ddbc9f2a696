"""Published `.pt` and `.pth` files: read without executing anything in them, and held against the tensors needed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class ConversionError(ValueError):
    """The file is no checkpoint that can be converted; the message says why."""


def read_checkpoint(path: Path, entries: tuple[str, ...]) -> dict[str, Any]:
    """Load a dictionary of which `entries` are dictionaries, with `weights_only=True`.

    Raises:
        FileNotFoundError: there is no such file.
        ConversionError: the file is damaged, holds more than tensors and plain values, or lacks an entry.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes of another kind raise anything: a text may be a KeyError
        raise ConversionError(f"{path} is truncated or no PyTorch file of plain tensors: {_reason(error)}") from error
    missing = [name for name in entries if not isinstance(checkpoint, dict) or name not in checkpoint]
    if missing:
        found = sorted(map(str, checkpoint))[:5] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ConversionError(f"{path} has no {' and no '.join(map(repr, missing))}; it holds {found}.")
    for name in entries:
        if not isinstance(checkpoint[name], dict):
            raise ConversionError(f"{path}: {name!r} is a {type(checkpoint[name]).__name__}, a dictionary is needed.")
    return checkpoint


def _reason(error: Exception) -> str:
    """Why a file cannot be read, without torch's advice to execute it."""
    python_object = re.search(r"GLOBAL (\S+)", str(error))
    if python_object:
        return f"it holds the Python object {python_object[1]}"
    if isinstance(error, (RuntimeError, OSError)):
        return str(error).split(". ")[0]
    return "its bytes are no saved tensors"


def check_tensors(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Hold converted tensors against those of the model that they are for.

    Raises:
        ConversionError: a tensor is missing, superfluous, of another shape, or not finite.
    """
    for kind, names in (
        ("lacks", expected.keys() - weights.keys()),
        ("has unexpected", weights.keys() - expected.keys()),
    ):
        if names:
            raise ConversionError(f"The checkpoint {kind} {len(names)} tensors: {', '.join(sorted(names)[:5])} ...")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ConversionError(
                f"{name} has shape {tuple(tensor.shape)}, its configuration needs {tuple(expected[name].shape)}."
            )
        if not torch.isfinite(tensor).all():
            raise ConversionError(f"{name} has NaN or infinite values.")
