"""Work on a local Ray cluster of two workers, of which one is killed: the results are those of one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from fixtures_training import save_tiny_llm, small_corpus, tiny_processor

from listen.data import load_manifest, precompute_features
from listen.data.chat_models import Answer, LocalChatModel
from listen.data.targets import generate_targets
from listen.data.utterances import Utterance
from listen.evaluation.generate import generate_predictions
from listen.evaluation.ray_jobs import RayChatModel, answer_on_ray, precompute_on_ray

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
OPTIONS = {"max_new_tokens": 3, "do_sample": False}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        _system_config={"worker_niceness": 0},  # by default, workers get no time on a busy machine
        runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def die_once(mark: Path) -> None:
    """End this process as the kernel would, the first time."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def load(mark: Path) -> tuple[Any, Any]:
    """The tiny model, in a process that dies in its third batch."""
    torch.set_num_threads(1)
    model = tiny_model()
    calls = []

    def count(*_: Any) -> None:
        calls.append(0)
        if len(calls) == 3:
            die_once(mark)

    model.speech_encoder.register_forward_pre_hook(count)
    return model, tiny_processor(model.config)


class DyingChatModel:
    """A chat model whose process dies in its second batch."""

    def __init__(self, folder: str, mark: Path) -> None:
        self.llm, self.mark, self.batches = LocalChatModel(folder, max_new_tokens=6, do_sample=True), mark, 0

    def answer(self, conversations: Any, seed: int = 0) -> list[Answer]:
        self.batches += 1
        if self.batches == 2:
            die_once(self.mark)
        return self.llm.answer(conversations, seed=seed)

    def describe(self) -> dict[str, Any]:
        return self.llm.describe()


def test_features_and_answers_are_those_of_one_process(tmp_path: Path) -> None:
    dataset, model = load_manifest(small_corpus(tmp_path, num_rows=16)), tiny_model()
    processor, sizes = tiny_processor(model.config), {"batch_size": 1, "shard_size": 2}
    straight = precompute_features(model, processor, dataset, tmp_path / "straight", progress=False, **sizes)
    store = precompute_on_ray(partial(load, tmp_path / "dead"), dataset, tmp_path / "features", **sizes)
    assert (tmp_path / "dead").exists()
    assert len(store) == len(straight) == 16 and store.verify() == []
    for row in dataset:
        (one,), (two,) = store.recordings(row), straight.recordings(row)
        assert torch.equal(one.speech, two.speech) and torch.equal(one.audio, two.audio)
    expected = generate_predictions(model, processor, dataset, batch_size=2, progress=False, **OPTIONS)
    dying = partial(load, tmp_path / "dead too")
    found = answer_on_ray(dying, dataset, rows_per_item=4, batch_size=2, **OPTIONS)
    assert (tmp_path / "dead too").exists()
    assert [item.index for item in found] == list(range(16))
    for one, two in zip(found, expected, strict=True):
        assert (one.text, one.instruction, one.prompt_indices) == (two.text, two.instruction, two.prompt_indices)
        np.testing.assert_allclose(one.query, two.query, atol=1e-4)


def test_targets_are_those_of_one_process(tmp_path: Path) -> None:
    """Sampled ones too: a batch has its seed, wherever it is answered."""
    folder = save_tiny_llm(tmp_path / "llm")
    utterances = [
        Utterance(id=f"u{i}", audio=[{"path": f"{i}.wav", "bytes": None}], transcript=f"words {i}", emotion="happy")
        for i in range(12)
    ]
    settings = {"kinds": ["response"], "batch_size": 2, "keep_unfinished": True, "progress": False}
    generate_targets(
        utterances, tmp_path / "straight", LocalChatModel(folder, max_new_tokens=6, do_sample=True), **settings
    )
    llm = RayChatModel(partial(DyingChatModel, folder, tmp_path / "dead"))
    generate_targets(utterances, tmp_path / "ray", llm, **settings)
    assert (tmp_path / "dead").exists()
    one, two = ((tmp_path / name / "response.jsonl").read_text() for name in ("ray", "straight"))
    assert one == two and one.count("\n") == 12
