"""The processor of LiSTEN models; its code lies in `listen/processing_listen.py`."""

from listen import ListenProcessor

__all__ = ["ListenProcessor"]
