"""Distillation from the text input: what the teacher reads, the loss, and that it is exact however a batch is split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_model
from fixtures_backbones import save_backbones
from fixtures_training import tiny_processor, write_clip, write_manifest
from test_training_run import EXACT, ONE_STEP, assert_same_step, batches, first_log, launch, run, sections

from listen.data import ListenCollator, load_manifest
from listen.data.collator import IGNORED
from listen.data.tasks import get_task
from listen.training import (
    ArgumentError,
    DistillationTrainer,
    ListenTrainer,
    build_arguments,
    build_model,
    build_trainer,
    distillation_loss,
)

LORA = {"lora": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that word themselves shortly, of different answer lengths."""
    folder = tmp_path_factory.mktemp("corpus")
    words = [("i won", "happy", "great!"), ("we lost", "sad", "oh no, tell me more"), ("hi", "neutral", "hello")]
    rows = []
    for i, (text, emotion, response) in enumerate([*words, ("it came at night", "fearful", "stay calm")]):
        write_clip(folder / f"{i}.wav", 0.4 + 0.1 * i, seed=i)
        row = {"audio": f"{i}.wav", "task": "response", "response": response, "transcript": text, "emotion": emotion}
        rows.append({**row, "instruction": "Say: {input}"})
    return write_manifest(folder / "train.jsonl", rows)


def distill_sections(backbones: dict, manifest: Path, folder: Path, model: dict, **training: Any) -> dict:
    return sections(backbones, manifest, folder, model, alignment="distill", **{**ONE_STEP, **training})


def teacher_texts(rows: list[dict]) -> list[str]:
    processor = tiny_processor(tiny_config())
    batch = ListenCollator(processor, teacher=True)(rows)
    kept = zip(batch["teacher_input_ids"], batch["teacher_attention_mask"], strict=True)
    return [processor.tokenizer.decode(ids[mask.bool()]) for ids, mask in kept]


# ------------------------------------------------------------------ what the teacher reads


@pytest.mark.parametrize(
    ("task", "fields", "expected"),
    [
        ("response", {}, get_task("response").target_instruction.replace("{input}", "<sad> i won")),
        ("response", {"text_input": "i won"}, get_task("response").target_instruction.replace("{input}", "i won")),
        ("repeat", {}, "Repeat after me in English: i won"),
        ("ser", {"options": ["sad", "happy"]}, "Identify the emotional tone of the utterance that is provided. Select "
         "from the following options: sad, happy: <sad> i won"),
        ("er", {}, "i won\nWhich emotion does the speaker show?"),
    ],
)  # fmt: skip
def test_the_teacher_reads_the_words_where_the_student_hears(
    manifest: Path, task: str, fields: dict, expected: str
) -> None:
    row = {**load_manifest(manifest)[0], "task": task, "instruction": None, "response": ["well"]}
    extra = json.dumps({"transcript": "i won", "emotion": "sad", **fields})
    assert teacher_texts([{**row, "extra": extra}]) == [f"<s>U:{expected}A:well</s>".replace("\n", "<pad>")]


def test_both_inputs_end_in_the_same_answers(manifest: Path) -> None:
    batch = ListenCollator(tiny_processor(tiny_config()), train=True, teacher=True)(list(load_manifest(manifest)))
    kept = batch["logits_to_keep"]
    is_label = batch["labels"][:, -kept:] != IGNORED
    assert is_label.any(-1).all() and kept <= batch["teacher_input_ids"].shape[1]
    for name in ("input_ids", "teacher_input_ids"):
        assert torch.equal(batch[name][:, -kept:][is_label], batch["labels"][:, -kept:][is_label])


def test_a_row_without_words_is_named(manifest: Path) -> None:
    row = {**load_manifest(manifest)[0], "extra": None}
    with pytest.raises(ValueError, match="'train.jsonl:1'.*'transcript'"):
        teacher_texts([row])
    with pytest.raises(ValueError, match="train and teacher need answers"):
        ListenCollator(tiny_processor(tiny_config()), teacher=True, for_generation=True)


# ------------------------------------------------------------------ the loss


def test_the_loss_is_the_divergence_at_the_labels() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    labels = torch.tensor([[IGNORED, IGNORED, 3, 1, 2], [IGNORED] * 4 + [6]])
    expected = []
    for row, place in [(0, 1), (0, 2), (0, 3), (1, 3)]:  # each position before a label
        p, q = (logits[row, place].div(2.0).softmax(-1) for logits in (teacher, student))
        expected.append(4.0 * (p * (p / q).log()).sum())
    torch.testing.assert_close(distillation_loss(student, teacher, labels, 2.0), torch.stack(expected).mean())
    torch.testing.assert_close(distillation_loss(student, teacher, labels, 2.0, 10), torch.stack(expected).sum() / 10)
    assert distillation_loss(student, student, labels) == 0
    with pytest.raises(ValueError, match="differ"):
        distillation_loss(student, teacher[:, 1:], labels)


def test_a_student_that_reads_what_the_teacher_reads_has_nothing_to_learn(
    backbones: dict, manifest: Path, tmp_path: Path
) -> None:
    arguments = build_arguments(distill_sections(backbones, manifest, tmp_path, EXACT, **batches(4, 1)))
    trainer = build_trainer(*build_model(arguments.model), arguments.data, arguments.training)
    assert type(trainer) is DistillationTrainer
    batch = trainer.data_collator(list(trainer.train_dataset))
    heard = trainer.compute_loss(trainer.model, dict(batch))
    length = batch["teacher_input_ids"].shape[1]
    labels = torch.full((4, length), IGNORED)
    labels[:, -batch["logits_to_keep"] :] = batch["labels"][:, -batch["logits_to_keep"] :]
    read = {name: batch[name] for name in ("teacher_input_ids", "teacher_attention_mask", "logits_to_keep")}
    read |= {"input_ids": batch["teacher_input_ids"], "attention_mask": batch["teacher_attention_mask"]}
    assert trainer.compute_loss(trainer.model, {**read, "labels": labels}).abs() < 1e-5 < heard


@pytest.mark.parametrize("model", [{}, LORA], ids=["pool", "lora"])
def test_the_teacher_is_the_base_llm_whatever_was_learned(
    backbones: dict, manifest: Path, tmp_path: Path, model: dict
) -> None:
    settings = distill_sections(backbones, manifest, tmp_path, {**EXACT, **model}, max_steps=2, **batches(2, 1))
    arguments = build_arguments(settings)
    trainer = build_trainer(*build_model(arguments.model), arguments.data, arguments.training)
    batch = trainer.data_collator(list(trainer.train_dataset))
    taught = (batch["teacher_input_ids"], batch["teacher_attention_mask"], batch["logits_to_keep"])
    before = trainer._teacher_logits(trainer.model, *taught)
    learning = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert torch.equal(trainer._teacher_logits(trainer.model, *taught), before)
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == learning
    assert ("lora" in model) == any("lora_" in name for name in learning)
    alone = tiny_model().language_model  # the same weights, row by row and without padding
    for row, (ids, mask) in enumerate(zip(*taught[:2], strict=True)):
        logits = alone(input_ids=ids[mask.bool()][None]).logits[0]
        answer = int((batch["labels"][row] != IGNORED).sum()) + 1
        torch.testing.assert_close(before[row, -answer:], logits[-answer:], atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def one_batch(backbones: dict, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_batch")
    run(distill_sections(backbones, manifest, folder, EXACT, **batches(4, 1)))
    return folder


def test_accumulated_steps_equal_one_batch(backbones: dict, manifest: Path, tmp_path: Path, one_batch: Path) -> None:
    run(distill_sections(backbones, manifest, tmp_path, EXACT, **batches(1, 4)))
    assert_same_step(tmp_path, one_batch)
    assert first_log(tmp_path)["distill_loss"] == pytest.approx(first_log(one_batch)["distill_loss"], rel=1e-5)


@pytest.mark.slow
def test_two_processes_that_accumulate_equal_one_batch(
    backbones: dict, manifest: Path, tmp_path: Path, one_batch: Path
) -> None:
    launch(distill_sections(backbones, manifest, tmp_path, EXACT, **batches(1, 2)), tmp_path, 2)
    assert_same_step(tmp_path, one_batch)
    assert first_log(tmp_path)["distill_loss"] == pytest.approx(first_log(one_batch)["distill_loss"], rel=1e-5)


def test_the_loss_has_the_parts_that_were_asked_for(
    backbones: dict, manifest: Path, tmp_path: Path, one_batch: Path
) -> None:
    log = first_log(one_batch)
    assert log["loss"] == pytest.approx(log["distill_loss"] + 4 * log["key_loss"], rel=1e-5)
    weighted = {"prompt_pool": {**EXACT["prompt_pool"], "key_loss_weight": 0.3}}
    options = {"distill_lm_weight": 0.5, "distill_temperature": 3.0, **batches(4, 1)}
    run(distill_sections(backbones, manifest, tmp_path, weighted, **options))
    other = first_log(tmp_path)
    parts = other["distill_loss"] + 0.5 * other["lm_loss"] + 0.3 * 4 * other["key_loss"]  # k is 4
    assert other["loss"] == pytest.approx(parts, rel=1e-5)
    assert other["lm_loss"] == pytest.approx(log["lm_loss"], rel=1e-5)
    assert other["distill_loss"] != pytest.approx(log["distill_loss"], rel=1e-4)


def test_distillation_brings_the_student_to_its_teacher(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    options = {"optim": "adamw_torch", "learning_rate": 3e-3, "max_steps": 8, "max_grad_norm": 1.0}
    settings = distill_sections(backbones, manifest, tmp_path, EXACT, **options, **batches(4, 1))
    settings["data"]["eval"] = [str(manifest)]
    result = run(settings)
    logs = [entry["distill_loss"] for entry in result.history if "distill_loss" in entry]
    assert logs[-1] < 0.7 * logs[0]
    assert result.eval_metrics["eval_loss"] > 0  # of the responses, as in runs without distillation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alignment": "kd"}, "training.alignment='kd' is unknown; choose one of lm, distill, ctc"),
        ({"alignment": "distill", "distill_temperature": 0.0}, "distill_temperature=0.0 must be positive"),
        ({"alignment": "distill", "distill_lm_weight": -1.0}, "distill_lm_weight=-1.0 not negative"),
        ({"distill_temperature": 2.0}, "no effect with alignment=lm; set alignment=distill"),
    ],
)
def test_wrong_options_are_named(backbones: dict, manifest: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        build_arguments(sections(backbones, manifest, tmp_path, **options))


def test_the_usual_alignment_needs_no_words(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    arguments = build_arguments(sections(backbones, manifest, tmp_path, **ONE_STEP))
    trainer = build_trainer(*build_model(arguments.model), arguments.data, arguments.training)
    assert type(trainer) is ListenTrainer
    assert "teacher_input_ids" not in trainer.data_collator([{**trainer.train_dataset[0], "extra": None}])
