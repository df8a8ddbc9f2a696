"""Data sets of a training run: the lengths that batches are grouped by."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from conftest import tiny_config
from datasets import IterableDataset
from fixtures_training import small_corpus, tiny_processor, write_manifest

from listen.data.audio import row_seconds
from listen.data.manifest import ManifestError
from listen.training.arguments import ArgumentError, DataArguments
from listen.training.datasets import build_eval_dataset, build_train_dataset
from listen.training.run import _embeddings_per_second
from listen.training.streaming import StreamReader


@pytest.mark.parametrize("rate", [3.0, 12.5])
def test_lengths_follow_the_rate_of_the_connector(tmp_path: Path, rate: float) -> None:
    manifest = str(small_corpus(tmp_path, num_rows=6))
    data = DataArguments(train=[manifest], eval=[manifest])
    for dataset in (build_train_dataset(data, 0, rate), build_eval_dataset(data, 0, rate)):
        for row in dataset:
            assert 0 < row["length"] - rate * row_seconds(row) < len(row["response"][0]) + 2
    assert "length" not in build_train_dataset(data, 0).column_names


def test_the_rate_is_what_the_processor_counts() -> None:
    processor = tiny_processor(tiny_config())
    assert _embeddings_per_second(processor) == pytest.approx(3.0, abs=0.1)  # a window of a third of a second


def test_a_source_without_rows_is_named(tmp_path: Path) -> None:
    manifest = str(small_corpus(tmp_path, num_rows=6))
    for source in (str(write_manifest(tmp_path / "empty.jsonl", [])), {"path": manifest, "tasks": ["sqa"]}):
        with pytest.raises(ArgumentError, match=r"(empty.jsonl|tasks=\['sqa'\]).*fill it"):
            build_train_dataset(DataArguments(train=[manifest, source]), 0)


def test_an_empty_response_is_found_before_the_run(tmp_path: Path) -> None:
    lines = small_corpus(tmp_path, num_rows=3).read_text().splitlines()
    manifest = write_manifest(tmp_path / "m.jsonl", [json.loads(lines[0]), {**json.loads(lines[1]), "response": " "}])
    data = DataArguments(train=[str(manifest)], eval=[str(manifest)])
    for build in (build_train_dataset, build_eval_dataset):
        with pytest.raises(ManifestError, match=r"\['m.jsonl:2'\].*empty response.*take them out"):
            build(data, 0)


def test_a_stream_comes_in_random_order_and_each_pass_in_another(tmp_path: Path) -> None:
    rows = [{"audio": f"{i}.wav", "response": str(i)} for i in range(40)]
    files = str(write_manifest(tmp_path / "rows.jsonl", rows))
    source = {"path": "json", "format": "datasets", "data_files": files, "streaming": True, "task": "asr"}
    stream = build_train_dataset(DataArguments(train=[source]), 0)
    assert isinstance(stream, IterableDataset) and len(list(stream)) == 40
    seen = [row["response"][0] for row in itertools.islice(StreamReader(stream, batch_size=3), 200)]
    passes = [seen[start : start + 40] for start in range(0, 200, 40)]
    assert all(set(one) == {row["response"] for row in rows} for one in passes)
    assert len({tuple(one) for one in [[row["response"] for row in rows], *passes]}) == 6
    assert seen == [row["response"][0] for row in itertools.islice(StreamReader(stream, batch_size=3), 200)]
