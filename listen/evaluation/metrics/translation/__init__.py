"""Translation as a loadable `evaluate` module."""

from __future__ import annotations

from .translation import Translation

__all__ = ["Translation"]
