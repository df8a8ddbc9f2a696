"""An encoder that learns: it gets gradients, lives in fp32, and is part of the checkpoint; the rest is frozen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import clip, make_inputs, tiny_config
from fixtures_backbones import model_section, save_backbones
from fixtures_training import small_corpus
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from listen import ListenConfig, ListenForConditionalGeneration
from listen.data.features import FeatureStoreError
from listen.training import ArgumentError, ListenTrainingArguments, build_arguments, build_model, build_trainer, train

ROWS = [[clip(1.3, 1)], [clip(0.9, 2), clip(2.1, 3)]]
CONV = {"type": "conv_rotary", "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "dropout": 0.0}
TRAINABLE = ["speech_encoder", "connector"]
NAMES = ("speech_encoder", "audio_encoder", "language_model")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"), num_rows=6)


def fresh(backbones: dict[str, str], seed: int = 5, dtype: Any = "auto", **fields: Any) -> Any:
    settings = {"connector_config": CONV, "trainable": TRAINABLE, "audio_token_id": 100, "prompt_token_id": 101}
    config = ListenConfig.from_backbones(**{name: backbones[name] for name in NAMES}, **{**settings, **fields})
    torch.manual_seed(seed)
    return ListenForConditionalGeneration.from_backbones(config, dtype=dtype)


def moved(backbones: dict[str, str], **fields: Any) -> ListenForConditionalGeneration:
    """A model whose encoder is no longer the one it started with."""
    model = fresh(backbones, **fields)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def logits(model: ListenForConditionalGeneration) -> torch.Tensor:
    with torch.no_grad():
        return model(**make_inputs(model, ROWS, num_prompts=0)).logits[:, -4:]


def loss(model: ListenForConditionalGeneration) -> torch.Tensor:
    inputs = make_inputs(model, ROWS, num_prompts=0)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    return model(**inputs, labels=labels).loss


def learned(model: ListenForConditionalGeneration) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---------------------------------------------------------------------- learning


def test_encoder_and_connector_get_gradients_and_nothing_else_does(backbones: dict[str, str]) -> None:
    model = fresh(backbones, dtype=torch.bfloat16).train()
    loss(model).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    # a softmax over keys does not move with a bias that all keys share
    assert learned(model) - with_gradient <= {n for n in learned(model) if n.endswith("k_proj.bias")}
    assert with_gradient <= learned(model)
    assert {name.split(".")[0] for name in with_gradient} == {"speech_encoder", "adapters"}
    assert model.speech_encoder.conv1.weight.grad.abs().max() > 0
    assert "speech_encoder.embed_positions.weight" not in learned(model)  # sinusoids


def test_what_learns_is_in_fp32_and_in_training_mode(backbones: dict[str, str]) -> None:
    model = fresh(backbones, dtype=torch.bfloat16).train()
    for name, parameter in model.named_parameters():
        inside = name.startswith(("speech_encoder.", "adapters."))
        assert parameter.dtype == (torch.float32 if inside else torch.bfloat16), name
    assert all(module.training for module in model.speech_encoder.modules())
    assert not any(module.training for module in (*model.audio_encoder.modules(), *model.language_model.modules()))


def test_activation_checkpointing_changes_no_gradient(backbones: dict[str, str]) -> None:
    plain, checkpointed = fresh(backbones).train(), fresh(backbones).train()
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    for model in (plain, checkpointed):
        loss(model).backward()
    assert all(layer.gradient_checkpointing for layer in checkpointed.speech_encoder.layers)
    for (name, one), (_, two) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(two.grad, one.grad, msg=name)


# ---------------------------------------------------------------------- checkpoints


def test_a_checkpoint_holds_the_learned_encoder_and_where_it_began(backbones: dict[str, str], tmp_path: Path) -> None:
    model = moved(backbones)
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "model.safetensors"))
    assert keys == {key for key in model.state_dict() if key.startswith(("speech_encoder.", "adapters."))}
    bases = json.loads((tmp_path / "config.json").read_text())["base_models"]
    assert bases["speech_encoder"] == {"base_model_name_or_path": backbones["speech_encoder"], "revision": "main"}
    assert bases["language_model"]["fingerprint"]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_saved_is_loaded(backbones: dict[str, str], tmp_path: Path, full: bool, dtype: Any) -> None:
    model = moved(backbones)
    model.save_pretrained(tmp_path, save_full=full)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert learned(loaded) == learned(model)
    for name in learned(model):
        assert torch.equal(loaded.get_parameter(name), model.get_parameter(name)), name
    assert loaded.dtype == loaded.language_model.dtype == (torch.float32 if dtype == "auto" else dtype)
    if dtype == "auto":
        assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again", **({} if full else {"dtype": dtype}))  # full: as it was saved
    assert torch.equal(logits(again), logits(loaded))


def test_where_the_encoder_began_need_not_exist_any_more(backbones: dict[str, str], tmp_path: Path) -> None:
    copied = {name: str(shutil.copytree(path, tmp_path / name)) for name, path in backbones.items()}
    model = moved(copied)
    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(copied["speech_encoder"])
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "model")), logits(model))


def test_a_missing_encoder_weight_is_an_error(backbones: dict[str, str], tmp_path: Path) -> None:
    fresh(backbones, trainable=["connector"]).save_pretrained(tmp_path)
    config = ListenConfig.from_pretrained(tmp_path)
    config.trainable = TRAINABLE
    with pytest.raises(ValueError, match="lacks the weights .*speech_encoder"):
        AutoModel.from_pretrained(tmp_path, config=config)


def test_a_conformer_learns_and_comes_back(backbones: dict[str, str], tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = AutoConfig.for_model("wav2vec2-bert", **sizes, apply_spec_augment=False)
    AutoModel.from_config(config).save_pretrained(tmp_path / "conformer")
    model = moved({**backbones, "speech_encoder": str(tmp_path / "conformer"), "audio_encoder": None})
    features = {"input_features": torch.randn(2, 40, 160), "input_features_mask": torch.ones(2, 40, dtype=torch.long)}
    features["input_features_mask"][1, 25:] = 0
    heard = model.get_audio_features(**features)
    heard.pooler_output.square().sum().backward()
    assert heard.lengths.tolist() == [10, 7]
    without = {name for name in learned(model) if model.get_parameter(name).grad is None}
    assert without == set()  # the mask of a SpecAugment that is off does not count as learned
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModel.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert learned(loaded) == learned(model)
    assert all(torch.equal(loaded.get_parameter(name), model.get_parameter(name)) for name in learned(model))
    torch.testing.assert_close(loaded.get_audio_features(**features).pooler_output, heard.pooler_output)


# ---------------------------------------------------------------------- other adapters


def test_a_second_adapter_is_refused_with_the_way_out(backbones: dict[str, str], tmp_path: Path) -> None:
    owner, guest = moved(backbones), fresh(backbones, trainable=["connector"])
    owner.save_pretrained(tmp_path / "owner")
    guest.save_pretrained(tmp_path / "guest")
    with pytest.raises(ValueError, match=r"adapter 'second' .*speech_encoder of this model.*save_pretr"):
        owner.add_adapter(adapter_name="second")
    with pytest.raises(ValueError, match="guest' .*speech_encoder of this model.*save_pretr"):
        owner.load_adapter(tmp_path / "guest", "guest")
    with pytest.raises(ValueError, match="this model .*speech_encoder of adapter .*owner.*save_pretr"):
        guest.load_adapter(tmp_path / "owner", "owner")
    assert list(owner.adapters) == list(guest.adapters) == ["default"]


def test_the_way_out_works(backbones: dict[str, str], tmp_path: Path) -> None:
    """The learned encoder becomes a frozen backbone, over which adapters are as many as you like."""
    owner = moved(backbones)
    owner.speech_encoder.save_pretrained(tmp_path / "encoder")
    frozen = fresh({**backbones, "speech_encoder": str(tmp_path / "encoder")}, trainable=["connector"])
    frozen.adapters["default"].load_state_dict(owner.adapters["default"].state_dict())
    assert torch.equal(logits(frozen), logits(owner))
    frozen.add_adapter(adapter_name="second")
    assert set(frozen.adapters) == {"default", "second"}


def test_an_exported_adapter_brings_its_encoder(backbones: dict[str, str], tmp_path: Path) -> None:
    model = moved(backbones)
    model.save_adapter(tmp_path)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path)), logits(model))


def test_lora_on_the_llm_joins(backbones: dict[str, str], tmp_path: Path) -> None:
    model = moved(backbones)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path)), logits(model))


# ---------------------------------------------------------------------- changing what learns


def test_an_encoder_can_begin_to_learn_later(backbones: dict[str, str], tmp_path: Path) -> None:
    model = fresh(backbones, trainable=["connector"])
    model.save_pretrained(tmp_path / "frozen")
    half = AutoModel.from_pretrained(tmp_path / "frozen", dtype=torch.bfloat16)
    half.set_trainable(TRAINABLE)
    assert half.speech_encoder.dtype == torch.float32
    assert learned(half) == learned(fresh(backbones))
    half.save_pretrained(tmp_path / "learned")
    loaded = AutoModel.from_pretrained(tmp_path / "learned", dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(half))
    assert json.loads((tmp_path / "learned" / "config.json").read_text())["trainable"] == TRAINABLE
    assert any(key.startswith("speech_encoder.") for key in load_file(tmp_path / "learned" / "model.safetensors"))


def test_changes_that_would_lose_weights_are_refused(backbones: dict[str, str]) -> None:
    model = fresh(backbones)
    with pytest.raises(ValueError, match=r"\['speech_encoder'\].*save_pretrained"):
        model.set_trainable(["connector"])
    with pytest.raises(ValueError, match="'qformer'.* is unknown"):
        model.set_trainable([*TRAINABLE, "qformer"])
    assert model.config.trainable == TRAINABLE
    shared = fresh(backbones, trainable=["connector"])
    shared.add_adapter(adapter_name="second")
    with pytest.raises(ValueError, match="another adapter .*speech_encoder.*save_pretrained"):
        shared.set_trainable(TRAINABLE)
    assert shared.config.trainable == ["connector"]


# ---------------------------------------------------------------------- training runs


def sections(backbones: dict[str, str], manifest: Path, folder: Path, **training: Any) -> dict[str, Any]:
    model = model_section(backbones, connector=CONV, prompt_pool={"pool_size": 0}, trainable=TRAINABLE)
    defaults = {
        "output_dir": str(folder), "use_cpu": True, "num_threads": 1, "report_to": "none", "disable_tqdm": True,
        "logging_steps": 1, "seed": 3, "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
        "per_device_train_batch_size": 2, "learning_rate": 1e-3, "adam_beta2": 0.98,
    }  # fmt: skip
    return {"model": model, "data": {"train": [str(manifest)]}, "training": {**defaults, **training}}


def run(settings: dict[str, Any]) -> Any:
    arguments = build_arguments(settings)
    return train(arguments.model, arguments.data, arguments.training, raw=arguments.raw)


def test_a_run_moves_the_encoder_saves_it_and_resumes(
    backbones: dict[str, str], manifest: Path, tmp_path: Path
) -> None:
    settings = sections(backbones, manifest, tmp_path / "straight", layerwise_lr_decay=0.8)
    settings["model"]["dtype"] = "bfloat16"
    straight = run(settings)
    began = load_file(Path(backbones["speech_encoder"]) / "model.safetensors")
    weights = load_file(straight.model_folder / "model.safetensors")
    assert not torch.equal(weights["speech_encoder.conv1.weight"], began["conv1.weight"])
    assert torch.equal(weights["speech_encoder.embed_positions.weight"], began["embed_positions.weight"])
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    settings["training"].update(output_dir=str(tmp_path / "resumed"), resume=True)
    resumed = load_file(run(settings).model_folder / "model.safetensors")
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


@pytest.mark.parametrize("alignment", ["lm", "distill"])
def test_after_training_text_alone_gets_what_the_base_llm_gives(
    backbones: dict[str, str], manifest: Path, tmp_path: Path, alignment: str
) -> None:
    rows = [json.loads(line) | {"text_input": "<happy> to be"} for line in manifest.read_text().splitlines()]
    told = manifest.with_name(f"told-{alignment}.jsonl")
    told.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(sections(backbones, told, tmp_path, alignment=alignment, save_strategy="no"))
    base = AutoModelForCausalLM.from_pretrained(backbones["language_model"])
    text = result.processor("<happy> to be or not", num_prompts=0)
    with torch.no_grad():
        assert torch.equal(result.model(**text).logits, base(**text).logits)
    answers = [m.generate(**text, do_sample=False, max_new_tokens=8) for m in (result.model, base)]
    assert torch.equal(*answers)
    weights = base.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in result.model.language_model.state_dict().items())


def test_a_run_may_thaw_the_encoder_of_a_checkpoint(backbones: dict[str, str], manifest: Path, tmp_path: Path) -> None:
    settings = sections(backbones, manifest, tmp_path / "a", max_steps=1, save_strategy="no")
    settings["model"]["trainable"] = ["connector"]
    first = run(settings)
    second = sections(backbones, manifest, tmp_path / "b")["training"] | {"max_steps": 1, "save_strategy": "no"}
    model = {"checkpoint": str(first.model_folder), "trainable": TRAINABLE}
    result = run({**settings, "model": model, "training": second})
    assert any(key.startswith("speech_encoder.") for key in load_file(result.model_folder / "model.safetensors"))
    with pytest.raises(ValueError, match="speech_encoder.*save_pretrained"):
        build_model(
            build_arguments({"model": {"checkpoint": str(result.model_folder), "trainable": ["connector"]}}).model
        )


def test_features_of_a_learned_encoder_are_not_taken_from_a_store(
    backbones: dict[str, str], manifest: Path, tmp_path: Path
) -> None:
    from listen.data import load_manifest, precompute_features
    from listen.training import build_encoders

    settings = sections(backbones, manifest, tmp_path / "run")
    frozen = build_arguments({**settings, "model": {**settings["model"], "trainable": ["connector"]}})
    precompute_features(*build_encoders(frozen.model), load_manifest(manifest), tmp_path / "store", progress=False)
    settings["data"]["features"] = str(tmp_path / "store")
    with pytest.raises(FeatureStoreError, match=r"\['speech_encoder'\].*trainable="):
        run(settings)


def test_layerdrop_in_several_processes_is_refused(
    backbones: dict[str, str], manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = build_arguments(sections(backbones, manifest, tmp_path))
    model, processor = build_model(arguments.model)
    model.speech_encoder.config.encoder_layerdrop = 0.1
    assert build_trainer(model, processor, arguments.data, arguments.training)
    monkeypatch.setattr(ListenTrainingArguments, "world_size", 2)
    with pytest.raises(ArgumentError, match="encoder_layerdrop=0.1.*ddp_find_unused_parameters=true"):
        build_trainer(model, processor, arguments.data, arguments.training)


def test_a_config_lists_the_encoders_that_learn() -> None:
    assert tiny_config(trainable=["audio_encoder", "connector", "speech_encoder"]).learned_backbones == [
        "speech_encoder",
        "audio_encoder",
    ]
    assert tiny_config().learned_backbones == []
