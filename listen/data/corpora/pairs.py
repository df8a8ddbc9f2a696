"""Corpora over the recordings of others or of pairs: CoVoST 2, LibriSQA and VoxCeleb1."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..audio import audio_files
from ..manifest import ManifestError
from ..text_files import read_json, read_json_lines, read_lines, read_table
from .base import Corpus, Records, column, existing

_VOXCELEB_FOLDERS = (".", "wav", "dev/wav", "test/wav", "vox1_dev_wav/wav", "vox1_test_wav/wav")
_VOXCELEB_PAIRS = {"train": 100_000, "dev": 5_000}
_Speakers = Mapping[str, list[Path]]


def read_covost2(root: Path, split: str, clips: str = "clips") -> Records:
    """`covost_v2.en_zh-CN.SPLIT.tsv`, as the authors' `get_covost_splits.py` writes it.

    Args:
        root: the folder of the tables.
        split: `train`, `dev` or `test`.
        clips: folder of Common Voice's English clips (version 4), relative to `root`.
    """
    table = existing(root / f"covost_v2.en_zh-CN.{split}.tsv", "written by get_covost_splits.py of CoVoST")
    for where, row in read_table(table, delimiter="\t", escaped=True):
        name = column(where, row, "path")
        fields = {"id": Path(name).stem, "audio": root / clips / name, "speaker": row.get("client_id")}
        fields |= {"transcript": column(where, row, "sentence").strip()}
        yield where, {**fields, "translation": column(where, row, "translation").strip()}


def read_librisqa(root: Path, split: str, librispeech: str = "../LibriSpeech") -> Records:
    """`LibriSQA-PartI/LibriSQA-PartI-SPLIT.json` over train-clean-360 and test-clean of LibriSpeech.

    Args:
        root: the folder of LibriSQA.
        split: `train` or `test`.
        librispeech: the folder of LibriSpeech, relative to `root`.
    """
    path = existing(root / "LibriSQA-PartI" / f"LibriSQA-PartI-{split}.json", "the questions of the split")
    for where, row in _json_rows(path):
        texts = [row.get(name) for name in ("speech_path", "question", "answer")] if isinstance(row, Mapping) else []
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ManifestError(f"{where}: expected texts for speech_path, question and answer, found {row!r:.200}")
        place = Path(row["speech_path"]).parts[-4:]  # split/speaker/chapter/file, whatever stands before
        fields = {"audio": root / librispeech / Path(*place), "question": row["question"].strip()}
        fields |= {"transcript": row["text"].strip().lower()} if row.get("text") else {}
        yield where, {"id": place[-1].rsplit(".", 1)[0], **fields, "answer": row["answer"].strip()}


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The objects of a JSON list or of JSON lines."""
    with path.open(encoding="utf-8-sig") as file:
        is_list = file.read(1) == "["
    if not is_list:
        yield from read_json_lines(path)
        return
    yield from ((f"{path}: row {number}", row) for number, row in enumerate(read_json(path)))


def read_voxceleb1(
    root: Path,
    split: str,
    trials: str = "veri_test.txt",
    num_pairs: int | None = None,
    dev_speakers: int = 40,
    seed: int = 0,
) -> Records:
    """The trials of `veri_test.txt` for test; pairs of other speakers, drawn by a seed, for train and dev.

    Half of the drawn pairs are of one speaker, in two different videos where there are two. Train and dev have no
    speaker in common, and none with the trials.

    Args:
        root: the folder with `veri_test.txt` and the clips, as `wav/SPEAKER/VIDEO/CLIP.wav` or in VoxCeleb's own
            `vox1_dev_wav` and `vox1_test_wav`.
        split: `train`, `dev` or `test`.
        trials: the list of test pairs; `veri_test2.txt` is the cleaned one.
        num_pairs: pairs to draw; 100 000 for train and 5 000 for dev by default.
        dev_speakers: speakers kept apart for dev.
        seed: fixes the speakers and the pairs.
    """
    tests = list(_trials(existing(root / trials, "VoxCeleb1's list of test pairs")))
    if split == "test":
        for number, (where, same, clips) in enumerate(tests):
            yield where, {"id": f"test-{number}", "audio": [_clip(root, clip) for clip in clips], "same": same}
        return
    tested = {clip.split("/")[0] for _, _, clips in tests for clip in clips}
    speakers = _speakers(root, tested)
    held_out = set(random.Random(seed).sample(sorted(speakers), min(dev_speakers, len(speakers) // 2)))
    chosen = {name: clips for name, clips in speakers.items() if (name in held_out) == (split == "dev")}
    yield from _drawn_pairs(root, split, chosen, num_pairs or _VOXCELEB_PAIRS[split], random.Random(f"{seed}-{split}"))


def _drawn_pairs(root: Path, split: str, speakers: _Speakers, num_pairs: int, rng: random.Random) -> Records:
    """Pairs of one speaker and of two in turn."""
    names = list(speakers)
    able = [name for name in names if len(speakers[name]) > 1]
    if len(names) < 2 or not able:
        raise ManifestError(f"{root}: {len(names)} speakers for {split}, {len(able)} of them with two clips or more")
    for number in range(num_pairs):
        if number % 2:
            pair, same = [rng.choice(speakers[name]) for name in rng.sample(names, 2)], "no"
        else:
            pair, same = _same_speaker(speakers[rng.choice(able)], rng), "yes"
        yield f"{root}: {split} pair {number}", {"id": f"{split}-{number}", "audio": pair, "same": same}


def _trials(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    for where, line in read_lines(path):
        label, *clips = line.split()
        if label not in ("0", "1") or len(clips) != 2:
            raise ManifestError(f"{where}: expected 0 or 1 and two clips, found {line!r}")
        yield where, "yes" if label == "1" else "no", clips


def _clip(root: Path, name: str) -> Path:
    """The place of a clip: the first folder that has it, or the usual one where none does."""
    places = [root / folder / name for folder in _VOXCELEB_FOLDERS]
    return next((place for place in places if place.is_file()), root / "wav" / name)


def _speakers(root: Path, left_out: set[str]) -> _Speakers:
    """Clips of each speaker, in order."""
    found: dict[str, list[Path]] = {}
    for folder in _VOXCELEB_FOLDERS:
        for speaker in sorted((root / folder).glob("id*")):
            clips = audio_files(speaker, "*/*.*") if speaker.name not in left_out else []
            if clips:
                found.setdefault(speaker.name, []).extend(clips)
    return dict(sorted(found.items()))


def _same_speaker(clips: list[Path], rng: random.Random) -> list[Path]:
    """Two clips of one speaker, from different videos where there are two."""
    first, second = rng.sample(clips, 2)
    others = [clip for clip in clips if clip.parent != first.parent]
    return [first, rng.choice(others) if others else second]


COVOST2 = Corpus(
    name="covost2",
    title="CoVoST 2, English to Chinese",
    licence="CC0; the code, CC BY-NC 4.0",
    homepage="https://github.com/facebookresearch/covost",
    splits={"train": 289430, "dev": 15531, "test": 15531},  # Wang et al., Interspeech 2021
    answers={"en2zh": "translation", "asr": "transcript"},
    text="translations and sentences as they are",
    read=read_covost2,
)
LIBRISQA = Corpus(
    name="librisqa",
    title="LibriSQA, part I",
    licence="none is named; its recordings, LibriSpeech: CC BY 4.0",
    homepage="https://huggingface.co/datasets/ZihanZhao/LibriSQA",
    splits={"train": 104014, "test": 2620},  # a question for each utterance of train-clean-360 and test-clean
    answers={"sqa": "answer"},
    text="questions and answers as they are; transcripts in lower case",
    read=read_librisqa,
)
VOXCELEB1 = Corpus(
    name="voxceleb1",
    title="VoxCeleb1",
    licence="CC BY 4.0; the videos belong to their owners",
    homepage="https://www.robots.ox.ac.uk/~vgg/data/voxceleb/",
    splits={**_VOXCELEB_PAIRS, "test": 37720},  # train and dev are drawn from 148 642 clips of 1211 speakers
    answers={"sv": "same"},
    text="1 is yes, 0 is no",
    read=read_voxceleb1,
)
