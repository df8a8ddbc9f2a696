"""Adapter checkpoints: exactly what learned is written, exactly what was trained on is loaded."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.logging import LogCaptureFixture
from conftest import clip, make_inputs, tiny_config, tiny_model
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging

from listen import ListenConfig, ListenForConditionalGeneration, ListenModel, ListenPromptPoolConfig

ROWS = [[clip(1.3, 1)], [], [clip(0.9, 2), clip(2.1, 3)]]
POOL = {"pool_size": 12, "num_prompts": 4}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three backbones of a random model, each in its own format."""
    folder = tmp_path_factory.mktemp("backbones")
    model = tiny_model()
    for name in ("speech_encoder", "audio_encoder", "language_model"):
        getattr(model, name).save_pretrained(folder / name)
    return folder


def fresh(backbones: Path, seed: int = 5, **fields: object) -> ListenForConditionalGeneration:
    template = tiny_config()
    config = ListenConfig.from_backbones(
        **{name: str(backbones / name) for name in ("speech_encoder", "audio_encoder", "language_model")},
        connector_config=template.connector_config.to_dict(),
        **{"prompt_pool_config": POOL, "audio_token_id": 100, "prompt_token_id": 101, **fields},
    )
    torch.manual_seed(seed)
    return ListenForConditionalGeneration.from_backbones(config)


def logits(model: ListenForConditionalGeneration, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(**make_inputs(model, ROWS), **kwargs).logits[:, -4:]


def test_backbones_are_attached_as_they_are(backbones: Path) -> None:
    model, original = fresh(backbones), tiny_model()
    for name in ("speech_encoder", "audio_encoder", "language_model"):
        mine, theirs = getattr(model, name).state_dict(), getattr(original, name).state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert not any(module.training for module in model.modules())
    mean = model.get_input_embeddings().weight.mean(0)
    assert (model.adapters["default"].prompt_pool.values.mean(0) - mean).norm() < 0.2 * mean.norm() + 0.1


def test_an_adapter_checkpoint_holds_the_adapter_alone(backbones: Path, tmp_path: Path) -> None:
    model = fresh(backbones)
    model.save_pretrained(tmp_path)
    files = {p.name for p in tmp_path.iterdir() if p.suffix != ".py"}
    assert files == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        keys = set(weights.keys())
    assert keys == {key for key in model.state_dict() if key.startswith("adapters.default.")}
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 4 * learned < size < 4 * learned + 200 * len(keys)


def test_adapter_and_full_checkpoints_round_trip(backbones: Path, tmp_path: Path) -> None:
    model = fresh(backbones)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "full", save_full=True)
    assert model.config.base_models
    for name in ("adapter", "full"):
        assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / name)), expected)
    full = json.loads((tmp_path / "full" / "config.json").read_text())
    assert full.get("base_models") is None


def test_a_relative_backbone_is_of_the_working_directory(
    backbones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh(backbones)
    model.save_pretrained(tmp_path / "adapter")
    model.language_model.save_pretrained(tmp_path / "llm")
    monkeypatch.chdir(tmp_path)
    loaded = ListenForConditionalGeneration.from_pretrained("adapter", backbones={"language_model": "./llm"})
    assert torch.equal(logits(loaded), logits(model))


def test_backbones_inside_the_checkpoint_travel_with_it(backbones: Path, tmp_path: Path) -> None:
    model = fresh(backbones)
    folder = tmp_path / "here"
    model.save_pretrained(folder)
    for name in model.config.base_models:
        getattr(model, name).save_pretrained(folder / name)
    moved = {name: str(folder / name) for name in model.config.base_models}
    inside = ListenForConditionalGeneration.from_pretrained(folder, backbones=moved)
    inside.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())["base_models"]
    assert {s["base_model_name_or_path"] for s in written.values()} == {f"./{name}" for name in moved}
    assert str(tmp_path) not in (folder / "config.json").read_text()
    away = folder.rename(tmp_path / "there")
    assert torch.equal(logits(AutoModel.from_pretrained(away)), logits(model))
    (away / "language_model").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="needs the language_model in '.*there/language_model', which does not exist"):
        AutoModel.from_pretrained(away)
    found = AutoModel.from_pretrained(away, backbones={"language_model": str(tmp_path / "elsewhere")})
    assert torch.equal(logits(found), logits(model))


def test_an_unknown_keyword_saves_nothing(backbones: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"unknown arguments \['save_ful'\]"):
        fresh(backbones).save_pretrained(tmp_path, save_ful=True)
    assert not list(tmp_path.iterdir())


def test_a_missing_learned_weight_is_an_error(backbones: Path, tmp_path: Path) -> None:
    fresh(backbones).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["adapters.default.prompt_pool.values"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks the weights.*prompt_pool.values"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("backbone", "weight"), [("audio_encoder", "layers.0.output.weight"), ("language_model", "model.norm.weight")]
)
def test_a_missing_weight_of_a_backbone_is_an_error(
    backbones: Path, tmp_path: Path, backbone: str, weight: str
) -> None:
    fresh(backbones).save_pretrained(tmp_path / "adapter")
    shutil.copytree(backbones / backbone, tmp_path / "cut")
    weights = load_file(tmp_path / "cut" / "model.safetensors")
    del weights[weight]
    save_file(weights, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"cut' lacks the weights \['{weight}'\]"):
        AutoModel.from_pretrained(tmp_path / "adapter", backbones={backbone: str(tmp_path / "cut")})


def test_a_backbone_of_another_width_is_an_error(backbones: Path, tmp_path: Path) -> None:
    fresh(backbones).save_pretrained(tmp_path / "adapter")
    wider = tiny_config().text_config
    wider.hidden_size, wider.num_attention_heads = 64, 4
    AutoModelForCausalLM.from_config(wider).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="language_model: .*hidden_size=48, but .*wide.*hidden_size=64"):
        AutoModel.from_pretrained(tmp_path / "adapter", backbones={"language_model": str(tmp_path / "wide")})


def test_a_malformed_fingerprint_is_named(backbones: Path, tmp_path: Path) -> None:
    fresh(backbones).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["base_models"]["language_model"]["fingerprint"] = "0123456789ab"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="language_model: .*fingerprint='0123456789ab'.*drop the fingerprint"):
        AutoModel.from_pretrained(tmp_path)


def test_other_weights_of_the_same_shape_are_an_error(backbones: Path, tmp_path: Path) -> None:
    fresh(backbones).save_pretrained(tmp_path / "adapter")
    other = tiny_model(seed=9)
    with torch.no_grad():
        other.language_model.model.norm.weight.add_(0.5)
    other.language_model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="language_model: .*fingerprint"):
        AutoModel.from_pretrained(tmp_path / "adapter", backbones={"language_model": str(tmp_path / "other")})


def test_a_model_without_a_head_attaches_its_backbones_too(backbones: Path, tmp_path: Path) -> None:
    fresh(backbones).save_pretrained(tmp_path)
    bare = ListenModel.from_pretrained(tmp_path)
    assert bare(**make_inputs(bare, ROWS)).last_hidden_state.isfinite().all()


def test_unknown_backbone_names_are_errors(backbones: Path, tmp_path: Path) -> None:
    fresh(backbones).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'vision_encoder'"):
        AutoModel.from_pretrained(tmp_path, backbones={"vision_encoder": "x"})
    with pytest.raises(ValueError, match="base_models is None"):
        ListenForConditionalGeneration.from_backbones(tiny_config())


# ---------------------------------------------------------------------- several adapters


@pytest.fixture()
def two(backbones: Path, tmp_path: Path) -> ListenForConditionalGeneration:
    """A model with its default adapter and another one, `"other"`, with a bigger pool of another strategy."""
    fresh(backbones, seed=6, prompt_pool_config={**POOL, "pool_size": 20, "strategy": "residual"}).save_pretrained(
        tmp_path / "other"
    )
    model = fresh(backbones)
    model.load_adapter(tmp_path / "other", "other")
    return model


def test_adapters_switch(two: ListenForConditionalGeneration, backbones: Path, tmp_path: Path) -> None:
    alone = AutoModel.from_pretrained(tmp_path / "other")
    default = logits(two)
    two.set_adapter("other")
    assert torch.equal(logits(two), logits(alone))
    two.set_adapter("default")
    assert torch.equal(logits(two), default)
    assert not torch.equal(default, logits(alone))


def test_rows_of_one_batch_use_different_adapters(two: ListenForConditionalGeneration) -> None:
    by_name = {}
    for name in ("default", "other"):
        two.set_adapter(name)
        by_name[name] = logits(two)
    names = ["other", "default", "other"]
    mixed = logits(two, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], by_name[name][row], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_rows_of_one_batch_generate_with_different_adapters(two: ListenForConditionalGeneration, mode: dict) -> None:
    names = ["other", "default", "other"]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **mode}
    inputs = make_inputs(two, ROWS)
    start, copies = inputs["input_ids"].shape[1], mode.get("num_return_sequences", 1)
    mixed = two.generate(**inputs, adapter_names=names, **settings)[:, start:]
    for row, name in enumerate(names):
        two.set_adapter(name)
        expected = two.generate(**inputs, **settings)[:, start:]
        mine = slice(row * copies, (row + 1) * copies)
        assert torch.equal(mixed[mine], expected[mine])


def test_base_rows_answer_as_the_llm(two: ListenForConditionalGeneration) -> None:
    inputs = make_inputs(two, [[clip(1.0)], []], num_prompts=[3, 0])
    mixed = two(**inputs, adapter_names=["other", "__base__"]).logits[1, -5:]
    base = two.language_model(torch.tensor([[1, 11, 7, 8, 9]])).logits[0]
    torch.testing.assert_close(mixed, base, atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="no adapter is active"):
        two(**make_inputs(two, [[clip(1.0)]]), adapter_names=["__base__"])


def test_disabled_the_model_is_its_llm(two: ListenForConditionalGeneration) -> None:
    ids = torch.tensor([[1, 5, 9, 33]])
    with two.disable_adapter():
        assert torch.equal(two(ids).logits, two.language_model(ids).logits)
        with pytest.raises(ValueError, match="no adapter is active"):
            two(**make_inputs_of(two))
    assert two.active_adapter == "default"


def make_inputs_of(model: ListenForConditionalGeneration) -> dict[str, torch.Tensor]:
    active, model.active_adapter = model.active_adapter, "default"
    try:
        return make_inputs(model, ROWS)
    finally:
        model.active_adapter = active


def test_all_adapters_are_saved_and_each_can_be_exported(two: ListenForConditionalGeneration, tmp_path: Path) -> None:
    two.save_pretrained(tmp_path / "both")
    loaded = AutoModel.from_pretrained(tmp_path / "both")
    assert list(loaded.adapters) == ["default", "other"]
    assert torch.equal(logits(loaded), logits(two))
    two.set_adapter("other")
    two.save_adapter(tmp_path / "exported")
    exported = AutoModel.from_pretrained(tmp_path / "exported")
    assert list(exported.adapters) == ["default"]
    assert torch.equal(logits(exported), logits(two))
    assert two.config.extra_adapters


def test_adapter_names_are_checked(two: ListenForConditionalGeneration, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'nobody' is unknown; loaded: default, other"):
        two.set_adapter("nobody")
    with pytest.raises(ValueError, match="exists already"):
        two.load_adapter(tmp_path / "other", "other")
    with pytest.raises(ValueError, match="'__base__' means no adapter"):
        two.add_adapter(adapter_name="__base__")
    two.set_adapter("other")
    two.delete_adapter("other")
    assert (two.active_adapter, list(two.adapters), two.config.extra_adapters) == ("default", ["default"], None)
    with pytest.raises(ValueError, match="cannot be deleted"):
        two.delete_adapter("default")


def test_an_adapter_of_other_backbones_is_refused(backbones: Path, tmp_path: Path) -> None:
    stranger = tiny_model(seed=3, base_models=None)
    with torch.no_grad():
        stranger.language_model.model.norm.weight.add_(1.0)
    for name in ("speech_encoder", "audio_encoder", "language_model"):
        getattr(stranger, name).save_pretrained(tmp_path / "strange" / name)
    fresh(tmp_path / "strange").save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="fingerprint"):
        fresh(backbones).load_adapter(tmp_path / "adapter", "stranger")


def test_a_new_adapter_can_be_added_and_learns(backbones: Path) -> None:
    model = fresh(backbones)
    model.add_adapter(ListenPromptPoolConfig(pool_size=6, num_prompts=2, strategy="fixed"), "soft prompt")
    model.set_adapter("soft prompt")
    assert all(p.isfinite().all() and p.requires_grad for p in model.adapters["soft prompt"].parameters())
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("mode", [True, False])
def test_a_new_adapter_is_in_the_mode_of_the_model(mode: bool) -> None:
    model = tiny_model().train(mode)
    model.add_adapter(adapter_name="new")
    assert {module.training for module in model.adapters["new"].modules()} == {mode}


# ---------------------------------------------------------------------- LoRA


def lora(backbones: Path, seed: int = 5) -> ListenForConditionalGeneration:
    model = fresh(backbones, seed)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return model


def test_lora_changes_the_llm_and_disabling_it_restores_it(backbones: Path) -> None:
    model, plain = lora(backbones), fresh(backbones)
    ids = torch.tensor([[1, 5, 9, 33]])
    assert not torch.equal(model(ids).logits, plain(ids).logits)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in learned) and any("prompt_pool" in name for name in learned)
    assert all("lora_" in name or name.startswith("adapters.") for name in learned)


def test_the_lora_is_off_and_on_with_the_adapters(backbones: Path) -> None:
    model, plain = lora(backbones), fresh(backbones)
    ids = torch.tensor([[1, 5, 9, 33]])
    on, off = model(ids).logits, plain(ids).logits
    model.disable_adapters()
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, off)
    assert torch.equal(model(ids).logits, off)
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, on)


def test_a_deleted_adapter_is_not_enabled_again(backbones: Path) -> None:
    model = fresh(backbones)
    model.add_adapter(adapter_name="second")
    model.set_adapter("second")
    model.disable_adapters()
    model.delete_adapter("second")
    model.enable_adapters()
    assert model.active_adapter == "default"


def test_base_rows_among_rows_with_a_lora_are_refused(backbones: Path) -> None:
    model, ids = lora(backbones), torch.tensor([[1, 5, 9, 33]] * 2)
    with pytest.raises(ValueError, match="'__base__', but the LoRA on the LLM works on every row"):
        model.generate(ids, adapter_names=["__base__", "default"], max_new_tokens=2)
    with model.disable_adapter():
        expected = fresh(backbones).generate(ids, max_new_tokens=2, do_sample=False)
        assert torch.equal(model.generate(ids, adapter_names=["__base__"] * 2, max_new_tokens=2), expected)


def test_lora_is_part_of_the_adapter_checkpoint(backbones: Path, tmp_path: Path) -> None:
    model = lora(backbones)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        keys = set(weights.keys())
    assert all("lora_" in key or key.startswith("adapters.") for key in keys)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert torch.equal(logits(loaded), logits(model))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_an_adapter_that_learned_with_another_lora_is_refused(backbones: Path, tmp_path: Path) -> None:
    model = lora(backbones)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, adapter_name="again")  # beside its own LoRA
    moved, scaled = lora(backbones), fresh(backbones)
    torch.nn.init.ones_(moved.get_parameter(next(name for name, _ in moved.named_parameters() if "lora_B" in name)))
    scaled.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]))
    scaled.load_state_dict({name: value for name, value in model.state_dict().items() if "lora_" in name}, strict=False)
    for other in (fresh(backbones), moved, scaled):
        with pytest.raises(ValueError, match="was trained with a LoRA that this model's LLM does not have"):
            other.load_adapter(tmp_path, adapter_name="second")
        assert "second" not in other.adapters


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha_pattern": {"q_proj": 64}},
        {"rank_pattern": {"q_proj": 4}},
        {"use_dora": True},
        {"layers_to_transform": [0]},
        {"exclude_modules": ["v_proj"]},
    ],
)
def test_all_settings_of_a_lora_come_back(backbones: Path, tmp_path: Path, settings: dict) -> None:
    model = fresh(backbones)
    model.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path)), logits(model))


def test_a_lora_that_peft_saved_joins_the_checkpoint(backbones: Path, tmp_path: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(backbones / "language_model")
    torch.manual_seed(1)
    peft = get_peft_model(llm, LoraConfig(lora_alpha=16, target_modules=["q_proj"], init_lora_weights=False))
    peft.save_pretrained(tmp_path / "peft")
    model, ids = fresh(backbones), torch.tensor([[1, 5, 9, 33]])
    model.load_adapter(tmp_path / "peft")
    torch.testing.assert_close(model(ids).logits, peft(ids).logits)
    model.save_pretrained(tmp_path / "ours")
    loaded, info = AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert torch.equal(loaded(ids).logits, model(ids).logits) and not info["unexpected_keys"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\]: the LLM"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3Config is no LoraConfig"),
    ],
)
def test_more_than_a_lora_on_the_llm_is_refused(backbones: Path, config: PeftConfig, message: str) -> None:
    model = fresh(backbones)
    with pytest.raises(ValueError, match=message):
        model.add_adapter(config)
    with pytest.raises(ValueError, match="adapter_name='mine': checkpoints hold one LoRA"):
        model.add_adapter(LoraConfig(target_modules=["q_proj"]), "mine")
    assert model.config.lora_config is None


def test_lora_dropout_is_on_in_training_while_the_llm_rests(backbones: Path) -> None:
    model = fresh(backbones)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.3))
    model.train()
    training = {name for name, m in model.language_model.named_modules() if m.training}
    assert training and all("lora_dropout" in name for name in training)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_a_full_checkpoint_with_a_lora_gives_the_same_answers(
    backbones: Path, tmp_path: Path, merged: bool, again: bool
) -> None:
    """`again`: of a model that stands alone, else of one that names its backbones."""
    model = fresh(backbones)
    if again:
        model.save_pretrained(tmp_path / "whole", save_full=True)
        model = AutoModel.from_pretrained(tmp_path / "whole")
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False))
    if merged:
        model.merge_adapter()
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved", save_full=not again)
    loaded = AutoModel.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(loaded), expected)
    assert bool(loaded.config.lora_config) is not merged
    assert model.config.lora_config  # as it was before saving


def test_a_merged_lora_is_saved_as_a_lora_beside_named_backbones(backbones: Path, tmp_path: Path) -> None:
    model = lora(backbones)
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "language_model").exists()
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path)), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="no LoRA to merge"):
        fresh(backbones).merge_adapter()


def test_a_changed_backbone_is_written_and_named(backbones: Path, tmp_path: Path, caplog: LogCaptureFixture) -> None:
    model = get_peft_model(
        fresh(backbones), LoraConfig(target_modules=r"language_model.*q_proj", init_lora_weights=False)
    ).merge_and_unload()
    logging.get_logger("listen").addHandler(caplog.handler)
    try:
        model.save_pretrained(tmp_path / "merged")
    finally:
        logging.get_logger("listen").removeHandler(caplog.handler)
    assert "frozen language_model is not the one in" in caplog.text and "the folder language_model" in caplog.text
    bases = json.loads((tmp_path / "merged" / "config.json").read_text())["base_models"]
    assert bases["language_model"]["base_model_name_or_path"] == "./language_model"
    assert bases["speech_encoder"]["base_model_name_or_path"] == str(backbones / "speech_encoder")
    loaded = AutoModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")  # unchanged since: named, not copied
    assert not (tmp_path / "again" / "language_model").exists()


def test_a_backbone_changed_below_a_lora_is_written_without_it(backbones: Path, tmp_path: Path) -> None:
    model = lora(backbones)
    with torch.no_grad():
        model.language_model.model.layers[0].self_attn.q_proj.base_layer.weight.mul_(1.001)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModel.from_pretrained(tmp_path)), logits(model))


def test_a_lora_that_checkpoints_do_not_hold_is_refused(backbones: Path, tmp_path: Path) -> None:
    model = fresh(backbones)
    inject_adapter_in_model(LoraConfig(target_modules=r"speech_encoder.*q_proj"), model)
    with pytest.raises(ValueError, match=r"speech_encoder\..*lora_.* merge it"):
        model.save_pretrained(tmp_path)


# ---------------------------------------------------------------------- weights in files


@pytest.mark.parametrize("options", [{"max_shard_size": "30KB"}, {"variant": "fp16"}, {}])
def test_an_adapter_and_its_lora_load_from_any_kind_of_files(backbones: Path, tmp_path: Path, options: dict) -> None:
    model = lora(backbones)
    model.save_pretrained(tmp_path, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is ("max_shard_size" in options)
    loading = {"variant": options["variant"]} if "variant" in options else {}
    loaded = AutoModel.from_pretrained(tmp_path, **loading)
    assert torch.equal(logits(loaded), logits(model))
    loaded.load_adapter(tmp_path, "second", **loading)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("adapters.default.connector.projection.weight", lambda w: w.fill_(float("nan")), "not finite"),
        ("adapters.default.prompt_pool.values", lambda w: w.to(torch.int64), "type I64, not a float"),
        ("lora_A", lambda w: w.mul_(float("inf")), "not finite"),
    ],
)
def test_odd_weights_are_refused_by_name(backbones: Path, tmp_path: Path, key: str, change: Any, message: str) -> None:
    lora(backbones).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if key in name)
    weights[name] = change(weights[name])
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name}.* {message}"):
        AutoModel.from_pretrained(tmp_path)
    if key != "lora_A":
        model = lora(backbones)
        with pytest.raises(ValueError, match=rf"{name}.* {message}"):
            model.load_adapter(tmp_path, "odd")
        assert list(model.adapters) == ["default"]


# ---------------------------------------------------------------------- the rest of PEFT's interface


def test_an_added_adapter_is_in_the_mode_of_the_model(backbones: Path) -> None:
    model = fresh(backbones)
    model.add_adapter(adapter_name="resting")
    assert not any(module.training for module in model.adapters["resting"].modules())
    model.train().add_adapter(adapter_name="learning")
    assert model.adapters["learning"].training


def test_active_adapters_are_told_and_switched_off(backbones: Path) -> None:
    model = lora(backbones)
    ids = torch.tensor([[1, 5, 9, 33]])
    with_lora = model(ids).logits
    assert model.active_adapters() == ["default"]
    model.disable_adapters()
    assert model.active_adapters() == [] and model.active_adapter is None
    assert torch.equal(model(ids).logits, fresh(backbones)(ids).logits)
    model.enable_adapters()
    assert model.active_adapters() == ["default"] and torch.equal(model(ids).logits, with_lora)
    state = model.get_adapter_state_dict()
    assert {key.split(".")[0] for key in state} == {"adapters", "language_model"}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained <= set(state)


def test_adapters_are_disabled_for_one_thread_alone(backbones: Path) -> None:
    model = lora(backbones)
    ids = torch.tensor([[1, 5, 9, 33]])
    expected, plain = model(ids).logits, fresh(backbones)(ids).logits
    with ThreadPoolExecutor(1) as other, model.disable_adapter():
        assert torch.equal(model(ids).logits, plain)
        assert torch.equal(other.submit(lambda: model(ids).logits).result(), expected)
        assert other.submit(lambda: model.active_adapter).result() == "default"
    assert torch.equal(model(ids).logits, expected)


def test_parameters_are_counted_by_module(backbones: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = fresh(backbones)
    counts = model.parameter_counts()
    assert counts["default.prompt_pool"] == (2 * 12 * 48, 2 * 12 * 48)
    assert counts["language_model"][0] == 0
    assert sum(total for _, total in counts.values()) == sum(p.numel() for p in model.parameters())
    model.print_trainable_parameters()
    printed = capsys.readouterr().out
    assert "default.prompt_pool" in printed and "total" in printed
