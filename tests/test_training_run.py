"""Whole runs on tiny random backbones: exact losses, resuming, what learns, and what is written."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fixtures_backbones import model_section, save_backbones
from fixtures_encoders import random_encoder
from fixtures_processes import run_script
from fixtures_training import save_tiny_llm, small_corpus, write_manifest
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import ASTFeatureExtractor, TrainerState, Wav2Vec2FeatureExtractor
from transformers.utils import logging

from listen.commands import train as command
from listen.data import FeatureStoreError, ListenCollator, precompute_features
from listen.data.manifest import load_manifest
from listen.evaluation.generate import generate_predictions
from listen.modeling_listen import ListenForConditionalGeneration
from listen.processing_listen import ListenProcessor
from listen.training import (
    ArgumentError,
    build_arguments,
    build_encoders,
    build_model,
    build_trainer,
    parse_arguments,
    train,
)
from listen.training.progress import log_line, task_scores

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows that word themselves, so that a batch's size changes nothing but the batch."""
    path = small_corpus(tmp_path_factory.mktemp("corpus"), num_rows=8)
    rows = [{**json.loads(line), "instruction": "Say it."} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sections(backbones: dict, manifest: Path, folder: Path, model: dict | None = None, **training: Any) -> dict:
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "num_threads": 1,
        "report_to": "none",
        "save_strategy": "no",
    }
    return {
        "model": model_section(backbones, **(model or {})),
        "data": {"train": [str(manifest)]},
        "training": {**defaults, "disable_tqdm": True, "logging_steps": 1, "seed": 3, **training},
    }


def run(settings: dict) -> Any:
    arguments = build_arguments(settings)
    return train(arguments.model, arguments.data, arguments.training, raw=arguments.raw)


# the paper's key loss, a sum that moves the connector too
EXACT = {"prompt_pool": {"pool_size": 12, "num_prompts": 4, "stochastic": False, "key_loss_type": "distance"}}
# plain gradient descent: the step is the gradient itself, which Adam would rescale
ONE_STEP = {
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "train_sampling_strategy": "sequential",
}


def batches(size: int, accumulation: int) -> dict[str, int]:
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}


def learned(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("dtype", "bf16", "fix"),
    [("bfloat16", True, "model.dtype=float32"), ("float32", True, "training.bf16=false"), ("float32", False, "")],
)
@pytest.mark.parametrize("hardware", [True, False])
def test_bf16_in_software_is_said(
    backbones: dict, manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch, dtype: str, bf16: bool, fix: str, hardware: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": hardware})
    logging.warning_once.cache_clear()
    settings = sections(backbones, manifest, tmp_path, {"dtype": dtype}, bf16=bf16, generation_eval_rows=1)
    settings["data"]["eval"] = [str(manifest)]
    arguments = build_arguments(settings)
    trainer = build_trainer(*build_model(arguments.model), arguments.data, arguments.training)
    trainer.generation_evaluator(trainer.model)  # says it no second time
    assert caplog.text.count("computes bf16 in software") == bool(fix and not hardware)
    assert fix in caplog.text or hardware


def first_log(folder: Path) -> dict[str, float]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"][0]


def assert_same_step(folder: Path, other: Path) -> None:
    one, two = learned(folder), learned(other)
    assert set(one) == set(two)
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], atol=2e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for name in ("loss", "lm_loss", "key_loss"):
        assert first_log(folder)[name] == pytest.approx(first_log(other)[name], rel=1e-5)


@pytest.fixture(scope="module")
def one_batch(backbones: dict, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_batch")
    run(sections(backbones, manifest, folder, EXACT, **ONE_STEP, **batches(4, 1)))
    return folder


def launch(settings: dict, folder: Path, processes: int) -> None:
    """Run examples/train.py in several processes on the CPU."""
    config = folder / "settings.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(settings))
    variables = {"ACCELERATE_USE_CPU": "true"}
    script = REPOSITORY / "examples" / "train.py"
    run_script(script, "--config", config, cwd=folder, environment=variables, processes=processes)


def test_accumulated_steps_equal_one_batch(backbones: dict, manifest: Path, tmp_path: Path, one_batch: Path) -> None:
    run(sections(backbones, manifest, tmp_path, EXACT, **ONE_STEP, **batches(1, 4)))
    assert first_log(one_batch)["key_loss"] > 0
    assert_same_step(tmp_path, one_batch)


@pytest.mark.slow
def test_two_processes_that_accumulate_equal_one_batch(
    backbones: dict, manifest: Path, tmp_path: Path, one_batch: Path
) -> None:
    launch(sections(backbones, manifest, tmp_path, EXACT, **ONE_STEP, **batches(1, 2)), tmp_path, 2)
    assert_same_step(tmp_path, one_batch)


@pytest.mark.slow
def test_processes_that_average_their_own_means_log_means(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    """Of equal rows the mean of means is the mean."""
    row = json.loads(manifest.read_text().splitlines()[0])
    alike = write_manifest(tmp_path / "alike.jsonl", [{**row, "audio": str(manifest.parent / row["audio"])}] * 4)
    one, two = tmp_path / "one", tmp_path / "two"
    options = {**ONE_STEP, "average_tokens_across_devices": False}
    run(sections(backbones, alike, one, EXACT, **options, **batches(4, 1)))
    launch(sections(backbones, alike, two, EXACT, **options, **batches(2, 1)), two, 2)
    assert_same_step(two, one)


@pytest.mark.slow
def test_two_processes_train_an_encoder_as_one_does(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    model = {**EXACT, "trainable": ["speech_encoder", "adapter"]}
    one, two = tmp_path / "one", tmp_path / "two"
    run(sections(backbones, manifest, one, model, **ONE_STEP, **batches(4, 1), layerwise_lr_decay=0.5))
    launch(sections(backbones, manifest, two, model, **ONE_STEP, **batches(2, 1), layerwise_lr_decay=0.5), two, 2)
    assert "speech_encoder.conv1.weight" in learned(one)
    assert_same_step(two, one)


def test_the_step_moved_what_learns_and_nothing_else(backbones: dict, manifest: Path, one_batch: Path) -> None:
    arguments = build_arguments(sections(backbones, manifest, one_batch, EXACT))
    torch.manual_seed(0)
    after = ListenForConditionalGeneration.from_pretrained(one_batch / "model")
    fresh, _ = build_model(arguments.model)
    for name, weight in fresh.state_dict().items():
        if not name.startswith("adapters."):
            assert torch.equal(weight, after.state_dict()[name]), name
    assert not torch.equal(fresh.adapters["default"].prompt_pool.keys, after.adapters["default"].prompt_pool.keys)


def test_only_learned_parameters_reach_the_optimiser_and_backbones_stay_in_eval(
    backbones: dict, manifest: Path, tmp_path: Path
) -> None:
    arguments = build_arguments(sections(backbones, manifest, tmp_path, **ONE_STEP, **batches(2, 1)))
    model, processor = build_model(arguments.model)
    trainer = build_trainer(model, processor, arguments.data, arguments.training)
    trainer.train()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.adapters.parameters()}
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("adapters."))
    model.train()
    for backbone in (model.speech_encoder, model.audio_encoder, model.language_model):
        assert not any(module.training for module in backbone.modules())
    assert model.adapters.training


RESUMABLE = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2, **batches(2, 2)}
NOISY = {
    "connector": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "dropout": 0.1},
    "prompt_pool": {"pool_size": 12, "num_prompts": 6, "score_dropout": 0.2, "stochastic": True},
}


@pytest.mark.parametrize("options", [{}, {"dataloader_num_workers": 1}, {"train_sampling_strategy": "group_by_length"}])
def test_a_resumed_run_equals_a_straight_one(backbones: dict, manifest: Path, tmp_path: Path, options: dict) -> None:
    """Random k, wordings, dropout and order included; step 3 lies amid an epoch."""
    settings = sections(backbones, manifest, tmp_path / "straight", NOISY, **RESUMABLE, **options)
    straight = run(settings)
    shutil.copytree(tmp_path / "straight" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    settings["training"].update(output_dir=str(tmp_path / "resumed"), resume=True)
    resumed = run(settings)
    one, two = learned(tmp_path / "straight"), learned(tmp_path / "resumed")
    assert all(torch.equal(one[name], two[name]) for name in one)
    logs = [[entry for entry in r.history if "lm_loss" in entry] for r in (straight, resumed)]
    assert [entry["step"] for entry in logs[1]] == [1, 2, 3, 4, 5, 6]  # with those of the checkpoint
    for name in ("loss", "lm_loss", "key_loss", "pool_used_share"):
        assert [entry[name] for entry in logs[0]] == [entry[name] for entry in logs[1]], name


def as_stream(manifest: Path, folder: Path) -> dict:
    """The rows of a manifest as a source that streams."""
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows = [{**row, "audio": str(manifest.parent / row["audio"])} for row in lines]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": "json", "format": "datasets", "data_files": str(folder / "rows.jsonl"), "streaming": True}


def test_a_stream_is_resumed_in_a_later_pass_and_accumulates_across_its_end(
    backbones: dict, manifest: Path, tmp_path: Path
) -> None:
    """Eight rows, six a step: step 3 lies in the third pass, and no pass ends with a step."""
    uneven = {**RESUMABLE, **batches(2, 3), "max_steps": 4}
    settings = sections(backbones, manifest, tmp_path / "straight", EXACT, **uneven)
    settings["data"]["train"] = [as_stream(manifest, tmp_path)]
    run(settings)
    shutil.copytree(tmp_path / "straight" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    settings["training"].update(output_dir=str(tmp_path / "resumed"), resume=True)
    run(settings)
    settings["training"].update(output_dir=str(tmp_path / "whole"), resume=False, **batches(6, 1))
    run(settings)
    one, two, whole = (learned(tmp_path / name) for name in ("straight", "resumed", "whole"))
    for name, weight in one.items():
        assert torch.equal(weight, two[name]), name
        torch.testing.assert_close(weight, whole[name], atol=1e-4, rtol=1e-4)


def test_a_run_goes_on_from_the_last_checkpoint_that_is_whole(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    settings = sections(backbones, manifest, tmp_path, NOISY, **RESUMABLE, resume=True)
    run(settings)
    straight = learned(tmp_path)
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text("{")  # stopped amid writing
    shutil.rmtree(tmp_path / "model")
    run(settings)
    assert all(torch.equal(straight[name], weight) for name, weight in learned(tmp_path).items())
    for folder in tmp_path.glob("checkpoint-*"):
        (folder / "optimizer.pt").unlink()
    with pytest.raises(ArgumentError, match="checkpoint-6 .*optimi.er.*model.checkpoint"):
        run(settings)
    settings["training"]["resume"] = "flase"
    with pytest.raises(ArgumentError, match="training.resume='flase'.*true for the last"):
        run(settings)


def test_a_run_over_other_backbones_is_not_resumed(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    settings = sections(backbones, manifest, tmp_path / "run", **RESUMABLE)
    run(settings)
    settings["training"]["resume"] = True
    settings["model"]["language_model"] = save_tiny_llm(tmp_path / "other", seed=7)
    with pytest.raises(ValueError, match="language_model: .*checkpoint-6'.*fingerprint"):
        run(settings)


def test_a_run_folder_is_complete_and_repeats_the_run(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    settings = sections(backbones, manifest, tmp_path / "a", NOISY, **RESUMABLE)
    settings["training"].update(report_to="tensorboard", save_total_limit=1)
    run(settings)
    written = {path.name for path in (tmp_path / "a").iterdir()}
    assert written >= {"config.yaml", "run.json", "model", "checkpoint-6", "train_results.json", "trainer_state.json"}
    assert "checkpoint-3" not in written
    assert list((tmp_path / "a").glob("runs/*/events.out.tfevents.*"))
    about = json.loads((tmp_path / "a" / "run.json").read_text())
    assert about["seed"] == 3 and about["data"]["train"] == {"asr": 3, "er": 3, "acap": 2}
    assert about["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]  # a build tag may be missing
    again = parse_arguments(["--config", str(tmp_path / "a" / "config.yaml"), "--output_dir", str(tmp_path / "b")])
    train(again.model, again.data, again.training)
    one, two = learned(tmp_path / "a"), learned(tmp_path / "b")
    assert all(torch.equal(one[name], two[name]) for name in one)
    parse_arguments(["--config", str(tmp_path / "b" / "config.yaml")])  # also when written from the dataclasses


def test_checkpoints_hold_the_adapter_alone(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    result = run(sections(backbones, manifest, tmp_path, **RESUMABLE))
    for folder in (result.model_folder, tmp_path / "checkpoint-3"):
        assert all(name.startswith("adapters.default.") for name in load_file(folder / "model.safetensors"))
    assert not (result.model_folder / "training_args.bin").exists()
    loaded = ListenForConditionalGeneration.from_pretrained(result.model_folder)
    for name, weight in result.model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


def test_training_goes_on_from_a_checkpoint(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    first = run(sections(backbones, manifest, tmp_path / "a", **{**RESUMABLE, "max_steps": 2}))
    settings = sections(backbones, manifest, tmp_path / "b", **{**RESUMABLE, "max_steps": 1})
    settings["model"] = {"checkpoint": str(first.model_folder)}
    second = run(settings)
    assert second.history[0]["loss"] < first.history[0]["loss"]


def test_evaluation_by_loss_and_by_generation(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    short = {**RESUMABLE, "max_steps": 1, "save_steps": 1}
    options = {"eval_strategy": "steps", "eval_steps": 1, "generation_eval_rows": 1, "generation_max_new_tokens": 4}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_asr_wer", "greater_is_better": False}
    settings = sections(backbones, manifest, tmp_path, **short, **options, **best)
    settings["data"]["eval"] = [str(manifest)]
    result = run(settings)
    assert list(result.history[0])[:3] == ["lm_loss", "key_loss", "loss"]
    assert list(result.eval_metrics)[:3] == ["eval_lm_loss", "eval_key_loss", "eval_loss"]
    assert {"eval_loss", "eval_asr_wer", "eval_er_accuracy", "eval_acap_cider"} <= set(result.eval_metrics)
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"] == result.eval_metrics["eval_loss"]


def test_evaluation_reports_the_lm_loss_of_all_labels_first(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    reports = []
    for size in (1, 3, 8):
        settings = sections(backbones, manifest, tmp_path, EXACT, max_steps=1, per_device_eval_batch_size=size)
        settings["data"]["eval"] = [str(manifest)]
        arguments = build_arguments(settings)
        torch.manual_seed(0)  # the same new adapter
        trainer = build_trainer(*build_model(arguments.model), arguments.data, arguments.training)
        reports.append(trainer.evaluate())
    assert list(reports[0])[:2] == ["eval_lm_loss", "eval_key_loss"]
    for report in reports[1:]:  # transformers' eval_loss depends on the batches
        assert report["eval_lm_loss"] == pytest.approx(reports[0]["eval_lm_loss"], rel=1e-4)
        assert report["eval_key_loss"] == pytest.approx(reports[0]["eval_key_loss"], rel=1e-4)
    whole = reports[-1]  # one batch: the loss is its parts, the key loss a mean over k = 4
    assert whole["eval_loss"] == pytest.approx(whole["eval_lm_loss"] + 4 * whole["eval_key_loss"], rel=1e-5)


def test_the_logged_key_loss_is_a_mean_over_the_picked_prompts(one_batch: Path) -> None:
    log = first_log(one_batch)
    assert log["loss"] == pytest.approx(log["lm_loss"] + 4 * log["key_loss"], rel=1e-5)


def test_the_relative_key_loss_is_logged_as_it_is(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    run(sections(backbones, manifest, tmp_path, NOISY, **ONE_STEP, **batches(4, 1)))
    log = first_log(tmp_path)
    assert log["loss"] == pytest.approx(log["lm_loss"] + log["key_loss"], rel=1e-5)
    assert 0 < log["key_loss"] < 2


def test_the_best_model_is_not_chosen_by_a_loss_that_holds_the_key_loss(
    backbones: dict, manifest: Path, tmp_path: Path
) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    settings = sections(backbones, manifest, tmp_path, **{**best, "save_steps": 1})
    chosen = build_arguments(settings).training
    assert chosen.metric_for_best_model == "lm_loss" and chosen.greater_is_better is False
    for metric, greater in (("asr_wer", False), ("eval_sv_eer", False), ("er_accuracy", True), ("eval_lm_loss", False)):
        settings["training"]["metric_for_best_model"] = metric
        assert build_arguments(settings).training.greater_is_better is greater
    settings["training"]["metric_for_best_model"] = "eval_loss"
    with pytest.raises(ArgumentError, match="metric_for_best_model=eval_loss holds the key loss"):
        build_arguments(settings)


def test_evaluation_is_the_same_twice(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    settings = sections(backbones, manifest, tmp_path, NOISY, **{**RESUMABLE, "max_steps": 1})
    settings["data"]["eval"] = [str(manifest)]
    arguments = build_arguments(settings)
    trainer = build_trainer(*build_model(arguments.model), arguments.data, arguments.training)
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]  # fixed k, test wordings, no dropout


def test_stored_features_train_as_audio_does(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    settings = sections(backbones, manifest, tmp_path / "audio", EXACT, **ONE_STEP, **batches(4, 1))
    encoders, processor = build_encoders(build_arguments(settings).model)
    assert encoders.language_model is None
    precompute_features(encoders, processor, load_manifest(manifest), tmp_path / "features", progress=False)
    run(settings)
    settings["data"]["features"] = str(tmp_path / "features")
    settings["training"]["output_dir"] = str(tmp_path / "stored")
    run(settings)
    for name in ("loss", "key_loss"):
        assert first_log(tmp_path / "stored")[name] == pytest.approx(first_log(tmp_path / "audio")[name], rel=2e-3)


@pytest.mark.parametrize("kind", ["hubert", "ast"])
def test_a_run_over_another_speech_encoder(kind: str, backbones: dict, manifest: Path, tmp_path: Path) -> None:
    random_encoder(kind).save_pretrained(tmp_path / "encoder")
    (ASTFeatureExtractor() if kind == "ast" else Wav2Vec2FeatureExtractor()).save_pretrained(tmp_path / "encoder")
    places = {**backbones, "speech_encoder": str(tmp_path / "encoder")}
    settings = sections(places, manifest, tmp_path / "audio", EXACT, **ONE_STEP, **batches(4, 1))
    encoders, processor = build_encoders(build_arguments(settings).model)
    store = precompute_features(encoders, processor, load_manifest(manifest), tmp_path / "features", progress=False)
    run(settings)
    settings["data"]["features"] = str(tmp_path / "features")
    settings["training"]["output_dir"] = str(tmp_path / "stored")
    run(settings)
    for name in ("loss", "key_loss"):
        assert first_log(tmp_path / "stored")[name] == pytest.approx(first_log(tmp_path / "audio")[name], rel=2e-3)
    model = ListenForConditionalGeneration.from_pretrained(tmp_path / "audio" / "model")
    processor = ListenProcessor.from_pretrained(tmp_path / "audio" / "model")
    heard, stored = (
        generate_predictions(
            model, processor, load_manifest(manifest), features=features, max_new_tokens=3, progress=False
        )
        for features in (None, store)
    )
    assert [one.prompt_indices for one in heard] == [one.prompt_indices for one in stored]
    changed = dataclasses.replace(store.info, feature_extractor={**store.info.feature_extractor, "speech_padding": 1})
    with pytest.raises(FeatureStoreError, match="feature_extractor"):
        store.check(changed)


def test_keys_from_data_start_at_queries(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    arguments = build_arguments(sections(backbones, manifest, tmp_path, keys_from_rows=8))
    model, processor = build_model(arguments.model)
    build_trainer(model, processor, arguments.data, arguments.training)
    inputs = ListenCollator(processor, for_generation=True)(list(load_manifest(manifest)))
    inputs.pop("rows")
    with torch.no_grad():
        query = torch.nn.functional.normalize(model.select_prompts(**inputs).query, dim=-1)  # (rows, width)
        keys = torch.nn.functional.normalize(model.adapters["default"].prompt_pool.keys, dim=-1)  # (pool, width)
    assert (keys @ query.T).amax(-1).min() > 0.9


@pytest.mark.parametrize(
    "model",
    [
        {"prompt_pool": {"pool_size": 0}, "lora": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}},
        {"prompt_pool": {"strategy": "fixed", "pool_size": 5, "num_prompts": 5, "stochastic": False}},
        {"prompt_pool": {"strategy": "task", "pool_size": 20, "num_prompts": 4, "tasks": ["asr", "er", "acap"]}},
    ],
    ids=["lora", "soft-prompt", "task"],
)
def test_baselines_train_and_come_back(backbones: dict, manifest: Path, tmp_path: Path, model: dict) -> None:
    result = run(sections(backbones, manifest, tmp_path, model, **{**RESUMABLE, "max_steps": 3}))
    logs = [entry for entry in result.history if "lm_loss" in entry]
    assert logs[-1]["lm_loss"] < logs[0]["lm_loss"]
    assert ("key_loss" in logs[0]) == ("lora" not in model)
    loaded = ListenForConditionalGeneration.from_pretrained(result.model_folder)
    assert all(torch.equal(w, loaded.state_dict()[name]) for name, w in result.model.state_dict().items())


def test_a_pool_alone_needs_a_connector_that_was_trained(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    first = run(sections(backbones, manifest, tmp_path / "a", **{**RESUMABLE, "max_steps": 1}))
    settings = sections(backbones, manifest, tmp_path / "b", {"trainable": ["prompt_pool"]})
    with pytest.raises(ArgumentError, match="trainable=.*model.connector_from"):
        run(settings)
    settings["model"]["connector_from"] = str(first.model_folder)
    settings["training"].update(max_steps=1)
    second = run(settings)
    for name, weight in first.model.adapters["default"].connector.state_dict().items():
        assert torch.equal(weight, second.model.adapters["default"].connector.state_dict()[name])


def test_mixed_precision_and_activation_checkpointing_train(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    result = run(
        sections(
            backbones, manifest, tmp_path, {"dtype": "bfloat16"}, **{**RESUMABLE, "max_steps": 3},
            bf16=True, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False},
        )
    )  # fmt: skip
    logs = [entry for entry in result.history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert all(weight.dtype == torch.float32 for weight in learned(tmp_path).values())


def test_rows_that_are_too_long_are_cut_where_that_is_asked(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    settings = sections(backbones, manifest, tmp_path)
    settings["data"].update(max_audio_seconds=0.55, long_audio="cut")
    arguments = build_arguments(settings)
    trainer = build_trainer(*build_model(arguments.model), arguments.data, arguments.training)
    assert len(trainer.train_dataset) == 8 and trainer.processing_class.max_audio_seconds == 0.55
    features = trainer.data_collator([trainer.train_dataset[row] for row in range(8)])
    assert features["input_features_mask"].sum(-1).max() == 55  # frames of 10 ms
    settings["data"].update(max_audio_seconds=None)
    with pytest.raises(ArgumentError, match="long_audio=cut needs"):
        build_arguments(settings)


def test_streams_train(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    settings = sections(backbones, manifest, tmp_path / "run", **{**RESUMABLE, "max_steps": 2})
    columns = {"audio": "sound", "response": "text"}
    stream = as_stream(manifest, tmp_path)
    rows = [json.loads(line) for line in Path(stream["data_files"]).read_text().splitlines()]
    rows = [{theirs: row[ours] for ours, theirs in columns.items()} for row in rows]
    Path(stream["data_files"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings["data"]["train"] = [{**stream, "task": "asr", "columns": columns}]
    assert run(settings).metrics["train_loss"] > 0


def test_rows_that_are_too_long_are_left_out_and_clips_joined(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    settings = sections(backbones, manifest, tmp_path)
    settings["data"].update(max_audio_seconds=0.55)
    arguments = build_arguments(settings)
    trainer = build_trainer(*build_model(arguments.model), arguments.data, arguments.training)
    assert len(trainer.train_dataset) == 4  # of 0.4, 0.5, 0.6 and 0.7 s, twice each
    settings["data"].update(max_audio_seconds=0.1)
    with pytest.raises((ArgumentError, ValueError), match="no training row is left|add up to 0"):
        arguments = build_arguments(settings)
        build_trainer(*build_model(arguments.model), arguments.data, arguments.training)


def start(command_line: dict, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs `listen train` on a recipe."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(command_line))
    monkeypatch.setattr(sys, "argv", ["listen train", "--config", str(folder / "recipe.yaml")])
    command.main()


def test_a_run_ends_with_its_scores_and_the_next_command(
    backbones: dict, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    settings = sections(backbones, manifest, tmp_path / "run", max_steps=2, generation_eval_rows=2)
    settings["data"]["eval"] = [str(manifest)]
    start(settings, tmp_path, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("step 1/2  lm_loss ") for line in lines) == 1
    assert not any("{" in line for line in lines)
    assert any("asr" in line and "wer" in line for line in lines)
    model = tmp_path / "run" / "model"
    config = tmp_path / "run" / "config.yaml"
    assert lines[-2] == f"model saved to {model}" and config.is_file()
    assert lines[-1] == f"next: listen eval --config {config} --model {model} --output {tmp_path / 'run' / 'eval'}"
    scores = json.loads((model / "metrics.json").read_text())
    assert scores["asr"]["n"] == 2 and {"wer", "cer"} < set(scores["asr"])
    results = ModelCard.load(model / "README.md").data.eval_results
    assert {(result.task_name, result.metric_type) for result in results} == {
        (task, name) for task, values in scores.items() for name in values if name != "n"
    }
    (model / "metrics.json").write_text('{"asr": {"wer": 0.5, "n": 100}}')  # of an evaluation on more rows
    settings["training"]["resume"] = True
    start(settings, tmp_path, monkeypatch)
    assert json.loads((model / "metrics.json").read_text())["asr"]["n"] == 100


def test_a_run_without_evaluation_names_a_command_that_asks(
    backbones: dict, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    start(sections(backbones, manifest, tmp_path / "my run", max_steps=1), tmp_path, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"next: listen ask clip.wav \"What is being said?\" --model '{tmp_path / 'my run' / 'model'}'"
    assert not any("Scores" in line for line in lines) and not (tmp_path / "my run" / "model" / "metrics.json").exists()


def test_the_card_of_a_run_that_went_on_has_no_scores_of_earlier_weights(
    backbones: dict, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = sections(backbones, manifest, tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    start(settings, tmp_path, monkeypatch)
    model = tmp_path / "run" / "model"
    (model / "metrics.json").write_text('{"asr": {"wer": 0.5, "n": 100}}')
    settings["training"] |= {"resume": True, "max_steps": 2}
    start(settings, tmp_path, monkeypatch)
    assert not (model / "metrics.json").exists() and not ModelCard.load(model / "README.md").data.eval_results


def test_a_line_of_the_log_holds_what_a_person_reads() -> None:
    state = TrainerState(global_step=3, max_steps=7)
    logs = {"lm_loss": 1.23456, "learning_rate": 1e-5, "eval_runtime": 3.0, "pool_query_cosine": 0.1, "epoch": 1.0}
    assert log_line(logs, state) == "step 3/7  lm_loss 1.235  learning_rate 1e-05"
    metrics = {"eval_loss": 2.0, "eval_asr_wer": 0.5, "eval_er_uar": 0.25, "eval_response_bleu": 3.0}
    assert task_scores(metrics) == {"asr": {"wer": 0.5}, "er": {"uar": 0.25}, "response": {"bleu": 3.0}}


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "trackio"])
def test_trackers_get_the_figures_offline(tracker: str, backbones: dict, manifest: Path, tmp_path: Path) -> None:
    """In a process of its own: trackers keep state in their module."""
    pytest.importorskip(tracker)
    environment = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }
    settings = sections(backbones, manifest, tmp_path / "run", max_steps=1, report_to=tracker)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    done = subprocess.run(
        [sys.executable, "-m", "listen", "train", "--config", str(tmp_path / "recipe.yaml")],
        env={**os.environ, **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    written = {"wandb": "wandb/offline-run-*/*.wandb", "mlflow": "mlflow.db", "trackio": "trackio/*.db"}[tracker]
    (log,) = tmp_path.glob(written)
    assert b"key_loss" in log.read_bytes() + b"".join(path.read_bytes() for path in log.parent.glob(f"{log.name}-wal"))
