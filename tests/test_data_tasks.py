"""The task registry."""

from __future__ import annotations

import random

import pytest

from listen.data.tasks import Task, UnknownTaskError, get_task, list_tasks, register_task, wordings
from listen.processing_listen import TASK_INSTRUCTIONS

PAPER_TASKS = ("asr", "er", "sv", "sqa", "en2zh", "acap")


@pytest.mark.parametrize("name", [*PAPER_TASKS, "voice"])
def test_each_task_has_several_training_wordings_in_plain_ascii(name: str) -> None:
    task = get_task(name)
    assert len(set(task.instructions_train)) == len(task.instructions_train) >= 4
    assert all(wording.isascii() and wording.strip() == wording for wording in wordings([name]))
    assert task.metrics


def test_the_processor_ships_the_same_test_wordings() -> None:
    assert {name: get_task(name).instruction_test for name in TASK_INSTRUCTIONS} == TASK_INSTRUCTIONS
    assert set(TASK_INSTRUCTIONS) >= set(PAPER_TASKS)


def test_the_test_wording_is_one_and_the_training_wordings_vary() -> None:
    task = get_task("asr")
    assert {task.instruction() for _ in range(5)} == {task.instruction_test}
    drawn = {task.instruction(rng=random.Random(seed)) for seed in range(60)}
    assert drawn == set(task.instructions_train)


def test_a_question_is_filled_in_and_demanded() -> None:
    task = get_task("sqa")
    assert task.instruction("Who {speaks}?") == "Who {speaks}?"
    assert "Why?" in task.instruction("Why?", random.Random(0))
    with pytest.raises(ValueError, match="'sqa' needs a 'question'"):
        task.instruction()


def test_an_unknown_task_names_the_known_ones_and_the_closest() -> None:
    with pytest.raises(UnknownTaskError, match=r"'asrr'.*mean 'asr'.*acap, asr"):
        get_task("asrr")


def test_a_name_cannot_be_taken_twice_by_different_tasks() -> None:
    mine = Task("asr", "Mine", ("Say it.",), "Say it.", ("wer",))
    with pytest.raises(ValueError, match="registered already"):
        register_task(mine)
    assert register_task(get_task("asr")) is get_task("asr")
    assert list_tasks().count("asr") == 1


def test_a_question_must_stand_in_all_wordings_or_in_none() -> None:
    with pytest.raises(ValueError, match="in all of its wordings or in none"):
        Task("odd", "Odd", ("{question}", "Answer."), "{question}", ("wer",))
