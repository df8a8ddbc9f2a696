"""One schema for every source of rows: our JSONL manifests, SALMONN annotation files and any `datasets` data set.

A manifest holds one JSON object a line, its paths relative to the manifest's folder:

    {"audio": "a.flac", "task": "asr", "response": "hello there"}
    {"audio": ["a.flac", "b.flac"], "task": "sv", "response": "no"}
    {"audio": ["1.flac", "2.flac"], "join": "concatenate", "task": "sqa", "question": "Which word?", "response": "two"}
    {"audio": "rain.flac", "task": "acap", "response": ["Rain falls.", "It rains."], "label": "rain"}

Rows of every source get the columns of `FEATURES` with the same types, so that sources can be mixed: `audio` and
`response` are lists even for one clip and one answer, and fields outside the schema are kept as JSON text in `extra`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from datasets import Audio, Dataset, Features, IterableDataset, List, Value, load_dataset

from .tasks import UnknownTaskError, extra_fields, get_task

FEATURES = Features(
    {
        "id": Value("string"),
        "audio": List({"path": Value("string"), "bytes": Value("binary")}),
        "task": Value("string"),
        "response": List(Value("string")),
        "question": Value("string"),
        "instruction": Value("string"),
        "join": Value("string"),
        "extra": Value("string"),
    }
)
_KNOWN = tuple(name for name in FEATURES if name != "extra")
_REQUIRED = ("audio", "task", "response")
JOINS = (None, "concatenate")

SALMONN_TASKS = {
    "asr": "asr",
    "audiocaption": "acap",
    "audiocaption_v2": "acap",
    "emotion_recognition": "er",
    "speaker_verification": "sv",
    "translation_ec": "en2zh",
    "QA": "sqa",
    "inference_QA": "sqa",
    "gender_QA": "sqa",
}
"""Task names of SALMONN's prompt files (github.com/bytedance/SALMONN) and ours."""


class ManifestError(ValueError):
    """A row that cannot be used; the message starts with the file and the line."""


def load_manifest(path: str | os.PathLike[str], check_files: bool = True) -> Dataset:
    """Read one of our JSONL manifests.

    Args:
        path: the manifest; paths inside are relative to its folder.
        check_files: whether to raise for missing audio files now, instead of in the middle of training.

    Returns:
        A data set with the columns of `FEATURES` and absolute audio paths.

    Raises:
        ManifestError: broken JSON, a missing or ill-typed field, an unknown task or a missing file, with its line.
        FileNotFoundError: there is no such manifest.
    """
    path = Path(path)
    return _build(read_json_lines(path), path.parent.resolve(), check_files)


def load_salmonn(
    path: str | os.PathLike[str], check_files: bool = True, task_names: Mapping[str, str] | None = None
) -> Dataset:
    """Read an annotation file of SALMONN's format, `{"annotation": [{"path", "text", "task", "Q"?, "expand_wav"?}]}`.

    The clips of `expand_wav` follow the first one in the same recording, as in SALMONN's own data set.

    Args:
        path: the JSON file; relative audio paths are relative to its folder.
        check_files: see `load_manifest`.
        task_names: further task names -> ours, in addition to `SALMONN_TASKS`.

    Returns:
        A data set with the columns of `FEATURES`.

    Raises:
        ManifestError: another format, or a row that cannot be used, with its number.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    names = {**SALMONN_TASKS, **(task_names or {})}
    try:
        annotation = list(json.loads(path.read_text(encoding="utf-8-sig"))["annotation"])
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(f'{path}: expected {{"annotation": [...]}}, SALMONN\'s format, in UTF-8') from error
    numbered = ((f"{path}: annotation {number}", entry) for number, entry in enumerate(annotation))
    return _build(((where, _from_salmonn(where, entry, names)) for where, entry in numbered), path.parent, check_files)


def load_source(
    path: str,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    data_files: str | list[str] | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Read any source of the `datasets` library: a Hub id, a local folder or a builder such as `"json"`.

    Args:
        path: what `datasets.load_dataset` takes first.
        columns: our column -> column of the source, e.g. `{"response": "text"}`; other columns keep their names.
        task: task of all rows, if the source has no column for it.
        name: configuration of the data set.
        split: split of the data set, also sliced (`"train[:1%]"`).
        revision: commit or tag on the Hub.
        data_files: files for a builder.
        streaming: whether to stream the rows.

    Returns:
        A data set (iterable when streaming) with the columns of `FEATURES`.

    Raises:
        ManifestError: a required column is missing, or a row cannot be used.
    """
    source = load_dataset(path, name, split=split, revision=revision, data_files=data_files, streaming=streaming)
    return from_datasets(source, columns=columns, task=task, origin=f"{path}:{split}")


def from_datasets(
    source: Dataset | IterableDataset,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    origin: str = "dataset",
) -> Dataset | IterableDataset:
    """Convert a loaded data set to our schema.

    Audio may be a path, bytes, an `Audio` column, `{"array", "sampling_rate"}`, or a list of these.

    Args:
        source: the data set.
        columns: our column -> column of the source.
        task: task of all rows, if the source has no column for it.
        origin: name of the source, for ids and errors.

    Returns:
        The same kind of data set with the columns of `FEATURES`.

    Raises:
        ManifestError: see `load_source`.
    """
    features = source.features or {}
    mapping = {name: (columns or {}).get(name, name) for name in _KNOWN}
    _check_columns(mapping, columns or {}, features, task, origin)
    for name, feature in features.items():
        if isinstance(feature, Audio):
            source = source.cast_column(name, Audio(decode=False))  # the collator decodes, once

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        record = {key: value for key, value in row.items() if key not in mapping.values()}
        record.update({name: row[column] for name, column in mapping.items() if row.get(column) is not None})
        record["task"] = record.get("task") or task
        return to_row(f"{origin}: row {index}", record, Path.cwd(), check_files=False)

    return source.map(convert, with_indices=True, remove_columns=list(features) or None, features=FEATURES)


def to_row(where: str, record: Mapping[str, Any], folder: Path, check_files: bool = True) -> dict[str, Any]:
    """Check one record and convert it to the schema.

    Args:
        where: file and line: the start of every error, and its last part the id of a row without one.
        record: the fields of a manifest line.
        folder: audio paths are relative to it.
        check_files: whether to raise for missing audio files.

    Returns:
        A row with the columns of `FEATURES`.

    Raises:
        ManifestError: see `load_manifest`.
    """
    if not isinstance(record, Mapping):
        raise ManifestError(f"{where}: expected a JSON object, found {type(record).__name__}")
    missing = [name for name in _REQUIRED if record.get(name) is None]
    if missing:
        raise ManifestError(f"{where}: field {missing[0]!r} is missing; found {sorted(record)}")
    if record.get("join") not in JOINS:
        raise ManifestError(f"{where}: join={record['join']!r} is unknown; leave it out or use 'concatenate'")
    row = {name: _text(where, name, record.get(name)) for name in ("id", "question", "instruction", "join")}
    row["id"] = row["id"] or os.path.basename(where)  # the same in every folder
    row["task"] = _task(where, record["task"], has_question=bool(row["question"] or row["instruction"]))
    row["response"] = _responses(where, record["response"])
    row["audio"] = [_clip(where, clip, folder, check_files) for clip in _as_list(record["audio"])]
    if not row["audio"]:
        raise ManifestError(f"{where}: 'audio' holds no clip")
    extra = {name: value for name, value in record.items() if name not in _KNOWN and _is_json(value)}
    row["extra"] = json.dumps(extra, ensure_ascii=False) if extra else None
    return row


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The objects of a JSONL file, each with its file and line.

    Raises:
        ManifestError: a line that is not JSON, or a file that is not UTF-8.
        FileNotFoundError: there is no such file.
    """
    with path.open(encoding="utf-8-sig") as lines:  # some editors write a byte order mark
        try:
            yield from _parse_lines(path, lines)
        except UnicodeDecodeError as error:
            raise ManifestError(f"{path}: not UTF-8 ({error}); convert it") from error


def _parse_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ManifestError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
        yield where, record


def _build(records: Iterable[tuple[str, Any]], folder: Path, check_files: bool) -> Dataset:
    rows = [to_row(where, record, folder, check_files) for where, record in records]
    return Dataset.from_dict({name: [row[name] for row in rows] for name in FEATURES}, features=FEATURES)


def _from_salmonn(where: str, entry: Any, names: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or "path" not in entry or "text" not in entry:
        raise ManifestError(f"{where}: expected an object with 'path' and 'text'")
    task = entry.get("task", "asr")
    clips = [entry["path"], *_as_list(entry.get("expand_wav") or [])]
    record = {name: value for name, value in entry.items() if name not in ("path", "text", "Q", "expand_wav", "task")}
    task = names.get(task, task) if isinstance(task, str) else task
    record |= {"audio": clips, "response": entry["text"], "task": task, "question": entry.get("Q")}
    record["join"] = "concatenate" if len(clips) > 1 else None
    return record


def _check_columns(
    mapping: Mapping[str, str], asked: Mapping[str, str], features: Mapping[str, Any], task: str | None, origin: str
) -> None:
    unknown = set(asked) - set(_KNOWN)
    if unknown:
        raise ManifestError(f"{origin}: columns names {sorted(unknown)}, but ours are {', '.join(_KNOWN)}")
    if not features:  # the columns of a stream may be unknown before it is read
        return
    for name, column in mapping.items():
        needed = name in asked or (name in _REQUIRED and not (name == "task" and task))
        if needed and column not in features:
            raise ManifestError(
                f"{origin}: no column {column!r} for {name!r}; it has {sorted(features)}. "
                f"Map one with columns={{{name!r}: ...}}" + (" or give task=..." if name == "task" else "")
            )


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _text(where: str, name: str, value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, (str, int)):
        raise ManifestError(f"{where}: {name!r} must be text, found {type(value).__name__}")
    return str(value)


def _task(where: str, name: Any, has_question: bool) -> str:
    try:
        task = get_task(str(name))
    except UnknownTaskError as error:
        raise ManifestError(f"{where}: {error}") from error
    if task.needs_question and not has_question:
        raise ManifestError(f"{where}: task {name!r} needs a 'question'")
    return task.name


def _responses(where: str, value: Any) -> list[str]:
    responses = _as_list(value)
    if not responses or not all(isinstance(response, str) for response in responses):
        raise ManifestError(f"{where}: 'response' must be text or a list of texts, found {value!r}")
    return responses


def _clip(where: str, clip: Any, folder: Path, check_files: bool) -> dict[str, Any]:
    if isinstance(clip, (bytes, bytearray)):
        return {"path": None, "bytes": bytes(clip)}
    if isinstance(clip, Mapping):
        if clip.get("array") is not None:
            return {"path": clip.get("path"), "bytes": _encode(where, clip)}
        if clip.get("bytes") is not None:
            return {"path": clip.get("path"), "bytes": clip["bytes"]}
        clip = clip.get("path")
    if not isinstance(clip, (str, os.PathLike)):
        raise ManifestError(f"{where}: a clip must be a path, bytes or an audio column, found {type(clip).__name__}")
    if "://" in str(clip):
        return {"path": str(clip), "bytes": None}
    path = folder / clip
    if check_files and not path.is_file():
        raise ManifestError(f"{where}: there is no audio file {path}")
    return {"path": str(path), "bytes": None}


def _encode(where: str, clip: Mapping[str, Any]) -> bytes:
    if not clip.get("sampling_rate"):
        raise ManifestError(f"{where}: an audio array needs its 'sampling_rate'")
    buffer = BytesIO()
    samples = np.asarray(clip["array"], dtype=np.float32)
    soundfile.write(buffer, samples, int(clip["sampling_rate"]), format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


LOADERS: dict[str, Callable[..., Dataset | IterableDataset]] = {
    "manifest": load_manifest,
    "salmonn": load_salmonn,
    "datasets": load_source,
}
"""Reader of each format."""

__all__ = [
    "FEATURES",
    "JOINS",
    "LOADERS",
    "SALMONN_TASKS",
    "ManifestError",
    "extra_fields",
    "from_datasets",
    "load_manifest",
    "load_salmonn",
    "load_source",
    "read_json_lines",
    "to_row",
]
