"""CiderD as a loadable `evaluate` module."""

from __future__ import annotations

from .cider_d import CiderD

__all__ = ["CiderD"]
