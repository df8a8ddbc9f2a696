"""Methods of one seed start from the same connector and see the same batches, whatever their pool."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_backbones import model_section, save_backbones
from fixtures_training import small_corpus
from transformers import set_seed

from listen.training import build_arguments, build_model, build_trainer

LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
METHODS: dict[str, dict[str, Any]] = {
    "similarity": {},
    "connector": {"prompt_pool": {"pool_size": 0}},
    "larger pool": {"prompt_pool": {"pool_size": 40, "num_prompts": 20}},
    "fixed k": {"prompt_pool": {"pool_size": 12, "num_prompts": 4, "stochastic": False}},
    "soft prompt": {"prompt_pool": {"strategy": "fixed", "pool_size": 4, "num_prompts": 4, "stochastic": False}},
    "random": {"prompt_pool": {"strategy": "random", "pool_size": 12, "num_prompts": 4}},
    "residual": {"prompt_pool": {"strategy": "residual", "pool_size": 12, "num_prompts": 4, "center_query": True}},
    "task": {"prompt_pool": {"strategy": "task", "pool_size": 20, "num_prompts": 4, "tasks": ["asr", "er", "acap"]}},
    "lora": {"prompt_pool": {"pool_size": 0}, "lora": LORA},
    "encoder": {"prompt_pool": {"pool_size": 0}, "trainable": ["adapter", "speech_encoder"]},
}


def start(
    backbones: dict[str, str], manifest: Path, folder: Path, model: dict[str, Any], seed: int = 5
) -> tuple[dict, list, float]:
    """Connector, answers and instructions of three batches, and the first random number of training."""
    training = {"output_dir": str(folder), "use_cpu": True, "per_device_train_batch_size": 3, "seed": seed}
    if model.get("prompt_pool", {}).get("strategy") == "residual":
        training["keys_from_rows"] = 6
    sections = {"model": model_section(backbones, **model), "data": {"train": [str(manifest)]}, "training": training}
    arguments = build_arguments(sections)
    set_seed(arguments.training.seed)  # as `train` does
    trainer = build_trainer(*build_model(arguments.model), arguments.data, arguments.training)
    connector = {
        name: parameter.detach().clone()
        for name, parameter in trainer.model.named_parameters()
        if ".connector." in name
    }
    number = torch.rand(1).item()
    batches = list(itertools.islice(trainer.get_train_dataloader(), 3))
    prompt, audio = trainer.model.config.prompt_token_id, trainer.model.config.audio_token_id
    texts = []
    for batch in batches:
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            kept = (mask == 1) & (ids != prompt) & (ids != audio)
            texts.append((ids[kept].tolist(), labels[labels != -100].tolist()))
    return connector, texts, number


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"), num_rows=9)  # its rows leave the wording open


@pytest.fixture(scope="module")
def reference(
    backbones: dict[str, str], manifest: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict, list, float]:
    return start(backbones, manifest, tmp_path_factory.mktemp("run"), METHODS["similarity"])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "similarity"])
def test_connector_batches_and_wordings_are_those_of_every_method(
    method: str, backbones: dict[str, str], manifest: Path, tmp_path: Path, reference: tuple[dict, list, float]
) -> None:
    connector, texts, number = start(backbones, manifest, tmp_path, METHODS[method])
    assert set(connector) == set(reference[0])
    assert all(torch.equal(weight, reference[0][name]) for name, weight in connector.items())
    assert texts == reference[1]
    assert number == reference[2]  # so dropout of the connector starts alike too


def test_another_seed_is_another_start(
    backbones: dict[str, str], manifest: Path, tmp_path: Path, reference: tuple[dict, list, float]
) -> None:
    connector, texts, number = start(backbones, manifest, tmp_path, METHODS["similarity"], seed=6)
    assert not all(torch.equal(weight, reference[0][name]) for name, weight in connector.items())
    assert texts != reference[1] and number != reference[2]
