"""What a person sees of a run: a line for each log step, and the scores of each task."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

from ..data.tasks import list_tasks

_TRACKERS_ONLY = ("_runtime", "_per_second", "_entropy", "_cosine", "epoch", "total_flos")  # ends of their names


def log_line(logs: Mapping[str, Any], state: TrainerState) -> str:
    """The figures of a log step that a person reads; trackers such as TensorBoard get all of them."""
    shown = {name: value for name, value in logs.items() if not name.endswith(_TRACKERS_ONLY)}
    figures = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
    ]
    return "  ".join([f"step {state.global_step}/{state.max_steps}", *figures])


class BarWithLines(ProgressCallback):
    """Upstream's progress bar, with short lines above it."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """On the main process, while it trains."""
        if self.training_bar is not None and logs:
            self.training_bar.write(log_line(logs, state))


class Lines(PrinterCallback):
    """The same lines where there is no bar."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """On the main process of each machine."""
        if state.is_local_process_zero and logs:
            sys.stdout.write(log_line(logs, state) + "\n")
            sys.stdout.flush()


def use_short_lines(trainer: Trainer) -> None:
    """Replace upstream's way of printing logs, a Python mapping of all figures."""
    for upstream, ours in ((ProgressCallback, BarWithLines), (PrinterCallback, Lines)):
        if trainer.pop_callback(upstream) is not None:
            trainer.add_callback(ours)


def task_scores(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Scores of generated answers in the metrics of an evaluation: task -> metric -> value."""
    scores: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        bare = name.removeprefix("eval_")
        task = max((task for task in list_tasks() if bare.startswith(f"{task}_")), key=len, default=None)
        if task is not None:
            scores.setdefault(task, {})[bare.removeprefix(f"{task}_")] = value
    return scores
