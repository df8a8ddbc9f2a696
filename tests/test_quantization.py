"""A quantised LLM under an fp32 adapter: it trains, generates, saves and loads, and nothing else is quantised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import clip, make_inputs, tiny_config, tiny_model
from peft import LoraConfig
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig, Trainer, TrainingArguments

from listen.checkpoint_listen import whole_map
from listen.configuration_listen import ListenConfig
from listen.fingerprint_listen import differing_weights, fingerprint
from listen.language_models_listen import mean_embedding
from listen.modeling_listen import ListenForConditionalGeneration

ROWS = [[clip(1.3, 1), clip(0.6, 5)], [], [clip(0.9, 2)]]


def int8() -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is an extra")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def bits(count: int) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra")
    return BitsAndBytesConfig(**{f"load_in_{count}bit": True})


DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
KINDS = {"torchao int8": int8, "bitsandbytes 4 bit": lambda: bits(4), "bitsandbytes 8 bit": lambda: bits(8)}
every_kind = pytest.mark.parametrize("kind", KINDS)


def listen_config(folder: Path) -> ListenConfig:
    wide = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_key_value_heads": 4,
        "head_dim": 16,
    }  # kernels of 4 bit go by blocks
    template = tiny_config()
    model = tiny_model(text_config={**template.text_config.to_diff_dict(), **wide})
    paths = {name: str(folder / name) for name in ("speech_encoder", "audio_encoder", "language_model")}
    for name, path in paths.items():
        getattr(model, name).save_pretrained(path)
    return ListenConfig.from_backbones(
        **paths,
        connector_config=template.connector_config.to_dict(),
        prompt_pool_config=template.prompt_pool_config.to_dict(),
        audio_token_id=100,
        prompt_token_id=101,
    )


def quantised(folder: Path, kind: str) -> ListenForConditionalGeneration:
    quantization = KINDS[kind]()
    torch.manual_seed(0)
    return ListenForConditionalGeneration.from_backbones(
        listen_config(folder), quantization_config=quantization, device_map=DEVICE
    )


def heard(model: ListenForConditionalGeneration) -> dict[str, torch.Tensor]:
    plain = make_inputs(tiny_model(), ROWS)  # counts embeddings alike
    return {name: value.to(model.device) for name, value in plain.items()}


def inputs_of(model: ListenForConditionalGeneration) -> dict[str, torch.Tensor]:
    inputs = heard(model)
    inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
    inputs["labels"][:, -3:] = inputs["input_ids"][:, -3:]
    return inputs


def is_quantised(weight: torch.Tensor) -> bool:
    return type(weight.data) is not torch.Tensor or not weight.is_floating_point()


@every_kind
def test_the_llm_alone_is_quantised(kind: str, tmp_path: Path) -> None:
    model = quantised(tmp_path, kind)
    found = {name for name, weight in model.named_parameters() if is_quantised(weight)}
    assert {"language_model.model.layers.0.mlp.up_proj.weight"} <= found
    assert all(name.startswith("language_model.model.layers.") for name in found)
    assert {weight.dtype for weight in model.adapters.parameters()} == {torch.float32}


@every_kind
def test_the_adapter_learns_through_it(kind: str, tmp_path: Path) -> None:
    """Gradients lie near those under the whole LLM, the loss falls, and the LLM stays as it is."""
    model = quantised(tmp_path, kind).train()
    torch.manual_seed(0)
    whole = ListenForConditionalGeneration.from_backbones(model.config, device_map=DEVICE).train()
    whole.load_state_dict(
        {name: weight for name, weight in model.state_dict().items() if "adapters" in name}, strict=False
    )
    for each in (model, whole):
        each.adapters.eval()  # dropout would differ between the two
    inputs = inputs_of(model)
    model(**inputs).loss.backward()
    whole(**inputs).loss.backward()
    for name in ("connector.projection.weight", "prompt_pool.values"):
        mine, theirs = (each.adapters["default"].get_parameter(name).grad.flatten() for each in (model, whole))
        assert torch.cosine_similarity(mine, theirs, dim=0) > 0.8, name
    layer, ones = model.language_model.get_submodule("model.layers.0.mlp.up_proj"), torch.ones(1, 64, device=DEVICE)
    before = layer(ones)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**inputs).lm_loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert torch.equal(layer(ones), before)


@every_kind
def test_training_after_an_answer_has_the_same_gradients(kind: str, tmp_path: Path) -> None:
    """4-bit layers answer, on some CPUs, by a kernel through which no gradient passes."""
    model = quantised(tmp_path, kind)
    gradients = []
    for _ in range(2):
        model.train().adapters.eval()
        model(**inputs_of(model)).loss.backward()
        gradients.append(model.adapters["default"].get_parameter("prompt_pool.values").grad.flatten().clone())
        model.zero_grad()
        model.eval().generate(**heard(model), max_new_tokens=3)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.9999  # that kernel rounds the scales to bf16, once


@every_kind
def test_transformers_trainer_takes_it(kind: str, tmp_path: Path) -> None:
    """Without a device map: bitsandbytes places the LLM itself, and the rest goes where it is."""
    model = ListenForConditionalGeneration.from_backbones(
        listen_config(tmp_path), quantization_config=KINDS[kind](), device_map=None if "bits" in kind else DEVICE
    )
    assert {weight.device for weight in model.parameters()} == {torch.device(DEVICE)}
    assert [model.is_loaded_in_4bit, model.is_loaded_in_8bit] == ["4 bit" in kind, "8 bit" in kind]
    inputs, before = inputs_of(model), model.adapters["default"].prompt_pool.values.detach().clone()
    args = {"max_steps": 1, "gradient_checkpointing": True, "report_to": [], "save_strategy": "no"}
    args = TrainingArguments(str(tmp_path), remove_unused_columns=False, learning_rate=1e-2, disable_tqdm=True, **args)
    Trainer(model, args, train_dataset=[{}], data_collator=lambda _: inputs).train()
    assert not torch.equal(model.adapters["default"].prompt_pool.values, before)


@pytest.mark.parametrize(
    ("placed", "whole"),
    [
        ({"": 0}, {"": 0}),
        ({"model": torch.device("cuda:1"), "lm_head": torch.device("cuda:1")}, {"": torch.device("cuda:1")}),
        ({"model": 0, "lm_head": 1}, {"language_model.model": 0, "language_model.lm_head": 1, "": 0}),
        ({"model": "cpu", "lm_head": 1}, {"language_model.model": "cpu", "language_model.lm_head": 1, "": 1}),
        ({"": "disk"}, {"language_model": "disk", "": "cpu"}),
    ],
)
def test_one_device_makes_a_map_of_one_entry(placed: dict[str, object], whole: dict[str, object]) -> None:
    """Accelerate refuses to train a model of several in parallel processes."""
    assert whole_map(placed) == whole


def test_a_fingerprint_knows_4_bits_in_any_storage(tmp_path: Path) -> None:
    config = listen_config(tmp_path)
    quantization = bits(4)
    quantization.bnb_4bit_quant_storage = torch.bfloat16
    model = ListenForConditionalGeneration.from_backbones(config, quantization_config=quantization, device_map=DEVICE)
    assert model.language_model.model.layers[0].mlp.up_proj.weight.is_floating_point()
    whole = ListenForConditionalGeneration.from_backbones(config)
    assert differing_weights(fingerprint(whole.language_model), model.language_model) == []


@every_kind
def test_its_adapter_is_saved_and_loaded_over_either_llm(kind: str, tmp_path: Path) -> None:
    model = quantised(tmp_path, kind)
    inputs = heard(model)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "config.json").read_text())
    assert "quantization_config" not in config["text_config"]  # how an LLM is held is the user's choice, each time
    again = AutoModel.from_pretrained(tmp_path / "adapter", quantization_config=KINDS[kind](), device_map=DEVICE)
    assert torch.equal(again.generate(**inputs, **settings), expected)
    whole = AutoModel.from_pretrained(tmp_path / "adapter")
    assert not any(is_quantised(weight) for weight in whole.parameters())
    assert differing_weights(fingerprint(model.language_model), whole.language_model) == []


@every_kind
def test_its_pool_grows(kind: str, tmp_path: Path) -> None:
    model = quantised(tmp_path, kind)
    old = model.adapters["default"].prompt_pool.values.detach().clone()
    model.grow_pool(3)
    pool = model.adapters["default"].prompt_pool
    model.train()(**inputs_of(model)).loss.backward()
    changed = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert changed == {f"adapters.default.prompt_pool.{name}" for name, _ in pool.named_parameters()}
    assert torch.equal(pool.part("values")[: len(old)], old)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = model.eval().generate(**heard(model), **settings)
    model.save_pretrained(tmp_path / "grown")
    again = AutoModel.from_pretrained(tmp_path / "grown", quantization_config=KINDS[kind](), device_map=DEVICE)
    assert torch.equal(again.generate(**heard(model), **settings), expected)


@every_kind
def test_an_llm_may_come_quantised(kind: str, tmp_path: Path) -> None:
    """Its own checkpoint says how it is held, and nothing else is held so."""
    config = listen_config(tmp_path)
    language_model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "language_model", quantization_config=KINDS[kind](), device_map=DEVICE
    )
    language_model.save_pretrained(tmp_path / "small")
    config.base_models["language_model"]["base_model_name_or_path"] = str(tmp_path / "small")
    model = ListenForConditionalGeneration.from_backbones(config, device_map=DEVICE)
    model(**inputs_of(model)).loss.backward()
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModel.from_pretrained(tmp_path / "adapter", device_map=DEVICE)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(again.generate(**heard(model), **settings), model.generate(**heard(model), **settings))
    found = {name for name, weight in again.named_parameters() if is_quantised(weight)}
    assert found and all(name.startswith("language_model.model.layers.") for name in found)


@every_kind
def test_a_quantised_llm_is_not_written_out(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_full=True.*quantised"):
        quantised(tmp_path, kind).save_pretrained(tmp_path / "full", save_full=True)


@every_kind
def test_a_lora_learns_on_it(kind: str, tmp_path: Path) -> None:
    model = quantised(tmp_path, kind)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model(**inputs_of(model)).loss.backward()
    assert any("lora_B" in name and p.grad is not None and p.grad.any() for name, p in model.named_parameters())


def test_a_checkpoint_with_everything_in_it_is_not_quantised(tmp_path: Path) -> None:
    """It would reach encoders and adapter too."""
    quantization = int8()
    ListenForConditionalGeneration(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantization_config.*base_models"):
        ListenForConditionalGeneration.from_pretrained(tmp_path, quantization_config=quantization)


def test_an_llm_may_lie_on_disk(tmp_path: Path) -> None:
    """Its embeddings too, at whose mean prompts start."""
    config = listen_config(tmp_path)
    places = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places = {**places, "lm_head": "cpu"}
    model = ListenForConditionalGeneration.from_backbones(config, device_map=places, offload_folder=tmp_path / "off")
    whole = ListenForConditionalGeneration.from_backbones(config)
    assert model.language_model.device.type == "meta"
    assert torch.equal(mean_embedding(model.language_model), mean_embedding(whole.language_model))
    whole.adapters.load_state_dict(model.adapters.state_dict())
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**heard(whole), **settings), whole.generate(**heard(whole), **settings))
    model.train()(**inputs_of(whole)).loss.backward()
    assert model.adapters["default"].prompt_pool.values.grad.any()
