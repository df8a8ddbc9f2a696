"""RougeL as a loadable `evaluate` module."""

from __future__ import annotations

from .rouge_l import RougeL

__all__ = ["RougeL"]
