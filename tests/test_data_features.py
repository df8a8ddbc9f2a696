"""The store of encoder features."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_model
from datasets import Dataset, Features
from datasets.arrow_writer import ArrowWriter
from filelock import Timeout
from fixtures_backbones import model_section, save_backbones
from fixtures_training import small_corpus, tiny_processor, write_clip, write_manifest

from listen.commands import precompute
from listen.data import FeatureStore, FeatureStoreError, load_manifest, precompute_features
from listen.data.audio import read_clips
from listen.data.features import EncodedRecording, collate_features, recording_keys, store_info, write_shard
from listen.data.files import lease, rename_complete
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


@pytest.mark.slow
def test_workers_that_are_spawned_give_the_same_features(tmp_path: Path) -> None:
    """As on macOS and Windows, and on Linux from Python 3.14 on: processes are not forked, all they need is pickled."""
    dataset = load_manifest(small_corpus(tmp_path, num_rows=3))
    default = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        spawned = compute(dataset, tmp_path / "spawned", num_workers=1)
    finally:
        multiprocessing.set_start_method(default, force=True)
    alone = compute(dataset, tmp_path / "alone")
    for row in dataset:
        (one,), (two,) = spawned.recordings(row), alone.recordings(row)
        assert torch.equal(one.speech, two.speech) and one.content == two.content


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


# ------------------------------------------------------------------ shared folders, replaced audio, damaged files


def compute_in_processes(works: list[tuple[Dataset, Path, int]]) -> None:
    """Each in a process of its own, all at once; each has to end well."""
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=compute, args=(dataset, folder), kwargs={"batch_size": 2, "shard_size": size})
        for dataset, folder, size in works
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(works)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.arrow"))


@pytest.mark.parametrize("size", [2, 512])
def test_runs_in_one_folder_at_the_same_time_lose_nothing(tmp_path: Path, size: int) -> None:
    dataset = load_manifest(small_corpus(tmp_path, num_rows=8))
    folder, straight = tmp_path / "features", compute(dataset, tmp_path / "straight", batch_size=2)
    parts = [dataset.select(range(5)), dataset.select(range(3, 8)), dataset]
    compute_in_processes([(part, folder, size) for part in parts])
    store = FeatureStore(folder)
    assert len(store) == 8 and store.verify() == []
    for row in dataset:
        (one,), (two,) = store.recordings(row), straight.recordings(row)
        torch.testing.assert_close(one.speech, two.speech, atol=5e-3, rtol=2e-3)
        assert one.num_samples == two.num_samples


def test_equal_runs_share_the_work(tmp_path: Path) -> None:
    dataset = load_manifest(small_corpus(tmp_path, num_rows=8))
    compute_in_processes([(dataset, tmp_path / "features", 2)] * 3)
    stored = sum(len(Dataset.from_file(str(shard))) for shard in shards(tmp_path / "features"))
    assert stored == len(FeatureStore(tmp_path / "features")) == 8


def test_runs_that_ask_for_shards_of_other_sizes_share_the_work(tmp_path: Path) -> None:
    dataset, folder = load_manifest(small_corpus(tmp_path, num_rows=8)), tmp_path / "features"
    compute_in_processes([(dataset, folder, size) for size in (2, 3, 8)])
    stored = [len(Dataset.from_file(str(shard))) for shard in shards(folder)]
    assert sum(stored) == len(FeatureStore(folder)) == 8 and max(stored) in (2, 3, 8)
    with pytest.raises(ValueError, match="shard_size=0 must be at least 1"):
        compute(dataset, folder, shard_size=0)


def start(dataset: Dataset, folder: Path) -> multiprocessing.Process:
    kwargs = {"batch_size": 1, "shard_size": 2}
    process = multiprocessing.get_context("fork").Process(target=compute, args=(dataset, folder), kwargs=kwargs)
    process.start()
    return process


def wait_for_claim(process: multiprocessing.Process, folder: Path) -> str:
    """The digest of a shard that the process has claimed."""
    while process.is_alive():
        for path in (folder / ".locks").glob("*.lock"):
            with suppress(FileNotFoundError):  # released meanwhile
                if f"pid={process.pid}\n" in path.read_text():
                    return path.stem
    raise AssertionError("the process has ended")


def contents(folder: Path) -> dict[str, tuple[bytes, str]]:
    rows = [row for shard in shards(folder) for row in Dataset.from_file(str(shard))]
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: (row["speech"], row["checksum"]) for row in rows}


def test_the_shard_of_a_killed_process_is_encoded_by_another_one(tmp_path: Path) -> None:
    dataset = load_manifest(small_corpus(tmp_path, num_rows=24))
    folder, straight = tmp_path / "features", tmp_path / "straight"
    compute(dataset, straight, batch_size=1, shard_size=2)
    first, *others = [start(dataset.shuffle(seed=seed), folder) for seed in range(3)]  # in any order of rows
    digest = wait_for_claim(first, folder)
    os.kill(first.pid, signal.SIGKILL)
    for process in (first, *others):
        process.join()
    assert [process.exitcode for process in (first, *others)] == [-signal.SIGKILL, 0, 0]
    assert len(list(folder.glob(f"shard-*-{digest}.arrow"))) == 1
    assert contents(folder) == contents(straight)
    assert FeatureStore(folder).verify() == [] and not list((folder / ".locks").glob("*.lock"))
    assert not list(folder.glob("*.tmp"))  # not even of the killed one


def test_the_shard_of_a_suspended_process_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a machine that does not answer; the process then ends well too."""
    monkeypatch.setattr("listen.data.files._LEASE_SECONDS", 0.5)
    dataset, folder = load_manifest(small_corpus(tmp_path, num_rows=12)), tmp_path / "features"
    process = start(dataset, folder)
    wait_for_claim(process, folder)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        store = compute(dataset, folder, batch_size=1, shard_size=2)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert len(store) == 12 and store.verify() == []
    process.join()
    assert process.exitcode == 0
    store = FeatureStore(folder)
    assert len(store) == 12 and store.verify() == []


def test_a_shard_whose_partial_file_another_run_removed_is_encoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a run that was suspended until another one had taken over its shard."""
    dataset, folder = load_manifest(small_corpus(tmp_path, num_rows=4)), tmp_path / "features"
    removed: list[Path] = []

    def remove_first(partial: Path, path: Path) -> None:
        if not removed:
            removed.append(partial)
            partial.unlink()
        rename_complete(partial, path)

    monkeypatch.setattr("listen.data.features.rename_complete", remove_first)
    store = compute(dataset, folder, shard_size=2)
    assert removed and len(store) == 4 and store.verify() == []
    assert contents(folder) == contents(compute(dataset, tmp_path / "straight", shard_size=2).folder)


def test_a_run_started_soon_after_one_that_was_killed_does_not_wait_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The empty lock is not old yet; of all that find it later, one at a time goes on."""
    monkeypatch.setattr("listen.data.files._LEASE_SECONDS", 0.5)
    monkeypatch.setattr("listen.data.files._LOOK_SECONDS", 0.5, raising=False)
    (tmp_path / "work.lock").touch()
    with lease(tmp_path / "work.lock").acquire(timeout=20), pytest.raises(Timeout):
        lease(tmp_path / "work.lock").acquire(timeout=0)
    assert not list(tmp_path.iterdir())


def test_files_of_runs_killed_while_the_store_was_opened_are_removed(tmp_path: Path) -> None:
    """A part of `store.json`, and the empty lock of a run killed between creating and writing it."""
    dataset, folder = load_manifest(small_corpus(tmp_path, num_rows=2)), tmp_path / "features"
    folder.mkdir()
    (folder / ".store.json.12-34.tmp").write_text("{")
    lock = folder / ".store.json.lock"
    lock.touch()
    os.utime(lock, (0, 0))
    assert len(compute(dataset, folder)) == 2
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        *(path.name for path in shards(folder)), "store.json",
    ]  # fmt: skip


def test_verify_finds_a_shard_with_fewer_rows_than_its_name_stands_for(tmp_path: Path) -> None:
    dataset, folder = load_manifest(small_corpus(tmp_path, num_rows=3)), tmp_path / "features"
    compute(dataset, folder)
    (shard,) = shards(folder)
    rows = Dataset.from_file(str(shard)).with_format("arrow")[:2]
    shard.unlink()
    with ArrowWriter(schema=rows.schema, path=str(shard)) as writer:
        writer.write_table(rows)
    (problem,) = FeatureStore(folder).verify()
    assert shard.name in problem and "2 rows are not all of its rows" in problem


def test_replaced_audio_is_encoded_again_and_copied_audio_is_not(tmp_path: Path) -> None:
    dataset = load_manifest(small_corpus(tmp_path, num_rows=3))
    folder, clip = tmp_path / "features", tmp_path / "audio" / "0.wav"
    compute(dataset, folder)
    os.utime(clip, (1, 1))
    compute(dataset, folder)
    assert len(shards(folder)) == 1
    write_clip(clip, 0.9, seed=9)
    with pytest.raises(FeatureStoreError, match="older audio for '../audio/0.wav'.*precompute_features.py"):
        FeatureStore(folder).recordings(dataset[0])
    store = compute(dataset, folder)
    assert len(store) == 3 and len(shards(folder)) == 2 and store.verify() == []
    assert store.recordings(dataset[0])[0].num_samples == FeatureStore(folder).recordings(dataset[0])[0].num_samples
    assert store.recordings(dataset[0])[0].num_samples == 14400
    clip.unlink()
    assert FeatureStore(folder).recordings(dataset[0])[0].num_samples == 14400  # training needs no audio


def test_a_replaced_clip_of_a_joined_recording_counts(tmp_path: Path) -> None:
    clips = [write_clip(tmp_path / f"{i}.wav", 0.4, seed=i) for i in range(2)]
    line = {"audio": ["0.wav", "1.wav"], "task": "asr", "response": "x", "join": "concatenate"}
    dataset = load_manifest(write_manifest(tmp_path / "m.jsonl", [line]))
    assert compute(dataset, tmp_path / "features").recordings(dataset[0])[0].num_samples == 12800
    write_clip(clips[1], 0.6)
    assert compute(dataset, tmp_path / "features").recordings(dataset[0])[0].num_samples == 16000


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_damaged_shard_is_named_and_only_its_recordings_are_encoded_again(tmp_path: Path, share: float) -> None:
    dataset = load_manifest(small_corpus(tmp_path, num_rows=4))
    folder = tmp_path / "features"
    compute(dataset, folder, shard_size=2)
    first, second = shards(folder)
    first.write_bytes(first.read_bytes()[: int(share * first.stat().st_size)])
    with pytest.raises(FeatureStoreError, match=f"{first.name} is damaged.*delete .*{first.name} and run"):
        compute(dataset, folder, shard_size=2)
    first.unlink()
    assert len(compute(dataset, folder, shard_size=2)) == 4 and second in shards(folder)


def test_verify_finds_changed_features_and_changed_audio(tmp_path: Path) -> None:
    dataset = load_manifest(small_corpus(tmp_path, num_rows=3))
    store = compute(dataset, tmp_path / "features")
    assert store.verify() == []
    clip = tmp_path / "audio" / "1.wav"
    times = clip.stat()
    data = bytearray(clip.read_bytes())
    data[-1] ^= 1
    clip.write_bytes(data)
    os.utime(clip, ns=(times.st_atime_ns, times.st_mtime_ns))  # size and time say nothing
    (problem,) = store.verify()
    assert "'../audio/1.wav'" in problem and "precompute_features.py" in problem
    (shard,) = shards(tmp_path / "features")
    stored = store.recordings(dataset[0])[0].speech.numpy().tobytes()
    content = shard.read_bytes()
    assert content.count(stored) == 1
    shard.write_bytes(content.replace(stored, stored[:-1] + bytes([stored[-1] ^ 1])))
    problems = FeatureStore(tmp_path / "features").verify()
    assert len(problems) == 2 and any(shard.name in problem and "checksum" in problem for problem in problems)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"speech_width": 4, "later": 1}', '{"speech_width": "4"}'])
def test_a_damaged_description_of_a_store_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(FeatureStoreError, match="store.json"):
        FeatureStore(tmp_path)


def test_a_store_of_an_earlier_version_is_read_and_extended(tmp_path: Path) -> None:
    dataset = load_manifest(small_corpus(tmp_path, num_rows=4))
    folder = tmp_path / "features"
    compute(dataset.select([0, 1]), folder)
    (shard,) = shards(folder)
    rows = [{k: v for k, v in row.items() if k not in ("content", "checksum")} for row in Dataset.from_file(str(shard))]
    features = Features({k: v for k, v in Dataset.from_file(str(shard)).features.items() if k in rows[0]})
    shard.unlink()
    with ArrowWriter(features=features, path=str(folder / "shard-00000-000.arrow")) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    store = compute(dataset, folder)
    assert len(store) == 4 and len(shards(folder)) == 2 and store.verify() == []


def test_the_script_encodes_and_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    manifest, script = small_corpus(tmp_path, num_rows=3), precompute
    training = {"use_cpu": True, "report_to": "none", "output_dir": str(tmp_path / "run")}
    data = {"train": [str(manifest)], "features": str(tmp_path / "features")}
    recipe = {"model": model_section(save_backbones(tmp_path / "backbones")), "data": data, "training": training}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def call(*options: str) -> str:
        monkeypatch.setattr("sys.argv", ["precompute_features.py", "--config", str(tmp_path / "recipe.yaml"), *options])
        script.main()
        return capsys.readouterr().out

    with pytest.raises(SystemExit, match="error: .*is not a feature store"):
        call("--verify")
    assert "3 recordings" in call() and "3 recordings in" in call("--verify")
    write_clip(tmp_path / "audio" / "1.wav", 0.8)
    with pytest.raises(SystemExit, match="2 problems"):
        call("--verify")
    assert "'../audio/1.wav'" in capsys.readouterr().out
    call()
    assert "complete" in call("--verify")
