"""Corpora of read speech: LibriSpeech, speechocean762 and the Free Spoken Digit Dataset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..audio import audio_files
from ..manifest import ManifestError
from ..text_files import read_json, read_lines
from .base import Corpus, Records, existing

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SCORES = ("accuracy", "completeness", "fluency", "prosodic", "total")


def read_librispeech(root: Path, split: str) -> Records:
    """`SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt`, with `ID WORDS` in each line and `ID.flac` beside it."""
    folder = existing(root / split, f"the folder of the split {split}")
    for transcripts in sorted(folder.glob("*/*/*.trans.txt")):
        for where, line in read_lines(transcripts):
            name, _, words = line.partition(" ")
            if not words.strip():
                raise ManifestError(f"{where}: expected an utterance and its words, found {line!r}")
            fields = {"id": name, "audio": transcripts.parent / f"{name}.flac", "speaker": name.split("-")[0]}
            yield where, {**fields, "transcript": words.strip().lower()}


def read_speechocean(root: Path, split: str) -> Records:
    """Kaldi's `SPLIT/wav.scp`, `text` and `utt2spk`, and the sentence scores of `resource/scores.json`."""
    folder = existing(root / split, f"the folder of the split {split}")
    words, speakers = (_kaldi(folder / name) for name in ("text", "utt2spk"))
    scores_file = root / "resource" / "scores.json"
    scores = read_json(scores_file) if scores_file.is_file() else {}
    if not isinstance(scores, Mapping) or not all(isinstance(rated, Mapping) for rated in scores.values()):
        raise ManifestError(f"{scores_file}: expected an object with an object of scores for each utterance")
    for where, line in read_lines(folder / "wav.scp"):
        name, *place = line.split(maxsplit=1)
        if not place or name not in words or name not in speakers:
            raise ManifestError(f"{where}: utterance {name!r} needs a file, a line in text and one in utt2spk")
        rated = {key: value for key, value in scores.get(name, {}).items() if key in _SCORES}
        fields = {"id": name, "audio": root / place[0].strip(), "speaker": speakers[name], **rated}
        yield where, {**fields, "transcript": words[name].lower()}


def _kaldi(path: Path) -> Mapping[str, str]:
    """A Kaldi table: the first word of each line -> the rest of it."""
    found: dict[str, str] = {}
    for where, line in read_lines(path):
        key, _, value = line.replace("\t", " ").partition(" ")
        if found.setdefault(key, value.strip()) != value.strip():
            raise ManifestError(f"{where}: utterance {key!r} has another line before; keep one of them")
    return found


def read_fsdd(root: Path, split: str) -> Records:
    """`recordings/DIGIT_SPEAKER_TAKE.wav`; takes 0 to 4 are the test set."""
    for path in audio_files(existing(root / "recordings", "the folder of the recordings"), "[0-9]_*_*.*"):
        digit, speaker, take = path.stem.split("_", 2)
        if not take.isdigit():
            raise ManifestError(f"{path}: expected a name such as 7_jackson_32.wav")
        if (int(take) < 5) == (split == "test"):
            fields: dict[str, Any] = {"id": path.stem, "audio": path, "speaker": speaker}
            yield str(path), {**fields, "transcript": DIGITS[int(digit)]}


LIBRISPEECH = Corpus(
    name="librispeech",
    title="LibriSpeech",
    licence="CC BY 4.0",
    homepage="https://www.openslr.org/12",
    # utterances of each part: Panayotov et al., ICASSP 2015
    splits={
        "train-clean-100": 28539,
        "train-clean-360": 104014,
        "train-other-500": 148688,
        "dev-clean": 2703,
        "dev-other": 2864,
        "test-clean": 2620,
        "test-other": 2939,
    },
    aliases={"train": ("train-clean-100", "train-clean-360", "train-other-500")},
    answers={"asr": "transcript", "repeat": "transcript"},
    text="lower case; the corpus is in upper case without punctuation",
    read=read_librispeech,
)
SPEECHOCEAN762 = Corpus(
    name="speechocean762",
    title="speechocean762",
    licence="free for commercial and non-commercial use",
    homepage="https://www.openslr.org/101",
    splits={"train": 2500, "test": 2500},  # Zhang et al., Interspeech 2021
    answers={"asr": "transcript", "repeat": "transcript"},
    text="lower case; the corpus is in upper case without punctuation",
    read=read_speechocean,
)
FSDD = Corpus(
    name="fsdd",
    title="Free Spoken Digit Dataset",
    licence="CC BY-SA 4.0",
    homepage="https://github.com/Jakobovski/free-spoken-digit-dataset",
    splits={"train": 2700, "test": 300},  # its README: 3000 recordings, the takes 0 to 4 for test
    answers={"asr": "transcript", "repeat": "transcript"},
    text="the digit of the file name in words",
    read=read_fsdd,
)
