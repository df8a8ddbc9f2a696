"""The task registry."""

from __future__ import annotations

import random

import pytest

from listen.data import tasks
from listen.data.tasks import Task, UnknownTaskError, get_task, list_tasks, register_task, wordings
from listen.tasks_listen import TASK_ALIASES, TASK_INSTRUCTIONS

ALIGNMENT_TASKS = ("response", "repeat", "speech_caption", "ser")
PAPER_TASKS = ("asr", "er", "sv", "sqa", "en2zh", "acap")


@pytest.mark.parametrize("name", [*PAPER_TASKS, "voice"])
def test_each_task_has_several_training_wordings_in_plain_ascii(name: str) -> None:
    task = get_task(name)
    assert len(set(task.instructions_train)) == len(task.instructions_train) >= 4
    assert all(wording.isascii() and wording.strip() == wording for wording in wordings([name]))
    assert task.metrics


def test_the_processor_ships_the_same_test_wordings() -> None:
    assert {n: get_task(n).instruction(question="{question}") for n in TASK_INSTRUCTIONS} == TASK_INSTRUCTIONS
    assert set(TASK_INSTRUCTIONS) >= {*PAPER_TASKS, *ALIGNMENT_TASKS}


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


@pytest.mark.parametrize("name", ALIGNMENT_TASKS)
def test_alignment_tasks_are_worded_alike_in_training_and_test_and_hear_the_recording_last(name: str) -> None:
    task = get_task(name)
    assert task.instructions_train == (task.instruction_test,)
    assert task.instruction().endswith("{input}") and task.instruction() in wordings()


def test_the_recording_alone_stands_for_a_response_whose_target_is_made_under_an_instruction() -> None:
    task = get_task("response")
    assert task.instruction() == "{input}"
    prompt = task.text_prompt("i won", "happy")
    assert prompt.startswith("Respond as if you are") and prompt.endswith("in that emotion: <happy> i won")
    assert task.text_prompt("i won").endswith("in that emotion: i won")
    assert task.target_instruction in wordings()


def test_a_text_stands_where_the_recording_would() -> None:
    assert get_task("repeat").text_prompt("i won", "happy") == "Repeat after me in English: i won"
    assert get_task("asr").text_prompt("i won") == "i won\nWhat is being said?"
    assert get_task("ser").text_prompt("i won", "sad").endswith("sleepy, whisper: <sad> i won")


def test_options_are_the_tasks_own_unless_a_row_brings_others() -> None:
    task = get_task("ser")
    assert len(task.labels) == 15 and task.instruction().endswith(f"options: {', '.join(task.labels)}: {{input}}")
    assert task.instruction(options=["happy", "sad"]).endswith("following options: happy, sad: {input}")
    with pytest.raises(ValueError, match="options='happy, sad'.*list"):
        task.instruction(options="happy, sad")
    assert get_task("asr").instruction(options="a column of that name") == get_task("asr").instruction()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"instruction_test": "{input} or {input}"}, "occurs twice"),
        ({"instruction_test": "One of {options}: {input}"}, "needs labels"),
        ({"instruction_test": "Say.", "target_instruction": "Say it."}, "needs {input}"),
    ],
)
def test_fields_of_a_wording_are_checked(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task("odd", "Odd", ("Say it.",), metrics=("wer",), **fields)


def test_aliases_name_tasks_unless_a_task_has_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {get_task(alias).name: alias for alias in TASK_ALIASES} == {
        "asr": "transcribe", "en2zh": "translate", "acap": "caption", "er": "emotion", "sv": "speaker",
        "sqa": "question",
    }  # fmt: skip
    own = Task("caption", "Captions", ("Caption it.",), "Caption it.", ("bleu",))
    monkeypatch.setitem(tasks._TASKS, "caption", own)
    assert get_task("caption") is own
