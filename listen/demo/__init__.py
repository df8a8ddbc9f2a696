"""A page in the browser that asks a model about clips. It needs gradio, see the extra `demo`."""

from ..data.extras import extra

with extra("demo"):
    from .page import build_page, launch

from .answers import LocalAnswers
from .served import ServedAnswers

__all__ = ["LocalAnswers", "ServedAnswers", "build_page", "launch"]
