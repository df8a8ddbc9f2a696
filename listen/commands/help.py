"""The format of `--help` of the commands whose arguments are no dataclasses."""

from __future__ import annotations

import argparse

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Dtypes of the backbones; `auto` is that of each checkpoint."""


class ArgumentFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows each argument with its type and, unless its help speaks of it, its default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.nargs == 0:  # a flag has no value, and is off by default
            return text
        facts = [] if action.choices else [f"type: {getattr(action.type or str, '__name__', action.type)}"]
        # A default that the help describes may be a secret of the environment: it is not shown.
        if action.option_strings and not action.required and "default" not in text:
            value = action.default if action.default not in (None, []) else "none"
            facts.append(f"default: {' '.join(map(str, value)) if isinstance(value, list) else value}")
        return f"{text} ({', '.join(facts)})" if facts else text


__all__ = ["DTYPES", "ArgumentFormatter"]
