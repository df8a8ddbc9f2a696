"""The store of encoder features."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from fixtures_training import small_corpus, tiny_processor, write_clip, write_manifest

from listen.data import FeatureStore, FeatureStoreError, load_manifest, precompute_features
from listen.data.audio import read_clips
from listen.data.features import EncodedRecording, collate_features, recording_keys, store_info, write_shard
from listen.evaluation.generate import generate_predictions

MODEL = tiny_model()
PROCESSOR = tiny_processor(MODEL.config)


def compute(dataset: Dataset, folder: Path, **options: object) -> FeatureStore:
    return precompute_features(MODEL, PROCESSOR, dataset, folder, progress=False, **options)


def test_features_of_a_batch_are_those_of_each_clip_alone(tmp_path: Path) -> None:
    dataset = load_manifest(small_corpus(tmp_path, num_rows=5))
    store = compute(dataset, tmp_path / "features", batch_size=3, shard_size=2)
    assert len(list((tmp_path / "features").glob("shard-*.arrow"))) == 3
    for row in dataset:
        (stored,) = store.recordings(row)
        wave = read_clips(row["audio"], 16000)
        features = PROCESSOR.feature_extractor(wave, sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            alone = MODEL.encode_audio(**features)
        assert stored.num_samples == len(wave[0])
        speech = alone.speech_hidden_states[alone.speech_hidden_states_mask.bool()]
        audio = alone.audio_hidden_states[alone.audio_hidden_states_mask.bool()]
        torch.testing.assert_close(stored.speech.float(), speech, atol=5e-3, rtol=2e-3)
        torch.testing.assert_close(stored.audio.float(), audio, atol=5e-3, rtol=2e-3)


def test_each_recording_is_stored_once_and_joined_ones_apart(tmp_path: Path) -> None:
    for i in range(2):
        write_clip(tmp_path / f"{i}.wav", 0.4, seed=i)
    pair = {"audio": ["0.wav", "1.wav"], "task": "sv", "response": "no"}
    lines = [pair, pair, {**pair, "join": "concatenate"}, {"audio": "0.wav", "task": "asr", "response": "x"}]
    dataset = load_manifest(write_manifest(tmp_path / "m.jsonl", lines))
    store = compute(dataset, tmp_path / "features")
    assert len(store) == 3
    assert [item.num_samples for item in store.recordings(dataset[2])] == [12800]


def test_interrupted_work_goes_on_and_nothing_is_computed_twice(tmp_path: Path) -> None:
    dataset = load_manifest(small_corpus(tmp_path, num_rows=6))
    folder = tmp_path / "features"
    whole = compute(dataset, folder, shard_size=2)
    (shards := sorted(folder.glob("shard-*.arrow")))[-1].unlink()
    (folder / "shard-00002-000.123.tmp").write_bytes(b"half a file")
    times = [shard.stat().st_mtime_ns for shard in shards[:-1]]
    again = compute(dataset, folder, shard_size=2)
    assert [shard.stat().st_mtime_ns for shard in shards[:-1]] == times
    keys = [key for row in dataset for key in recording_keys(row, folder)]
    assert all(torch.equal(again[key].speech, whole[key].speech) for key in keys)


def test_a_store_moves_with_its_audio(tmp_path: Path) -> None:
    dataset = load_manifest(small_corpus(tmp_path / "here", num_rows=3))
    compute(dataset, tmp_path / "here" / "features")
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = load_manifest(tmp_path / "there" / "train.jsonl")
    assert len(FeatureStore(tmp_path / "there" / "features").recordings(moved[0])) == 1


def test_audio_given_as_bytes_is_found_by_its_content(tmp_path: Path) -> None:
    data = write_clip(tmp_path / "a.wav", 0.4).read_bytes()
    row = load_manifest(write_manifest(tmp_path / "m.jsonl", [{"audio": "a.wav", "task": "asr", "response": "x"}]))[0]
    embedded = {**row, "audio": [{"path": None, "bytes": data}]}
    store = compute(Dataset.from_list([embedded]), tmp_path / "features")
    assert len(store.recordings({**embedded, "id": "other"})) == 1


def test_recordings_over_30_seconds_keep_their_chunks(tmp_path: Path) -> None:
    write_clip(tmp_path / "long.wav", 31.0)
    line = {"audio": "long.wav", "task": "asr", "response": "x"}
    dataset = load_manifest(write_manifest(tmp_path / "m.jsonl", [line]))
    (stored,) = compute(dataset, tmp_path / "features").recordings(dataset[0])
    assert stored.speech_frames == (1500, 50)
    assert collate_features([stored])["speech_hidden_states"].shape[:2] == (2, 1504)


def test_a_store_of_other_encoders_is_refused(tmp_path: Path) -> None:
    dataset = load_manifest(small_corpus(tmp_path, num_rows=2))
    store = compute(dataset, tmp_path / "features")
    other = store_info(tiny_model(seed=1), PROCESSOR.feature_extractor)
    with pytest.raises(FeatureStoreError, match="encoders="):
        store.check(other)
    with pytest.raises(FeatureStoreError, match="another setting"):
        precompute_features(tiny_model(seed=1), PROCESSOR, dataset, tmp_path / "features", progress=False)
    with pytest.raises(FeatureStoreError, match="join_silence_seconds=0.0.*join_silence_seconds=0.1.*another folder"):
        store.check(store_info(MODEL, PROCESSOR.feature_extractor, join_silence_seconds=0.1))
    with pytest.raises(FeatureStoreError, match="cannot be stored: trainable="):
        store_info(tiny_model(trainable=["adapter", "speech_encoder"]), PROCESSOR.feature_extractor)


def test_evaluation_reads_a_store_and_refuses_that_of_another_model(tmp_path: Path) -> None:
    dataset = load_manifest(small_corpus(tmp_path, num_rows=2))
    compute(dataset, tmp_path / "features")
    options = {"features": FeatureStore(tmp_path / "features"), "progress": False, "max_new_tokens": 2}
    assert len(generate_predictions(MODEL, PROCESSOR, dataset, **options)) == 2
    with pytest.raises(FeatureStoreError):
        generate_predictions(tiny_model(seed=8), PROCESSOR, dataset, **options)


def test_what_is_not_stored_is_named(tmp_path: Path) -> None:
    dataset = load_manifest(small_corpus(tmp_path, num_rows=3))
    store = compute(dataset.select([0]), tmp_path / "features")
    with pytest.raises(FeatureStoreError, match="'../audio/1.wav'.*precompute_features.py"):
        store.recordings(dataset[1])
    with pytest.raises(FeatureStoreError, match="is not a feature store"):
        FeatureStore(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "store.json").write_text(json.dumps({"speech_width": 4}))
    with pytest.raises(FeatureStoreError, match="holds no features yet"):
        FeatureStore(tmp_path / "empty")


def test_values_that_16_bits_cannot_hold_are_refused(tmp_path: Path) -> None:
    recording = EncodedRecording(100, torch.full((2, 4), 1e6), (2,))
    with pytest.raises(FeatureStoreError, match="'loud' do not fit into 16 bits"):
        write_shard(tmp_path / "shard-00000.arrow", iter([("loud", recording)]))
