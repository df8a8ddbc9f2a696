"""Lines, tables and JSON of text files, each with its place for errors."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class ManifestError(ValueError):
    """A row that cannot be used; the message starts with the file and the line."""


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not empty, each with its file and line number.

    Raises:
        ManifestError: it is not UTF-8.
        FileNotFoundError: there is no such file.
    """
    with path.open(encoding="utf-8-sig") as lines:  # some editors write a byte order mark
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
        ManifestError: no header, another delimiter, two columns of one name, cells of several columns without a name, a
            quote that is not closed or not doubled, a row of another length, or a file that is not UTF-8.
        FileNotFoundError: there is no such file.
    """
    style: dict[str, Any] = {"quoting": csv.QUOTE_NONE, "escapechar": "\\"} if escaped else {}
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=not escaped, **style)
        rows = _lines_with_cells(path, reader)
        place, header = next(rows, (str(path), []))
        _check_header(place, header)
        for number, (where, cells) in enumerate(rows):
            if number == 0:
                _check_delimiter(place, header, cells, delimiter)
            if any(cells):
                _check_cells(where, header, cells, delimiter, escaped)
                yield where, dict(zip(header, cells, strict=True))


def _lines_with_cells(path: Path, reader: Any) -> Iterator[tuple[str, list[str]]]:
    """The rows of `reader`, a `csv.reader`, each with its place; blank lines are left out."""
    first = 1
    try:
        for cells in reader:
            if len(cells) > 1 or any(cell.strip() for cell in cells):
                yield f"{path}:{reader.line_num}", cells
            first = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 ({error}); convert it") from error
    except csv.Error as error:  # strict: else a quote that is not closed takes all rows up to the next quote
        fix = 'close each quoted cell with a quote, and write a quote inside it twice: "He said ""no""."'
        if "limit" in str(error):
            fix = "if no quote is missing, keep so long a cell, such as audio in base64, in a file of its own"
        raise ManifestError(f"{path}:{first}: the row that starts here cannot be read ({error}); {fix}") from error


def _check_header(place: str, header: list[str]) -> None:
    if not any(name.strip() for name in header):
        reason = "its header names no column" if header else "the file is empty"
        raise ManifestError(f"{place}: {reason}; its first line must name the columns")
    repeated = sorted({name for name in header if name.strip() and header.count(name) > 1})
    if repeated:
        raise ManifestError(f"{place}: columns with the same name: {', '.join(repeated)}; rename one of them")


def _check_delimiter(place: str, header: list[str], cells: list[str], delimiter: str) -> None:
    """Compare a header of one column with the first row: a name alone may hold any mark."""
    marks = (mark for mark in ",;\t|" if mark != delimiter and mark in header[0] and mark in delimiter.join(cells))
    other = next(marks, None)
    if len(header) == 1 and other:
        raise ManifestError(
            f"{place}: cells are separated by {other!r}, expected {delimiter!r}: save it as comma-separated .csv or "
            "tab-separated .tsv, or rename the column"
        )


def _check_cells(where: str, header: list[str], cells: list[str], delimiter: str, escaped: bool) -> None:
    if len(cells) != len(header):
        fix = f"quote text that holds the delimiter {delimiter!r}"
        if escaped:
            fix = f"write a backslash before each delimiter {delimiter!r} and each backslash inside a cell"
        elif len(cells) < len(header):
            fix = "add the others, empty or not"
        raise ManifestError(f"{where}: expected {len(header)} cells ({', '.join(header)}), found {len(cells)}; {fix}")
    nameless = [column for column, name in enumerate(header) if not name.strip()]  # one may be an index, as of pandas
    filled = [column for column in nameless if cells[column].strip()]
    if filled and len(nameless) > 1:
        column = filled[0]
        raise ManifestError(
            f"{where}: column {column + 1} has no name but holds {cells[column]!r:.80}; name it in the header"
        )


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The objects of a JSONL file, each with its file and line.

    Raises:
        ManifestError: a line that is not JSON, or a file that is not UTF-8.
        FileNotFoundError: there is no such file.
    """
    for where, line in read_lines(path):
        yield where, _parse(where, line)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ManifestError: it is not JSON, or not UTF-8.
        FileNotFoundError: there is no such file.
    """
    try:
        return _parse(str(path), path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 ({error}); convert it") from error


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_fields)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if "\n" not in text.strip() else f"line {error.lineno}, column {error.colno}"
        fix = "; a .jsonl file holds one JSON object a line, a .json file one" if error.msg == "Extra data" else ""
        raise ManifestError(f"{where}: not valid JSON ({error.msg} at {place}){fix}") from error
    except (ValueError, RecursionError) as error:  # a number with too many digits, lists in lists without an end
        raise ManifestError(f"{where}: not valid JSON ({error})") from error


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, each of whose names may stand there once: Python would keep the last value alone."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is written twice in one object")
    return fields


def is_unicode(text: str) -> bool:
    """Whether a file can hold a text: not with half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def described(value: Any) -> str:
    """Type and start of a value, for errors."""
    return f"{type(value).__name__} {value!r:.80}"
