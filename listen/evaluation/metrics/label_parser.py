"""Reading a class out of a free-text answer, without ever guessing."""

from __future__ import annotations

import re
from collections.abc import Iterable

UNPARSABLE = -1


class LabelParser:
    """Finds the one label that a text names.

    Case, punctuation and spacing do not matter. A text that is a label stands for it; otherwise the text must hold
    exactly one of the labels as whole words ("The speaker sounds happy."). Of labels inside one another ("tired",
    "very tired") the longest counts. No label or several different ones: unparsable.

    Args:
        labels: the classes, each a word or a phrase.

    Raises:
        ValueError: a label without a letter or figure, or two labels that differ in case or punctuation alone.
    """

    def __init__(self, labels: Iterable[str]) -> None:
        self.labels = list(labels)
        self._index: dict[str, int] = {}
        for label in self.labels:
            words = plain_words(label)
            if not words or words in self._index:
                raise ValueError(f"label {label!r} is empty or the same as another of {self.labels}; rename it")
            self._index[words] = len(self._index)
        longest_first = sorted(self._index, key=len, reverse=True)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")

    def index_of(self, label: str) -> int:
        """Place of `label` among the labels."""
        return self._index[plain_words(label)]

    def __call__(self, text: str) -> int:
        """Place of the label that `text` names, or `UNPARSABLE`."""
        words = plain_words(text)
        found = {words} if words in self._index else set(self._pattern.findall(words))
        return self._index[found.pop()] if len(found) == 1 else UNPARSABLE


def plain_words(text: str) -> str:
    """`text` in lower case, its words (letters, figures, apostrophes) joined by single spaces."""
    return " ".join(re.findall(r"\w+(?:'\w+)*", text.lower()))
