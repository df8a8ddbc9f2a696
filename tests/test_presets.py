"""Presets: exact counts of the large ones on the meta device; the small ones run."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from conftest import clip
from fixtures_backbones import save_backbones

from listen import ListenConfig, ListenForConditionalGeneration
from listen.feature_extraction_listen import ListenFeatureExtractor
from listen.presets_listen import PRESETS
from listen.training import build_arguments, build_config

LEARNED_ENCODER, MASK, CONNECTOR, LLM = 580_492_096, 1_024, 100_286_464, 8_030_261_248


def test_the_emotion_preset_has_the_counts_that_it_states() -> None:
    with torch.device("meta"):
        model = ListenForConditionalGeneration(ListenConfig.from_preset("speech-emotion-llama3-8b"))
    assert model.parameter_counts() == {
        "speech_encoder": (LEARNED_ENCODER, LEARNED_ENCODER + MASK),
        "language_model": (0, LLM),
        "default.connector": (CONNECTOR, CONNECTOR),
    }
    stated = inspect.getdoc(PRESETS["speech-emotion-llama3-8b"])
    for count in (LEARNED_ENCODER, LEARNED_ENCODER + MASK, CONNECTOR, LLM, LEARNED_ENCODER + CONNECTOR):
        assert f"{count:,}" in stated
    connector = model.adapters["default"].connector
    assert (connector.stride, connector.kernel_size) == (4, 7)
    assert connector.lengths(torch.tensor([50])).tolist() == [13]  # one second


def test_the_emotion_miniature_hears_and_learns() -> None:
    torch.manual_seed(0)
    overrides = {"audio_token_id": 864, "prompt_token_id": 865}
    model = ListenForConditionalGeneration(ListenConfig.from_preset("speech-emotion-tiny", **overrides)).train()
    assert model.parameter_counts()["default.connector"] == (1_395_936, 1_395_936)
    assert model.audio_encoder is None and model.adapters["default"].prompt_pool is None
    assert model.speech_encoder.training and not model.language_model.training
    inputs = audio_inputs(model, [clip(1.0), clip(2.1)])
    labels = inputs["input_ids"].where(inputs["input_ids"] < 864, -100)
    model(**inputs, labels=labels).loss.backward()
    assert model.speech_encoder.conv1.weight.grad.abs().max() > 0


def audio_inputs(model: ListenForConditionalGeneration, clips: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows of one clip each, left-padded, with the first ids above the vocabulary as placeholders."""

    extractor = ListenFeatureExtractor(num_fbank_bins=None)
    audio = dict(extractor([c.numpy() for c in clips], sampling_rate=16000, return_tensors="pt"))
    lengths = model.get_audio_features(**audio).lengths.tolist()
    assert lengths == [4, 7]
    ids = torch.tensor([[0] * (7 - n) + [1] + [864] * n + [5, 6, 7] for n in lengths])
    return {**audio, "input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize(
    ("model", "pool", "learns"),
    [
        ({"preset": "speech-emotion-tiny"}, None, ["speech_encoder", "connector"]),
        ({"preset": "speech-emotion-tiny", "trainable": ["connector"]}, None, ["connector"]),
        ({"preset": "speech-emotion-tiny", "prompt_pool": {"pool_size": 8, "num_prompts": 2}}, 8, None),
        ({"preset": "listen-tiny"}, 96, ["adapter"]),
        ({}, 400, ["adapter"]),
    ],
)
def test_a_run_takes_the_pool_of_its_preset(
    model: dict[str, Any], pool: int | None, learns: list[str] | None, tmp_path: Any
) -> None:
    paths = save_backbones(tmp_path)
    config = build_config(build_arguments({"model": {**paths, "audio_encoder": None, **model}}).model)
    assert (config.prompt_pool_config and config.prompt_pool_config.pool_size) == pool
    assert learns is None or config.trainable == learns
    assert config.connector_config.type == ("conv_rotary" if "emotion" in model.get("preset", "") else "window_qformer")
