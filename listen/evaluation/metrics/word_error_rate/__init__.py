"""WordErrorRate as a loadable `evaluate` module."""

from __future__ import annotations

from .word_error_rate import WordErrorRate

__all__ = ["WordErrorRate"]
