"""Hugging Face's `Trainer`, which also logs parts of the loss and the pool's health and evaluates by generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..data.collator import ListenCollator
from .callbacks import EpochCallback, EpochLengthGroupedSampler
from .layer_rates import layer_rates, split_by_rate
from .pool_health import PoolMonitor

logger = logging.get_logger(__name__)

GenerationEvaluator = Callable[[torch.nn.Module], dict[str, float]]
_SIGNS_BEFORE_WARNING = 3  # consecutive windows: the first steps of a run are not typical


class ListenTrainer(Trainer):
    """Trains a `ListenForConditionalGeneration`.

    The optimisation is that of `Trainer`, unless `layerwise_lr_decay` is set: the model's losses
    are exact under accumulation and over processes, and only parameters that require gradients reach the optimiser.

    Args:
        model: the model.
        args: `ListenTrainingArguments`.
        data_collator: collator of the training data.
        eval_collator: collator of the evaluation data, with the test wording and a fixed k.
        generation_evaluator: generates answers and scores them: model -> metrics; called in each evaluation by all
            processes.
        **kwargs: see `Trainer`.
    """

    loss_parts = ("lm_loss", "key_loss")
    """Parts of the loss that are logged too."""

    def __init__(
        self,
        *,
        data_collator: ListenCollator,
        eval_collator: ListenCollator | None = None,
        generation_evaluator: GenerationEvaluator | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_collator=data_collator, **kwargs)
        self.eval_collator = eval_collator or data_collator
        self.generation_evaluator = generation_evaluator
        self._epochs = EpochCallback(data_collator)
        self.add_callback(self._epochs)
        self._parts = dict.fromkeys(self.loss_parts, 0.0)
        self._window_start: int | None = None  # step before the window's first batch; none yet
        self._monitor = _monitor(self.model)
        self._signs: dict[str, int] = {}

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """As upstream; with `layerwise_lr_decay` the layers of trainable encoders get their own learning rates.

        Raises:
            ArgumentError: no encoder is trainable, or it has no list of layers.
        """
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.args.layerwise_lr_decay < 1.0:
            model = self.model if model is None else model
            split_by_rate(optimizer, model, layer_rates(model, self.args.layerwise_lr_decay))
        return optimizer

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """As upstream; keeps the parts of the loss and the selected prompts for the log."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self._remember(outputs)
        return (loss, outputs) if return_outputs else loss

    def _remember(self, outputs: Any) -> None:
        if self._window_start is None:
            self._window_start = self.state.global_step
        for name in self.loss_parts:
            if getattr(outputs, name, None) is not None:
                self.add_part(name, getattr(outputs, name))
        if self._monitor is not None and outputs.prompt_indices is not None:
            self._monitor.add(outputs.prompt_indices, outputs.query)

    def add_part(self, name: str, value: torch.Tensor) -> None:
        """Add a batch's value of one of `loss_parts`."""
        self._parts[name] += value.detach().float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As upstream; training logs also get the parts of the loss and the pool's health."""
        if "loss" in logs:
            logs.update(self._window())
        super().log(logs, start_time)

    def _window(self) -> dict[str, float]:
        """Metrics since the last log, over all processes."""
        start = self.state.global_step if self._window_start is None else self._window_start
        steps = max(self.state.global_step - start, 1)
        sums = torch.tensor(
            [float(self._parts[name]) for name in self.loss_parts], dtype=torch.float32, device=self.args.device
        )
        shares = self.args.average_tokens_across_devices  # of every step; else each process has its own mean
        sums = self.accelerator.reduce(sums, reduction="sum" if shares else "mean")
        figures = {name: value / steps for name, value in zip(self.loss_parts, sums.tolist(), strict=True)}
        if self._monitor is None:
            figures.pop("key_loss")
        else:
            figures.update(self._health())
        self._parts = dict.fromkeys(self.loss_parts, 0.0)
        self._window_start = None
        return figures

    def _health(self) -> dict[str, float]:
        states = self.accelerator.gather(self._monitor.state().float().to(self.args.device)[None])  # (processes, n)
        health = self._monitor.health(states)
        self._monitor.reset()
        found = health.warnings()
        self._signs = {name: self._signs.get(name, 0) + 1 for name in found}
        for name, message in found.items():
            if self._signs[name] == _SIGNS_BEFORE_WARNING and self.is_world_process_zero():
                logger.warning(f"step {self.state.global_step}: {message}")
        return health.as_logs()

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        """As upstream; grouping by length keeps its order when a run is resumed."""
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler = EpochLengthGroupedSampler(sampler.batch_size, sampler.lengths, self.args.sampling_seed)
            self._epochs.listeners.append(sampler)
        return sampler

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As upstream, with the collator of the evaluation data."""
        return self._with_eval_collator(super().get_eval_dataloader, eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As upstream, with the collator of the evaluation data."""
        return self._with_eval_collator(super().get_test_dataloader, test_dataset)

    def _with_eval_collator(self, make: Callable[[Any], DataLoader], dataset: Any) -> DataLoader:
        train_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return make(dataset)
        finally:
            self.data_collator = train_collator

    def evaluation_loop(self, dataloader: DataLoader, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As upstream; scores of generated answers are added to the metrics, so that they can select the best model."""
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        if self.generation_evaluator is not None and description == "Evaluation":
            prefix = kwargs.get("metric_key_prefix", "eval")
            figures = self.generation_evaluator(self.accelerator.unwrap_model(self.model))
            output.metrics.update({f"{prefix}_{name}": value for name, value in figures.items()})
        return output


def _monitor(model: torch.nn.Module) -> PoolMonitor | None:
    adapters = getattr(model, "adapters", {})
    adapter = adapters[model.active_adapter] if getattr(model, "active_adapter", None) in adapters else None
    pool = adapter.prompt_pool if adapter is not None else None
    return PoolMonitor(pool) if pool is not None else None
