"""Cascades: the classifier's label stands before the speech, for each row its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_model
from fixtures_classification import LABELS, noise, tiny_classifier
from fixtures_training import RATE, tiny_processor, write_clip, write_manifest

from listen import ListenAudioClassificationFeatureExtractor
from listen.commands import evaluate
from listen.data import ListenCollator, load_manifest
from listen.evaluation import evaluate_model
from listen.evaluation.cascade import classify_rows, tag_rows

TASKS = ("asr", "response", "ser", "repeat")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cascade")
    rows = []
    for number in range(8):
        write_clip(folder / f"{number}.wav", 0.3 + 0.15 * (number * 5 % 8), seed=number)
        rows.append({"audio": f"{number}.wav", "task": TASKS[number % 4], "response": "sad", "emotion": "sad"})
    return write_manifest(folder / "rows.jsonl", rows)


def test_rows_keep_their_order_whatever_the_batches(manifest: Path) -> None:
    rows, extractor = load_manifest(manifest), ListenAudioClassificationFeatureExtractor()
    model = tiny_classifier(seed=3).train()
    alone = []
    for row in rows:
        single = rows.select([int(Path(row["audio"][0]["path"]).stem)])
        alone += classify_rows(model, extractor, single, progress=False)
    assert set(alone) <= set(LABELS) and len(set(alone)) > 1
    for batch_size in (1, 3, 8):
        assert classify_rows(model, extractor, rows, batch_size=batch_size, progress=False) == alone
    assert model.training


def test_the_tag_stands_right_before_the_speech(manifest: Path) -> None:
    rows = load_manifest(manifest)
    tags = [LABELS[number % 3] for number in range(8)]
    tagged = tag_rows(rows, tags)
    processor = tiny_processor(tiny_config())
    collator = ListenCollator(processor, for_generation=True, num_prompts=0)
    words = [collator.word(row, None).prompt for row in tagged]
    for prompt, tag in zip(words, tags, strict=True):
        assert prompt.count(f"<{tag}> <|audio|>") == 1
    plain = [collator.word(row, None).prompt for row in rows]
    assert [p.replace(f"<{tag}> ", "") for p, tag in zip(words, tags, strict=True)] == plain
    content = [{"type": "text", "text": "<happy> "}, {"type": "audio"}, {"type": "text", "text": "What is being said?"}]
    as_chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert words[0] == as_chat
    assert "Repeat after me in English: <happy> <|audio|>" in words[3]


def test_the_model_reads_the_tag(manifest: Path) -> None:
    rows, processor, model = load_manifest(manifest), tiny_processor(tiny_config()), tiny_model()
    collator = ListenCollator(processor, for_generation=True, num_prompts=2)
    logits = []
    for tag in ("happy", "sad"):
        inputs = collator([tag_rows(rows, [tag] * 8)[0]])
        inputs.pop("rows")
        with torch.no_grad():
            logits.append(model(**inputs).logits[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_evaluation_takes_tagged_rows(manifest: Path) -> None:
    rows = load_manifest(manifest).select([0, 4])
    tagged = tag_rows(rows, ["angry", "sad"])
    result = evaluate_model(
        tiny_model(), tiny_processor(tiny_config()), tagged, num_resamples=0, progress=False, max_new_tokens=2
    )
    assert [record["instruction"] for record in result.predictions] == [
        "<angry> {input}What is being said?",
        "<sad> {input}What is being said?",
    ]


def test_the_script_classifies_only_what_is_asked_and_keeps_it_when_a_sweep_fails(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, classifier = tiny_model(), tiny_classifier(tmp_path / "encoder")
    model.save_pretrained(tmp_path / "model", save_full=True)
    tiny_processor(model.config).save_pretrained(tmp_path / "model")
    classifier.save_pretrained(tmp_path / "classifier")
    ListenAudioClassificationFeatureExtractor().save_pretrained(tmp_path / "classifier")
    clips = [str(manifest.parent / f"{number}.wav") for number in (0, 4)]
    pair = write_manifest(tmp_path / "pair.jsonl", [{"audio": clips, "task": "sv", "response": "no"}])
    names = {"model": "model", "cascade": "classifier", "output": "results"}
    folders = [word for name, folder in names.items() for word in (f"--{name}", str(tmp_path / folder))]
    data = ["--data", str(manifest), str(pair), "--tasks", "repeat", "--max-new-tokens", "2", "--sweep", "1000"]
    monkeypatch.setattr("sys.argv", ["evaluate_tasks.py", *folders, *data])
    with pytest.raises(ValueError, match="num_prompts=1000"):
        evaluate.main()
    lines = (tmp_path / "results" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all("English: <" in json.loads(line)["instruction"] for line in lines)


def test_what_cannot_be_tagged_is_named(manifest: Path, tmp_path: Path) -> None:
    rows = load_manifest(manifest)
    with pytest.raises(ValueError, match="1 labels for 8 rows"):
        tag_rows(rows, ["sad"])
    for name in ("a", "b"):
        write_clip(tmp_path / f"{name}.wav", len(noise(0.3)) / RATE)
    pair = write_manifest(tmp_path / "p.jsonl", [{"audio": ["a.wav", "b.wav"], "task": "sv", "response": "no"}])
    extractor = ListenAudioClassificationFeatureExtractor()
    with pytest.raises(ValueError, match="2 recordings"):
        classify_rows(tiny_classifier(), extractor, load_manifest(pair), progress=False)
