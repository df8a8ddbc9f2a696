"""What `listen.analysis.sizes` computes is what really built models have; `examples/sizes.py` prints it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import clip, make_inputs, tiny_config, tiny_model
from fixtures_language_models import family_text_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from listen import ListenConfig
from listen.analysis.sizes import Sizes, cache_bytes, measure_sizes
from listen.commands import cost
from listen.presets_listen import PRESETS

ROOT = Path(__file__).resolve().parents[1]
SECONDS, TEXT = 1.5, 9
SCRIPT = cost


@pytest.fixture(scope="module")
def sizes() -> Sizes:
    return measure_sizes(tiny_config(), batch_size=2, audio_seconds=SECONDS, text_tokens=TEXT)


def real_inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The batch that `sizes` is for."""
    count = model.config.prompt_pool_config.num_prompts
    rows = [[clip(SECONDS, seed)] for seed in range(2)]
    return make_inputs(model, rows, num_prompts=count, text=[[7] * (TEXT - 1)] * 2)


@pytest.mark.parametrize(
    "overrides", [{}, {"audio_config": None}, {"prompt_pool_config": None}, {"trainable": ["prompt_pool"]}, {"tied": 1}]
)
def test_counts_are_those_of_a_real_model(overrides: dict) -> None:
    if overrides.pop("tied", None):
        overrides["text_config"] = {**tiny_config().text_config.to_dict(), "tie_word_embeddings": True}
    model = tiny_model(**overrides)
    found = measure_sizes(tiny_config(**overrides), audio_seconds=0.5, text_tokens=2)
    parameters = list(model.parameters())
    assert sum(m.parameters for m in found.modules.values()) == sum(p.numel() for p in parameters)
    assert sum(m.learned for m in found.modules.values()) == sum(p.numel() for p in parameters if p.requires_grad)
    assert found.weight_bytes == sum(p.nbytes for p in parameters)
    for name in ("speech_encoder", "audio_encoder", "language_model"):
        part = getattr(model, name)
        assert (part is None) == (name not in found.modules)
        assert part is None or found.modules[name].parameters == sum(p.numel() for p in part.parameters())


def test_positions_and_flops_are_those_of_a_real_forward_pass(sizes: Sizes) -> None:
    model = tiny_model()
    model.set_attn_implementation("eager")
    inputs = real_inputs(model)
    assert inputs["input_ids"].shape == (2, sizes.positions)
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert counter.get_total_flops() == sizes.forward_flops


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3", "gemma3n", "qwen3-moe", "mixtral"])
def test_composite_llms_and_experts_are_counted(family: str) -> None:
    overrides = {"text_config": family_text_config(family)}
    sizes = measure_sizes(tiny_config(**overrides), audio_seconds=0.5, text_tokens=5, dtype=torch.bfloat16)
    llm = tiny_model(**overrides).language_model
    llm.set_attn_implementation("eager")
    llm.set_experts_implementation("eager")  # one product after the other, which torch's counter knows
    with FlopCounterMode(display=False) as counter:
        llm(torch.full((1, sizes.positions), 5))
    assert counter.get_total_flops() == sizes.flops_per_position * sizes.positions
    assert sizes.modules["language_model"].parameters == sum(p.numel() for p in llm.parameters())


def test_a_misspelt_field_of_a_recipe_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {preset: listen-llama3-8b, promt_pool: {pool_size: 5}}\n")
    with pytest.raises(SystemExit, match=r"unknown argument model.promt_pool; did you mean prompt_pool\?"):
        cost.main([str(recipe)])


def test_experts_are_measured_in_bfloat16_alone() -> None:
    with pytest.raises(ValueError, match=r"measured in bfloat16, not torch.float32; pass dtype=torch.bfloat16"):
        measure_sizes(tiny_config(text_config=family_text_config("mixtral")), audio_seconds=0.5, text_tokens=5)


def test_flops_of_a_training_step_are_near_those_of_a_real_one(sizes: Sizes) -> None:
    """They differ by what the first layers need not pass on and the key loss adds: a few per cent."""
    model = tiny_model().eval()
    model.set_attn_implementation("eager")
    inputs = real_inputs(model)
    with FlopCounterMode(display=False) as counter:
        query_mask = torch.ones_like(inputs["input_ids"])  # the labels leave nothing to pick the prompts by
        model(**inputs, labels=inputs["input_ids"].clamp_max(98), query_mask=query_mask).loss.backward()
    assert sizes.forward_flops < sizes.training_flops
    assert counter.get_total_flops() == pytest.approx(sizes.training_flops, rel=0.05)


def test_cache_is_that_of_a_real_one(sizes: Sizes) -> None:
    model = tiny_model()
    cache = DynamicCache(config=model.config.text_config)
    model(**real_inputs(model), past_key_values=cache, use_cache=True)
    text = model.config.text_config
    formula = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * sizes.positions * 4
    assert cache_bytes(cache) == sizes.cache_bytes == formula


def other_llm(model_type: str, **settings: object) -> dict[str, dict]:
    """A config override for an LLM of the tiny one's sizes."""
    return {"text_config": {**tiny_config().text_config.to_diff_dict(), "model_type": model_type, **settings}}


@torch.no_grad()
def test_states_of_linear_layers_are_in_the_cache() -> None:
    sizes = {"mamba_n_heads": 12, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_ssm": 96, "mamba_chunk_size": 8}
    hybrid = other_llm("falcon_h1", head_dim=12, **sizes)
    found = measure_sizes(tiny_config(**hybrid), audio_seconds=0.5, text_tokens=5)
    cache = tiny_model(**hybrid).language_model(torch.full((1, found.positions), 5)).past_key_values
    held = [(layer.keys, layer.values, layer.conv_states[0], layer.recurrent_states[0]) for layer in cache.layers]
    assert found.cache_bytes == sum(tensor.nbytes for layer in held for tensor in layer)


@torch.no_grad()
def test_an_llm_without_a_cache_reads_all_anew() -> None:
    mamba = other_llm("mamba")
    found = measure_sizes(tiny_config(**mamba), audio_seconds=0.5, text_tokens=5)
    with FlopCounterMode(display=False) as counter:
        tiny_model(**mamba).language_model(torch.full((1, found.positions + 1), 5), use_cache=False)
    assert found.cache_bytes == 0 and found.flops_per_new_token == counter.get_total_flops()


def test_kept_activations_are_those_that_autograd_keeps(sizes: Sizes) -> None:
    model = tiny_model()
    model.set_attn_implementation("eager")
    inputs, parameters = real_inputs(model), {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert sizes.activation_bytes == pytest.approx(real, rel=0.15)  # placing the embeddings keeps masks besides


def test_sizes_grow_as_they_should(sizes: Sizes) -> None:
    one = measure_sizes(tiny_config(), batch_size=1, audio_seconds=SECONDS, text_tokens=TEXT)
    assert sizes.forward_flops == 2 * one.forward_flops and sizes.cache_bytes == 2 * one.cache_bytes
    half = measure_sizes(tiny_config(), 1, SECONDS, TEXT, dtype=torch.bfloat16)
    assert half.modules["language_model"].bytes * 2 == one.modules["language_model"].bytes
    assert half.modules["connector"].bytes == one.modules["connector"].bytes and half.cache_bytes * 2 == one.cache_bytes
    lora = measure_sizes(tiny_config(), 1, SECONDS, TEXT, lora={"r": 2, "target_modules": ["q_proj"]})
    assert lora.modules["lora"].learned == lora.modules["lora"].parameters == 2 * 2 * (48 + 48)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"audio_seconds": -1.0}, {"text_tokens": 0}])
def test_sizes_of_nothing_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        measure_sizes(tiny_config(), **wrong)


def test_command_reads_folders_recipes_and_presets(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny_config().save_pretrained(tmp_path)
    small = ["--audio-seconds", "0.5", "--text-tokens", "3"]
    found = SCRIPT.main([str(tmp_path), *small, "--json"])
    assert json.loads(capsys.readouterr().out)["forward_flops"] == found.forward_flops
    assert found == measure_sizes(tiny_config(), audio_seconds=0.5, text_tokens=3)
    config, lora = SCRIPT.read_model(str(ROOT / "examples" / "configs" / "lora-baseline.yaml"))
    assert config.text_config.hidden_size == 4096 and lora
    with pytest.raises(SystemExit, match="neither a preset"):
        SCRIPT.main(["no-such-model"])
    with pytest.raises(SystemExit, match="No such file .*none.yaml"):
        SCRIPT.main([str(tmp_path / "none.yaml")])
    (tmp_path / "config.json").unlink()
    with pytest.raises(SystemExit, match="found no config.json"):
        SCRIPT.main([str(tmp_path)])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_read(name: str) -> None:
    config, lora = SCRIPT.read_model(name)
    assert config.to_diff_dict() == ListenConfig.from_preset(name).to_diff_dict() and lora is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["listen-llama3-8b", "speech-emotion-llama3-8b"])
def test_the_page_on_cost_shows_what_the_command_prints(name: str) -> None:
    page = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    sizes = measure_sizes(ListenConfig.from_preset(name))
    rows = [*SCRIPT.parameter_rows(sizes), *SCRIPT.cost_rows(sizes)]
    missing = [row for row in rows if f"| {' | '.join(row)} |" not in page]
    assert missing == []
