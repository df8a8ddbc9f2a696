"""Utterances with transcript and emotion, from manifests or any `datasets` data set.

All rows of one recording are one utterance, whatever their tasks. Its transcript is the field `transcript` or `text`,
or the response of a speech recognition row; its emotion is the field `emotion`, or the response of an emotion
recognition row.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .manifest import FEATURES, ManifestError, check_object, to_row
from .sources import DataSource, folder_of, raw_records
from .tasks import extra_fields, tagged_text

logger = logging.get_logger(__name__)

COLUMNS = ("audio", "transcript", "emotion", "id")
_TRANSCRIPT_FIELDS = ("transcript", "text")
_ANSWERS = {"transcript": ("asr", "repeat"), "emotion": ("er", "ser")}


@dataclass(frozen=True)
class Utterance:
    """One utterance.

    Attributes:
        id: unique in its source.
        audio: its clips, `{"path", "bytes"}` each, as in the manifest schema.
        transcript: the words.
        emotion: the speaker's emotion; `None` if unknown.
        extra: further fields of its rows, such as `speaker`.
    """

    id: str
    audio: list[dict[str, Any]]
    transcript: str
    emotion: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def read_utterances(
    path: str | os.PathLike[str],
    columns: Mapping[str, str] | None = None,
    emotion_names: Mapping[str, str] | None = None,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    check_files: bool = True,
    format: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Utterance]:
    """Read the utterances of a source, each recording once.

    Args:
        path: any source of rows, see `DataSource`.
        columns: our column (`audio`, `transcript`, `emotion`, `id`) -> field of the source.
        emotion_names: emotions of the source -> names to use, such as `{"disgust": "disgusted"}`.
        name: configuration of a data set.
        split: split of a data set or corpus.
        revision: commit or tag of a data set.
        check_files: whether a missing audio file is an error.
        format: see `DataSource`.
        options: options of a corpus' reader.

    Returns:
        Utterances in the order of the source. Recordings without a transcript are left out, and their number is logged.

    Raises:
        ManifestError: a row that cannot be used, or no row has a transcript.
        FileNotFoundError: there is no such manifest.
    """
    unknown = set(columns or {}) - set(COLUMNS)
    if unknown:
        raise ManifestError(f"{path}: columns names {sorted(unknown)}, but there are {', '.join(COLUMNS)}")
    source = DataSource(os.fspath(path), format, name=name, split=split, revision=revision, options=dict(options or {}))
    columns, folder = dict(columns or {}), folder_of(source)
    if source.format == "audiofolder":
        columns = {"audio": "file_name", **columns}
    recordings: dict[str, dict[str, Any]] = {}
    absent, differing = set(columns.values()), list[str]()
    for where, record in raw_records(source):
        check_object(where, record)
        absent -= record.keys()
        found = _read(where, record, columns, folder, check_files)
        key = _recording_key(found["audio"])
        earlier = {name: value for name, value in recordings.get(key, {}).items() if value is not None}
        recordings[key] = {**found, **earlier}
        differing += [
            where for name in ("transcript", "emotion") if recordings[key][name] != (found[name] or earlier.get(name))
        ]
    if absent:
        raise ManifestError(f"{path}: no row has the field {sorted(absent)[0]!r} that columns={columns} names")
    spoken = [found for found in recordings.values() if found["transcript"]]
    if not spoken:
        raise ManifestError(f"{path}: no row has a transcript; name its field with columns={{'transcript': ...}}")
    if differing:
        logger.warning(
            f"{path}: {len(differing)} rows contradict an earlier row of the same recording, which counts; "
            f"the first: {differing[0]}"
        )
    if len(spoken) < len(recordings):
        logger.warning(
            f"{path}: left out {len(recordings) - len(spoken)} of {len(recordings)} recordings without a transcript"
        )
    names = emotion_names or {}
    unused = sorted(set(names) - {found["emotion"] for found in spoken})
    if unused:
        logger.warning(f"{path}: no recording has the emotion {unused[0]!r} that emotion_names names")
    return [Utterance(**{**found, "emotion": names.get(found["emotion"], found["emotion"])}) for found in spoken]


def text_input(row: Mapping[str, Any], tagged: bool) -> str:
    """The text that a text LLM reads in place of the recording of a row.

    Args:
        row: a row of the manifest schema. Its field `text_input` is used unchanged; without it the transcript is found
            as in `read_utterances`.
        tagged: whether to put the emotion, if the row has one, before the transcript.

    Raises:
        ValueError: the row has no transcript.
    """
    fields = {**row, **extra_fields(row)}
    if fields.get("text_input"):
        return fields["text_input"]
    words = _first_text(fields, _TRANSCRIPT_FIELDS, "transcript")
    if words is None:
        raise ValueError(f"row {row['id']!r} has no transcript of its recording; add a field 'transcript'")
    return tagged_text(words, _first_text(fields, ("emotion",), "emotion") if tagged else None)


def _read(
    where: str, record: Mapping[str, Any], columns: Mapping[str, str], folder: Path, check_files: bool
) -> dict[str, Any]:
    """The fields of an `Utterance` that one row has."""
    fields = {**record, **{ours: record.get(theirs) for ours, theirs in columns.items()}}
    # the schema reads and checks the audio; task and response are optional here
    row = to_row(where, {"audio": fields.get("audio"), "id": fields.get("id"), **_ANY_TASK}, folder, check_files)
    if record.get("join") is None and len(row["audio"]) > 1:
        fields = {}  # several recordings: the fields describe none of them alone
    known = {*FEATURES, *COLUMNS, *_TRANSCRIPT_FIELDS, *columns.values()}
    return {
        "id": row["id"],
        "audio": row["audio"],
        "transcript": _first_text(fields, _TRANSCRIPT_FIELDS, "transcript"),
        "emotion": _first_text(fields, ("emotion",), "emotion"),
        "extra": {name: value for name, value in fields.items() if name not in known},
    }


_ANY_TASK = {"task": "asr", "response": ""}


def _first_text(fields: Mapping[str, Any], names: tuple[str, ...], what: str) -> str | None:
    candidates = [fields.get(name) for name in names]
    if fields.get("task") in _ANSWERS[what]:
        response = fields.get("response")
        candidates.append(response[0] if isinstance(response, list) and response else response)
    texts = [text.strip() for text in candidates if isinstance(text, str) and text.strip()]
    return texts[0] if texts else None


def _recording_key(audio: list[dict[str, Any]]) -> str:
    parts = [hashlib.sha256(clip["bytes"]).hexdigest() if clip["bytes"] else clip["path"] for clip in audio]
    return "+".join(parts)
