"""Corpora of emotional speech: IEMOCAP, RAVDESS and Expresso."""

from __future__ import annotations

import re
from pathlib import Path

from ..audio import audio_files
from ..manifest import ManifestError
from ..text_files import read_lines
from .base import Corpus, Records, existing

IEMOCAP_EMOTIONS = {"neu": "neutral", "hap": "happy", "exc": "happy", "ang": "angry", "sad": "sad"}
"""Labels of IEMOCAP's four classes; happy and excited are one, as is usual (5531 utterances)."""

RAVDESS_EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
RAVDESS_STATEMENTS = ("Kids are talking by the door", "Dogs are sitting by the door")

_RATING = re.compile(r"^\[[\d.]+ - [\d.]+\]\t(\S+)\t(\w+)\t")
_TURN = re.compile(r"^(\S+) \[[\d.]+-[\d.]+\]: (.*)$")
_SPEECH = "03-01-*.*"  # modality 03 is audio alone, vocal channel 01 is speech


def read_iemocap(root: Path, split: str) -> Records:
    """`SessionN/dialog/EmoEvaluation/*.txt`, `dialog/transcriptions/*.txt` and `sentences/wav/DIALOG/UTTERANCE.wav`.

    Utterances of other labels, such as frustrated, and those without agreement are no part of the four classes.
    """
    session = root / split.capitalize()
    ratings = existing(session / "dialog" / "EmoEvaluation", "IEMOCAP's labels")
    for path in sorted(ratings.glob("Ses*.txt")):
        words = _iemocap_words(session / "dialog" / "transcriptions" / path.name)
        for where, line in read_lines(path):
            found = _RATING.match(line)
            if found is None or found[2] not in IEMOCAP_EMOTIONS:  # ratings of single persons, other labels
                continue
            name = found[1]
            if name not in words:
                raise ManifestError(f"{where}: utterance {name!r} has no transcription")
            audio = session / "sentences" / "wav" / path.stem / f"{name}.wav"
            speaker = f"{name[:5]}{name.rsplit('_', 1)[1][0]}"  # Ses01 and F or M of the turn
            fields = {"id": name, "audio": audio, "speaker": speaker, "transcript": words[name]}
            yield where, {**fields, "emotion": IEMOCAP_EMOTIONS[found[2]]}


def _iemocap_words(path: Path) -> dict[str, str]:
    turns = (_TURN.match(line) for _, line in read_lines(path))
    return {turn[1]: turn[2].strip() for turn in turns if turn}


def read_ravdess(root: Path, split: str) -> Records:
    """`Actor_NN/03-01-EMOTION-INTENSITY-STATEMENT-REPETITION-ACTOR.wav`, the recordings of speech."""
    folder = existing(root / f"Actor_{split.removeprefix('actor')}", "the folder of an actor")
    emotions, statements = (dict(enumerate(names, 1)) for names in (RAVDESS_EMOTIONS, RAVDESS_STATEMENTS))
    for path in audio_files(folder, _SPEECH):
        numbers = path.stem.split("-")
        try:
            emotion, intensity, statement = (int(number) for number in numbers[2:5])
            fields = {"emotion": emotions[emotion], "transcript": statements[statement]}
        except (ValueError, KeyError) as error:
            raise ManifestError(f"{path}: expected a name such as 03-01-06-01-02-01-12.wav") from error
        speaker = int(split.removeprefix("actor"))
        yield str(path), {"id": path.stem, "audio": path, "speaker": speaker, "intensity": intensity, **fields}


def read_expresso(root: Path, split: str) -> Records:
    """`splits/SPLIT.txt`, `read_transcriptions.txt` and `audio_48khz/read/SPEAKER/STYLE/base/ID.wav`.

    The short read sentences only: dialogues have two speakers, and long readings no transcript of their parts. The
    emotion is the style; the style `default` is `neutral`.
    """
    lines = read_lines(existing(root / "read_transcriptions.txt", "the transcripts of the read sentences"))
    words = {name: text.strip() for _, line in lines for name, _, text in [line.partition("\t")]}
    for where, line in read_lines(existing(root / "splits" / f"{split}.txt", "the names of a split")):
        name = line.split("\t")[0].strip()
        if name.startswith("#") or "_longform_" in name or "-" in name.split("_")[0]:
            continue
        if name not in words:
            raise ManifestError(f"{where}: {name!r} has no line in read_transcriptions.txt")
        speaker, style, *rest = name.split("_")
        if not rest:
            raise ManifestError(f"{where}: expected a name such as ex01_happy_00001, found {name!r}")
        audio = root / "audio_48khz" / "read" / speaker / style / "base" / f"{name}.wav"
        emotion = "neutral" if style == "default" else style
        fields = {"id": name, "audio": audio, "speaker": speaker, "style": style}
        yield where, {**fields, "transcript": words[name], "emotion": emotion}


_SESSIONS = {"session1": 1085, "session2": 1023, "session3": 1151, "session4": 1031, "session5": 1241}
_ACTORS = tuple(f"actor{number:02d}" for number in range(1, 25))
_BY_EMOTION = {"er": "emotion", "ser": "emotion", "asr": "transcript", "repeat": "transcript"}

IEMOCAP = Corpus(
    name="iemocap",
    title="IEMOCAP",
    licence="research only, by a signed agreement with USC",
    homepage="https://sail.usc.edu/iemocap/",
    splits=_SESSIONS,  # four classes, 5531 utterances
    # leave one session out: test-3 is session 3, train-3 all others; 5 is held out where none is named
    aliases={
        **{f"test-{n}": (f"session{n}",) for n in range(1, 6)},
        **{f"train-{n}": tuple(name for name in _SESSIONS if name != f"session{n}") for n in range(1, 6)},
        "train": ("session1", "session2", "session3", "session4"),
        "test": ("session5",),
    },
    answers=_BY_EMOTION,
    text="transcripts as they are, with marks such as [LAUGHTER]; happy and excited are happy, four classes in all",
    read=read_iemocap,
)
RAVDESS = Corpus(
    name="ravdess",
    title="RAVDESS (speech)",
    licence="CC BY-NC-SA 4.0",
    homepage="https://zenodo.org/records/1188976",
    splits=dict.fromkeys(_ACTORS, 60),  # 1440 files of 24 actors: Livingstone and Russo, PLoS ONE 2018
    aliases={"train": _ACTORS[:18], "dev": _ACTORS[18:20], "test": _ACTORS[20:]},  # ours; it has no official splits
    answers={name: answer for name, answer in _BY_EMOTION.items() if name != "ser"},  # calm is none of its classes
    text="the two statements as they are; emotions in the corpus' own words",
    read=read_ravdess,
)
EXPRESSO = Corpus(
    name="expresso",
    title="Expresso (read sentences)",
    licence="CC BY-NC 4.0",
    homepage="https://speechbot.github.io/expresso/",
    splits={"train": 10380, "dev": 628, "test": 588},  # the authors' split files without dialogues and long readings
    answers={name: answer for name, answer in _BY_EMOTION.items() if name != "ser"},  # enunciated is none of them
    text="transcripts as they are; the style default is called neutral",
    read=read_expresso,
)
