"""FSDP2 and ZeRO-3 on the CPU: the losses of one process, and checkpoints that any number of processes reads."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import clip, make_inputs, tiny_config, tiny_model
from fixtures_backbones import model_section, save_backbones
from fixtures_processes import place, run_processes
from fixtures_repository import ROOT
from fixtures_servers import free_port
from fixtures_training import small_corpus
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModel

from listen import ListenConfig, ListenForConditionalGeneration
from listen.training import build_arguments
from listen.training import train as run_training

STEPS, ROWS = 3, 4
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def fresh_model(folder: Path) -> ListenForConditionalGeneration:
    fields = tiny_config().to_dict()
    fields["connector_config"]["dropout"] = 0.0  # processes would draw other masks than one process
    kept = ("connector_config", "prompt_pool_config", "audio_token_id", "prompt_token_id")
    config = ListenConfig.from_backbones(
        **{name: str(folder / name) for name in ("speech_encoder", "audio_encoder", "language_model")},
        **{name: fields[name] for name in kept},
    )
    torch.manual_seed(0)
    return ListenForConditionalGeneration.from_backbones(config)


def batch_of(rank: int, world: int) -> dict[str, torch.Tensor]:
    """The share of one process: every `world`-th row of the same batch."""
    rows = [[clip(0.5 + 0.1 * i, i)] for i in range(ROWS)]
    inputs = make_inputs(tiny_model(), rows[rank::world], text=[[10 + i, 7, 8, 9] for i in range(ROWS)][rank::world])
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    return {**inputs, "labels": labels}


def train(model: ListenForConditionalGeneration, rank: int, world: int) -> list[float]:
    """Losses of the whole batch over some steps; gradients are averaged over processes, so each loss counts `world`
    times, as in the Trainer."""
    model.train()
    batch, losses = batch_of(rank, world), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(STEPS):
        loss = model(**batch, num_items_in_batch=2 * ROWS).loss
        (loss * world).backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world > 1:
            distributed.all_reduce(total)
        losses.append(total.item())
    return losses


def worker(rank: int, world: int, folder: Path, source: Path | None) -> None:
    """One process: shard, train, save the adapter of the whole model and the losses."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    model = fresh_model(folder.parent) if source is None else ListenForConditionalGeneration.from_pretrained(source)
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.language_model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = train(model, rank, world)
    state = get_model_state_dict(model, options=WHOLE)
    if rank == 0:
        model.save_pretrained(folder / "saved", state_dict=state)
        torch.save(losses, folder / "losses.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def run_sharded(folder: Path, name: str, world: int, source: Path | None = None) -> tuple[list[float], Path]:
    target = folder / name
    target.mkdir()
    run_processes(worker, world, target, source)
    return torch.load(target / "losses.pt"), target / "saved"


@pytest.mark.slow
def test_sharded_training_equals_one_process_and_its_checkpoints_fit_any_number(tmp_path: Path) -> None:
    save_backbones(tmp_path)
    whole = fresh_model(tmp_path)
    first = train(whole, 0, 1)
    second = train(whole, 0, 1)  # a fresh optimizer, as after loading a checkpoint
    two, saved_by_two = run_sharded(tmp_path, "two", 2)
    assert two == pytest.approx(first, abs=1e-5)
    assert two[-1] < two[0]
    saved = load_file(saved_by_two / "model.safetensors")
    assert saved and all(key.startswith("adapters.") for key in saved)
    one, saved_by_one = run_sharded(tmp_path, "one", 1, saved_by_two)
    assert one == pytest.approx(second, abs=1e-5)
    again, _ = run_sharded(tmp_path, "four", 4, saved_by_two)
    assert again == pytest.approx(second, abs=1e-5)
    loaded = ListenForConditionalGeneration.from_pretrained(saved_by_one)
    # AdamW moves a weight by up to 1e-3 a step, also where the sum of its gradients is little more than rounding
    for name, value in loaded.adapters.state_dict().items():
        torch.testing.assert_close(value, whole.adapters.state_dict()[name], atol=2e-4, rtol=0.0)


# ------------------------------------------------------------------ through the Trainer


def launch_settings() -> dict[str, str]:
    """The environment that `accelerate launch` makes of examples/configs/accelerate/fsdp2.yaml."""
    config = yaml.safe_load((ROOT / "examples" / "configs" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    return {"ACCELERATE_USE_FSDP": "true", **{name.upper(): str(value) for name, value in config.items()}}


def write_settings(folder: Path) -> None:
    """Backbones, rows and the settings of a run over them."""
    training = {"save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 1, "learning_rate": 1e-3}
    training |= {
        "use_cpu": True,
        "num_threads": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }
    settings = {"model": model_section(save_backbones(folder / "backbones")), "training": training}
    settings["data"] = {"train": [str(small_corpus(folder, num_rows=12))]}
    (folder / "settings.json").write_text(json.dumps(settings))


def fit(folder: Path, name: str, world: int, steps: int = 3, model: dict | None = None, resume: str = "") -> None:
    """A run of 4 rows a step, one in a batch: the same batches for any number of processes."""
    settings = json.loads((folder / "settings.json").read_text())
    settings["model"] = model or settings["model"]
    options = {"output_dir": str(folder / name), "max_steps": steps, "gradient_accumulation_steps": 4 // world}
    settings["training"].update(options, resume=resume or False)
    arguments = build_arguments(settings)
    if world > 1:  # accelerate shards models on accelerators alone, so this process says that it has one
        assert arguments.training.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    result = run_training(arguments.model, arguments.data, arguments.training, raw=arguments.raw)
    (folder / f"{name}.json").write_text(json.dumps([entry["loss"] for entry in result.history if "loss" in entry]))


def train_worker(rank: int, world: int, port: int, folder: Path, runs: list[dict]) -> None:
    os.environ.update(place(rank, world, port), ACCELERATE_USE_CPU="true")
    os.environ.update(launch_settings())
    torch.set_num_threads(1)
    for options in runs:
        fit(folder, world=world, **options)


def launch(folder: Path, world: int, *runs: dict) -> None:
    """Runs in the same processes, one after the other."""
    run_processes(train_worker, world, free_port(), folder, list(runs))


def losses(folder: Path, name: str) -> list[float]:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.slow
def test_the_trainer_over_fsdp_equals_one_process_and_its_checkpoints_hold_the_adapter(tmp_path: Path) -> None:
    write_settings(tmp_path)
    saved = {"checkpoint": str(tmp_path / "two" / "model")}
    whole = {"name": "two"}, {"name": "resumed", "resume": str(tmp_path / "two" / "checkpoint-2")}
    launch(tmp_path, 2, *whole, {"name": "two more", "model": saved, "steps": 2})
    launch(tmp_path, 4, {"name": "four more", "model": saved, "steps": 2})
    fit(tmp_path, "one", world=1)
    fit(tmp_path, "one more", world=1, model=saved, steps=2)
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "one"), abs=1e-5)
    assert losses(tmp_path, "resumed")[-1] == pytest.approx(losses(tmp_path, "two")[-1], abs=1e-5)
    for name in ("two more", "four more"):
        assert losses(tmp_path, name) == pytest.approx(losses(tmp_path, "one more"), abs=1e-5)
    for folder in ("two/checkpoint-2", "two/model", "four more/model"):
        names = {path.name for path in (tmp_path / folder).iterdir()}
        assert names >= {path.name for path in (tmp_path / "one" / "model").iterdir()}
        assert not [name for name in names if "fsdp" in name]
        weights, expected = (load_file(tmp_path / place / "model.safetensors") for place in (folder, "one/model"))
        assert weights.keys() == expected.keys()
        assert AutoModel.from_pretrained(tmp_path / folder, trust_remote_code=True).num_parameters() > 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_zero3_equals_one_process_and_its_checkpoints_hold_the_adapter(tmp_path: Path) -> None:
    write_settings(tmp_path)
    config = yaml.safe_load((ROOT / "examples" / "configs" / "accelerate" / "deepspeed_zero3.yaml").read_text())
    config |= {"num_processes": 2, "mixed_precision": "no", "use_cpu": True, "main_process_port": 0}
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(config))
    settings = json.loads((tmp_path / "settings.json").read_text())
    settings["training"] |= {"max_steps": 3, "gradient_accumulation_steps": 2}

    def launch_two(name: str, **options: str) -> list[float]:
        settings["training"] |= {"output_dir": str(tmp_path / name), **options}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where deepspeed finds ninja
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "launch.yaml"]
        command = [*launcher, ROOT / "examples" / "train.py", "--config", tmp_path / f"{name}.yaml"]
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        subprocess.run(command, check=True, env=environment)
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]

    two = launch_two("two")
    assert launch_two("resumed", resume=str(tmp_path / "two" / "checkpoint-2"))[-1] == pytest.approx(two[-1], abs=1e-5)
    fit(tmp_path, "one", world=1)
    assert two == pytest.approx(losses(tmp_path, "one"), abs=1e-5)
    expected = load_file(tmp_path / "one" / "model" / "model.safetensors")
    for folder in ("two/checkpoint-2", "two/model"):
        assert load_file(tmp_path / folder / "model.safetensors").keys() == expected.keys()
        assert AutoModel.from_pretrained(tmp_path / folder, trust_remote_code=True).num_parameters() > 0
