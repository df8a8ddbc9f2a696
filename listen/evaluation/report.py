"""A readable report of an evaluation: `report.md`, which links to its plots, and `report.html`, which contains them.

The page is one file: the plots and short recordings of its examples are inside, and it loads nothing from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from ..analysis.escape import markdown, visible
from ..data.files import write_text
from ..data.tasks import get_task
from .clips import MAX_CLIP_SECONDS, embed_clips
from .confusions import Confusions, count_confusions
from .report_templates import HTML, MARKDOWN, SCRIPT, STYLE
from .result import EvaluationResult
from .scoring import LOWER_IS_BETTER, score_title

_SHOWN_EXAMPLES = 100  # of a task
_MATRIX_CLASSES = 16  # more classes are shown as a list of confusions
_CAPTIONS = {
    "prompt_usage": "How often the examples of each task selected each prompt of the pool.",
    "prompt_overlap": "How much the tasks share their prompts: 1 for the same prompts equally often, 0 for none.",
    "query_keys": "Mean cosine between the queries of a task and the keys of the prompts in use.",
    "query_map": "The queries, one point per example. Tasks that form separate clusters can get separate prompts.",
}
_SCALES = {"bleu": 100, "chrf": 100, "cider": 10}  # all other metrics are fractions
_LEGEND = (
    "Intervals: percentile bootstrap over examples. An arrow shows the better direction. BLEU and chrF run from 0 to "
    "100, CIDEr-D from 0 to 10, all others from 0 to 1; WER and CER exceed 1 where there are more errors than words or "
    "characters."
)


@dataclass(frozen=True)
class _Row:
    """A row of the table of results."""

    label: str
    value: str
    bare: str
    interval: str


def write_report(result: EvaluationResult, folder: str | Path, plots: Sequence[Path] = ()) -> None:
    """Write `report.md` and `report.html` into `folder`.

    Args:
        result: what to report. With `rows`, the page plays the recordings of its worst examples.
        folder: must exist.
        plots: PNG files of the pool inside `folder`. The Markdown file links to them, the HTML file contains them.
    """
    folder = Path(folder)
    bare = bool(result.without_prompts)
    content = {
        "title": _title(result.settings),
        "summary": _summary(result),
        "legend": _LEGEND + (" k = 0: the same model without prompts." if bare else ""),
        "settings": result.settings,
        "tasks": [_task(name, result) for name in result.metrics],
        "bare": bare,
        "pool": _describe_pool(result),
        "plots": [_plot(path, folder, result) for path in plots],
        "playable": result.rows is not None,
        "players": _players_note(result),
    }
    text = Environment(keep_trailing_newline=True, finalize=markdown)
    write_text(folder / "report.md", text.from_string(MARKDOWN).render(content))
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode("ascii")
    page = Environment(autoescape=True).from_string(HTML)
    write_text(folder / "report.html", page.render(content, style=STYLE, script=SCRIPT, script_hash=script_hash))


def _title(settings: Mapping[str, Any]) -> str:
    """Model, data, date and code, as far as they are known."""
    model = "/".join(Path(str(settings.get("model", "a model"))).parts[-3:])
    parts = [f"Evaluation of {model}"]
    if settings.get("data"):
        parts[0] += f" on {settings['data']}"
    if settings.get("date"):
        parts.append(settings["date"][:10])
    if settings.get("code"):
        parts.append(f"code {settings['code']}")
    return visible(", ".join(parts))


def _summary(result: EvaluationResult) -> str:
    tasks, total = len(result.metrics), len(result.predictions)
    text = f"{total} examples of {tasks} task{'s' if tasks > 1 else ''}"
    if not result.settings.get("num_prompts"):
        return f"{text}."
    return f"{text}, {result.settings['num_prompts']} prompts each from a pool of {result.settings['pool_size']}."


def _players_note(result: EvaluationResult) -> str:
    text = "Rows that are not perfect are marked."
    if result.rows is None:
        return text
    return f"{text} Recordings are cut to {MAX_CLIP_SECONDS:.0f} s; only the worst rows of each task have one."


def _rows(task: str, result: EvaluationResult) -> list[_Row]:
    values = {name: value for name, value in result.metrics[task].items() if name != "n"}
    bare = result.without_prompts.get(task, {})
    return [
        _Row(
            label=score_title(name),
            value=_number(name, value),
            bare=_number(name, bare[name]) if name in bare else "",
            interval=" – ".join(_number(name, end) for end in result.intervals[task].get(name, ())),
        )
        for name, value in values.items()
    ]


def _task(name: str, result: EvaluationResult) -> dict[str, Any]:
    """Scores, confusions and the worst examples of a task."""
    task, metric = get_task(name), next(iter(result.metrics[name]))
    places = [place for place, record in enumerate(result.predictions) if record["task"] == name]
    records = [result.predictions[place] for place in places]
    shown = sorted(places, key=lambda place: _goodness(result.predictions[place], metric))[:_SHOWN_EXAMPLES]
    share = 1 / len(result.metrics)
    clips = {} if result.rows is None else embed_clips(result.rows, shown, share)
    confusions = count_confusions(task, records)
    large = confusions is not None and len(confusions.labels) > _MATRIX_CLASSES
    return {
        "title": f"{task.title} ({name})",
        "metric": score_title(metric),
        "rows": _rows(name, result),
        "n": len(records),
        "note": _task_note(records, len(shown)),
        "asks": any(record.get("question") for record in records),
        "examples": [{**_example(result.predictions[i], metric), "clips": clips.get(i, [])} for i in shown],
        "confusion": None if confusions is None or large else _matrix(confusions),
        "confused": confusions.frequent(most=20) if large else [],
    }


def _task_note(records: Sequence[Mapping[str, Any]], shown: int) -> str:
    """The instruction where all examples share it, and how many examples are left out."""
    instructions = {record.get("instruction") for record in records}
    notes = [f"Instruction: {visible(*instructions)}"] if len(instructions) == 1 and all(instructions) else []
    if shown < len(records):
        notes.append(f"The worst {shown} of {len(records)} examples; all are in predictions.jsonl.")
    return " ".join(notes)


def _goodness(record: Mapping[str, Any], metric: str) -> float:
    """The score of an example with larger for better; undefined ones come last."""
    score = record["scores"].get(metric, math.nan)
    if math.isnan(score):
        return math.inf
    return -score if metric in LOWER_IS_BETTER else score


def _example(record: Mapping[str, Any], metric: str) -> dict[str, Any]:
    score = record["scores"].get(metric, math.nan)
    best = 0.0 if metric in LOWER_IS_BETTER else _SCALES.get(metric, 1)
    return {
        "id": visible(record.get("id") or f"row {record.get('index', '')}"),
        "question": visible(record.get("question") or ""),
        "expected": visible(" / ".join(record["references"])),
        "answered": visible(record["prediction"]),
        "score": _number(metric, score),
        "wrong": abs(score - best) > 1e-6,
    }


def _matrix(confusions: Confusions) -> dict[str, Any]:
    """Columns and rows of the table; the column of no class is left out where it is empty."""
    counts, columns = confusions.counts, [*confusions.labels, "no class"]
    if not counts[:, -1].any():
        counts, columns = counts[:, :-1], columns[:-1]
    percent = np.round(100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).astype(int)
    rows = [
        {"name": name, "cells": [{"count": n, "percent": p} for n, p in zip(counts[i], percent[i], strict=True)]}
        for i, name in enumerate(confusions.labels)
        if counts[i].any()
    ]
    return {"columns": columns, "rows": rows}


def _describe_pool(result: EvaluationResult) -> str:
    if result.pool is None:
        return ""
    usage, clusters = result.pool.usage, result.pool.clusters
    pool_size = usage.shares.shape[1]
    text = (
        f"The examples used {round(usage.share_used * pool_size)} of {pool_size} prompts; the entropy of selections is "
        f"{usage.entropy():.2f}, where 1 is uniform use of the whole pool."
    )
    if clusters is None or math.isnan(clusters.mean_cosine):
        return text
    text += f" Two queries have a mean cosine of {clusters.mean_cosine:.2f}."
    if len(usage.tasks) < 2 or math.isnan(clusters.silhouette):
        return text
    return text + (
        f" The nearest neighbour of a query belongs to the same task in {clusters.neighbour_accuracy:.0%} of cases "
        f"(chance {clusters.chance:.0%}), and the silhouette of the tasks is {clusters.silhouette:.2f}."
    )


def _plot(path: Path, folder: Path, result: EvaluationResult) -> dict[str, str]:
    return {
        "caption": _CAPTIONS[path.stem],
        "alt": _alternative(path.stem, result),
        "link": path.relative_to(folder).as_posix(),
        "data": base64.b64encode(path.read_bytes()).decode("ascii"),
    }


def _alternative(name: str, result: EvaluationResult) -> str:
    """What a plot shows, in words, for readers who cannot see it."""
    usage = result.pool.usage
    if name == "prompt_usage":
        first = np.argsort(-usage.shares, axis=1, kind="stable")[:, :3]
        most = [f"{task}: {', '.join(map(str, row))}" for task, row in zip(usage.tasks, first, strict=True)]
        return f"Heat map of tasks by prompts. Most selected prompts of {'; '.join(most)}."
    if name == "prompt_overlap":
        overlap = usage.weighted_jaccard() - 2 * np.eye(len(usage.tasks))
        first, second = np.unravel_index(overlap.argmax(), overlap.shape)
        pair = f"{usage.tasks[first]} and {usage.tasks[second]}, {overlap[first, second]:.2f}"
        return f"Matrix of the overlap of every two tasks. Largest: {pair}."
    if name == "query_keys":
        return "Heat map of the mean cosine of each task's queries and each key."
    return f"Scatter plot of the queries of {', '.join(usage.tasks)}."


def _number(metric: str, value: float) -> str:
    if math.isnan(value):
        return "undefined"
    return f"{value:.1f}" if _SCALES.get(metric, 1) == 100 else f"{value:.3f}"


def metrics_table(metrics: Mapping[str, Mapping[str, float]]) -> list[Sequence[str]]:
    """Rows `(task, metric, value, n)` of an evaluation, as text, for printing."""
    return [
        (task, name, _number(name, value), str(int(values["n"])) if "n" in values else "")
        for task, values in metrics.items()
        for name, value in values.items()
        if name != "n"
    ]
