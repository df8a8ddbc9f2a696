"""Rouge as a loadable `evaluate` module."""

from __future__ import annotations

from .rouge import Rouge

__all__ = ["Rouge"]
