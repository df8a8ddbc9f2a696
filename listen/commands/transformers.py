"""Run the command line of transformers in a process that knows LiSTEN models.

listen transformers serve my/checkpoint --port 8000
listen transformers chat http://localhost:8000 my/checkpoint
"""

from __future__ import annotations

from transformers.cli.transformers import app


def main() -> None:
    """The command in `sys.argv`; LiSTEN models are known, since this module is part of the package."""
    app()
