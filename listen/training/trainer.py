"""Hugging Face's `Trainer`, which also logs parts of the loss and the pool's health and evaluates by generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..data.collator import ListenCollator
from .callbacks import EpochCallback, EpochLengthGroupedSampler
from .layer_rates import is_pool, layer_rates, pool_rates, split_by_rate
from .pool_health import PoolMonitor, merged
from .resumable import ResumableTrainer

logger = logging.get_logger(__name__)

GenerationEvaluator = Callable[[torch.nn.Module], dict[str, float]]
_SIGNS_BEFORE_WARNING = 3  # consecutive windows: the first steps of a run are not typical


@dataclass
class _EvalSums:
    """Losses summed over the labels of the evaluation data, and the number of these labels."""

    lm_loss: float = 0.0
    key_loss: float = 0.0
    targets: float = 0.0


class ListenTrainer(ResumableTrainer):
    """Trains a `ListenForConditionalGeneration`.

    The optimisation is that of `Trainer`, unless `layerwise_lr_decay`, `pool_lr_factor` or `decay_pool` is set: the
    model's losses are exact under accumulation and over processes, and only parameters that require gradients reach the
    optimiser.

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
    """Parts of the loss, logged before it. `key_loss` is a mean over the selected prompts, before its weight."""

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
        self._eval_sums = _EvalSums()
        self._window_start: int | None = None  # step before the window's first batch; none yet
        self._monitor = _monitor(self.model)
        self._signs: dict[str, int] = {}  # sign of collapse: in how many windows in a row

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """As upstream; `layerwise_lr_decay` and `pool_lr_factor` give encoder layers and the pool their own rates.

        Raises:
            ArgumentError: no encoder or no pool is trainable, or the encoder has no list of layers.
        """
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        decay, factor = self.args.layerwise_lr_decay, self.args.pool_lr_factor
        if fresh and (decay < 1.0 or factor != 1.0):
            model = self.model if model is None else model
            rates = pool_rates(model, factor)
            if decay < 1.0:
                rates = {name: share * rates[name] for name, share in layer_rates(model, decay).items()}
            split_by_rate(optimizer, model, rates)
        return optimizer

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """As upstream; without the prompt pool unless `decay_pool` is set."""
        names = super().get_decay_parameter_names(model)
        return names if self.args.decay_pool else [name for name in names if not is_pool(name)]

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
        else:
            self._add_eval_batch(outputs, inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _remember(self, outputs: Any) -> None:
        self.add_part("lm_loss", outputs.lm_loss)
        if outputs.key_loss is not None:
            self.add_part("key_loss", outputs.key_loss / self._key_terms(outputs))
        if self._monitor is not None and outputs.prompt_indices is not None:
            self._monitor.add(outputs.prompt_indices, outputs.query)

    def add_part(self, name: str, value: torch.Tensor) -> None:
        """Add a batch's value of one of `loss_parts`."""
        if self._window_start is None:
            self._window_start = self.state.global_step
        self._parts[name] += value.detach().float()

    def _key_terms(self, outputs: Any) -> torch.Tensor | float:
        """Terms that a row's key loss is the sum of: prompts selected for it, or 1 where the loss is not such a sum."""
        if self._monitor is None or not self._monitor.key_loss_is_sum:
            return 1.0
        selected = (outputs.prompt_indices >= 0).sum(-1)  # (batch,)
        return selected.float().mean().clamp_min(1.0)

    def _add_eval_batch(self, outputs: Any, labels: torch.Tensor, num_items: torch.Tensor | int | None) -> None:
        """Add the losses of a batch of the evaluation data, each as a sum over its labels."""
        targets = (labels[:, 1:] != -100).sum()
        divisor = targets if num_items is None else num_items
        self._eval_sums.targets += float(targets)
        self._eval_sums.lm_loss += float(outputs.lm_loss * divisor)
        if outputs.key_loss is not None:
            self._eval_sums.key_loss += float(outputs.key_loss * divisor / self._key_terms(outputs))

    def _eval_parts(self, prefix: str) -> dict[str, float]:
        """Parts of the loss, each a mean over all labels of the evaluation data."""
        sums = [self._eval_sums.lm_loss, self._eval_sums.key_loss, self._eval_sums.targets]
        sums = self.accelerator.reduce(torch.tensor(sums, device=self.args.device), reduction="sum").tolist()
        self._eval_sums = _EvalSums()
        parts = {f"{prefix}_lm_loss": sums[0] / max(sums[2], 1.0), f"{prefix}_key_loss": sums[1] / max(sums[2], 1.0)}
        if self._monitor is None:
            parts.pop(f"{prefix}_key_loss")
        return parts

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As upstream; training logs start with the parts of the loss and end with the pool's health."""
        if "loss" in logs:
            window = self._window()
            parts = {name: window.pop(name) for name in self.loss_parts if name in window}
            logs = {**parts, **logs, **window}
        super().log(logs, start_time)

    def _window(self) -> dict[str, float]:
        """Metrics since the last log, over all processes."""
        start = self.state.global_step if self._window_start is None else self._window_start
        steps = max(self.state.global_step - start, 1)
        figures = {name: value / steps for name, value in self._part_sums().items()}
        if self._monitor is None:
            figures.pop("key_loss", None)
        else:
            figures.update(self._health())
        self._parts = dict.fromkeys(self.loss_parts, 0.0)
        self._window_start = None
        return figures

    @property
    def _shares_steps(self) -> bool:
        """Whether processes share a step's loss; else each has its own mean."""
        return self.args.average_tokens_across_devices

    def _part_sums(self) -> dict[str, float]:
        """Sums of the parts of the loss over the window, over all processes."""
        parts = [float(self._parts[name]) for name in self.loss_parts]
        sums = torch.tensor(parts, dtype=torch.float32, device=self.args.device)
        sums = self.accelerator.reduce(sums, reduction="sum" if self._shares_steps else "mean")
        return dict(zip(self.loss_parts, sums.tolist(), strict=True))

    def window_state(self) -> dict[str, Any]:
        """As in the base class, with the parts of the loss and the pool's statistics."""
        state = {**super().window_state(), "start": self._window_start, "parts": self._part_sums()}
        if self._monitor is not None:
            states = self.accelerator.gather(self._monitor.state().to(self.args.device)[None])  # (processes, n)
            state |= {"pool": merged(states).tolist(), "signs": self._signs}
        return state

    def restore_window(self, window: dict[str, Any]) -> None:
        """As in the base class; sums over processes go on in the first one."""
        super().restore_window(window)
        self._window_start = window["start"]
        is_first = self.args.process_index == 0
        parts = {name: window["parts"].get(name, 0.0) for name in self.loss_parts}
        self._parts = parts if is_first or not self._shares_steps else dict.fromkeys(parts, 0.0)
        if self._monitor is not None and "pool" in window:
            self._signs = window["signs"]
            if is_first:
                self._monitor.load(torch.tensor(window["pool"]))

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
        """As upstream; the metrics start with the parts of the loss and end with scores of generated answers, so that
        each can select the best model. Parts are means over labels; `eval_loss` is transformers' mean over batches."""
        self._eval_sums = _EvalSums()
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output = output._replace(metrics={**self._eval_parts(prefix), **output.metrics})
        if self.generation_evaluator is not None and description == "Evaluation":
            figures = self.generation_evaluator(self.accelerator.unwrap_model(self.model))
            output.metrics.update({f"{prefix}_{name}": value for name, value in figures.items()})
        return output


def _monitor(model: torch.nn.Module) -> PoolMonitor | None:
    adapters = getattr(model, "adapters", {})
    adapter = adapters[model.active_adapter] if getattr(model, "active_adapter", None) in adapters else None
    pool = adapter.prompt_pool if adapter is not None else None
    return PoolMonitor(pool) if pool is not None else None
