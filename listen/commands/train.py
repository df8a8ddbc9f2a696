"""Train a LiSTEN adapter.

One process:    listen train --config examples/configs/listen-llama3-8b.yaml
Eight GPUs:     accelerate launch --num_processes 8 examples/train.py --config examples/configs/listen-llama3-8b.yaml
Resume:         ... --training.resume
Arguments:      listen train --help; with all values: ... --print_config
Override:       ... --training.learning_rate 1e-4 --model.prompt_pool.pool_size 200 --data.train my.jsonl

Arguments are those of `listen.training.arguments`. The run's folder (`--training.output_dir`) gets the checkpoints,
TensorBoard logs, what is needed to repeat the run, and the trained adapter under `model/`. A folder with results is
only written to by resuming its run. On SIGTERM the state is saved, and the exit status is 143.
"""

from __future__ import annotations

import shlex
import signal
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..modeling_listen import ListenForConditionalGeneration
from ..training import RunArguments, TrainingStopped, TrainResult, parse_arguments, train
from ..training.datasets import count_tasks
from ..training.help import answer_questions
from ..training.progress import task_scores
from ..training.push import MODEL_FOLDER
from ..training.run_folder import CONFIG_FILE


class StartTable(TrainerCallback):
    """Prints the parameters and the rows of a run as one short table before the first step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Once, on the main process."""
        if state.is_world_process_zero:
            table = start_table(kwargs["model"], count_tasks(kwargs["train_dataloader"].dataset), state.max_steps)
            with tqdm.external_write_mode():  # the progress bar is there already
                Console(markup=False).print(table)


def start_table(model: ListenForConditionalGeneration, rows: dict[str, int], steps: int) -> Table:
    """Parameters of each part, and training rows of each task.

    Args:
        model: the model that is trained.
        rows: of each task; empty for streams.
        steps: optimiser steps of the run.
    """
    table = Table("what", title=f"{steps} steps")
    for heading in ("all", "trainable"):
        table.add_column(heading, justify="right")
    for part, counts in parameter_counts(model).items():
        table.add_row(f"parameters: {part}", *(f"{count:,}" for count in counts))
    for task, count in rows.items():
        table.add_row(f"rows: {task}", f"{count:,}", "")
    return table


def parameter_counts(model: ListenForConditionalGeneration) -> dict[str, tuple[int, int]]:
    """All and trainable parameters of each backbone and of the adapter, each parameter once."""
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        words = [word for word in name.split(".") if word not in ("module", "model")]
        total, trainable = counts.get(words[0], (0, 0))
        counts[words[0]] = (total + parameter.numel(), trainable + parameter.numel() * parameter.requires_grad)
    return counts


def main() -> None:
    """Parse the command line, train, and print the scores, where the model is, and the next command."""
    answer_questions(sys.argv[1:], __doc__)
    run = parse_arguments(sys.argv[1:])
    quiet_when_redirected(run)
    try:
        result = train(run.model, run.data, run.training, raw=run.raw, callbacks=[StartTable()])
    except TrainingStopped as stop:
        print(stop)
        sys.exit(128 + signal.SIGTERM)
    if run.training.should_save:
        print_result(result, bool(run.data.eval))


def print_result(result: TrainResult, has_eval_data: bool) -> None:
    """Print the scores of each task, where the model is, and the next command."""
    table = Table("task", "metric", "value", title="Scores of the final evaluation")
    losses = {name: value for name, value in result.eval_metrics.items() if name.endswith("_loss")}
    scores = {"all": losses, **task_scores(result.eval_metrics)}
    for task, values in scores.items():
        for name, value in values.items():
            table.add_row(task, name.removeprefix("eval_"), f"{value:.4g}")
    console = Console(markup=False, highlight=False, soft_wrap=True)
    if table.row_count:
        console.print(table)
    folder = result.model_folder
    model, recipe, output = (shlex.quote(str(folder.parent / name)) for name in (MODEL_FOLDER, CONFIG_FILE, "eval"))
    console.print(f"model saved to {folder}")
    if has_eval_data:
        console.print(f"next: listen eval --config {recipe} --model {model} --output {output}")
    else:
        console.print(f'next: listen ask clip.wav "What is being said?" --model {model}')


def quiet_when_redirected(run: RunArguments) -> None:
    """Without a terminal, a line for each log step in place of progress bars, unless the arguments name the bars."""
    if not sys.stderr.isatty() and "disable_tqdm" not in run.raw["training"]:
        run.training.disable_tqdm = True
