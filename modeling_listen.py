"""The LiSTEN model; its code lies in `listen/modeling_listen.py`."""

from listen import ListenForConditionalGeneration, ListenModel

__all__ = ["ListenForConditionalGeneration", "ListenModel"]
