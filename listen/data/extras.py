"""Packages that only some parts of the library need: pip installs them with an extra of the distribution."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

DISTRIBUTION = "listen-audio-llm"
"""Name on PyPI, where `listen` is another project."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Name the extra to install where a package that is imported in this block is missing.

    Args:
        name: of an extra in `setup.py`.

    Raises:
        ImportError: with the name of the package, and the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if not error.name or error.name.split(".")[0] == __name__.split(".")[0]:
            raise
        raise ImportError(
            f"{error.name} is not installed; install it by: pip install '{DISTRIBUTION}[{name}]'", name=error.name
        ) from error


__all__ = ["DISTRIBUTION", "extra"]
