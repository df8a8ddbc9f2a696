"""Classification as a loadable `evaluate` module."""

from __future__ import annotations

from .classification import Classification

__all__ = ["Classification"]
