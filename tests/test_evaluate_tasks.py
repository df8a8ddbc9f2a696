"""examples/evaluate_tasks.py reads what training reads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import tiny_model
from fixtures_corpora import BUILDERS
from fixtures_training import tiny_processor, write_clip, write_manifest

from listen.commands import evaluate
from listen.training import ArgumentError, DataArguments, build_train_dataset
from listen.training.datasets import build_eval_dataset


@pytest.fixture()
def script() -> ModuleType:
    return evaluate


def read(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> DataArguments:
    monkeypatch.setattr(sys, "argv", ["evaluate_tasks.py", "--model", "none", *words])
    return script.data_arguments(script.parse_arguments())


def test_a_recipe_joins_the_same_clips_in_training_and_evaluation(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BUILDERS["voxceleb1"](tmp_path / "vox")
    source = f"{{path: {tmp_path / 'vox'}, format: voxceleb1, split: test}}"
    recipe = tmp_path / "recipe.yaml"
    settings = "join_tasks: [sv], join_silence_seconds: 0.1, max_eval_rows: 1"
    recipe.write_text(f"data: {{train: [{source}], eval: [{source}], {settings}}}\n")
    data = read(script, monkeypatch, "--config", str(recipe))
    trained = build_train_dataset(DataArguments(train=data.eval, join_tasks=["sv"]), 0)
    evaluated = build_eval_dataset(data, 0)
    assert data.join_silence_seconds == 0.1 and len(evaluated) == 2  # all rows, max_eval_rows is for training
    assert list(trained) == list(evaluated) and evaluated["join"][:] == ["concatenate"] * 2
    apart = build_eval_dataset(read(script, monkeypatch, "--data", source), 0)
    assert apart["join"][:] == [None, None]
    joined = read(script, monkeypatch, "--data", source, "--join-tasks", "sv", "--join-silence-seconds", "0.2")
    assert build_eval_dataset(joined, 0)["join"][:] == ["concatenate"] * 2 and joined.join_silence_seconds == 0.2


def test_what_cannot_be_read_is_said(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="no data to evaluate on; name it with --data"):
        read(script, monkeypatch)
    with pytest.raises(ArgumentError, match="unknown argument --data: formt"):
        read(script, monkeypatch, "--data", "{path: a, formt: csv}")
    with pytest.raises(ArgumentError, match="{path: a: expected a path, or a source such as"):
        read(script, monkeypatch, "--data", "{path: a")
    with pytest.raises(ArgumentError, match=r"long_audio=cut cannot cut data.features, which are of whole clips"):
        read(script, monkeypatch, "--data", "a.csv", "--features", "store", "--max-audio-seconds", "5")
    monkeypatch.setattr(sys, "argv", ["evaluate_tasks.py", "--model", "none", "--data", str(tmp_path / "no.csv")])
    with pytest.raises(SystemExit, match="error: .*no.csv"):
        script.main()


def test_each_source_of_a_list_is_read_and_a_word_is_a_path(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = read(
        script, monkeypatch, "--data", "[a.jsonl, {path: b.csv, task: asr}]", "2026", "--max-audio-seconds", "0"
    )
    assert [source.path for source in data.eval] == ["a.jsonl", "b.csv", "2026"]
    assert (
        data.long_audio == "cut" and data.max_audio_seconds == 0
    )  # refused where clips are cut, not taken for no limit


def test_joined_clips_are_answered_as_one_recording(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "model", save_full=True)
    tiny_processor(model.config).save_pretrained(tmp_path / "model")
    clips = [str(write_clip(tmp_path / f"{number}.wav", 0.3, seed=number)) for number in range(2)]
    rows = write_manifest(tmp_path / "m.jsonl", [{"audio": clips, "task": "sv", "response": "no"}])
    words = ["--model", str(tmp_path / "model"), "--data", str(rows), "--max-new-tokens", "4", "--join-tasks", "sv"]
    monkeypatch.setattr(sys, "argv", ["evaluate_tasks.py", *words, "--output", str(tmp_path / "joined")])
    script.main()
    whole = write_manifest(
        tmp_path / "whole.jsonl", [{"audio": clips, "join": "concatenate", "task": "sv", "response": "no"}]
    )
    words = ["--model", str(tmp_path / "model"), "--data", str(whole), "--max-new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["evaluate_tasks.py", *words, "--output", str(tmp_path / "whole")])
    script.main()
    answers = [
        [json.loads(line) for line in (tmp_path / name / "predictions.jsonl").read_text().splitlines()]
        for name in ("joined", "whole")
    ]
    for name in ("prediction", "prompt_indices", "prompt_scores"):
        assert answers[0][0][name] == answers[1][0][name]
