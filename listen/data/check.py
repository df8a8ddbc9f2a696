"""Checks of data before a run: rows, tasks, hours, labels, longest recordings, and what is broken or missing."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..audio_listen import read_clips
from .audio import clip_seconds
from .corpora import CORPORA
from .manifest import ManifestError
from .sources import DataSource, checked_rows, expected_rows
from .tasks import get_task

MAX_LABELS = 30
"""A task with at most this many different answers, each of several rows, has labels to balance."""

_RATE = 16_000  # Hz; to decode with, nothing depends on it


@dataclass
class SourceReport:
    """What a source holds.

    Attributes:
        label: the path of the source, with its split.
        rows: rows that can be used.
        expected_rows: rows of the complete corpus; `None` if unknown.
        tasks: rows of each task.
        seconds: seconds of audio of each task; a clip counts once for each row that uses it.
        labels: answer -> rows, for tasks whose answers are labels.
        longest: the longest recordings as `(seconds, path or row)`, the longest first.
        unmeasured: clips whose length is unknown, as for URLs.
        problems: broken rows and files, each with its place.
    """

    label: str
    rows: int = 0
    expected_rows: int | None = None
    tasks: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    labels: dict[str, Counter[str]] = field(default_factory=dict)
    longest: list[tuple[float, str]] = field(default_factory=list)
    unmeasured: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether nothing is broken or missing."""
        return not self.problems


def check_source(source: DataSource, decode: bool = False, num_longest: int = 3) -> SourceReport:
    """Read every row of a source and look at every audio file.

    Args:
        source: what to check; `tasks` of it are kept, `max_rows` is not applied.
        decode: whether to decode each file in full, in place of its header; slow, but finds truncated files.
        num_longest: number of longest recordings to name.

    Returns:
        The report. Nothing is raised for broken rows, missing files or a source that cannot be read: they are problems
        of the report.
    """
    report = SourceReport(f"{source.label} ({source.split})" if source.format in CORPORA else source.label)
    lengths: dict[str, float | str | None] = {}
    try:
        report.expected_rows = expected_rows(source)
        for where, row in checked_rows(source):
            if isinstance(row, ManifestError):
                report.problems.append(str(row))
            elif source.tasks is None or row["task"] in source.tasks:
                _count(report, where, row, lengths, decode)
    except (OSError, ValueError) as error:
        report.expected_rows = None
        place = "" if str(error).startswith(source.label) else f"{report.label}: "
        rest = "; what follows in this source was not read" if report.rows or report.problems else ""
        report.problems.append(f"{place}{error}{rest}")
    _finish(report, lengths, num_longest)
    return report


def _count(
    report: SourceReport, where: str, row: Mapping[str, Any], lengths: dict[str, float | str | None], decode: bool
) -> None:
    """Add a row; `lengths` holds seconds, or what is wrong, of each clip that was seen before."""
    task = row["task"]
    report.rows += 1
    report.tasks[task] += 1
    report.labels.setdefault(task, Counter()).update(row["response"][:1])
    if not all(response.strip() for response in row["response"]):
        report.problems.append(f"{where}: 'response' is empty")
    for number, clip in enumerate(row["audio"]):
        name = clip["path"] if clip["bytes"] is None else f"{where}: clip {number}"
        if name not in lengths:
            lengths[name] = _measure(clip, decode)
            if isinstance(lengths[name], str):
                report.problems.append(f"{where}: {lengths[name]}")
        if isinstance(lengths[name], float):
            report.seconds[task] += lengths[name]


def _measure(clip: Mapping[str, Any], decode: bool) -> float | str | None:
    """Seconds of a clip; the words for what is wrong with it; or `None` where it is not looked at."""
    path = clip["path"]
    if clip["bytes"] is None and "://" in path:
        return None
    if clip["bytes"] is None and not os.path.isfile(path):
        return f"there is no audio file {path}"
    seconds = None if decode else clip_seconds(clip)
    if seconds is None:  # also formats that another library has to read
        try:
            seconds = len(read_clips([clip], _RATE)[0]) / _RATE
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            return f"{path or 'the audio'} cannot be read: {error}"
    return float(seconds) if seconds else f"{path or 'the audio'} holds no samples"


def _finish(report: SourceReport, lengths: Mapping[str, float | str | None], num_longest: int) -> None:
    known = ((seconds, name) for name, seconds in lengths.items() if isinstance(seconds, float))
    report.longest = sorted(known, reverse=True)[:num_longest]
    report.unmeasured = sum(seconds is None for seconds in lengths.values())
    report.labels = {task: Counter(dict(found)) for task, found in _label_counts(report)}
    if report.expected_rows is not None and report.rows != report.expected_rows:
        report.problems.append(f"{report.label}: {report.rows} rows, but the corpus has {report.expected_rows}")
    elif not report.rows and not report.problems:
        report.problems.append(f"{report.label}: no rows")


def _label_counts(report: SourceReport) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    for task, answers in report.labels.items():
        repeated = report.tasks[task] > 2 * len(answers)
        if get_task(task).labels or (len(answers) <= MAX_LABELS and repeated):
            yield task, answers.most_common(MAX_LABELS)


__all__ = ["MAX_LABELS", "SourceReport", "check_source"]
