"""One loader for every source of rows, for training, evaluation, precomputed features and checks alike.

A source is a file (JSONL, SALMONN's JSON, CSV, TSV, parquet), a folder of recordings in the AudioFolder layout of
Hugging Face, a corpus in its authors' layout (`listen.data.corpora`), or a data set of the `datasets` library: a Hub
id, a folder of `save_to_disk`, or an object.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers.utils import logging

from ..tasks_listen import TASK_ALIASES
from .audio import AUDIO_SUFFIXES, audio_files
from .corpora import CORPORA
from .manifest import (
    FEATURES,
    ManifestError,
    from_datasets,
    is_saved_dataset,
    one_split,
    open_dataset,
    read_json_lines,
    read_salmonn,
    renamed,
    rows_of,
    to_dataset,
    to_row,
)
from .tasks import UnknownTaskError, get_task
from .text_files import read_table

logger = logging.get_logger(__name__)

FORMATS = ("manifest", "salmonn", "datasets", "csv", "parquet", "audiofolder", *CORPORA)
_SUFFIXES = {
    ".jsonl": "manifest",
    ".json": "salmonn",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl")
_MAPPED = ("datasets", "csv", "parquet", "audiofolder")
_FORMATS_OF_FIELDS = {
    "columns": _MAPPED,
    "task": (*_MAPPED, *CORPORA),
    "split": ("datasets", "audiofolder", *CORPORA),
    **dict.fromkeys(("name", "revision", "data_files"), ("datasets",)),
    "task_names": ("salmonn",),
    "options": tuple(CORPORA),
}
_Records = Iterator[tuple[str, Any]]


@dataclass
class DataSource:
    """One source of rows.

    Attributes:
        path: a file, a folder, a Hub id or another name for `datasets.load_dataset`; in Python also a data set of the
            `datasets` library.
        format: one of `FORMATS`; null decides by the suffix (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`) or by what
            the folder holds. The formats of corpora are always named.
        task: task of all rows; one of those that a corpus has answers for. Manifests and annotations name the task of
            each row.
        tasks: keep only rows of these tasks.
        columns: our column -> column of the source, or several columns that make a list.
        task_names: names of tasks in a SALMONN file -> our names.
        name: configuration of a Hub data set.
        split: its split, or that of a corpus; several are joined as in `dev-clean+dev-other`.
        revision: commit or tag of a Hub data set.
        data_files: files for a builder of `datasets`.
        options: options of a corpus' reader, such as `{clips: ../cv-corpus/clips}`.
        streaming: whether rows are read while they are used, in place of before the run.
        max_rows: max rows, drawn at random.
    """

    path: str | Dataset | IterableDataset
    format: str | None = None
    task: str | None = None
    tasks: list[str] | None = None
    columns: dict[str, str | list[str]] = field(default_factory=dict)
    task_names: dict[str, str] = field(default_factory=dict)
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    streaming: bool = False
    max_rows: int | None = None

    def __post_init__(self) -> None:
        """Set the format.

        Raises:
            ValueError: an unknown suffix, format, split or task, or a field that this format does not read.
        """
        self.format = self.format or _guess_format(self.path)
        if self.format not in FORMATS:
            raise ValueError(f"{self.label}: format={self.format!r} is unknown; choose one of {', '.join(FORMATS)}")
        for name, formats in _FORMATS_OF_FIELDS.items():
            if getattr(self, name) not in (None, False, {}, "train") and self.format not in formats:
                raise ValueError(
                    f"{self.label}: {name}={getattr(self, name)!r} has no meaning for format={self.format!r}, only for "
                    f"{', '.join(formats)}; leave it out"
                )
        try:
            self.tasks = None if self.tasks is None else [get_task(name).name for name in self.tasks]
        except UnknownTaskError as error:
            raise ValueError(f"{self.label}: tasks: {error}") from error
        if self.task in TASK_ALIASES:
            self.task = get_task(self.task).name
        if self.format in CORPORA:
            CORPORA[self.format].parts(self.split)

    @property
    def label(self) -> str:
        """The path, or a name for an object."""
        return self.path if isinstance(self.path, str) else "the data set"


def _guess_format(path: Any) -> str:
    if not isinstance(path, str):
        return "datasets"
    suffix = Path(path).suffix.lower()
    if suffix not in _SUFFIXES and Path(path).is_file():
        raise ValueError(f"{path}: unknown suffix {suffix!r}; expected {', '.join(_SUFFIXES)}, or name the format")
    return _SUFFIXES.get(suffix) or ("audiofolder" if _is_audio_folder(Path(path)) else "datasets")


def load_rows(source: DataSource, check_files: bool = True) -> Dataset | IterableDataset:
    """Read a source.

    Args:
        source: what to read.
        check_files: whether to raise for missing audio files now, in place of in the middle of training. Streams are
            not checked.

    Returns:
        A data set with the columns of `FEATURES`; iterable if the source streams.

    Raises:
        ManifestError: a row that cannot be used, with its file and line, or missing files: the first ones and their
            number.
        FileNotFoundError: there is no such file or folder.
        ValueError: a task or an option that a corpus does not have.
    """
    if source.format in ("datasets", "parquet"):
        return _load_dataset(source, check_files)
    folder = folder_of(source)
    if source.streaming:
        return IterableDataset.from_generator(_stream, features=FEATURES, gen_kwargs={"source": source})
    rows = to_dataset(read_records(source), folder, check_files)
    if source.format in CORPORA and source.max_rows is None:
        corpus, expected = CORPORA[source.format], expected_rows(source)
        if len(rows) != expected:
            logger.warning(f"{source.path}: {corpus.title}, {source.split}: {len(rows)} rows of {expected}")
    return rows


def expected_rows(source: DataSource) -> int | None:
    """The number of rows that a complete corpus gives; `None` for other formats and other numbers of drawn pairs."""
    if source.format not in CORPORA or "num_pairs" in source.options:
        return None
    return CORPORA[source.format].expected_rows(source.split)


def raw_records(source: DataSource) -> _Records:
    """The records of a source one by one with its own columns, each with its file and line.

    Raises:
        ManifestError, FileNotFoundError, ValueError: see `load_rows`.
    """
    path, form = source.path, source.format
    if form in CORPORA:
        return CORPORA[form].records(Path(path), source.split, source.task, source.options)
    if form in ("datasets", "parquet"):
        return rows_of(*_open(source))
    if form == "audiofolder":
        return _read_audio_folder(Path(path), source.split)
    if form == "salmonn":
        return read_salmonn(Path(path), source.task_names)
    return read_json_lines(Path(path)) if form == "manifest" else _read_csv(Path(path))


def read_records(source: DataSource) -> _Records:
    """The records of a source as those of a manifest, each with its file and line; `to_row` checks them.

    Raises:
        ManifestError, FileNotFoundError, ValueError: see `load_rows`.
    """
    records = raw_records(source)
    if source.format not in _MAPPED:
        return records
    columns = {"audio": "file_name", **source.columns} if source.format == "audiofolder" else source.columns
    return ((where, renamed(where, record, columns, source.task)) for where, record in records)


def checked_rows(source: DataSource) -> Iterator[tuple[str, dict[str, Any] | ManifestError]]:
    """Each row of a source with its file and line, or the error that it would raise; files are not looked for."""
    folder = folder_of(source)
    for where, record in read_records(source):
        try:
            yield where, to_row(where, record, folder, check_files=False)
        except ManifestError as error:
            yield where, error


def _stream(source: DataSource) -> Iterator[dict[str, Any]]:
    folder = folder_of(source)
    for where, record in read_records(source):
        yield to_row(where, record, folder, check_files=False)


def _load_dataset(source: DataSource, check_files: bool) -> Dataset | IterableDataset:
    opened, origin = _open(source)
    return from_datasets(opened, source.columns, source.task, origin, folder_of(source), check_files)


def _open(source: DataSource) -> tuple[Dataset | IterableDataset, str]:
    """The data set and its name for errors."""
    names = ("name", "split", "revision", "data_files")
    options = {name: getattr(source, name) for name in names}
    if not isinstance(source.path, str):
        opened = one_split(source.path, source.label, **options)
        stream = source.streaming and isinstance(opened, Dataset)
        return opened.to_iterable_dataset() if stream else opened, "dataset"
    if source.format == "parquet":
        opened = open_dataset("parquet", data_files=source.path, streaming=source.streaming)
        return opened, source.path
    opened = open_dataset(source.path, streaming=source.streaming, **options)
    return opened, f"{source.path}:{source.split}"


def folder_of(source: DataSource) -> Path:
    """The folder that relative audio paths start from: that of the file, or the one that holds all files."""
    if not isinstance(source.path, str):
        return Path.cwd()
    files = source.data_files or ""
    files = files if isinstance(files, list) else [files]
    # `datasets` looks for the files of a folder below it; elsewhere the path names a builder, or is a Hub id
    folders = [_folder(Path(source.path, file)) or _folder(Path(file)) or Path.cwd() for file in files]
    return Path(os.path.commonpath(folders)).resolve()


def _folder(path: Path) -> Path | None:
    """The folder of a file or of all files that fit a pattern, or the folder itself; `None` where there is nothing."""
    while not path.exists() and has_magic(str(path)):
        path = path.parent
    return (path if path.is_dir() else path.parent).absolute() if path.exists() else None


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    return read_table(path, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")


def _is_audio_folder(path: Path) -> bool:
    if not path.is_dir() or is_saved_dataset(path):
        return False
    if any(path.joinpath(*middle, name).is_file() for name in _METADATA for middle in ((), ("train",))):
        return True
    return any(file.suffix.lower() in AUDIO_SUFFIXES for depth in ("*", "*/*", "*/*/*") for file in path.glob(depth))


def _read_audio_folder(path: Path, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """`metadata.csv` (or `.tsv`, `.jsonl`) with a column `file_name`, or a folder of recordings for each class."""
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    root = path / split if (path / split).is_dir() else path
    if root == path and split != "train":
        raise FileNotFoundError(f"there is no folder {path / split} of the split {split!r}")
    tables = [root / name for name in _METADATA if (root / name).is_file()]
    if len(tables) > 1:
        raise ManifestError(f"{root}: both {tables[0].name} and {tables[1].name} name its recordings; keep one")
    if tables:
        records = read_json_lines(tables[0]) if tables[0].suffix == ".jsonl" else _read_csv(tables[0])
        for where, record in records:
            yield where, _below(record, root)
    else:
        yield from _read_class_folders(root)


def _read_class_folders(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    files = audio_files(root, "*/*")
    if not files:
        raise ManifestError(
            f"{root}: no {', '.join(_METADATA)} and no folders of recordings, one for each class; write the answers "
            "into a metadata.csv with the columns file_name and response"
        )
    outside = [*audio_files(root, "*"), *audio_files(root, "*/*/**/*")]
    if outside:
        raise ManifestError(
            f"{outside[0]}: {len(outside)} recordings lie beside or below the folders of the classes; move each into "
            "the folder of its class, or write a metadata.csv"
        )
    tables = [file for file in sorted(root.glob("*")) if file.suffix.lower() in _SUFFIXES]
    if tables and len({file.parent for file in files}) == 1:
        raise ManifestError(
            f"{root}: all recordings lie in one folder, so the answer to each would be {files[0].parent.name!r}, and "
            f"{tables[0].name} is not read; name that file as the path of the source"
        )
    others = [file for file in root.glob("*/*") if file.is_file() and file not in files and file.name[0] != "."]
    if others:
        logger.warning(f"{root}: left out {len(others)} files that are no known audio, such as {min(others)}")
    for file in files:
        yield str(file), {"file_name": file, "response": file.parent.name, "id": str(file.relative_to(root))}


def _below(record: Any, root: Path) -> Any:
    """The record with its `file_name` below the folder of the table, as Hugging Face reads it."""
    name = record.get("file_name") if isinstance(record, Mapping) else None
    return {**record, "file_name": root / name} if isinstance(name, str) and name else record


__all__ = [
    "AUDIO_SUFFIXES",
    "FORMATS",
    "DataSource",
    "checked_rows",
    "expected_rows",
    "folder_of",
    "load_rows",
    "raw_records",
    "read_records",
]
