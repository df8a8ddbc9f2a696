"""Data sets of a training run: the lengths that batches are grouped by."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import tiny_config
from fixtures_training import small_corpus, tiny_processor

from listen.data.audio import row_seconds
from listen.training.arguments import DataArguments
from listen.training.datasets import build_eval_dataset, build_train_dataset
from listen.training.run import _embeddings_per_second


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
