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
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from io import BytesIO
from numbers import Real
from pathlib import Path
from typing import Any

import soundfile
from datasets import (
    Audio,
    ClassLabel,
    Dataset,
    Features,
    IterableDataset,
    List,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from transformers.utils import logging

from ..audio_listen import is_one_clip
from ..sources_listen import RATES, Source, open_source
from .files import json_text
from .tasks import UnknownTaskError, extra_fields, get_task, list_tasks
from .text_files import ManifestError, described, is_unicode, read_json, read_json_lines

logger = logging.get_logger(__name__)

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
Columns = Mapping[str, str | list[str]]
"""Our column -> column of a source, or several columns that make a list."""
_NAMED_FILES = 3  # further missing files that an error names
_PARTS = ("offset", "start", "end")  # by which other formats name a part of a file
_LONGEST_PATH = 1024  # a longer text is the clip itself in base64

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
    return to_dataset(read_json_lines(path), path.parent.resolve(), check_files)


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
    return to_dataset(read_salmonn(path, task_names), path.parent, check_files)


def read_salmonn(path: Path, task_names: Mapping[str, str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of an annotation file, each with its file and number; see `load_salmonn`."""
    names = {**SALMONN_TASKS, **(task_names or {})}
    content = read_json(path)
    annotation = content.get("annotation") if isinstance(content, Mapping) else None
    if not isinstance(annotation, list):
        raise ManifestError(
            f'{path}: expected {{"annotation": [...]}}, SALMONN\'s format, found {described(content)}; put others in a '
            ".jsonl file, one JSON object a line"
        )
    for number, entry in enumerate(annotation):
        where = f"{path}: annotation {number}"
        yield where, _from_salmonn(where, entry, names)


def load_source(
    path: str,
    columns: Columns | None = None,
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
        columns: our column -> column of the source, e.g. `{"response": "text"}`, or several columns that make a list;
            other columns keep their names.
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
    source = open_dataset(path, name, split, revision, data_files, streaming)
    return from_datasets(source, columns=columns, task=task, origin=f"{path}:{split}")


def open_dataset(
    path: str,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    data_files: str | list[str] | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """The data set itself, with its own columns; also a folder of `save_to_disk`. Arguments as in `load_source`.

    Raises:
        ManifestError: an unknown split, or a file that cannot be read, by name; of a stream, while it is read.
    """
    if is_saved_dataset(Path(path)):
        saved = one_split(load_from_disk(path), path, split, name=name, revision=revision, data_files=data_files)
        return saved.to_iterable_dataset() if streaming else saved
    try:
        opened = load_dataset(path, name, split=split, revision=revision, data_files=data_files, streaming=streaming)
    # they do not say what was wrong, or not in which file; an empty JSON file ends the search for its columns
    except (DatasetGenerationError, ValueError, StopIteration) as error:
        place = _file_of(error) or data_files or path
        reason = "no rows" if "corresponds to no data" in str(error) else error.__cause__ or str(error) or "no rows"
        raise ManifestError(f"{place}: {reason}") from error
    if isinstance(opened, IterableDataset):
        files = getattr(opened, "_ex_iterable", None)  # a part of `datasets` without a public name
        if hasattr(files, "generate_tables_fn"):  # of all builders that read files of rows
            files.generate_tables_fn = partial(_tables, files.generate_tables_fn)
    return opened


def one_split(opened: Any, origin: str, split: str, **unread: Any) -> Any:
    """A split of a data set, or of a mapping with one for each split, that is open already and ignores `unread`.

    Raises:
        ManifestError: it has no such split, or a value of `unread` is given.
    """
    for name, value in unread.items():
        if value:
            raise ManifestError(f"{origin}: {name}={value!r} has no meaning for a saved or open data set; leave it out")
    if isinstance(opened, Mapping):
        if split not in opened:
            raise ManifestError(f"{origin}: there is no split {split!r}; it has {', '.join(opened)}")
        return opened[split]
    if split not in ("train", str(opened.split)):
        raise ManifestError(f"{origin}: there is no split {split!r}; the data set has no splits, leave it out")
    return opened


def _tables(read: Callable[..., Iterator[Any]], **files: Any) -> Iterator[Any]:
    """The tables of the files of a stream; errors name the file, which `datasets` only logs."""
    try:
        yield from read(**files)
    except (ValueError, TypeError) as error:  # Arrow's and pandas' are among them
        raise ManifestError(f"{_file_of(error) or 'a file'}: {error}") from error


def _file_of(error: BaseException | None) -> str | None:
    """The file that a builder of `datasets` was reading: none of its errors holds it."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if "packaged_modules" in frame.f_code.co_filename and isinstance(frame.f_locals.get("file"), str):
                return frame.f_locals["file"]
        error = error.__cause__
    return None


def is_saved_dataset(path: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote this folder."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def from_datasets(
    source: Dataset | IterableDataset,
    columns: Columns | None = None,
    task: str | None = None,
    origin: str = "dataset",
    folder: Path | None = None,
    check_files: bool = False,
) -> Dataset | IterableDataset:
    """Convert a loaded data set to our schema.

    Audio may be a path, bytes, an `Audio` column, `{"array", "sampling_rate"}`, or a list of these.

    Args:
        source: the data set.
        columns: our column -> column of the source, or several columns that make a list.
        task: task of all rows, if the source has no column for it.
        origin: name of the source, for ids and errors.
        folder: relative audio paths start from it; the working directory by default.
        check_files: whether to raise for missing audio files; streams are not checked.

    Returns:
        The same kind of data set with the columns of `FEATURES`.

    Raises:
        ManifestError: see `load_source`.
    """
    features = source.features or {}
    if features:  # the columns of a stream may be unknown before it is read
        _check_columns(columns or {}, features, task, origin)
    place = folder or Path.cwd()
    source, labels = _undecoded(source)

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"{origin}: row {index}"
        record = renamed(where, _with_label_names(row, labels), columns or {}, task)
        return to_row(where, record, place, check_files=False)

    options: dict[str, Any] = {"with_indices": True, "remove_columns": list(features) or None, "features": FEATURES}
    if isinstance(source, Dataset):  # which cannot hash the function itself and would write all rows again in each run
        settings = [source._fingerprint, repr(features), origin, columns, task, str(place)]
        checks = [*(repr(get_task(name)) for name in list_tasks()), Path(__file__).read_bytes()]
        options["new_fingerprint"] = Hasher.hash([settings, checks])
    rows = source.map(convert, **options)
    if check_files and isinstance(rows, Dataset):
        refuse_missing_files(rows, [f"{origin}: row {index}" for index in range(len(rows))])
    return rows


def rows_of(source: Dataset | IterableDataset, origin: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a data set with its own columns, each with its place; labels by name, audio as it is stored."""
    source, labels = _undecoded(source)
    for index, row in enumerate(source):
        yield f"{origin}: row {index}", _with_label_names(row, labels)


def _undecoded(source: Dataset | IterableDataset) -> tuple[Dataset | IterableDataset, dict[str, ClassLabel]]:
    """The data set with its audio as it is stored, for the collator to decode once, and its columns of labels."""
    features = source.features or {}
    for name, feature in features.items():
        if isinstance(feature, Audio):
            source = source.cast_column(name, Audio(decode=False))
    return source, {name: feature for name, feature in features.items() if isinstance(feature, ClassLabel)}


def _with_label_names(row: Mapping[str, Any], labels: Mapping[str, ClassLabel]) -> dict[str, Any]:
    marks = {name: (row[name], kind) for name, kind in labels.items() if row[name] is not None}
    return {
        **row,
        **{name: kind.int2str(mark) if mark >= 0 else None for name, (mark, kind) in marks.items()},
    }  # -1: none


def renamed(where: str, record: Any, columns: Columns, task: str | None) -> Any:
    """A record with the fields of a manifest from the columns of another source.

    Args:
        where: file and line, for errors.
        record: column -> value; empty cells are left out.
        columns: our field -> its column, or several columns that make a list.
        task: task of the record where it names none.

    Raises:
        ManifestError: a required column is missing, or one of several clips.
    """
    if not isinstance(record, Mapping):
        return record
    _check_columns(columns, record, task, where)
    mapping = {name: _as_list(columns.get(name, name)) for name in _KNOWN}
    taken = {column for asked in mapping.values() for column in asked}
    filled = {
        name: value for name, value in record.items() if not (value is None or isinstance(value, str) and not value)
    }
    found = {name: value for name, value in filled.items() if name not in taken and name not in _KNOWN}
    for name, asked in mapping.items():
        values = [filled[column] for column in asked if column in filled]
        if name == "audio" and 0 < len(values) < len(asked):
            empty = next(column for column in asked if column not in filled)
            raise ManifestError(f"{where}: column {empty!r} of 'audio' is empty; name a file, or leave the row out")
        if values:
            found[name] = values if len(asked) > 1 else values[0]
    return {**found, "task": found.get("task") or task}


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
    check_object(where, record)
    missing = [name for name in _REQUIRED if record.get(name) is None]
    if missing:
        raise ManifestError(f"{where}: field {missing[0]!r} is missing or empty; found {sorted(record)}")
    if record.get("join") not in JOINS:
        raise ManifestError(f"{where}: join={record['join']!r} is unknown; leave it out or use 'concatenate'")
    row = {name: _text(where, name, record.get(name)) for name in ("id", "question", "instruction", "join")}
    row["id"] = row["id"] or os.path.basename(where)  # the same in every folder
    has_question = bool(row["question"] or row["instruction"])
    row["task"] = _task(where, record["task"], has_question, record.get("options"))
    if str(record.get("offset") or "").strip("0."):  # of NeMo's manifests
        logger.warning_once("the field 'offset' does not cut clips, which are read whole; cut the files by it")
    row["response"] = _responses(where, record["response"])
    row["audio"] = [_clip(where, clip, folder, check_files) for clip in _clips(record["audio"])]
    if not row["audio"]:
        raise ManifestError(f"{where}: 'audio' holds no clip")
    extra = {name: value for name, value in record.items() if name not in _KNOWN and _is_json(value)}
    if record.get("extra") is None:  # a row of the schema without further fields
        extra.pop("extra", None)
    if isinstance(record.get("extra"), str):  # a row of the schema: its further fields are packed already
        extra = {**_packed(extra.pop("extra")), **extra}
    for name in record.keys() - extra.keys() - {*_KNOWN, "extra"}:
        logger.warning_once(f"the field {name!r} is left out: {type(record[name]).__name__} cannot be kept as JSON")
    row["extra"] = json_text(extra) if extra else None
    _check_unicode(where, row)
    return row


def check_object(where: str, record: Any) -> None:
    """Raise a `ManifestError` for a record that is no object."""
    if not isinstance(record, Mapping):
        raise ManifestError(f"{where}: expected a JSON object, found {described(record)}")


def _packed(text: str) -> dict[str, Any]:
    """The fields of a column `extra`; any other text is a field itself."""
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    return fields if isinstance(fields, dict) else {"extra": text}


def _check_unicode(where: str, row: Mapping[str, Any]) -> None:
    """Refuse halves of characters, as of names of files in another encoding, which no table can store."""
    texts = {**row, "audio": [clip["path"] for clip in row["audio"]]}
    for name, value in texts.items():
        broken = [text for text in _as_list(value) if text is not None and not text.isascii() and not is_unicode(text)]
        if broken:
            raise ManifestError(f"{where}: {name!r} is not valid Unicode: {broken[0]!a:.80}; mend or rename it")


def to_dataset(records: Iterable[tuple[str, Any]], folder: Path, check_files: bool = True) -> Dataset:
    """Records with their file and line as a data set of the schema.

    Raises:
        ManifestError: a record that cannot be used, or missing files; see `refuse_missing_files`.
    """
    places, rows = [], []
    for where, record in records:
        places.append(where)
        rows.append(to_row(where, record, folder, check_files=False))
    dataset = Dataset.from_dict({name: [row[name] for row in rows] for name in FEATURES}, features=FEATURES)
    if check_files:
        refuse_missing_files(dataset, places)
    return dataset


def refuse_missing_files(dataset: Dataset, places: Sequence[str]) -> None:
    """Look for the local audio files of all rows.

    Args:
        dataset: rows of the schema, not filtered.
        places: file and line of each row.

    Raises:
        ManifestError: files that are not there: the first ones with their rows, and the number of all.
    """
    missing: dict[str, str] = {}
    known: set[str] = set()
    for row, path in _local_paths(dataset):
        if path not in known and not os.path.isfile(path):
            missing[path] = places[row]
        known.add(path)
    if missing:
        (first, where), *others = missing.items()
        further = "".join(f", {place}: {path}" for path, place in others[:_NAMED_FILES])
        total = f"; {len(missing)} of {len(known)} files are missing: also{further[1:]}" if others else ""
        total += ", ..." if len(others) > _NAMED_FILES else ""
        raise ManifestError(f"{where}: there is no audio file {first}{total}")


def _local_paths(dataset: Dataset) -> Iterator[tuple[int, str]]:
    """Row and path of each clip that is a local file. Only paths are read, not the bytes beside them."""
    start = 0
    for chunk in dataset.data.column("audio").chunks:
        clips = chunk.flatten()
        rows = [row for row, count in enumerate(chunk.value_lengths().to_pylist()) for _ in range(count)]
        paths = clips.field("path").to_pylist()
        for row, path, is_file in zip(rows, paths, clips.field("bytes").is_null().to_pylist(), strict=True):
            if is_file and path is not None and "://" not in path:
                yield start + row, path
        start += len(chunk)


def _from_salmonn(where: str, entry: Any, names: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or "path" not in entry or "text" not in entry:
        raise ManifestError(f"{where}: expected an object with 'path' and 'text', found {described(entry)}")
    task = entry.get("task", "asr")
    clips = [entry["path"], *_as_list(entry.get("expand_wav") or [])]
    record = {name: value for name, value in entry.items() if name not in ("path", "text", "Q", "expand_wav", "task")}
    task = names.get(task, task) if isinstance(task, str) else task
    record |= {"audio": clips, "response": entry["text"], "task": task, "question": entry.get("Q")}
    record["join"] = "concatenate" if len(clips) > 1 else None
    return record


def _check_columns(asked: Columns, present: Mapping[str, Any], task: str | None, origin: str) -> None:
    unknown = set(asked) - set(_KNOWN)
    if unknown:
        raise ManifestError(f"{origin}: columns names {sorted(unknown)}, but ours are {', '.join(_KNOWN)}")
    needed = {name: name for name in _REQUIRED if not (name == "task" and task)} | dict(asked)
    for name, columns in needed.items():
        absent = [column for column in _as_list(columns) if column not in present]
        if absent:
            raise ManifestError(
                f"{origin}: no column {absent[0]!r} for {name!r}; it has {sorted(present)}. "
                f"Map one with columns={{{name!r}: ...}}" + (" or give task=..." if name == "task" else "")
            )


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _clips(audio: Any) -> list[Any]:
    return [audio] if is_one_clip(audio) else list(audio)


def _text(where: str, name: str, value: Any) -> str | None:
    if value is None or isinstance(value, str) and not value.strip():
        return None
    if not isinstance(value, (str, int)):
        raise ManifestError(f"{where}: {name!r} must be text, found {described(value)}")
    return str(value)


def _task(where: str, name: Any, has_question: bool, options: Any) -> str:
    try:
        task = get_task(str(name))
    except UnknownTaskError as error:
        raise ManifestError(f"{where}: {error}") from error
    if task.needs_question and not has_question:
        raise ManifestError(f"{where}: task {name!r} needs a 'question'")
    if "{options}" in task.instruction_test and not isinstance(options, (list, tuple, type(None))):
        raise ManifestError(f"{where}: 'options' must be a list, a text for each class, found {described(options)}")
    return task.name


def _responses(where: str, value: Any) -> list[str]:
    responses = _as_list(value)
    if not responses or not all(isinstance(response, str) for response in responses):
        raise ManifestError(f"{where}: 'response' must be text or a list of texts, found {value!r:.80}")
    return responses


def _clip(where: str, clip: Any, folder: Path, check_files: bool) -> dict[str, Any]:
    """A clip as path or bytes; what is neither is opened, and samples are encoded as WAV."""
    part = next((name for name in _PARTS if clip.get(name) is not None), None) if isinstance(clip, Mapping) else None
    if part:
        raise ManifestError(f"{where}: {part!r} does not cut the clip, clips are read whole; cut the file")
    if isinstance(clip, Mapping) and all(clip.get(name) is None for name in ("array", "raw")):
        if clip.get("bytes") is not None:
            return {"path": clip.get("path"), "bytes": bytes(clip["bytes"])}
        named = [clip[name] for name in ("path", "audio", "audio_url", "url") if clip.get(name) is not None]
        if named:
            return _clip(where, named[0], folder, check_files)
    if isinstance(clip, str) and not clip.strip():
        raise ManifestError(f"{where}: 'audio' holds an empty path, {clip!r}")
    if isinstance(clip, (str, os.PathLike)) and not str(clip).startswith("data:") and len(str(clip)) < _LONGEST_PATH:
        if "://" in str(clip):
            return {"path": str(clip), "bytes": None}
        path = str(folder / clip)
        if check_files and not os.path.isfile(path):
            raise ManifestError(f"{where}: there is no audio file {path}")
        return {"path": path, "bytes": None}
    try:
        source = open_source(clip)
    except TypeError as error:
        raise ManifestError(f"{where}: a clip must be a path, bytes, samples or an audio column; {error}") from error
    except (OSError, ValueError) as error:
        raise ManifestError(f"{where}: {error}") from error
    content = source.file.getvalue() if isinstance(source.file, BytesIO) else _encode(where, source)
    return {"path": clip.get("path") if isinstance(clip, Mapping) else None, "bytes": content}


def _encode(where: str, source: Source) -> bytes:
    if not isinstance(source.rate, Real) or not RATES[0] <= source.rate <= RATES[1]:
        raise ManifestError(
            f"{where}: an audio array needs its 'sampling_rate', from {RATES[0]} to {RATES[1]}, not {source.rate!r:.80}"
        )
    buffer = BytesIO()
    soundfile.write(buffer, source.samples, int(source.rate), format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


__all__ = [
    "FEATURES",
    "JOINS",
    "SALMONN_TASKS",
    "ManifestError",
    "check_object",
    "extra_fields",
    "from_datasets",
    "is_saved_dataset",
    "load_manifest",
    "load_salmonn",
    "load_source",
    "open_dataset",
    "read_json",
    "read_json_lines",
    "read_salmonn",
    "refuse_missing_files",
    "renamed",
    "rows_of",
    "to_dataset",
    "to_row",
]
