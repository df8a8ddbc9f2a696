"""ExactMatch as a loadable `evaluate` module."""

from __future__ import annotations

from .exact_match import ExactMatch

__all__ = ["ExactMatch"]
