"""Readers of corpora on real recordings.

Runs where the environment variable LISTEN_REAL_DATA names a folder with recordings of RAVDESS, FSDD, speechocean762 and
ESC-10 and manifests of them. The recordings carry their corpora's own names in another audio format; tables that are
not there are written anew from the manifests.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from listen.data.corpora import CORPORA
from listen.data.manifest import extra_fields
from listen.data.sources import DataSource, load_rows

DATA = Path(os.environ.get("LISTEN_REAL_DATA") or "missing")
MANIFESTS = ("er_train", "er_dev", "digits_train", "digits_dev", "asr_train", "acap_train", "acap_dev")
pytestmark = pytest.mark.skipif(
    not all((DATA / f"{name}.jsonl").is_file() for name in MANIFESTS),
    reason="LISTEN_REAL_DATA names no real recordings",
)


def manifest(name: str) -> dict[str, dict]:
    """File name -> row."""
    rows = map(json.loads, (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    return {Path(row["audio"]).stem: row for row in rows}


def read(root: Path, form: str, split: str, **fields: object) -> dict[str, dict]:
    return {row["id"]: row for row in load_rows(DataSource(str(root), format=form, split=split, **fields))}


@pytest.mark.parametrize("split", ["train", "dev"])
def test_ravdess_is_complete_and_its_labels_agree(split: str) -> None:
    rows, known = read(DATA / "audio" / "ravdess", "ravdess", split), manifest(f"er_{split}")
    assert len(rows) == CORPORA["ravdess"].expected_rows(split) and rows.keys() == known.keys()
    for name, row in rows.items():
        fields = extra_fields(row)
        assert row["response"] == [known[name]["response"]]
        assert {key: fields[key] for key in ("speaker", "intensity", "transcript")}.items() <= known[name].items()


def test_fsdd_training_set_is_complete_and_its_words_agree(tmp_path: Path) -> None:
    (tmp_path / "recordings").symlink_to(DATA / "audio" / "fsdd", target_is_directory=True)
    rows, known = read(tmp_path, "fsdd", "train"), manifest("digits_train") | manifest("digits_dev")
    assert len(rows) == CORPORA["fsdd"].expected_rows("train") and rows.keys() == known.keys()
    for name, row in rows.items():
        assert (row["response"], extra_fields(row)["speaker"]) == ([known[name]["response"]], known[name]["speaker"])


def test_speechocean762_is_complete_and_its_words_agree(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    known = manifest("asr_train")
    columns = {
        "wav.scp": lambda row: DATA / row["audio"],
        "text": lambda row: row["response"].upper(),
        "utt2spk": lambda row: row["speaker"],
    }
    for table, cell in columns.items():
        (tmp_path / "train" / table).write_text("".join(f"{name}\t{cell(row)}\n" for name, row in known.items()))
    rows = read(tmp_path, "speechocean762", "train")
    assert len(rows) == CORPORA["speechocean762"].expected_rows("train")
    assert {name: row["response"][0] for name, row in rows.items()} == {k: row["response"] for k, row in known.items()}


def test_esc10_folds_agree(tmp_path: Path) -> None:
    known = manifest("acap_train") | manifest("acap_dev")
    (tmp_path / "audio").mkdir()
    (tmp_path / "meta").mkdir()
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for name, row in known.items():
        fold, clip, take = name.split("-")
        (tmp_path / "audio" / f"{name}.opus").symlink_to(DATA / row["audio"])
        lines.append(f"{name}.opus,{fold},0,{row['label'].lower().replace(' ', '_')},True,{clip},{take}")
    (tmp_path / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    assert read(tmp_path, "esc50", "fold1+fold2+fold3").keys() == manifest("acap_train").keys()
    assert read(tmp_path, "esc50", "fold4").keys() == manifest("acap_dev").keys()
    folders = load_rows(DataSource(str(DATA / "audio" / "esc10"), format="audiofolder", task="acap"))
    classes = {Path(row["id"]).stem: row["response"][0].split("_-_")[1].replace("_", " ") for row in folders}
    assert classes == {name: row["label"] for name, row in known.items()}
