"""EventF1 as a loadable `evaluate` module."""

from __future__ import annotations

from .event_f1 import EventF1

__all__ = ["EventF1"]
