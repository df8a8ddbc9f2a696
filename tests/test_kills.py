"""Long work that is killed at many points: nothing is lost, and what goes on gives the same results."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny_model
from datasets import Dataset
from fixtures_backbones import model_section, save_backbones
from fixtures_endpoint import serve_chat
from fixtures_runs import assert_same_run, kill_after, seconds_of
from fixtures_training import small_corpus, tiny_processor

from listen.data import FeatureStore, load_manifest, precompute_features
from listen.data.chat_models import EndpointChatModel
from listen.data.targets import generate_targets
from listen.data.utterances import Utterance
from listen.training import build_arguments, train

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent.parent / "examples" / "train.py"
POINTS = [share / 10 for share in (0.5, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9.5)]  # of the time of a whole run

FAILING_RUN = """
import sys
from transformers import TrainerCallback
from listen.training import parse_arguments, train

class Fault(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        raise RuntimeError("a fault of the user's code")

run = parse_arguments(sys.argv[1:])
train(run.model, run.data, run.training, callbacks=[Fault()])
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A run with checkpoints within windows of its log, evaluations, and a loader process."""
    folder = tmp_path_factory.mktemp("sources")
    manifest = small_corpus(folder, num_rows=8)
    steps = {"max_steps": 12, "save_steps": 1, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 4}
    training = {**steps, "use_cpu": True, "num_threads": 1, "report_to": "none", "disable_tqdm": True, "seed": 3}
    training |= {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "dataloader_num_workers": 1}
    data = {"train": [str(manifest)], "eval": [str(manifest)]}
    return {"model": model_section(save_backbones(folder / "backbones")), "data": data, "training": training}


def run(settings: dict, folder: Path) -> None:
    resumed = {**settings, "training": {**settings["training"], "output_dir": str(folder), "resume": True}}
    arguments = build_arguments(resumed)
    train(arguments.model, arguments.data, arguments.training, raw=arguments.raw)


def test_a_training_that_is_killed_again_and_again_ends_as_a_straight_one(settings: dict, tmp_path: Path) -> None:
    seconds = seconds_of(lambda: run(settings, tmp_path / "straight"))
    killed = [kill_after(lambda: run(settings, tmp_path / "killed"), share * seconds) for share in POINTS]
    assert sum(killed) >= 3
    run(settings, tmp_path / "killed")
    assert_same_run(tmp_path / "killed", tmp_path / "straight")
    assert len(list((tmp_path / "killed").glob("checkpoint-*"))) <= 4


def test_sigterm_to_the_script_and_its_workers_saves_and_the_run_goes_on(settings: dict, tmp_path: Path) -> None:
    run(settings, tmp_path / "straight")
    section = {**settings["training"], "output_dir": str(tmp_path / "stopped"), "resume": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**settings, "training": section}))
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--config", str(tmp_path / "run.yaml")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not list((tmp_path / "stopped").glob("checkpoint-*/trainer_state.json")) and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors[-3000:]
    assert "stopped by SIGTERM after step" in output and "training.resume=true" in output
    run(settings, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")


def test_a_failed_run_ends_though_its_workers_ignore_sigterm(settings: dict, tmp_path: Path) -> None:
    settings = {**settings, "training": {**settings["training"], "output_dir": str(tmp_path / "run")}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    process = subprocess.run(
        [sys.executable, "-c", FAILING_RUN, "--config", str(tmp_path / "run.yaml")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 1 and process.stderr.endswith("RuntimeError: a fault of the user's code\n")


def test_features_that_are_killed_again_and_again_are_complete(tmp_path: Path) -> None:
    model = tiny_model()
    processor, dataset = tiny_processor(model.config), load_manifest(small_corpus(tmp_path, num_rows=40))

    def compute(folder: Path, rows: Dataset = dataset) -> FeatureStore:
        return precompute_features(model, processor, rows, folder, batch_size=1, shard_size=2, progress=False)

    seconds = seconds_of(lambda: compute(tmp_path / "straight"))
    stored, killed = [], []
    for share in POINTS:
        killed.append(kill_after(lambda: compute(tmp_path / "killed"), share * seconds))
        stored.append(len(list((tmp_path / "killed").glob("shard-*.arrow"))))
    assert sum(killed) >= 3 and stored == sorted(stored)
    store, straight = compute(tmp_path / "killed"), FeatureStore(tmp_path / "straight")
    assert len(store) == len(straight) == 40 and store.verify() == []
    assert not list((tmp_path / "killed").glob("*.tmp"))
    assert sum(len(Dataset.from_file(str(path))) for path in (tmp_path / "killed").glob("shard-*.arrow")) == 40
    for row in dataset:
        (one,), (two,) = store.recordings(row), straight.recordings(row)
        assert torch.equal(one.speech, two.speech) and torch.equal(one.audio, two.audio)


def test_targets_that_are_killed_again_and_again_are_complete(tmp_path: Path) -> None:
    clips = [{"path": str(tmp_path / "a.wav"), "bytes": None}]
    utterances = [Utterance(f"u{i}", clips, f"words number {i}", "happy") for i in range(48)]
    kinds = ["response", "speech_caption", "repeat"]

    def reply(body: dict) -> tuple[int, Any]:
        time.sleep(0.002)
        return 200, f"You said {body['messages'][0]['content']}."

    with serve_chat(reply) as server:

        def make(folder: Path) -> Any:
            llm = EndpointChatModel(server.url, "m")
            return generate_targets(utterances, folder, llm, kinds=kinds, batch_size=4, progress=False)

        seconds = seconds_of(lambda: make(tmp_path / "straight"))
        whole = len(server.requests)
        killed = [kill_after(lambda: make(tmp_path / "killed"), share * seconds) for share in POINTS]
        assert sum(killed) >= 3
        (tmp_path / "killed" / ".settings.json.1-2.tmp").touch()  # of a kill while a file is written
        assert make(tmp_path / "killed").rows == dict.fromkeys(kinds, 48)
        assert len(server.requests) <= 2 * whole + 4 * sum(killed)  # a batch is lost to each kill at most
    for kind in kinds:
        one, two = ((tmp_path / name / f"{kind}.jsonl").read_bytes() for name in ("straight", "killed"))
        assert one == two
    assert not list((tmp_path / "killed").glob("*.tmp"))
