"""Corpora of sounds and their captions: Clotho, AudioCaps and ESC-50."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import logging

from ..manifest import ManifestError
from ..text_files import read_table
from .base import Corpus, Records, column, existing

logger = logging.get_logger(__name__)


def read_clotho(root: Path, split: str) -> Records:
    """`clotho_captions_SPLIT.csv` with five captions a row, and the recordings in the folder `SPLIT`."""
    table = existing(root / f"clotho_captions_{split}.csv", "the captions of the split")
    for where, row in read_table(table):
        name = column(where, row, "file_name")
        captions = [column(where, row, f"caption_{number}").strip() for number in range(1, 6)]
        yield where, {"id": name, "audio": root / split / name, "captions": captions}


def read_audiocaps(
    root: Path, split: str, file_name: str = "audio/{youtube_id}.wav", skip_missing: bool = False
) -> Records:
    """`SPLIT.csv`, one caption a row; the captions of a clip become one row.

    Args:
        root: the corpus' folder.
        split: `train`, `val` or `test`.
        file_name: where a clip lies below `root`; `{split}` and the columns of the table may stand in it.
        skip_missing: whether clips without a file, deleted from YouTube, are left out; their number is logged.
    """
    clips: dict[str, tuple[str, dict[str, str], list[str]]] = {}
    for where, row in read_table(existing(root / f"{split}.csv", "the captions of the split")):
        name = column(where, row, "youtube_id")
        clips.setdefault(name, (where, row, []))[2].append(column(where, row, "caption").strip())
    missing = 0
    for name, (where, row, captions) in clips.items():
        try:
            audio = root / file_name.format(**{**row, "split": split})
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ManifestError(f"{where}: file_name={file_name!r} may hold {{split}} and {', '.join(row)}") from error
        if skip_missing and not audio.is_file():
            missing += 1
            continue
        yield where, {"id": name, "audio": audio, "captions": captions}
    if missing:
        logger.warning(f"AudioCaps {split}: left out {missing} of {len(clips)} clips without a file")


def read_esc50(root: Path, split: str) -> Records:
    """`meta/esc50.csv` with the fold and the class of each file of `audio/`."""
    for where, row in read_table(existing(root / "meta" / "esc50.csv", "the table of ESC-50")):
        if f"fold{column(where, row, 'fold')}" == split:
            name, category = column(where, row, "filename"), column(where, row, "category")
            fields = {"id": Path(name).stem, "audio": root / "audio" / name, "label": category}
            yield where, {**fields, "esc10": row.get("esc10") == "True", "sound": category.replace("_", " ")}


CLOTHO = Corpus(
    name="clotho",
    title="Clotho v2.1",
    licence="captions: Tampere University, non-commercial; audio: the Freesound licence of each file",
    homepage="https://zenodo.org/records/4783391",
    splits={"development": 3839, "validation": 1045, "evaluation": 1045},
    aliases={"train": ("development",), "dev": ("validation",), "test": ("evaluation",)},
    answers={"acap": "captions"},
    text="captions as they are; all five are responses of the row",
    read=read_clotho,
)
AUDIOCAPS = Corpus(
    name="audiocaps",
    title="AudioCaps",
    licence="captions: MIT; audio: clips of YouTube videos, which belong to their owners",
    homepage="https://github.com/cdjkim/audiocaps",
    splits={"train": 49838, "val": 495, "test": 975},  # clips of version 1: dataset/README.md of the repository
    aliases={"dev": ("val",)},
    answers={"acap": "captions"},
    text="captions as they are; all captions of a clip are responses of one row",
    read=read_audiocaps,
)
ESC50 = Corpus(
    name="esc50",
    title="ESC-50",
    licence="CC BY-NC 3.0; its subset ESC-10: CC BY 3.0",
    homepage="https://github.com/karolpiczak/ESC-50",
    splits={f"fold{number}": 400 for number in range(1, 6)},  # Piczak, ACM Multimedia 2015
    aliases={"train": ("fold1", "fold2", "fold3", "fold4"), "test": ("fold5",)},
    answers={"acap": "sound"},
    text="the class in words, such as crackling fire",
    read=read_esc50,
)
