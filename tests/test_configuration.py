"""Configs: round trips, presets, and errors that name the value and the fix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from transformers import AutoConfig, PreTrainedConfig

from listen import ListenConfig, ListenConnectorConfig, ListenForConditionalGeneration, ListenPromptPoolConfig
from listen.configuration_listen import BACKBONES
from listen.presets_listen import PRESETS

CARDS = Path(__file__).parents[1] / "model_cards"


def test_a_config_needs_no_arguments() -> None:
    config = ListenConfig()
    assert (config.speech_config.model_type, config.text_config.model_type) == ("whisper", "llama")
    assert config.audio_config is None and config.prompt_pool_config is None
    assert config.trainable == ["adapter"]


@pytest.mark.parametrize("preset", PRESETS)
def test_configs_round_trip(preset: str, tmp_path: object) -> None:
    config = ListenConfig.from_preset(preset)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    loaded.name_or_path = config.name_or_path
    assert loaded.to_json_string(use_diff=False) == config.to_json_string(use_diff=False)


def test_saved_configs_name_every_field_of_the_pool(tmp_path: Path) -> None:
    """So new defaults change new models alone."""
    pool = ListenPromptPoolConfig()
    tiny_config(prompt_pool_config=pool, extra_adapters=None).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["prompt_pool_config"]
    assert set(ListenPromptPoolConfig.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__) <= set(saved)


@pytest.mark.parametrize("card", sorted(path.name for path in CARDS.iterdir() if (path / "config.json").exists()))
def test_published_pools_keep_the_settings_they_were_trained_with(card: str) -> None:
    saved = json.loads((CARDS / card / "config.json").read_text())["prompt_pool_config"]
    pool = ListenConfig.from_pretrained(CARDS / card).prompt_pool_config
    assert (saved is None) == (pool is None)
    if saved is not None:
        assert {"key_loss_type", "score_dropout"} <= set(saved)
        del saved["dtype"]
        assert {name: getattr(pool, name) for name in saved} == saved


def test_an_absent_encoder_and_pool_stay_absent(tmp_path: object) -> None:
    tiny_config(audio_config=None, prompt_pool_config=None).save_pretrained(tmp_path)
    loaded = ListenConfig.from_pretrained(tmp_path)
    assert loaded.audio_config is None and loaded.prompt_pool_config is None


def test_the_papers_model_has_the_papers_size() -> None:
    """P=400 pairs of width 4096 are 3.3 M parameters, the small pool 0.41 M; counted on the meta device."""
    sizes = {}
    layers = ListenConfig.from_preset("listen-llama3-8b")
    layers.prompt_pool_config = ListenPromptPoolConfig(pool_size=13, num_prompts=13, form="layers")
    configs = {name: ListenConfig.from_preset(name) for name in ("listen-llama3-8b", "listen-0.4m")}
    for name, config in {**configs, "layers": layers}.items():
        with torch.device("meta"):
            model = ListenForConditionalGeneration(config)
        sizes[name] = model.parameter_counts()
    assert sizes.pop("layers")["default.prompt_pool"][0] == 13 * (32 * 2 * 4096 + 4096) == 3_461_120
    large, small = sizes["listen-llama3-8b"], sizes["listen-0.4m"]
    assert large["default.prompt_pool"] == (400 * 4096 * 2, 400 * 4096 * 2)
    assert large["speech_encoder"][0] == large["audio_encoder"][0] == 0
    assert large["language_model"] == (0, 8_030_261_248)
    assert sum(learned for learned, _ in small.values()) == 50 * 4096 * 2 == 409_600


def test_the_tiny_preset_describes_the_model_in_the_repository() -> None:
    backbones = Path(__file__).parents[1] / "model_cards" / "listen-tiny" / "backbones"
    preset = PRESETS["listen-tiny"]()
    for name, part in BACKBONES.items():
        carried = json.loads((backbones / name / "config.json").read_text())
        assert preset[part] == {field: carried[field] for field in preset[part]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ListenPromptPoolConfig(pool_size=5, num_prompts=6), "num_prompts=6 must lie in 1..pool_size=5"),
        (lambda: ListenPromptPoolConfig(num_prompts=0), "num_prompts=0"),
        (lambda: ListenPromptPoolConfig(strategy="nearest"), "strategy='nearest' is unknown; choose one of similarity"),
        (lambda: ListenPromptPoolConfig(key_loss_type="l2"), "key_loss_type='l2'"),
        (lambda: ListenPromptPoolConfig(query_source="audio"), "query_source='audio'"),
        (lambda: ListenPromptPoolConfig(value_start="zero"), "value_start='zero'"),
        (lambda: ListenPromptPoolConfig(value_start="vocabulary", form="layers"), "no effect with form='layers'"),
        (lambda: ListenPromptPoolConfig(strategy="task"), "needs `tasks`"),
        (lambda: ListenPromptPoolConfig(pool_size=10, num_prompts=9, strategy="task", tasks=["a", "b"]), "reaches 7"),
        (lambda: ListenPromptPoolConfig(score_dropout=1.5), "score_dropout=1.5"),
        (lambda: ListenPromptPoolConfig(promt_length=3), "no field 'promt_length'"),
        (lambda: ListenPromptPoolConfig(train_prompts=401), "train_prompts=401 must lie in 1..400"),
        (lambda: ListenPromptPoolConfig(train_prompts=9, stochastic=False), "train_prompts=9 has no effect"),
        (lambda: ListenPromptPoolConfig(form="prefix"), "form='prefix'"),
        (lambda: ListenPromptPoolConfig(frozen_prompts=400), "frozen_prompts=400 must lie in 0..399"),
        (lambda: ListenPromptPoolConfig(frozen_prompts=-1), "frozen_prompts=-1 must lie in 0..399"),
        (lambda: ListenPromptPoolConfig(gate_temperature=0.0), "gate_temperature=0.0 must be above 0"),
        (lambda: ListenPromptPoolConfig(strategy="fixed", gate_temperature=0.3), "needs strategy='similarity'"),
        (lambda: ListenPromptPoolConfig(pool_sise=3), "did you mean 'pool_size'"),
        (lambda: ListenConnectorConfig(type="mlp"), "type='mlp' is unknown; choose one of window_qformer"),
        (lambda: ListenConnectorConfig(hidden_size=10, num_attention_heads=3), "hidden_size=10 is not a multiple"),
        (lambda: ListenConnectorConfig(window_seconds=0), "window_seconds=0 must be above 0"),
        (lambda: tiny_config(trainable=["language_model"]), "the LLM stays frozen"),
        (lambda: tiny_config(trainable=["qformer"]), "unknown; choose among adapter"),
        (lambda: tiny_config(trainable=["prompt_pool"], prompt_pool_config=None), "prompt_pool_config is None"),
        (lambda: tiny_config(trainable=["audio_encoder"], audio_config=None), "audio_config is None"),
        (lambda: tiny_config(audio_token_id=7, prompt_token_id=7), "both 7"),
        (lambda: tiny_config(base_models={"speech_encoder": {"base_model_name_or_path": "x"}}), "this config needs"),
        (lambda: tiny_config(speech_config={"model_type": "bert"}), "speech_config model_type='bert' is no supported"),
        (
            lambda: tiny_config(speech_config={"model_type": "hubert"}, pad_to_30s=True),
            "is for Whisper only, not for hub",
        ),
        (
            lambda: tiny_config(
                speech_config={"model_type": "wav2vec2", "add_adapter": True}, trainable=["speech_encoder"]
            ),
            "set layerdrop=0 in speech_config",
        ),
        (lambda: ListenConfig.from_dict({"model_type": "llama"}), "found a config of model_type='llama', but a LiSTEN"),
        (lambda: ListenConfig.from_preset("listen-70b"), "preset='listen-70b' is unknown; choose one of listen-llama3"),
    ],
)
def test_values_that_cannot_work_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_audio_encoder_that_is_no_converted_beats_is_named(tmp_path: Path) -> None:
    backbones = Path(__file__).parents[1] / "model_cards" / "listen-tiny" / "backbones"
    (tmp_path / "BEATs.pt").write_bytes(b"PK")
    for source, found in ((tmp_path / "BEATs.pt", "None"), (tmp_path, "None"), (backbones / "speech_encoder", "'whis")):
        with pytest.raises(ValueError, match=rf"audio_encoder='{source}' .*\(model_type={found}.*convert_beats"):
            ListenConfig.from_backbones(
                str(backbones / "speech_encoder"), str(backbones / "language_model"), str(source)
            )


def test_the_place_of_a_backbone(tmp_path: Path) -> None:
    inside, pinned = {"base_model_name_or_path": "./llm"}, {"base_model_name_or_path": "a/b", "revision": "v1"}
    names = dict.fromkeys(("speech_encoder", "audio_encoder"), pinned)
    config = tiny_config(base_models={**names, "language_model": inside})
    assert config.backbone_place("speech_encoder") == ("a/b", {"revision": "v1"})
    assert config.backbone_place("language_model") == ("./llm", {"revision": "main"})  # of no checkpoint
    on_hub = ("me/model", {"revision": "v2", "subfolder": "llm"})
    assert config.backbone_place("language_model", "me/model", "v2") == on_hub
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.backbone_place("language_model") == (str(tmp_path / "llm"), {"revision": "main"})
    loaded.base_models = None
    assert loaded.backbone_place("language_model") is None
