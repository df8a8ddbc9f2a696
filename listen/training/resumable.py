"""A Trainer whose runs stop at SIGTERM and resume as if they had never stopped, down to the log."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from ..data.files import json_text, write_text
from .precision import warn_of_slow_bf16
from .progress import use_short_lines
from .sharded import ShardedTrainer
from .streaming import CollateUnlessSkipped, StreamReader, keep_whole

logger = logging.get_logger(__name__)

RUN_STATE_FILE = "run_state.json"
"""File of a checkpoint with the id of its run and the sums of the current logging window."""


class TrainingStopped(RuntimeError):
    """Training ended early by SIGTERM, after its state was saved; the message names checkpoint and fix."""


def read_run_state(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """What `RUN_STATE_FILE` of a checkpoint holds; nothing in checkpoints of earlier versions."""
    try:
        return dict(json.loads((Path(checkpoint) / RUN_STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


class ResumableTrainer(ShardedTrainer):
    """A Trainer with checkpoints that carry the id of their run and the sums behind the log.

    On SIGTERM, which machines that are taken away get before they are turned off, it finishes the step, saves a
    checkpoint and raises `TrainingStopped`.
    """

    def __init__(self, *, args: TrainingArguments, **kwargs: Any) -> None:
        if args.n_gpu > 1:  # upstream would cut batches by their first axis, which holds chunks of audio or rows
            logger.warning(
                f"training on {args.device} alone, one of {args.n_gpu} GPUs; for all of them, start the command with "
                f"accelerate launch --num_processes {args.n_gpu}"
            )
            args._n_gpu = 1
        super().__init__(args=args, **kwargs)
        warn_of_slow_bf16(self.model, args)
        self.run_id: str | None = None
        self.is_stopping = False
        self._resumed_from: str | None = None
        self._restored = False
        self._stream: StreamReader | None = None
        self._sigterm = threading.Event()
        self.add_callback(_ResumeCallback(self))
        use_short_lines(self)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As upstream.

        Raises:
            TrainingStopped: SIGTERM came; the run can be resumed.
        """
        self._resumed_from = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        with _noting_sigterm(self._sigterm):
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def window_state(self) -> dict[str, Any]:
        """Sums since the last log, over all processes; each process has to call it."""
        loss = self.accelerator.gather(self._tr_loss.reshape(1)).mean()
        return {
            "loss_sum": loss.item(),
            "logged_loss_sum": self._total_loss_scalar,
            "last_logged_step": self._globalstep_last_logged,
        }

    def restore_window(self, window: dict[str, Any]) -> None:
        """Go on with the sums of `window_state`."""
        self._tr_loss += window["loss_sum"]
        self._total_loss_scalar = window["logged_loss_sum"]
        self._globalstep_last_logged = window["last_logged_step"]
        self._restored = True

    def restore(self) -> None:
        """Restore the window of the checkpoint that training resumes from; those of earlier versions have none."""
        if self._stream is not None and not self.args.ignore_data_skip:
            self._stream.skipped_batches = self.state.global_step * self.args.gradient_accumulation_steps
        window = read_run_state(self._resumed_from).get("window") if self._resumed_from else None
        if window:
            self.restore_window(window)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As upstream; `train_loss` is the mean over the whole run, also after a resume."""
        if self._restored and "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def stop_requested(self) -> bool:
        """Whether any process got SIGTERM; all processes agree."""
        if self.args.world_size == 1:
            return self._sigterm.is_set()
        flag = torch.tensor(int(self._sigterm.is_set()), device=self.args.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item())

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        window = self.window_state()
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # upstream writes it last: incomplete until then
            write_text(folder / RUN_STATE_FILE, json_text({"run_id": self.run_id, "window": window}))
        super()._save_checkpoint(model, trial)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        output = super()._finalize_training(*args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        streams = is_training and isinstance(dataset, IterableDataset)
        if streams:
            place = self.args.process_index, self.args.world_size
            self._stream = dataset = StreamReader(dataset, self._train_batch_size, *place)
        loader = super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        base = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper starts the workers of that one
        base.worker_init_fn = partial(_ignore_sigterm, base.worker_init_fn)
        _end_workers_at_exit()
        if streams:
            keep_whole(base)
            base.collate_fn = CollateUnlessSkipped(base.collate_fn)
        return loader


class _ResumeCallback(TrainerCallback):
    """Restores the log's sums, and stops after a step and its checkpoint."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.restore()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.stop_requested() and state.global_step < state.max_steps:
            self.trainer.is_stopping = control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.is_stopping:
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            raise TrainingStopped(
                f"stopped by SIGTERM after step {state.global_step} of {state.max_steps}; the state is saved in "
                f"{checkpoint}. Run the same command with training.resume=true to go on"
            )


@contextmanager
def _noting_sigterm(event: threading.Event) -> Iterator[None]:
    """Set the event at SIGTERM in place of ending; only the main thread can do so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _ignore_sigterm(init: Callable[[int], None] | None, worker: int) -> None:
    """Launchers send SIGTERM to all processes, but the step under way still needs the data of its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if init is not None:
        init(worker)


@cache
def _end_workers_at_exit() -> None:
    if hasattr(signal, "SIGCHLD"):  # POSIX
        atexit.register(_end_workers)


def _end_workers() -> None:
    """Kill workers that an uncaught error leaves: Python sends them SIGTERM, which they ignore, and waits forever."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the handler of torch would raise another error
    for worker in workers:
        worker.kill()


__all__ = ["RUN_STATE_FILE", "ResumableTrainer", "TrainingStopped", "read_run_state"]
