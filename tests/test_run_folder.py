"""Whose folder it is: locks, ids, finished runs, other settings, and stops that leave no trace."""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_backbones import model_section, save_backbones
from fixtures_runs import assert_same_run, history
from fixtures_training import small_corpus
from transformers import TrainerCallback, set_seed

from listen.data.files import FolderInUseError, hold_folder, write_text
from listen.training import (
    ArgumentError,
    TrainingStopped,
    build_arguments,
    build_model,
    build_trainer,
    run_trainer,
    train,
)

SHORT = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"), num_rows=8)


@pytest.fixture
def settings(backbones: dict, manifest: Path, tmp_path: Path) -> dict:
    """Arguments of a run of four steps."""
    fixed = {"use_cpu": True, "num_threads": 1, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    training = {**fixed, **SHORT, "save_strategy": "steps", "seed": 3, "output_dir": str(tmp_path / "run")}
    return {"model": model_section(backbones), "data": {"train": [str(manifest)]}, "training": training}


def changed(settings: dict, **training: Any) -> dict:
    return {**settings, "training": {**settings["training"], **training}}


def run(settings: dict, **training: Any) -> Any:
    arguments = build_arguments(changed(settings, **training))
    return train(arguments.model, arguments.data, arguments.training, raw=arguments.raw)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------ whose folder


def test_a_folder_in_which_another_process_trains_is_refused_until_that_is_gone(settings: dict, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def hold() -> None:
        with hold_folder(tmp_path / "run", "training"):
            ready.set()
            time.sleep(60)

    process = context.Process(target=hold)
    process.start()
    assert ready.wait(30)
    for resume in (False, True):
        with pytest.raises(FolderInUseError, match=f"run is in use: training by process {process.pid} on .*another"):
            run(settings, resume=resume)
    process.kill()
    process.join()
    run(settings, max_steps=1)
    run(settings, max_steps=2, output_dir=str(tmp_path / "other"))  # the lock ends with its run


def test_a_file_is_flushed_by_a_handle_that_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses to flush what is open for reading alone."""
    flags: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: flags.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE))
    write_text(tmp_path / "a.txt", "words")
    assert flags == [os.O_RDWR] and (tmp_path / "a.txt").read_text() == "words"


def test_no_signal_is_sent_on_windows_to_see_whether_a_process_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signal 0 is Ctrl-C there."""
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, signal: sent.append(pid))
    holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
    for platform, expected in (("win32", []), ("linux", [os.getpid()])):
        (tmp_path / ".training.json").write_text(holder)
        monkeypatch.setattr(sys, "platform", platform)
        with hold_folder(tmp_path, "training"):
            assert sent == expected


def test_a_folder_with_results_is_not_overwritten(settings: dict, tmp_path: Path) -> None:
    run(settings)
    before = content(tmp_path / "run")
    with pytest.raises(ArgumentError, match=r"run'.*holds a run \(id \w+.*checkpoint-4.*model; resume it with"):
        run(settings, seed=7)
    assert content(tmp_path / "run") == before
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(ArgumentError, match="holds a run"):
        run(settings)


def test_a_run_that_saved_nothing_yet_may_start_anew(settings: dict, tmp_path: Path) -> None:
    run(settings, max_steps=1)
    for name in ("model", "checkpoint-1"):
        shutil.rmtree(tmp_path / "run" / name)
    run(settings, max_steps=1)
    assert (tmp_path / "run" / "model").is_dir()


def test_a_run_resumes_from_its_own_checkpoints_alone(
    settings: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = {}
    for name, seed in (("run", 3), ("other", 7)):
        run(settings, seed=seed, output_dir=str(tmp_path / name))
        ids[name] = json.loads((tmp_path / name / "run.json").read_text())["id"]
    assert ids["run"] != ids["other"]
    foreign = tmp_path / "other" / "checkpoint-2"
    with pytest.raises(ArgumentError, match=f"checkpoint of the run {ids['other']}, but .*the run {ids['run']}"):
        run(settings, resume=str(foreign))
    shutil.copytree(tmp_path / "run", tmp_path / "straight")
    for name in ("model", "checkpoint-4"):
        shutil.rmtree(tmp_path / "run" / name)
    shutil.copytree(foreign, tmp_path / "run" / "checkpoint-3")
    with caplog.at_level(logging.WARNING):
        run(settings, resume=True)
    assert f"checkpoint-3 of the run {ids['other']}" in caplog.text
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    for path in (tmp_path / "run").glob("checkpoint-[24]"):
        shutil.rmtree(path)
    with pytest.raises(ArgumentError, match=f"only checkpoints of other runs: checkpoint-3 of the run {ids['other']}"):
        run(settings, resume=True)


def test_checkpoints_of_earlier_versions_are_resumed(settings: dict, tmp_path: Path) -> None:
    run(settings)
    for path in (tmp_path / "run").glob("checkpoint-*"):
        (path / "run_state.json").unlink()
    (tmp_path / "run" / "run.json").unlink()
    run(settings, resume=True, max_steps=6)
    assert [entry["step"] for entry in history(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


# ------------------------------------------------------------------ finished runs and other settings


@pytest.mark.parametrize("length", [{}, {"max_steps": -1, "num_train_epochs": 2}, {"save_strategy": "no"}])
def test_a_finished_run_says_so_and_changes_nothing(
    settings: dict, tmp_path: Path, length: dict, caplog: pytest.LogCaptureFixture
) -> None:
    first = run(settings, **length)
    before = content(tmp_path / "run")
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            again = run(settings, resume=True, **length)
        assert "run is finished after" in caplog.text and "no step is added" in caplog.text
        caplog.clear()
        assert again.metrics == json.loads((tmp_path / "run" / "train_results.json").read_text())
        assert again.metrics["train_loss"] == first.metrics["train_loss"]
        for name, weight in first.model.state_dict().items():
            assert torch.equal(weight, again.model.state_dict()[name]), name
    after = content(tmp_path / "run")
    described = ("run.json", "config.yaml")
    assert {k: v for k, v in after.items() if k not in described} == {
        k: v for k, v in before.items() if k not in described
    }


def test_a_run_that_was_killed_before_its_model_was_saved_gets_it(settings: dict, tmp_path: Path) -> None:
    run(settings)
    shutil.copytree(tmp_path / "run", tmp_path / "straight")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about.pop("finished") == 4
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    (tmp_path / "run" / "model" / "model.safetensors").write_bytes(b"half")
    for name in ("trainer_state.json", "train_results.json"):
        (tmp_path / "run" / name).unlink()
    run(settings, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_a_finished_run_goes_on_if_more_steps_are_asked_for(settings: dict, tmp_path: Path) -> None:
    run(settings)
    run(settings, resume=True, max_steps=6)
    assert [entry["step"] for entry in history(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ArgumentError, match=r"is finished, with other settings: training.seed differ"):
        run(settings, resume=True, max_steps=6, seed=7)
    for path in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(ArgumentError, match="finished after 6 steps and has no checkpoint to go on from to 8"):
        run(settings, resume=True, max_steps=8)


def test_other_settings_of_a_resumed_run_are_named(
    settings: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(settings)
    with caplog.at_level(logging.WARNING):
        run(settings, resume=True, max_steps=6, learning_rate=3e-3)
    assert "training.max_steps: 4 -> 6" in caplog.text and "training.learning_rate: 0.001 -> 0.003" in caplog.text
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["resumed"][0]["changed"]["training.learning_rate"] == [0.001, 0.003] and about["finished"] == 6
    assert "training.learning_rate stays as in the checkpoint" in caplog.text


def test_other_data_of_a_resumed_run_is_named(settings: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = Path(settings["data"]["train"][0]).read_text().splitlines(keepends=True)
    manifest = Path(settings["data"]["train"][0]).with_name("growing.jsonl")
    settings = {**settings, "data": {"train": [str(manifest)]}}
    for count in (4, 3):
        manifest.write_text("".join(rows[:count]))
        run(settings, resume=True, max_steps=8 - count)
    assert f"{tmp_path / 'run'} is resumed with other data: rows were" in caplog.text
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["data"]["train"]["asr"] == 2 and about["resumed"][0]["data"]["train"]["asr"] == 1


def test_a_damaged_description_is_named(settings: dict, tmp_path: Path) -> None:
    run(settings, max_steps=1)
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(ArgumentError, match=r"run.json is damaged .*delete it"):
        run(settings, resume=True)


# ------------------------------------------------------------------ stops and the log


def test_a_log_window_across_a_resume_is_that_of_a_straight_run(settings: dict, tmp_path: Path) -> None:
    """Checkpoints lie within windows of the log."""
    window = {"max_steps": 10, "logging_steps": 4, "save_steps": 3}
    run(settings, **window)
    shutil.copytree(tmp_path / "run", tmp_path / "straight")
    for name in ("model", "checkpoint-9", "checkpoint-10", "trainer_state.json", "train_results.json"):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run(settings, resume=True, **window)
    assert [entry["step"] for entry in history(tmp_path / "run")] == [4, 8]
    assert_same_run(tmp_path / "run", tmp_path / "straight")


class Terminate(TrainerCallback):
    """Gets SIGTERM within a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_saves_and_the_resumed_run_is_a_straight_one(settings: dict, tmp_path: Path, workers: int) -> None:
    settings = changed(settings, max_steps=6, logging_steps=4, save_steps=4, dataloader_num_workers=workers)
    run(settings, output_dir=str(tmp_path / "straight"))
    arguments, before = build_arguments(settings), signal.getsignal(signal.SIGTERM)
    set_seed(3)
    trainer = build_trainer(*build_model(arguments.model), arguments.data, arguments.training)
    trainer.add_callback(Terminate(2))
    with pytest.raises(TrainingStopped, match="SIGTERM after step 3 of 6.*checkpoint-3.*training.resume=true"):
        run_trainer(trainer)
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "run" / "model").exists()
    run(settings, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_a_checkpoint_that_is_written_again_is_incomplete_meanwhile(settings: dict, tmp_path: Path) -> None:
    run(settings)
    shutil.rmtree(tmp_path / "run" / "model")
    checkpoint = tmp_path / "run" / "checkpoint-4"
    (checkpoint / "trainer_state.json").rename(tmp_path / "state.json")
    arguments = build_arguments(changed(settings, resume=True))
    trainer = build_trainer(*build_model(arguments.model), arguments.data, arguments.training)
    save, complete = trainer.save_model, []

    def save_model(folder: str, **options: Any) -> None:
        complete.append((checkpoint / "trainer_state.json").exists())
        save(folder, **options)

    class Restore(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            shutil.copy(tmp_path / "state.json", checkpoint / "trainer_state.json")  # of an older, whole checkpoint

    trainer.save_model = save_model
    trainer.add_callback(Restore())
    run_trainer(trainer)
    assert complete == [False, True]  # while checkpoint-4 and then the model are written
