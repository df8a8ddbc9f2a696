"""What the readers of corpora share: the description of a corpus and the checks of its files."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..manifest import ManifestError

Records = Iterator[tuple[str, dict[str, Any]]]
"""Rows as `(file and line, fields)`; the fields are those of a manifest, but for `task` and `response`."""


@dataclass(frozen=True)
class Corpus:
    """A published corpus in the layout that its authors give it.

    Attributes:
        name: short name, the `format` of a source.
        title: readable name.
        licence: the terms that it is given under, in short.
        homepage: where it is described and downloaded.
        splits: split -> number of rows that it must hold.
        answers: task -> field of a row that is its response; the first task is the default.
        text: what the reader changes in the corpus' text.
        read: `(root, split, **options)` -> rows of one split.
        aliases: further names of splits -> the splits that they stand for.
    """

    name: str
    title: str
    licence: str
    homepage: str
    splits: Mapping[str, int]
    answers: Mapping[str, str]
    text: str
    read: Callable[..., Records]
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def options(self) -> list[str]:
        """Names of the reader's options."""
        return list(inspect.signature(self.read).parameters)[2:]

    def parts(self, split: str) -> list[str]:
        """The splits that a name stands for: several are joined as in `train-clean-100+train-clean-360`.

        Raises:
            ValueError: the corpus has no such split.
        """
        found: list[str] = []
        for name in split.split("+"):
            if name not in self.splits and name not in self.aliases:
                known = ", ".join([*self.splits, *self.aliases])
                raise ValueError(f"{self.title} has no split {name!r}; choose among {known}, joined by +")
            found.extend(self.aliases.get(name, (name,)))
        return list(dict.fromkeys(found))

    def expected_rows(self, split: str) -> int:
        """The number of rows that the complete corpus has in a split."""
        return sum(self.splits[part] for part in self.parts(split))

    def records(
        self, root: Path, split: str = "train", task: str | None = None, options: Mapping[str, Any] | None = None
    ) -> Records:
        """The rows of a split, read one by one.

        Args:
            root: the corpus' folder.
            split: see `parts`.
            task: one of `answers`.
            options: options of the reader.

        Returns:
            An iterator over `(file and line, fields of a manifest row)`.

        Raises:
            ValueError: an unknown split, task or option.
            FileNotFoundError: a file or folder of the corpus is not there.
            ManifestError: a line of another shape.
        """
        task = task or next(iter(self.answers))
        if task not in self.answers:
            raise ValueError(f"{self.title} has no answers for task {task!r}; it has {', '.join(self.answers)}")
        unknown = sorted(set(options or {}) - set(self.options))
        if unknown:
            raise ValueError(
                f"{self.title} has no option {unknown[0]!r}; it has {', '.join(self.options) or 'none at all'}"
            )
        if not root.is_dir():
            raise FileNotFoundError(f"there is no folder {root} with {self.title}; get it from {self.homepage}")
        return self._answered(root, self.parts(split), task, dict(options or {}))

    def _answered(self, root: Path, parts: list[str], task: str, options: dict[str, Any]) -> Records:
        answer = self.answers[task]
        for part in parts:
            for where, fields in self.read(root, part, **options):
                row = {**fields, "task": task, "response": fields[answer]}
                if answer not in ("transcript", "emotion"):  # what other tasks and the teacher read stays
                    del row[answer]
                yield where, row


def existing(path: Path, what: str) -> Path:
    """The path itself, if it is there.

    Raises:
        FileNotFoundError: it is not; the message says what it should be.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}, {what}")
    return path


def column(where: str, row: Mapping[str, str], name: str) -> str:
    """A cell of a row.

    Raises:
        ManifestError: the table has no such column.
    """
    if name not in row:
        raise ManifestError(f"{where}: there is no column {name!r}; found {', '.join(row)}")
    return row[name]
