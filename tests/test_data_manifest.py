"""Sources of rows: manifests, SALMONN annotations and `datasets`."""

from __future__ import annotations

import json
import logging
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from datasets import Audio, ClassLabel, Dataset, Features, Value, concatenate_datasets
from fixtures_training import RATE, write_clip, write_manifest

from listen.audio_listen import load_waveform
from listen.data.audio import clip_seconds, read_clips, row_seconds
from listen.data.manifest import (
    FEATURES,
    ManifestError,
    extra_fields,
    from_datasets,
    load_manifest,
    load_salmonn,
    load_source,
)


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    for i in range(2):
        write_clip(tmp_path / "audio" / f"{i}.wav", 0.25 + 0.25 * i, seed=i)
    return tmp_path


def test_rows_have_one_schema_whatever_they_hold(folder: Path) -> None:
    rows = [
        {"audio": "audio/0.wav", "task": "asr", "response": "hello", "speaker": 7, "id": "a"},
        {"audio": ["audio/0.wav", "audio/1.wav"], "task": "sv", "response": "no"},
        {"audio": "audio/1.wav", "task": "acap", "response": ["Rain.", "It rains."]},
        {"audio": ["audio/0.wav"], "task": "sqa", "question": "Who?", "response": "me", "join": "concatenate"},
    ]
    dataset = load_manifest(write_manifest(folder / "m.jsonl", rows))
    assert dataset.features == FEATURES
    assert [len(row["audio"]) for row in dataset] == [1, 2, 1, 1]
    assert dataset["response"][:] == [["hello"], ["no"], ["Rain.", "It rains."], ["me"]]
    assert dataset["id"][:] == ["a", "m.jsonl:2", "m.jsonl:3", "m.jsonl:4"]
    assert extra_fields(dataset[0]) == {"speaker": 7} and extra_fields(dataset[1]) == {}
    assert Path(dataset[0]["audio"][0]["path"]) == folder / "audio" / "0.wav"
    assert (dataset[3]["question"], dataset[3]["join"]) == ("Who?", "concatenate")


def test_rows_of_the_schema_are_read_as_they_are(folder: Path) -> None:
    rows = [{"audio": "audio/0.wav", "task": "asr", "response": "hello", "speaker": 7}]
    dataset = load_manifest(write_manifest(folder / "m.jsonl", rows))
    assert from_datasets(dataset)[0] == dataset[0]
    del rows[0]["speaker"]
    plain = load_manifest(write_manifest(folder / "m.jsonl", rows))
    plain.to_json(folder / "again.jsonl")  # with null where a row has no such field
    assert load_manifest(folder / "again.jsonl")[0] == plain[0]
    rows[0]["speaker"] = 7
    rows[0]["extra"] = "a word"
    assert extra_fields(load_manifest(write_manifest(folder / "m.jsonl", rows))[0]) == {"extra": "a word", "speaker": 7}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"audio": "audio/0.wav", ', r"m.jsonl:2: not valid JSON"),
        ("{} {}", r"m.jsonl:2: not valid JSON .Extra data at column 4.; a .jsonl file holds one JSON object a line"),
        ('["audio/0.wav"]', r"m.jsonl:2: expected a JSON object, found list"),
        ('{"audio": "audio/0.wav", "task": "asr"}', r"m.jsonl:2: field 'response' is missing"),
        ('{"audio": "audio/0.wav", "task": "asrr", "response": "x"}', r"m.jsonl:2: unknown task 'asrr'.*'asr'"),
        ('{"audio": "audio/9.wav", "task": "asr", "response": "x"}', r"m.jsonl:2: there is no audio file .*9.wav"),
        ('{"audio": "audio/0.wav", "task": "sqa", "response": "x"}', r"m.jsonl:2: task 'sqa' needs a 'question'"),
        ('{"audio": "audio/0.wav", "task": ["asr"], "response": "x"}', r"m.jsonl:2: unknown task"),
        ('{"audio": [], "task": "asr", "response": "x"}', r"m.jsonl:2: 'audio' holds no clip"),
        ('{"audio": "audio/0.wav", "task": "asr", "response": 3}', r"m.jsonl:2: 'response' must be text"),
        ('{"audio": "audio/0.wav", "task": "asr", "response": "x", "join": "mix"}', r"m.jsonl:2: join='mix'"),
        ('{"audio": 3, "task": "asr", "response": "x"}', r"m.jsonl:2: a clip must be a path"),
        (
            '{"audio": {"path": "a", "start": 1}, "task": "asr", "response": "x"}',
            r"m.jsonl:2: 'start' does not cut the",
        ),
        ('{"audio": "audio/0.wav", "task": "ser", "response": "x", "options": "x, y"}', "m.jsonl:2: 'options' must be"),
        ('{"audio": " ", "task": "asr", "response": "x"}', r"m.jsonl:2: 'audio' holds an empty path, ' '"),
        (
            '{"audio": "audio/0.wav", "task": "sqa", "response": "x", "question": " "}',
            r"m.jsonl:2: .* needs a 'question'",
        ),
        (
            '{"audio": "audio/0.wav", "task": "asr", "response": "\\ud800"}',
            r"m.jsonl:2: 'response' is not valid Unicode",
        ),
        ('{"audio": "a.wav", "response": "x", "audio": "b.wav"}', r"m.jsonl:2: .*'audio' is written twice in one obj"),
        ('{"audio": "audio/0.wav", "task": "asr", "response": "x", "id": 1.5}', "'id' must be text, found float 1.5"),
    ],
)
def test_a_bad_line_is_named(folder: Path, line: str, message: str) -> None:
    good = json.dumps({"audio": "audio/0.wav", "task": "asr", "response": "x"})
    (folder / "m.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ManifestError, match=message):
        load_manifest(folder / "m.jsonl")


def test_a_mark_before_the_first_line_is_no_part_of_it(folder: Path) -> None:
    row = {"audio": "audio/0.wav", "task": "asr", "response": "\u00e4"}
    (folder / "m.jsonl").write_text(json.dumps(row) + "\r\n", encoding="utf-8-sig")
    assert load_manifest(folder / "m.jsonl")["response"][0] == ["\u00e4"]
    (folder / "m.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="latin-1")
    with pytest.raises(ManifestError, match=r"m.jsonl: .*UTF-8 .*0xe4.*convert"):
        load_manifest(folder / "m.jsonl")


def test_labels_and_fields_that_cannot_be_kept_are_named(caplog: pytest.LogCaptureFixture) -> None:
    features = Features({"audio": Value("string"), "response": ClassLabel(names=["sad"]), "day": Value("date32")})
    rows = {"audio": ["a.wav"] * 2, "response": [0, -1], "day": [date(2026, 1, 2)] * 2}
    source = Dataset.from_dict(rows, features=features)
    with caplog.at_level(logging.WARNING):
        assert from_datasets(source.select([0]), task="er")["response"][:] == [["sad"]]
    assert "the field 'day' is left out: date cannot be kept as JSON" in caplog.text
    with pytest.raises(ManifestError, match="dataset: row 1: field 'response' is missing or empty"):
        from_datasets(source, task="er")


def test_a_manifest_of_parts_of_files_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"audio": "audio/0.wav", "task": "asr", "response": "x", "duration": 0.1}
    load_manifest(write_manifest(folder / "m.jsonl", [{**row, "offset": 0.0}, {**row, "offset": "0.0"}]))
    assert "offset" not in caplog.text
    load_manifest(write_manifest(folder / "m.jsonl", [row, {**row, "offset": 0.1}]))
    assert "the field 'offset' does not cut clips, which are read whole; cut the files by it" in caplog.text


def test_missing_files_can_be_left_for_later(folder: Path) -> None:
    path = write_manifest(folder / "m.jsonl", [{"audio": "none.wav", "task": "asr", "response": "x"}])
    assert len(load_manifest(path, check_files=False)) == 1


def test_salmonn_annotations(folder: Path) -> None:
    entries = [
        {"path": "audio/0.wav", "text": "hello", "expand_wav": None},
        {"path": "audio/0.wav", "text": "yes", "task": "speaker_verification", "expand_wav": ["audio/1.wav"]},
        {"path": "audio/1.wav", "text": "red", "task": "QA", "Q": "Which colour?", "speaker": "s1"},
        {"path": "audio/1.wav", "text": "sad", "task": "emotion_recognition"},
    ]
    (folder / "a.json").write_text(json.dumps({"annotation": entries}))
    dataset = load_salmonn(folder / "a.json")
    assert dataset.features == FEATURES
    assert dataset["task"][:] == ["asr", "sv", "sqa", "er"]
    assert [(row["join"], len(row["audio"])) for row in dataset][:2] == [(None, 1), ("concatenate", 2)]
    assert dataset[2]["question"] == "Which colour?" and extra_fields(dataset[2]) == {"speaker": "s1"}


def test_salmonn_tasks_that_are_not_known_can_be_mapped(folder: Path) -> None:
    entry = {"path": "audio/0.wav", "text": "a sad voice", "task": "describe_voice"}
    (folder / "a.json").write_text(json.dumps({"annotation": [entry]}))
    with pytest.raises(ManifestError, match="annotation 0: .*'describe_voice'"):
        load_salmonn(folder / "a.json")
    assert load_salmonn(folder / "a.json", task_names={"describe_voice": "voice"})["task"][0] == "voice"
    for content in ("[]", '{"annotation": null}'):
        (folder / "b.json").write_text(content)
        with pytest.raises(ManifestError, match="SALMONN's format"):
            load_salmonn(folder / "b.json")


def test_any_data_set_becomes_the_same_schema(folder: Path) -> None:
    path = str(folder / "audio" / "0.wav")
    source = Dataset.from_dict({"file": [path, path], "text": ["one", "two"], "speaker": [1, 2]})
    source = source.cast_column("file", Audio(decode=False))
    columns = {"audio": "file", "response": "text"}
    dataset = from_datasets(source, columns, task="asr", origin="mine")
    assert dataset.features == FEATURES
    assert dataset[1]["response"] == ["two"] and dataset[1]["id"] == "mine: row 1"
    assert extra_fields(dataset[1]) == {"speaker": 2}
    streamed = list(from_datasets(source.to_iterable_dataset(), columns, task="asr", origin="mine"))
    assert streamed == list(dataset)
    manifest = load_manifest(write_manifest(folder / "m.jsonl", [{"audio": path, "task": "er", "response": "sad"}]))
    assert len(concatenate_datasets([dataset, manifest])) == 3


def test_arrays_and_files_of_any_data_set_are_read(folder: Path) -> None:
    samples = np.linspace(-0.5, 0.5, 800)
    source = Dataset.from_dict({"audio": [{"array": samples, "sampling_rate": RATE}], "response": ["x"]})
    row = from_datasets(source, task="asr")[0]
    assert np.allclose(load_waveform(row["audio"][0], target_rate=RATE), samples, atol=1e-6)
    lines = [{"sound": str(folder / "audio" / "1.wav"), "text": "hi"}]
    data = write_manifest(folder / "d.jsonl", lines)
    loaded = load_source("json", {"audio": "sound", "response": "text"}, task="asr", data_files=str(data))
    assert loaded.features == FEATURES and loaded["response"][0] == ["hi"]


def test_a_missing_column_is_named_with_the_fix() -> None:
    source = Dataset.from_dict({"file": ["a.wav"], "text": ["one"]})
    with pytest.raises(ManifestError, match=r"'audio'.*\['file', 'text'\].*columns={'audio'"):
        from_datasets(source, {"response": "text"}, task="asr")
    with pytest.raises(ManifestError, match="give task="):
        from_datasets(source, {"response": "text", "audio": "file"})
    with pytest.raises(ManifestError, match="columns names"):
        from_datasets(source, {"sound": "file"})


def test_clips_are_joined_with_silence_between_them(folder: Path) -> None:
    clips = [{"path": str(folder / "audio" / f"{i}.wav"), "bytes": None} for i in range(2)]
    first, second = read_clips(clips, RATE)
    assert (len(first), len(second)) == (RATE // 4, RATE // 2)
    (joined,) = read_clips(clips, RATE, join=True)
    assert np.array_equal(joined, np.concatenate([first, second]))
    (spaced,) = read_clips(clips, RATE, join=True, silence_seconds=0.1)
    gap = spaced[len(first) : -len(second)]
    assert len(gap) == RATE // 10 and not gap.any()
    assert row_seconds({"audio": clips}) == pytest.approx(0.75)
    assert clip_seconds({"path": "none.wav", "bytes": None}) is None
