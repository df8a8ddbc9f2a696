"""Training on real recordings: spoken digits (FSDD) over the miniature backbones that the repository carries.

Runs where the environment variable LISTEN_REAL_DATA names a folder with `digits_train.jsonl` and `digits_dev.jsonl`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from listen.data import FeatureStore, load_manifest, precompute_features
from listen.evaluation import evaluate_model
from listen.training import TrainResult, build_arguments, build_encoders, train

DATA = Path(os.environ.get("LISTEN_REAL_DATA") or "missing")
BACKBONES = Path(__file__).parent.parent / "model_cards" / "listen-tiny" / "backbones"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA / "digits_train.jsonl").is_file(), reason="LISTEN_REAL_DATA names no real recordings"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, FeatureStore]:
    folder = tmp_path_factory.mktemp("digits")
    run = build_arguments(
        {
            "model": {
                "preset": "listen-tiny",
                **{name: str(BACKBONES / name) for name in ("speech_encoder", "audio_encoder", "language_model")},
                "connector": {"dropout": 0.0},
                "prompt_pool": {"key_loss_weight": 0.1},
            },
            "data": {"train": [str(DATA / "digits_train.jsonl")], "features": str(folder / "features")},
            "training": {
                "output_dir": str(folder / "run"),
                "max_steps": 150,
                "per_device_train_batch_size": 32,
                "learning_rate": 1e-3,
                "warmup_steps": 15,
                "logging_steps": 20,
                "save_strategy": "no",
                "report_to": "none",
                "use_cpu": True,
                "num_threads": 1,
            },
        }
    )
    encoders, processor = build_encoders(run.model)
    for name in ("train", "dev"):
        dataset = load_manifest(DATA / f"digits_{name}.jsonl")
        features = precompute_features(encoders, processor, dataset, folder / "features", batch_size=32, progress=False)
    return train(run.model, run.data, run.training), features


def test_the_loss_falls(trained: tuple[TrainResult, FeatureStore]) -> None:
    losses = [entry["lm_loss"] for entry in trained[0].history if "lm_loss" in entry]
    assert sum(losses[-3:]) / 3 < 0.5 * losses[0]


def test_held_out_takes_are_understood_far_better_than_by_chance(trained: tuple[TrainResult, FeatureStore]) -> None:
    result, features = trained
    dataset = load_manifest(DATA / "digits_dev.jsonl")
    found = evaluate_model(
        result.model, result.processor, dataset, features=features, batch_size=50, num_resamples=0, progress=False,
        max_new_tokens=8,
    )  # fmt: skip
    right = [record["prediction"].strip() == record["references"][0] for record in found.predictions]
    assert sum(right) / len(right) > 0.5  # ten digits: chance is 0.1
