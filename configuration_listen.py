"""The configuration of LiSTEN models; its code lies in `listen/configuration_listen.py`."""

from listen import ListenConfig, ListenConnectorConfig, ListenPromptPoolConfig

__all__ = ["ListenConfig", "ListenConnectorConfig", "ListenPromptPoolConfig"]
