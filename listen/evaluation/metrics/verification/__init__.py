"""Verification as a loadable `evaluate` module."""

from __future__ import annotations

from .verification import Verification

__all__ = ["Verification"]
