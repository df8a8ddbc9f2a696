"""Comparisons end to end on tiny backbones: cells, interruption, refusal of changed arguments, the written table.

And what makes them fair: methods of one seed start from the same connector and see the same batches.
"""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from fixtures_backbones import model_section, save_backbones
from fixtures_processes import run_script
from fixtures_training import small_corpus
from safetensors.torch import load_file
from transformers import TrainerCallback, set_seed

from listen.commands.compare import write_table
from listen.evaluation.comparison import load_cells
from listen.evaluation.comparison_report import markdown_prompts, write_comparison
from listen.training import ArgumentError, build_arguments, build_model, build_trainer
from listen.training.build import build_config
from listen.training.comparison import (
    is_finished,
    prepare,
    read_comparison,
    run_cell,
    unequal_arguments,
    unequal_machines,
)
from listen.training.cost import peak_memory

REPOSITORY = Path(__file__).parent.parent
RECIPES = REPOSITORY / "examples" / "configs" / "compare"
TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
}
METHODS = {
    "connector alone": {"model": {"prompt_pool": {"pool_size": 0}}},
    "pool": {"model": {"prompt_pool": {"pool_size": 12, "num_prompts": 4}}},
}


class StopAfterFirstSave(TrainerCallback):
    """Stops a run as Ctrl-C would, after its first checkpoint."""

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of two methods and two seeds, over stored features."""
    folder = tmp_path_factory.mktemp("comparison")
    manifest = str(small_corpus(folder / "corpus", num_rows=6))
    base = {
        "model": model_section(save_backbones(folder / "backbones")),
        "data": {"train": [manifest], "eval": [manifest], "features": str(folder / "features")},
        "training": TRAINING,
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    content = {
        "base": {"extends": "base.yaml"},
        "methods": METHODS,
        "seeds": [0, 1],
        "evaluation": {"data": [manifest], "max_new_tokens": 3, "num_resamples": 10, "further_num_prompts": [0]},
        "output": str(folder / "unused"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    prepare(read_comparison(folder / "recipe.yaml"), progress=False)
    return folder / "recipe.yaml"


def changed(recipe: Path, folder: Path, **content: Any) -> Path:
    """The recipe with other entries, beside its base."""
    entries = {**yaml.safe_load(recipe.read_text()), **content}
    entries["base"] = {"extends": str(recipe.parent / "base.yaml"), **content.get("base", {})}
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(entries))
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of all four cells."""
    output = tmp_path_factory.mktemp("output")
    for cell in read_comparison(recipe).cells:
        run_cell(cell, output)
    return output


def test_a_comparison_runs_end_to_end(recipe: Path, finished: Path, tmp_path: Path) -> None:
    cells = load_cells(finished)
    rows = {(cell.method, cell.seed) for cell in cells}
    assert rows == {(name, seed) for name in (*METHODS, "pool, k = 0") for seed in (0, 1)}
    assert all(sum("lm_loss" in entry for entry in cell.history) == 2 for cell in cells if cell.method in METHODS)
    comparisons = write_comparison(cells, tmp_path, "connector alone", ["A note."])
    assert len(comparisons) == 3 * 3 and {one.num_seeds for one in comparisons} == {2}  # pairs x tasks
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "of 9 comparisons" in text and "A note." in text and "| pool, k = 0 | 2 |" in text
    for name in ("scores.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "cells.csv").open() as file:
        values = list(csv.DictReader(file))
    found = {(row["method"], row["value"]): float(row["number"]) for row in values}
    assert found["pool", "trainable_parameters"] - found["connector alone", "trainable_parameters"] == 12 * 48 * 2
    assert found["connector alone", "parameters_beside_connector"] == 0
    for name in ("seconds_per_step", "peak_memory_bytes", "eval_lm_loss", "pool_used_share"):
        assert found["pool", name] > 0
    prompts = markdown_prompts(finished, list(METHODS))
    assert prompts.count("## ") == 1 and "## pool" in prompts and "| asr | " in prompts
    assert "Overlap of the prompts" in prompts and "cosine between the queries" in prompts


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1), ("win32", 0)])
def test_peak_memory_is_counted_in_the_unit_of_the_system(
    platform: str, unit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    if platform == "win32":
        monkeypatch.setitem(sys.modules, "resource", None)  # cannot be imported there
    else:
        monkeypatch.setattr("resource.getrusage", lambda _: SimpleNamespace(ru_maxrss=3))
    assert peak_memory(torch.device("cpu")) == 3 * unit


def test_a_finished_cell_is_not_run_again(recipe: Path, finished: Path) -> None:
    cell = read_comparison(recipe).cell("pool", 1)
    files = {path: path.stat().st_mtime_ns for path in (finished / cell.folder).rglob("*.*") if path.suffix != ".lock"}
    run_cell(cell, finished, callbacks=[StopAfterFirstSave()])
    after = {path: path.stat().st_mtime_ns for path in (finished / cell.folder).rglob("*.*") if path.suffix != ".lock"}
    assert after == files and not list((finished / cell.folder).glob("checkpoint-*"))


def test_an_interrupted_cell_goes_on_from_its_checkpoint(recipe: Path, finished: Path, tmp_path: Path) -> None:
    cell = read_comparison(recipe).cell("pool", 0)
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell, tmp_path, callbacks=[StopAfterFirstSave()])
    assert (tmp_path / cell.folder / "checkpoint-1").is_dir() and not is_finished(cell, tmp_path)
    run_cell(cell, tmp_path)
    assert is_finished(cell, tmp_path)
    folders = [folder / cell.folder for folder in (tmp_path, finished)]
    weights, whole = (load_file(folder / "model" / "model.safetensors") for folder in folders)
    assert all(torch.equal(weight, whole[name]) for name, weight in weights.items())
    assert len(json.loads((folders[0] / "cost.json").read_text())["step_seconds"]) == 2  # both steps, one of each run
    contents = [json.loads((folder / "cell.json").read_text()) for folder in folders]
    assert [entry.get("lm_loss") for entry in contents[0]["history"]] == [
        entry.get("lm_loss") for entry in contents[1]["history"]
    ]


def test_changed_arguments_are_refused_by_name(recipe: Path, finished: Path, tmp_path: Path) -> None:
    path = changed(recipe, tmp_path, base={"training": {"max_steps": 3}})
    with pytest.raises(ArgumentError, match="training.max_steps was 2 and is 3; choose another output folder"):
        run_cell(read_comparison(path).cell("pool", 0), finished)
    path = changed(recipe, tmp_path, methods={"pool": {"model": {"prompt_pool": {"pool_size": 13}}}})
    with pytest.raises(ArgumentError, match="model.prompt_pool.pool_size was 12 and is 13"):
        is_finished(read_comparison(path).cell("pool", 0), finished)


def test_the_table_holds_finished_cells_of_the_recipe_alone(recipe: Path, finished: Path, tmp_path: Path) -> None:
    """Not those of seeds that it no longer has, whose arguments may differ, nor one that is still evaluated."""
    output = shutil.copytree(finished, tmp_path / "output")
    shutil.rmtree(output / "connector-alone" / "seed-1")
    (output / "pool" / "seed-0" / "cell.json").unlink()
    write_table(read_comparison(changed(recipe, tmp_path, seeds=[1])), output)
    text = (output / "comparison.md").read_text(encoding="utf-8")
    assert "| pool | 1 |" in text and "connector alone | 1" not in text and "1 of 2 cells are finished" in text
    assert "No cell of the reference 'connector alone' is finished; 'pool' stands in its place." in text
    with pytest.raises(ArgumentError, match="holds no finished cell of this recipe"):
        write_table(read_comparison(changed(recipe, tmp_path, seeds=[7])), output)


def test_machines_that_differ_are_named(recipe: Path, finished: Path, tmp_path: Path) -> None:
    output = shutil.copytree(finished, tmp_path / "output")
    folders = [output / cell.folder for cell in read_comparison(recipe).cells]
    assert unequal_machines(folders) == []
    about = json.loads((folders[3] / "run.json").read_text())
    (folders[3] / "run.json").write_text(
        json.dumps({**about, "bf16": True, "resumed": [{**about, "devices": ["H100"]}]})
    )
    assert unequal_machines(folders) == [
        "Not the same for all cells: bf16 is false, but [true, false] for pool/seed-1.",
        'Not the same for all cells: devices is ["cpu"], but [["cpu"], ["H100"]] for pool/seed-1.',
    ]


def test_the_precision_of_this_machine_is_kept(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = changed(recipe, tmp_path, methods={"pool": METHODS["pool"]}, base={"training": {"bf16": "auto"}})
    cell = read_comparison(path).cells[0]
    for has_bf16, callbacks in ((True, [StopAfterFirstSave()]), (False, [])):
        monkeypatch.setattr("listen.training.precision.cpu_has_bf16", lambda value=has_bf16: value)
        with suppress(KeyboardInterrupt):
            run_cell(cell, tmp_path, callbacks=callbacks)
    about = json.loads((tmp_path / cell.folder / "run.json").read_text())
    assert about["bf16"] is True and about["resumed"][0]["changed"] == {"training.bf16": [True, False]}


def test_methods_extend_methods(recipe: Path, tmp_path: Path) -> None:
    methods = {**METHODS, "fixed k": {"extends": "pool", "model": {"prompt_pool": {"stochastic": False}}}}
    path = changed(recipe, tmp_path, methods=methods)
    pool = read_comparison(path).cell("fixed k", 1).sections["model"]["prompt_pool"]
    assert pool == {"pool_size": 12, "num_prompts": 4, "stochastic": False}
    assert read_comparison(path).reference == "connector alone"


def test_unequal_arguments_are_named(recipe: Path, tmp_path: Path) -> None:
    assert unequal_arguments(read_comparison(recipe)) == []
    methods = {**METHODS, "longer": {"extends": "pool", "training": {"max_steps": 4}}}
    (sentence,) = unequal_arguments(read_comparison(changed(recipe, tmp_path, methods=methods)))
    assert "`training.max_steps` is 2, but 4 for 'longer'" in sentence


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"method": {}}, "unknown argument method; did you mean methods"),
        ({"seeds": []}, "needs methods .* and seeds"),
        ({"reference": "pol"}, "reference='pol' is no method; did you mean pool"),
        ({"methods": {"pool": {"modle": {}}}}, "unknown argument methods.pool.modle; did you mean model"),
        ({"methods": {"pool": {"extends": "x"}}}, "method 'pool' extends 'x', which is none"),
        ({"methods": {"a": {"extends": "b"}, "b": {"extends": "a"}}}, "circle: a -> b -> a"),
        ({"methods": {"a b": {}, "a-b": {}}}, "two methods need the same folder"),
        ({"methods": {"pool": {"training": {"seed": 4}}}}, "methods.pool.training.seed is set by the comparison"),
        ({"methods": {"pool": {"training": {"max_step": 4}}}}, "unknown argument training.max_step"),
        ({"evaluation": {"data": []}}, "evaluation.data names no source"),
        ({"evaluation": {"data": ["a.jsonl"], "batch_size": 0}}, "evaluation.batch_size=0 must be at least 1"),
        ({"evaluation": {"data": ["a.jsonl"], "further_num_prompts": [13]}}, "methods.pool: .* pool_size=12; give"),
        ({"methods": {"a": {"start_from": "b"}}}, r"'a' starts from 'b'; it can start from one of \[\]"),
        (
            {"methods": {"a": {}, "b": {"start_from": "a"}, "c": {"start_from": "b"}}},
            r"it can start from one of \['a'\]",
        ),
    ],
)
def test_recipes_that_cannot_be_are_refused(recipe: Path, tmp_path: Path, content: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        read_comparison(changed(recipe, tmp_path, **content))


def test_test_rows_that_are_missing_show_before_the_training(recipe: Path, tmp_path: Path) -> None:
    evaluation = {**yaml.safe_load(recipe.read_text())["evaluation"], "tasks": ["sv"]}
    cell = read_comparison(changed(recipe, tmp_path, evaluation=evaluation)).cell("pool", 0)
    with pytest.raises(ValueError, match=r"the data has no rows of \['sv'\]"):
        run_cell(cell, tmp_path)
    assert not (tmp_path / cell.folder / "run.json").exists()


def test_backbones_named_by_hub_id_are_read_from_a_folder(recipe: Path, finished: Path, tmp_path: Path) -> None:
    """The identity of a cell holds the id, so a finished one stays finished wherever the folder is."""
    places = yaml.safe_load((recipe.parent / "base.yaml").read_text())["model"]
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny-llm").symlink_to(places["language_model"])
    path = changed(recipe, tmp_path, base={"model": {"language_model": "someone/Tiny-LLM"}})
    cell = read_comparison(path).cell("pool", 0)
    run_cell(cell, tmp_path / "output", tmp_path / "models")
    assert cell.identity()["model"]["language_model"] == "someone/Tiny-LLM"
    folders = (tmp_path / "output" / cell.folder, finished / cell.folder)
    weights, same = (load_file(folder / "model" / "model.safetensors") for folder in folders)
    assert all(torch.equal(weight, same[name]) for name, weight in weights.items())


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_fair(path: Path) -> None:
    comparison = read_comparison(path)
    assert len(comparison.cells) >= 3 * len(comparison.methods)  # seeds
    found = " ".join(unequal_arguments(comparison))
    for name in ("max_steps", "batch_size", "learning_rate", "lr_scheduler", "warmup", "data.train", "evaluation"):
        assert name not in found
    for cell in comparison.cells:
        assert cell.sections["training"]["save_strategy"] == "steps"  # else an interrupted cell starts again
        model = build_arguments(cell.sections).model
        if cell.start_from is None and Path(model.language_model).is_dir():
            build_config(model)  # its pool's fields fit each other


@pytest.mark.slow
def test_the_command_runs_cells_in_processes_and_compares_two_evaluations(recipe: Path, tmp_path: Path) -> None:
    call = partial(run_script, REPOSITORY / "examples" / "compare.py", environment={"PYTHONPATH": str(REPOSITORY)})
    path = changed(recipe, tmp_path, seeds=[0])
    first = call("--config", str(path), "--jobs", "2", "--output", str(tmp_path))
    assert first.count(": done, ") == 2 and (tmp_path / "comparison.md").is_file()
    again = call("--config", str(path), "--output", str(tmp_path))
    assert "done" not in again and "table: " in again
    pair = [str(tmp_path / name / "seed-0" / "evaluation" / "metrics.json") for name in ("pool", "connector-alone")]
    text = call(*pair)
    assert "| asr | wer ↓ |" in text and "Two runs, not two methods" in text


LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
ADAPTERS: dict[str, dict[str, Any]] = {
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


def start_of(
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
    return start_of(backbones, manifest, tmp_path_factory.mktemp("run"), ADAPTERS["similarity"])


@pytest.mark.parametrize("method", [name for name in ADAPTERS if name != "similarity"])
def test_connector_batches_and_wordings_are_those_of_every_method(
    method: str, backbones: dict[str, str], manifest: Path, tmp_path: Path, reference: tuple[dict, list, float]
) -> None:
    connector, texts, number = start_of(backbones, manifest, tmp_path, ADAPTERS[method])
    assert set(connector) == set(reference[0])
    assert all(torch.equal(weight, reference[0][name]) for name, weight in connector.items())
    assert texts == reference[1]
    assert number == reference[2]  # so dropout of the connector starts alike too


def test_another_seed_is_another_start(
    backbones: dict[str, str], manifest: Path, tmp_path: Path, reference: tuple[dict, list, float]
) -> None:
    connector, texts, number = start_of(backbones, manifest, tmp_path, ADAPTERS["similarity"], seed=6)
    assert not all(torch.equal(weight, reference[0][name]) for name, weight in connector.items())
    assert texts != reference[1] and number != reference[2]
