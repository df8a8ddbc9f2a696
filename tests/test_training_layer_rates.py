"""Layer-wise learning rates: each learned parameter has the rate of its depth and the weight decay it had before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_model
from fixtures_training import small_corpus, tiny_processor
from torch import nn
from transformers import AutoConfig, AutoModel

from listen import ListenForConditionalGeneration
from listen.training import ArgumentError, ListenTrainingArguments, build_arguments, build_trainer
from listen.training.layer_rates import layer_rates

RATE, DECAY = 1e-3, 0.5
TRAINABLE = ["speech_encoder", "adapter"]


def trainer_of(model: ListenForConditionalGeneration, folder: Path, **training: Any) -> Any:
    manifest = small_corpus(folder, num_rows=4)
    options = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": RATE,
        "weight_decay": 0.05, "adam_beta2": 0.98, "layerwise_lr_decay": DECAY, "per_device_train_batch_size": 2,
        "max_steps": 2, "save_strategy": "no", "warmup_steps": 0, "lr_scheduler_type": "linear", "logging_steps": 1,
    }  # fmt: skip
    sections = {"model": {"checkpoint": "unused"}, "data": {"train": [str(manifest)]}}
    arguments = build_arguments({**sections, "training": {**options, **training}})
    return build_trainer(model, tiny_processor(model.config), arguments.data, arguments.training)


def settings_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Options of the group that holds each parameter; each must be in one alone."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = [(names[p], group) for group in optimizer.param_groups for p in group["params"]]
    assert len(dict(held)) == len(held)
    return dict(held)


def test_the_pool_has_its_own_rate_and_no_weight_decay(tmp_path: Path) -> None:
    model = tiny_model()
    trainer = trainer_of(model, tmp_path, layerwise_lr_decay=1.0, pool_lr_factor=30.0, decay_pool=False)
    held = settings_of(model, trainer.create_optimizer())
    assert trainer.optimizer.param_groups[0]["lr"] == RATE  # what is logged
    pool = {name for name in held if "prompt_pool" in name}
    assert len(pool) == 2
    for name, group in held.items():
        assert group["lr"] == pytest.approx(RATE * (30.0 if name in pool else 1.0))
    assert {held[name]["weight_decay"] for name in pool} == {0.0}
    assert {group["weight_decay"] for name, group in held.items() if name not in pool} == {0.0, 0.05}


def test_the_rates_of_pool_and_layers_combine(tmp_path: Path) -> None:
    model = tiny_model(trainable=TRAINABLE)
    held = settings_of(model, trainer_of(model, tmp_path, pool_lr_factor=4.0).create_optimizer())
    for name, share in layer_rates(model, DECAY).items():
        assert held[name]["lr"] == pytest.approx(RATE * share * (4.0 if "prompt_pool" in name else 1.0))


def test_a_rate_for_a_pool_that_is_not_there_is_refused(tmp_path: Path) -> None:
    without = tiny_model(prompt_pool_config=None)
    with pytest.raises(ArgumentError, match="pool_lr_factor=2.0 has no effect"):
        trainer_of(without, tmp_path, layerwise_lr_decay=1.0, pool_lr_factor=2.0).create_optimizer()
    with pytest.raises(ArgumentError, match="pool_lr_factor=0.0 must be above 0"):
        ListenTrainingArguments(output_dir=str(tmp_path), pool_lr_factor=0.0, use_cpu=True)


def test_rates_fall_from_the_connector_to_the_features() -> None:
    model = tiny_model(trainable=TRAINABLE)
    rates = layer_rates(model, DECAY)
    assert set(rates) == {name for name, p in model.named_parameters() if p.requires_grad}
    encoder = {
        "conv1.weight": DECAY**3,
        "conv2.bias": DECAY**3,
        "layers.0.self_attn.q_proj.weight": DECAY**2,
        "layers.1.fc1.bias": DECAY,
        "layer_norm.weight": DECAY,
    }
    assert {name: rates[f"speech_encoder.{name}"] for name in encoder} == encoder
    assert {rate for name, rate in rates.items() if name.startswith("adapters.")} == {1.0}


def test_both_encoders_have_layers_of_their_own() -> None:
    rates = layer_rates(tiny_model(trainable=[*TRAINABLE, "audio_encoder"]), DECAY)
    for name in ("speech_encoder", "audio_encoder"):
        assert {rate for key, rate in rates.items() if key.startswith(name)} == {DECAY, DECAY**2, DECAY**3}


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("wav2vec2-bert", "feature_projection.projection.weight"),
        ("wav2vec2-conformer", "feature_extractor.conv_layers.0.conv.weight"),
        ("hubert", "feature_extractor.conv_layers.0.conv.weight"),
    ],
)
def test_the_layers_of_any_encoder_are_found(kind: str, first: str) -> None:
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "hidden_size": 32}
    rates = layer_rates(Holder(AutoModel.from_config(AutoConfig.for_model(kind, **sizes))), DECAY)
    assert rates[f"speech_encoder.{first}"] == min(rates.values()) == DECAY**4
    for i in range(3):
        here = {rate for name, rate in rates.items() if name.startswith(f"speech_encoder.encoder.layers.{i}.")}
        assert here == {DECAY ** (3 - i)}


class Holder(nn.Module):
    """An encoder under the name that a LiSTEN model gives it, and its config."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.speech_encoder = encoder
        self.config = tiny_config(trainable=["speech_encoder"])


def test_groups_keep_weight_decay_and_betas(tmp_path: Path) -> None:
    model = tiny_model(trainable=TRAINABLE)
    plain = settings_of(model, trainer_of(model, tmp_path, layerwise_lr_decay=1.0).create_optimizer())
    optimizer = trainer_of(model, tmp_path).create_optimizer()
    split, rates = settings_of(model, optimizer), layer_rates(model, DECAY)
    assert split.keys() == plain.keys() == rates.keys()
    for name, group in split.items():
        assert group["lr"] == pytest.approx(RATE * rates[name])
        assert {**group, "params": 0, "lr": 0} == {**plain[name], "params": 0, "lr": 0}
    assert {group["weight_decay"] for group in split.values()} == {0.0, 0.05}
    assert {group["betas"] for group in split.values()} == {(0.9, 0.98)}
    assert optimizer.param_groups[0]["lr"] == RATE  # the one that is logged
    assert isinstance(optimizer, torch.optim.AdamW)


def test_the_schedule_scales_all_rates_and_the_step_follows_them(tmp_path: Path) -> None:
    """Adam's first step moves each weight by its learning rate, whatever the gradient."""
    model = tiny_model(trainable=TRAINABLE)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_of(model, tmp_path, max_steps=1, lr_scheduler_type="constant", weight_decay=0.0)
    rates = layer_rates(model, DECAY)
    trainer.train()
    for name in ("speech_encoder.conv1.weight", "speech_encoder.layers.0.fc1.weight", "speech_encoder.layer_norm.bias"):
        step = (model.get_parameter(name).detach() - before[name]).abs().max()
        assert float(step) == pytest.approx(RATE * rates[name], rel=0.02), name
    assert [group["lr"] for group in trainer.optimizer.param_groups][0] == RATE


def test_a_schedule_keeps_the_ratios(tmp_path: Path) -> None:
    trainer = trainer_of(tiny_model(trainable=TRAINABLE), tmp_path, warmup_steps=10)
    trainer.create_optimizer_and_scheduler(num_training_steps=100)
    full = trainer.optimizer.param_groups[0]["initial_lr"]
    for _ in range(5):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    for group in trainer.optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.5 * group["initial_lr"])
        assert group["initial_lr"] / full in {DECAY**n for n in range(4)}


def test_a_decay_without_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="layerwise_lr_decay=0.5 .*model.trainable"):
        trainer_of(tiny_model(), tmp_path).create_optimizer()
    with pytest.raises(ArgumentError, match="Linear has no list of layers"):
        layer_rates(Holder(nn.Linear(2, 2)), DECAY)


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.1])
def test_a_decay_out_of_range_is_named(decay: float, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=f"layerwise_lr_decay={decay} must lie in"):
        ListenTrainingArguments(output_dir=str(tmp_path), layerwise_lr_decay=decay, use_cpu=True)
