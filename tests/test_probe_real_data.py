"""Real acted emotion (RAVDESS): the miniature's embeddings tell emotions of speakers that the probe never heard.

Runs where the environment variable LISTEN_REAL_DATA names a folder with `er_train.jsonl`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from listen import ListenForConditionalGeneration, ListenProcessor
from listen.data.manifest import extra_fields, load_manifest
from listen.evaluation.embeddings import pooled_embeddings
from listen.evaluation.probe import probe_groups

DATA = Path(os.environ.get("LISTEN_REAL_DATA") or "missing")
FOLDER = Path(__file__).parents[1] / "model_cards" / "listen-tiny"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA / "er_train.jsonl").is_file(), reason="LISTEN_REAL_DATA names no real recordings"),
]


def test_emotions_of_held_out_speakers_are_told_better_than_by_chance() -> None:
    dataset = load_manifest(DATA / "er_train.jsonl")
    rows = dataset.select([i for i in range(len(dataset)) if i % 2 == 0])  # every other one: 540 of 18 actors
    model = ListenForConditionalGeneration.from_pretrained(FOLDER)
    processor = ListenProcessor.from_pretrained(FOLDER)
    embeddings = pooled_embeddings(model, processor, rows, batch_size=32, progress=False)
    labels = [row["response"][0] for row in rows]
    speakers = [str(extra_fields(row)["speaker"]) for row in rows]
    probe = probe_groups(embeddings, labels, speakers, folds=6)
    assert len(set(labels)) == 8 and len(set(speakers)) == 18 and probe.chance < 0.15
    assert probe.uar > 0.25 and probe.accuracy > probe.chance + 0.12  # measured: 0.33 and 0.35, chance 0.13
