"""A task is added to a trained adapter by new prompts: old weights and old answers stay as they are, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import clip, make_inputs, tiny_model
from fixtures_backbones import model_section, save_backbones
from fixtures_training import small_corpus
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from listen import ListenForConditionalGeneration
from listen.training import ArgumentError, build_arguments, build_model, train
from listen.training.build import build_config
from listen.training.comparison import is_finished, read_comparison, run_cell

ROWS = [[clip(1.3, 1)], [], [clip(0.9, 2), clip(2.1, 3)]]
POOL = {"pool_size": 12, "num_prompts": 4}
POOLS = {
    "input": {"center_query": True, "query_momentum": 0.5},
    "attention": {"strategy": "attention", "num_prompts": 12},
    "layers": {"form": "layers", "gate_temperature": 0.3},
}


def inputs_of(model: ListenForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Inputs of three rows; placeholders of prompts in the layers are masked."""
    inputs = make_inputs(model, ROWS)
    if model.config.prompt_pool_config.form == "layers":
        inputs["attention_mask"] *= inputs["input_ids"] != model.config.prompt_token_id
    return inputs


def logits(model: ListenForConditionalGeneration, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_of(model), **kwargs).logits[:, -4:]


def answers(model: ListenForConditionalGeneration) -> torch.Tensor:
    return model.generate(**inputs_of(model), max_new_tokens=6, min_new_tokens=6, do_sample=False)


def train_on(model: ListenForConditionalGeneration) -> set[str]:
    """Two steps with weight decay; returns the names of the weights that changed."""
    inputs = inputs_of(model)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        model.train()(**inputs, labels=labels).loss.backward()
        optimizer.step()
    model.eval()
    return {name for name, weight in model.state_dict().items() if not torch.equal(weight, start[name])}


@pytest.mark.parametrize("settings", POOLS.values(), ids=POOLS)
def test_new_prompts_change_no_answer_of_the_adapter_they_extend(tmp_path: Path, settings: dict) -> None:
    model = tiny_model(prompt_pool_config={**POOL, **settings})
    pool = model.adapters["default"].prompt_pool
    for weight in pool.state_dict().values():
        torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path / "old")
    before, said = logits(model), answers(model)
    old = {f"adapters.default.prompt_pool.frozen_{name}": p.detach().clone() for name, p in pool.named_parameters()}

    model.grow_pool(5)
    grown = model.adapters["default"].prompt_pool
    grown.initialize_keys(model.select_prompts(**inputs_of(model)).query)
    assert train_on(model) == {f"adapters.default.prompt_pool.{name}" for name, _ in grown.named_parameters()}
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in old.items())
    new = logits(model)
    assert not torch.equal(new, before)
    model.save_pretrained(tmp_path / "grown")
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "grown")), new)

    served = AutoModel.from_pretrained(tmp_path / "old")
    served.load_adapter(tmp_path / "grown", "new")
    served.save_pretrained(tmp_path / "both")
    for model in (served, AutoModel.from_pretrained(tmp_path / "both")):
        assert torch.equal(logits(model), before) and torch.equal(answers(model), said)
        assert torch.equal(logits(model, adapter_names=["new"] * 3), new)
        mixed = logits(model, adapter_names=["default", "new", "default"])
        torch.testing.assert_close(mixed, torch.stack([before[0], new[1], before[2]]), atol=2e-5, rtol=1e-4)


def test_a_pool_grows_again() -> None:
    """The second new task freezes the prompts of the first."""
    model = tiny_model(prompt_pool_config={**POOL, "center_query": True})
    model.grow_pool(2)
    train_on(model)
    parts = {name: model.adapters["default"].prompt_pool.part(name).detach().clone() for name in ("keys", "values")}
    model.grow_pool(3)
    train_on(model)
    with pytest.raises(ValueError, match="a fresh adapter has no frozen prompts, found 14"):
        model.add_adapter(adapter_name="fresh")
    pool = model.adapters["default"].prompt_pool
    assert (pool.config.pool_size, pool.config.frozen_prompts, len(pool.values)) == (17, 14, 3)
    assert all(torch.equal(pool.part(name)[:14], part) for name, part in parts.items())
    with torch.no_grad():
        assert (
            pool(torch.randn(2, pool.width), torch.tensor([17, 17]))[1].indices.sort().values.tolist()
            == [[*range(17)]] * 2
        )


@pytest.mark.parametrize(
    ("fields", "count", "message"),
    [
        ({"prompt_pool_config": None}, 2, "the default adapter has no prompt pool"),
        ({}, 0, "new_prompts=0 is below 1"),
        ({"prompt_pool_config": {**POOL, "strategy": "fixed"}}, 2, "needs a strategy with keys, not 'fixed'"),
    ],
)
def test_pools_that_cannot_grow_are_refused(fields: dict, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(**fields).grow_pool(count)


def test_a_pool_beside_a_lora_is_not_grown(model: ListenForConditionalGeneration) -> None:
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="LoRA on the LLM would be trained for the old tasks too"):
        model.grow_pool(2)
    assert model.adapters["default"].connector.projection.weight.requires_grad  # nothing was changed


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Sections of a recipe that trains a new adapter for two steps."""
    folder = tmp_path_factory.mktemp("add_task")
    training = {
        "output_dir": str(folder / "old"),
        "max_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "keys_from_rows": 6,
    }
    model = model_section(save_backbones(folder / "backbones"), prompt_pool={**POOL, "center_query": True})
    return {"model": model, "data": {"train": [str(small_corpus(folder, num_rows=6))]}, "training": training}


def run(sections: dict[str, Any]) -> Any:
    arguments = build_arguments(sections)
    return train(arguments.model, arguments.data, arguments.training, raw=arguments.raw)


def test_a_recipe_trains_new_prompts_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    old = run(recipe).model_folder
    training = {**recipe["training"], "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    sections = {**recipe, "model": {"checkpoint": str(old), "new_prompts": 3}, "training": training}
    result = run(sections)
    start, after = AutoModel.from_pretrained(old).state_dict(), result.model.state_dict()
    for name, weight in start.items():
        kept = name.replace("prompt_pool.", "prompt_pool.frozen_") if name.endswith((".keys", ".values")) else name
        assert torch.equal(weight, after[kept]), name
    loaded = AutoModel.from_pretrained(result.model_folder)
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in after.items())
    assert AutoProcessor.from_pretrained(result.model_folder).pool_size == 15
    fresh = build_model(build_arguments(sections).model)[0].adapters["default"].prompt_pool
    assert not torch.equal(fresh.values, loaded.adapters["default"].prompt_pool.values)
    again = run({**sections, "training": {**training, "resume": str(tmp_path / "checkpoint-1")}})
    assert all(torch.equal(weight, again.model.state_dict()[name]) for name, weight in after.items())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"checkpoint": "x", "trainable": ["adapter"]}, "leave out model.trainable and model.lora"),
        ({"checkpoint": "x", "lora": {"r": 2}}, "leave out model.trainable and model.lora"),
        ({"speech_encoder": "x", "language_model": "y"}, "new_prompts=3 adds prompts .* name a checkpoint"),
    ],
)
def test_settings_that_do_not_go_with_new_prompts_are_named(model: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        build_arguments({"model": {**model, "new_prompts": 3}})


def test_new_prompts_need_keys_from_rows(recipe: dict[str, Any]) -> None:
    training = {**recipe["training"], "keys_from_rows": 0}
    with pytest.raises(ArgumentError, match="new_prompts needs training.keys_from_rows"):
        run({**recipe, "model": {"checkpoint": "x", "new_prompts": 3}, "training": training})


def test_a_new_model_has_no_frozen_prompts(recipe: dict[str, Any]) -> None:
    model = {**recipe["model"], "prompt_pool": {**POOL, "frozen_prompts": 2}}
    with pytest.raises(ArgumentError, match="frozen_prompts is set by model.new_prompts"):
        build_config(build_arguments({**recipe, "model": model}).model)


def test_a_cell_of_a_comparison_starts_from_the_model_of_another(recipe: dict[str, Any], tmp_path: Path) -> None:
    base = {**recipe, "training": {"max_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True}}
    content = {
        "base": base,
        "methods": {
            "added": {"start_from": "old", "model": {"new_prompts": 3}, "training": {"keys_from_rows": 6}},
            "old": {},
        },
        "seeds": [1],
        "evaluation": {"data": recipe["data"]["train"], "max_new_tokens": 2, "num_resamples": 10, "max_examples": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    added, old = read_comparison(tmp_path / "recipe.yaml").cells
    with pytest.raises(ArgumentError, match="'added' starts from 'old', whose run with seed 1 is not finished in"):
        run_cell(added, tmp_path)
    for cell in (old, added):
        run_cell(cell, tmp_path)
        assert is_finished(cell, tmp_path)
    assert added.identity()["model"] == {"checkpoint": "old/seed-1/model", "new_prompts": 3}
    start, grown = (load_file(tmp_path / cell.folder / "model" / "model.safetensors") for cell in (old, added))
    prefix = "adapters.default.prompt_pool."
    assert torch.equal(start[f"{prefix}values"], grown[f"{prefix}frozen_values"])
    assert len(grown[f"{prefix}values"]) == 3
    content["methods"]["old"] = {"training": {"learning_rate": 0.5}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    changed = read_comparison(tmp_path / "recipe.yaml").cell("added", 1)
    with pytest.raises(ArgumentError, match="added/seed-1 was started with .* start.training.learning_rate was .* 0.5"):
        is_finished(changed, tmp_path)  # the model that it started from is not the recipe's
    started = tmp_path / added.folder / "arguments.json"
    earlier = {name: value for name, value in json.loads(started.read_text()).items() if name != "start"}
    started.write_text(json.dumps(earlier))
    assert is_finished(changed, tmp_path)  # earlier versions did not note it
