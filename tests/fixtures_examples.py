"""Scripts of `examples` as modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = str(Path(__file__).parent.parent / "examples")


def load_example(name: str) -> ModuleType:
    """Import a script as it is when run: its neighbours are found.

    The folder goes last, so that none of its scripts hides an installed package of the same name.
    """
    if EXAMPLES not in sys.path:
        sys.path.append(EXAMPLES)
    return importlib.import_module(name)
