"""Text from data, users and models that goes into Markdown, CSV files and pictures: shown as it is, and never run."""

from __future__ import annotations

import html
import re
import unicodedata

_FORMULA = ("=", "+", "-", "@")  # a spreadsheet runs a cell that begins so
_MARKDOWN = re.compile(r"[\\`*|$~\[\]]|(?<!\w)_|_(?!\w)|(?<!\w)#")


def visible(text: object) -> str:
    """One line, in which control characters, surrogates and marks that turn the direction of writing are spelt out."""
    line = " ".join(str(text).split())
    return "".join(f"\\u{ord(c):04x}" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in line)


def markdown(text: object) -> str:
    """Text of a table cell or a line: no HTML, emphasis, link, formula or further column."""
    return _MARKDOWN.sub(r"\\\g<0>", html.escape(visible(text), quote=False))


def csv_cell(text: object) -> str:
    """A cell that spreadsheets show rather than run: an apostrophe stands before what would begin a formula."""
    line = visible(text)
    return f"'{line}" if line.startswith((*_FORMULA, "'")) else line


def read_csv_cell(cell: str) -> str:
    """What `csv_cell` was given."""
    return cell[1:] if cell.startswith("'") else cell


def plot_text(text: object) -> str:
    """A title or label that matplotlib does not read as mathematics."""
    line = visible(text).replace("$", r"\$")
    return f" {line}" if line.startswith("_") else line  # which legends leave out
