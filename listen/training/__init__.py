"""Training: arguments, Trainer, and one run from arguments to a saved model.

>>> from listen.training import parse_arguments, train
>>> run = parse_arguments(["--config", "examples/configs/listen-0.4m.yaml"])  # doctest: +SKIP
>>> train(run.model, run.data, run.training).model_folder  # doctest: +SKIP
"""

from __future__ import annotations

from .arguments import DataArguments, DataSource, ListenTrainingArguments, ModelArguments
from .build import build_config, build_encoders, build_model, initialize_keys
from .datasets import build_eval_dataset, build_train_dataset
from .distillation import DistillationTrainer, distillation_loss
from .parsing import RunArguments, build_arguments, parse_arguments, read_config
from .pool_health import PoolHealth, PoolMonitor
from .resumable import TrainingStopped
from .run import TrainResult, build_trainer, run_trainer, train
from .trainer import ListenTrainer
from .values import ArgumentError

__all__ = [
    "ArgumentError",
    "DataArguments",
    "DataSource",
    "DistillationTrainer",
    "ListenTrainer",
    "ListenTrainingArguments",
    "ModelArguments",
    "PoolHealth",
    "PoolMonitor",
    "RunArguments",
    "TrainResult",
    "TrainingStopped",
    "build_arguments",
    "build_config",
    "build_encoders",
    "build_eval_dataset",
    "build_model",
    "build_train_dataset",
    "build_trainer",
    "distillation_loss",
    "initialize_keys",
    "parse_arguments",
    "read_config",
    "run_trainer",
    "train",
]
