"""Training of a classifier: what it learns, from whom, and what is left in its folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import tiny_model
from fixtures_training import RATE, write_manifest

from listen import ListenAudioClassificationFeatureExtractor, ListenForAudioClassification
from listen.data import load_manifest
from listen.data.classification import hold_out_speakers, row_label
from listen.training import ArgumentError, parse_arguments
from listen.training.classifier import ClassifierResult, build_rows, train_classifier
from listen.training.classifier_arguments import CLASSIFIER_SECTIONS
from listen.training.parsing import RunArguments, build_arguments

RECIPES = Path(__file__).parent.parent / "examples" / "configs" / "speech_emotion"
RECIPE = RECIPES / "classifier.yaml"
SPEAKERS = ("ann", "bob", "eve", "joe")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Low hums and high whistles by four speakers, each at a pitch of his or her own; hums are three times as many."""
    folder = tmp_path_factory.mktemp("voices")
    tiny_model().speech_encoder.save_pretrained(folder / "encoder")
    rows = []
    for number in range(32):
        speaker, high = number % 4, number // 4 % 4 == 0
        seconds = np.arange(round(RATE * (0.4 + 0.05 * (number % 5)))) / RATE
        wave = 0.3 * np.sin(2 * np.pi * (2000 if high else 150) * (1 + 0.05 * speaker) * seconds)
        soundfile.write(folder / f"{number}.wav", wave.astype(np.float32), RATE)
        label = {"emotion": "whistle" if high else "hum", "speaker": SPEAKERS[speaker]}
        rows.append({"audio": f"{number}.wav", "task": "asr", "response": "so", **label})
    return write_manifest(folder / "voices.jsonl", rows)


def arguments(manifest: Path, output: Path, model: dict | None = None, **data: object) -> RunArguments:
    head = {"hidden_size": 16, "num_layer_heads": 2, "intermediate_size": 32}
    return build_arguments(
        {
            "model": {"speech_encoder": str(manifest.parent / "encoder"), "head": head, **(model or {})},
            "data": {"train": str(manifest), "label_field": "emotion", "held_out_speakers": 0.25, **data},
            "training": {
                "output_dir": str(output), "max_steps": 30, "learning_rate": 1e-2, "logging_steps": 5, "use_cpu": True,
                "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "num_threads": 1,
            },
        },
        CLASSIFIER_SECTIONS,
    )  # fmt: skip


def train(*args: object, **kwargs: object) -> ClassifierResult:
    run = arguments(*args, **kwargs)
    return train_classifier(run.model, run.data, run.training, raw=run.raw)


@pytest.fixture(scope="module")
def trained(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> ClassifierResult:
    return train(manifest, tmp_path_factory.mktemp("run"), {"balance_classes": True})


def test_held_out_speakers_are_told(trained: ClassifierResult) -> None:
    assert trained.eval_metrics["eval_accuracy"] == trained.eval_metrics["eval_uar"] == 1.0
    assert {"eval_recall_hum", "eval_recall_whistle"} <= set(trained.eval_metrics)
    losses = [entry["loss"] for entry in trained.history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


def test_rare_classes_weigh_more(trained: ClassifierResult) -> None:
    assert trained.model.config.class_weights == pytest.approx([2 / 3, 2.0])  # hum, whistle: 18 and 6 of 24 rows
    assert trained.model.config.id2label == {0: "hum", 1: "whistle"}


def test_the_folder_holds_the_trained_head_and_its_extractor(trained: ClassifierResult, manifest: Path) -> None:
    folder = trained.model_folder
    assert not (folder / "training_args.bin").exists() and (folder.parent / "config.yaml").is_file()
    loaded = ListenForAudioClassification.from_pretrained(folder)
    extractor = ListenAudioClassificationFeatureExtractor.from_pretrained(folder)
    wave, rate = soundfile.read(manifest.parent / "0.wav", dtype="float32")
    inputs = extractor(wave, rate)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, trained.model(**inputs).logits)


def test_hearing_once_or_in_each_epoch_is_the_same(manifest: Path, tmp_path: Path) -> None:
    runs = [train(manifest, tmp_path / str(once), precompute=once) for once in (True, False)]
    for (name, once), each in zip(
        runs[0].model.classifier.state_dict().items(), runs[1].model.classifier.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(once, each, atol=2e-3, rtol=0, msg=name)
    assert runs[0].eval_metrics["eval_loss"] == pytest.approx(runs[1].eval_metrics["eval_loss"], abs=1e-3)


def test_a_checkpoint_is_trained_on(trained: ClassifierResult, manifest: Path, tmp_path: Path) -> None:
    model = {"speech_encoder": None, "head": {}, "checkpoint": str(trained.model_folder)}
    result = train(manifest, tmp_path, model)
    first = [next(e["loss"] for e in run.history if "loss" in e) for run in (trained, result)]
    assert first[1] < 0.5 * first[0]
    with pytest.raises(ArgumentError, match="training rows name the classes"):
        train(manifest, tmp_path / "other", model, label_field="speaker")


def test_no_speaker_is_on_both_sides(manifest: Path) -> None:
    rows = load_manifest(manifest)
    for seed in range(4):
        parts = hold_out_speakers(rows, "speaker", 0.5, seed)
        sides = [{row_label(row, "speaker") for row in part} for part in parts]
        assert [len(side) for side in sides] == [2, 2] and not sides[0] & sides[1]
        assert len(parts[0]) + len(parts[1]) == len(rows)


def test_shared_speakers_are_reported(manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = arguments(manifest, tmp_path, held_out_speakers=0.0, eval=str(manifest))
    logger = build_rows.__globals__["logger"]
    logger.addHandler(caplog.handler)
    try:
        build_rows(run.data, 0)
    finally:
        logger.removeHandler(caplog.handler)
    assert "4 speakers are in both training and evaluation" in caplog.text


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({}, {"label_field": "mood"}, "data.label_field='mood' must hold one class"),
        ({}, {"speaker_field": "voice"}, "two or more speakers in the field 'voice'"),
        ({}, {"eval": "x.jsonl"}, "give one of them"),
        ({}, {"train": []}, "data.train names no source"),
        ({}, {"held_out_speakers": 1.0}, r"must lie in \[0, 1\)"),
        ({"checkpoint": "x"}, {}, "name either model.speech_encoder"),
        ({"head": {"hiden_size": 3}}, {}, "did you mean 'hidden_size'"),
    ],
)
def test_impossible_arguments_are_named(manifest: Path, tmp_path: Path, model: dict, data: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(manifest, tmp_path, model, **data)


def test_data_that_tells_nothing_is_named(manifest: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(ArgumentError, match="empty.jsonl gives no row"):
        train(manifest, tmp_path / "run", held_out_speakers=0.0, eval=str(empty))
    lines = [line for line in manifest.read_text().splitlines() if '"hum"' in line]
    (manifest.parent / "hums.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ArgumentError, match=r"the training rows name the classes \['hum'\]; .*two or more"):
        train(manifest, tmp_path / "run", train=str(manifest.parent / "hums.jsonl"))


def test_the_recipe_is_read_and_overridden() -> None:
    command = [
        "--config",
        str(RECIPE),
        "--data.label_field",
        "label",
        "--training.use_cpu",
        "--model.head.dropout",
        "0.2",
    ]
    run = parse_arguments([*command, "--training.bf16", "false"], CLASSIFIER_SECTIONS)
    assert run.data.label_field == "label" and run.model.head["dropout"] == 0.2
    assert run.model.speech_encoder == "openai/whisper-large-v2"
    with pytest.raises(ArgumentError, match="unknown argument"):
        parse_arguments([*command, "--label_feild", "x"], CLASSIFIER_SECTIONS)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*classifier.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    run = parse_arguments(["--config", str(path), "--training.bf16", "false"], CLASSIFIER_SECTIONS)
    assert run.data.train and run.training.output_dir.startswith("runs/")
