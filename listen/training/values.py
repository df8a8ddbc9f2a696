"""Values from files and command lines, checked against the types that the fields of a dataclass declare."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from transformers.integrations import (
    is_mlflow_available,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)

from ..data.extras import DISTRIBUTION

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}

_TRACKERS = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "mlflow": is_mlflow_available,
    "trackio": is_trackio_available,
}


class ArgumentError(ValueError):
    """An argument that does not exist or has an invalid value; the message names it and the fix."""


def check_values(prefix: str, kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values for fields of a dataclass, in the types that it declares.

    Whole floats become integers where those are needed (`1e4`), and `no`, which YAML reads as false, becomes the
    word again for fields that have it as a choice.

    Args:
        prefix: what the error puts before the name of a field.
        kind: the dataclass.
        values: names of its fields -> values.

    Raises:
        ArgumentError: a value of another type, or none of the field's choices.
    """
    hints = typing.get_type_hints(kind)
    notes = {entry.name: entry.metadata for entry in dataclasses.fields(kind)}
    return {name: _checked(f"{prefix}{name}", hints[name], notes[name], value) for name, value in values.items()}


def check_report_to(report_to: Sequence[str]) -> None:
    """Refuse trackers that are not installed, before anything loads.

    Raises:
        ArgumentError: it names what to install.
    """
    for name, is_available in _TRACKERS.items():
        if name in report_to and not is_available():
            package = f"'{DISTRIBUTION}[train]'" if name == "tensorboard" else name
            raise ArgumentError(
                f"training.report_to={name}: it is not installed; pip install {package}, or set training.report_to=none"
            )


def field_names(kind: type) -> list[str]:
    """Names of the fields that a dataclass takes as arguments."""
    return [entry.name for entry in dataclasses.fields(kind) if entry.init]


def refuse_unknown(given: Any, known: Sequence[str], prefix: str) -> None:
    """Refuse names that are not known.

    Args:
        given: a mapping from names to values.
        known: the names that exist.
        prefix: what the error puts before a name.

    Raises:
        ArgumentError: `given` is not a mapping, or has an unknown name; the message suggests the closest one.
    """
    if not isinstance(given, Mapping):
        raise ArgumentError(f"{prefix.rstrip('.') or 'the file'} must be a mapping, found {given!r}")
    for name in given:
        if name not in known:
            raise ArgumentError(f"unknown argument {prefix}{name}{closest_name(str(name), known)}")


def closest_name(name: str, known: Sequence[str]) -> str:
    """End of an error about an unknown name: the closest known one, or all of them."""
    bare = name.split(".")[-1]
    close = difflib.get_close_matches(name, known, n=1) or [
        full for full in known if difflib.get_close_matches(bare, [full.split(".")[-1]], n=1)
    ]
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}"


def _checked(name: str, hint: Any, notes: Mapping[str, Any], value: Any) -> Any:
    if value is True and notes.get("const") is True:  # a flag, allowed besides the field's type
        return value
    for option in _options(hint):
        if value is False and isinstance(option, type) and issubclass(option, Enum) and "no" in _members(option):
            return "no"
        if _fits(option, value):
            value = int(value) if option is int else value
            break
    else:
        raise ArgumentError(f"{name}={value!r} must be {_describe(hint)}")
    choices = notes.get("choices")
    if choices and value is not None and value not in choices:
        raise ArgumentError(f"{name}={value!r} is unknown; choose one of {', '.join(map(str, choices))}")
    return value


def _fits(hint: Any, value: Any) -> bool:
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(option, value) for option in inner)
    if origin is typing.Literal:
        return value in inner
    if hint == list[Any]:  # a single item too: such fields check their items themselves
        return True
    if origin is list:
        return isinstance(value, (list, tuple)) and all(_fits(inner[0], item) for item in value if inner)
    if origin is dict:
        return isinstance(value, Mapping) and all(_fits(inner[1], item) for item in value.values() if inner)
    if origin in (int, float):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and (origin is float or float(value).is_integer())
    if origin is str:
        return isinstance(value, (str, os.PathLike))
    return origin is Any or not isinstance(origin, type) or isinstance(value, origin)


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _members(kind: type[Enum]) -> list[Any]:
    return [member.value for member in kind]


def _describe(hint: Any) -> str:
    """The types of a hint in plain words."""
    words = []
    for option in _options(hint):
        origin, inner = typing.get_origin(option) or option, typing.get_args(option)
        if origin is list:
            words.append("a list" if not inner or inner[0] is Any else f"a list, each item {_describe(inner[0])}")
        elif origin is dict:
            words.append("a mapping" if not inner or inner[1] is Any else f"a mapping to {_describe(inner[1])}")
        else:
            words.append(_WORDS.get(origin, getattr(origin, "__name__", str(origin))))
    return " or ".join(words)
