"""Result of an evaluation, and the folder that it is saved to."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..analysis import PoolAnalysis
from ..data.files import write_json, write_json_lines


@dataclass
class EvaluationResult:
    """Result of an evaluation.

    Attributes:
        metrics: `{task: {metric: value}}`, a task's leading metric first, then diagnostics and the number of examples
            `n`. Error rates, accuracies and F1 are fractions; BLEU and chrF run to 100 and CIDEr to 10.
        intervals: `{task: {metric: (low, high)}}`, 95 % bootstrap intervals.
        predictions: one record per row of the data set, in its order: instruction, references and answer, the scores of
            the row and the selected prompts.
        settings: how the answers were generated.
        pool: analysis of the prompt pool; `None` for a model without one.
        rows: the data set that was evaluated, whose recordings the report plays; `None` for a report without players.
        without_prompts: `{task: {metric: value}}` of the same model without prompts, k = 0; empty if not measured.
    """

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    intervals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    pool: PoolAnalysis | None = None
    rows: Dataset | None = None
    without_prompts: dict[str, dict[str, float]] = field(default_factory=dict)

    def name_data(self, sources: Iterable[str | os.PathLike[str]]) -> EvaluationResult:
        """The same result, with the folder and file of each source of its rows among the settings."""
        self.settings["data"] = ", ".join("/".join(Path(source).parts[-2:]) for source in sources)
        return self

    def save(self, folder: str | Path, extra: Mapping[str, Any] | None = None) -> Path:
        """Write `metrics.json`, `predictions.jsonl`, the report, and the pool's numbers and plots.

        Args:
            folder: created if needed.
            extra: further top-level entries of `metrics.json`, such as `{"train_seconds": 512.0}`.

        Returns:
            The folder.
        """
        from .report import write_report  # at load time the two modules would import each other

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "metrics.json", _without_nan(self.as_dict(extra)))
        write_json_lines(folder / "predictions.jsonl", map(_without_nan, self.predictions))
        write_report(self, folder, self.pool.save(folder / "pool") if self.pool is not None else [])
        return folder

    def as_dict(self, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The content of `metrics.json`: the tasks, `extra`, and `details` with the intervals, the settings
        and the scores without prompts."""
        details: dict[str, Any] = {"confidence_95": self.intervals, "settings": self.settings}
        if self.without_prompts:
            details["without_prompts"] = self.without_prompts
        return {**self.metrics, **(extra or {}), "details": details}


def _without_nan(value: Any) -> Any:
    """The value with null in place of NaN, which JSON does not know."""
    if isinstance(value, Mapping):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
