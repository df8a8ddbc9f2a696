"""Lines and tables of text files, each with its place for errors."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .manifest import ManifestError


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not empty, each with its file and line number.

    Raises:
        ManifestError: it is not UTF-8.
        FileNotFoundError: there is no such file.
    """
    with path.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ManifestError(f"{path}: not UTF-8 ({error}); convert it") from error


def read_table(path: Path, delimiter: str = ",", escaped: bool = False) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV or TSV file with a header, each with its file and line number.

    Args:
        path: the file.
        delimiter: between two cells.
        escaped: whether quotes are plain text and a backslash takes the delimiter's meaning away, as in CoVoST 2.

    Raises:
        ManifestError: no header, another delimiter, two columns of one name, a row of another length, or a file that
            is not UTF-8.
        FileNotFoundError: there is no such file.
    """
    style: dict[str, Any] = {"quoting": csv.QUOTE_NONE, "escapechar": "\\"} if escaped else {}
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, **style)
        try:
            header = next(reader, None)
            if not header:
                raise ManifestError(f"{path}: the file is empty; its first line must name the columns")
            _check_header(path, header, delimiter)
            for cells in reader:
                if len(cells) != len(header) and any(cells):
                    raise ManifestError(
                        f"{path}:{reader.line_num}: expected {len(header)} cells ({', '.join(header)}), "
                        f"found {len(cells)}; quote text that holds the delimiter {delimiter!r}"
                    )
                if any(cells):
                    yield f"{path}:{reader.line_num}", dict(zip(header, cells, strict=True))
        except UnicodeDecodeError as error:
            raise ManifestError(f"{path}: not UTF-8 ({error}); convert it") from error
        except csv.Error as error:
            raise ManifestError(f"{path}:{reader.line_num}: {error}") from error


def _check_header(path: Path, header: list[str], delimiter: str) -> None:
    repeated = sorted({name for name in header if name and header.count(name) > 1})
    if repeated:
        raise ManifestError(f"{path}:1: columns with the same name: {', '.join(repeated)}; rename one of them")
    other = next((mark for mark in ",;\t|" if mark != delimiter and mark in header[0]), None)
    if len(header) == 1 and other:
        raise ManifestError(
            f"{path}:1: cells are separated by {other!r}, expected {delimiter!r}: save it as comma-separated .csv or "
            "tab-separated .tsv, or rename the column"
        )
