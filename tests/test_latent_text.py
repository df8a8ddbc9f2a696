"""Text for a language model with latent skills: what its headers, wordings and clips give away, and what not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from listen.data.corpus.grammar import spoken_words
from listen.data.tasks import get_task, wordings

EXAMPLES = str(Path(__file__).parent.parent / "examples")


@pytest.fixture(scope="module")
def latent() -> Iterator[ModuleType]:
    """The module, found as the build script finds it."""
    sys.path.append(EXAMPLES)
    from tiny_backbones import latent_text

    yield latent_text
    sys.path.remove(EXAMPLES)


def _texts(example: object) -> str:
    return " ".join(part for part in example.parts if isinstance(part, str))


def test_no_instruction_and_no_sentence_names_a_kind_of_document(latent: ModuleType) -> None:
    said = {word.strip("?.,:").lower() for text in [*wordings(), *spoken_words()] for word in text.split()}
    kinds = [word for words in latent.KINDS.values() for word in words.split()]
    assert len(kinds) == len(set(kinds)) and not said & set(kinds)


def test_a_header_names_its_kind_more_often_than_any_other(latent: ModuleType) -> None:
    writer = latent.LatentExampleWriter({}, np.random.default_rng(0))
    for task in latent.KINDS:
        for _ in range(50):
            header = writer._header(task)
            assert 1 <= len(header) <= latent.MAX_HEADER
            words = [word for position in header for word, _ in position]
            counts = {name: sum(word in kind.split() for word in words) for name, kind in latent.KINDS.items()}
            assert counts[task] > max(count for name, count in counts.items() if name != task)


def test_an_instruction_comes_whole_only_with_what_is_known(latent: ModuleType) -> None:
    writer = latent.LatentExampleWriter({}, np.random.default_rng(0))
    hidden = ["er", "sv", "acap", "first_sound", "voice"]
    instructions = [text for task in hidden for text in get_task(task).instructions_train]
    for _ in range(2000):
        text = _texts(writer.draw())
        assert not any(instruction in text for instruction in instructions)


def test_without_a_header_all_but_the_known_tasks_are_unknown(latent: ModuleType) -> None:
    writer = latent.LatentExampleWriter({}, np.random.default_rng(0))
    kinds = {word for words in latent.KINDS.values() for word in words.split()}
    for _ in range(1000):
        example = writer.draw()
        says = any(word in kinds for position in example.header or [] for word, _ in position)
        assert says or example.task in (*latent.KNOWN, "unknown")
    assert writer.draw("unknown").response == latent.UNKNOWN
