"""Training of a classifier of speech from arguments to a saved model. `examples/train_classifier.py` calls it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import EvalPrediction, set_seed
from transformers.utils import logging

from ..configuration_audio_classification import ListenAudioClassificationConfig
from ..data.classification import ClipCollator, collate_states, hold_out_speakers, row_label, row_speakers
from ..data.extras import extra
from ..feature_extraction_audio_classification import ListenAudioClassificationFeatureExtractor
from ..modeling_audio_classification import ListenForAudioClassification
from .arguments import DataArguments, DataSource
from .classifier_arguments import (
    ClassifierDataArguments,
    ClassifierModelArguments,
    ClassifierTrainingArguments,
)
from .datasets import load
from .resumable import ResumableTrainer
from .run import train_and_save
from .run_folder import Run, chosen_settings, open_run
from .sharded import undivided
from .values import ArgumentError

with extra("train"):
    from sklearn.metrics import accuracy_score, recall_score

logger = logging.get_logger(__name__)


@dataclass
class ClassifierResult:
    """Result of a run.

    Attributes:
        model: the trained classifier.
        feature_extractor: makes its inputs.
        model_folder: where both were saved.
        metrics: metrics of the Trainer.
        eval_metrics: `eval_accuracy`, `eval_uar` (unweighted average recall) and the recall of each class; empty
            without evaluation rows.
        history: everything that was logged, in order.
    """

    model: ListenForAudioClassification
    feature_extractor: ListenAudioClassificationFeatureExtractor
    model_folder: Path
    metrics: dict[str, float]
    eval_metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def train_classifier(
    model_arguments: ClassifierModelArguments,
    data_arguments: ClassifierDataArguments,
    training_arguments: ClassifierTrainingArguments,
    raw: Mapping[str, Any] | None = None,
) -> ClassifierResult:
    """Train the head over a frozen encoder, save it, and evaluate it.

    Args:
        model_arguments: section `model`.
        data_arguments: section `data`.
        training_arguments: section `training`.
        raw: recipe and overrides as given, for the run folder.

    Raises:
        ArgumentError: arguments that exclude each other, rows without a label, or a folder that holds another run.
        ValueError: data or an encoder that cannot be used.
        FolderInUseError: another process trains in the folder.
        TrainingStopped: SIGTERM came; the state is saved.
    """
    if training_arguments.num_threads is not None:
        torch.set_num_threads(training_arguments.num_threads)
    settings = chosen_settings(raw or {}, training_arguments)
    with open_run(training_arguments, settings) as run:
        set_seed(training_arguments.seed)  # before the new head is initialised
        train_rows, eval_rows = build_rows(data_arguments, training_arguments.seed)
        labels = [row_label(row, data_arguments.label_field) for row in train_rows]
        model = build_classifier(model_arguments, labels)
        extractor = _extractor_of(model, model_arguments.checkpoint)
        trainer = _build_trainer(model, extractor, train_rows, eval_rows, data_arguments, training_arguments)
        if trainer.is_world_process_zero():
            data = {"train": dict(Counter(labels)), "eval": len(eval_rows or ())}
            run.write(settings, training_arguments.seed, data)
        return _run(trainer, extractor, run)


@undivided()
def build_classifier(arguments: ClassifierModelArguments, labels: Sequence[str]) -> ListenForAudioClassification:
    """Load the checkpoint, or build a new head on the named encoder.

    Args:
        arguments: section `model`.
        labels: class of each training row; a new head has these classes, in alphabetical order.

    Raises:
        ArgumentError: a class that the checkpoint does not have, or a new head for fewer than two classes.
    """
    counts = Counter(labels)
    if arguments.checkpoint:
        model = ListenForAudioClassification.from_pretrained(arguments.checkpoint, dtype=arguments.dtype)
        _check_known(counts, model.config, "training")
    elif len(counts) < 2:
        raise ArgumentError(f"the training rows name the classes {sorted(counts)}; a classifier needs two or more")
    else:
        config = ListenAudioClassificationConfig.from_backbones(
            arguments.speech_encoder, sorted(counts), revision=arguments.revision, **arguments.head
        )
        model = ListenForAudioClassification.from_backbones(config, dtype=arguments.dtype)
    if arguments.balance_classes:
        names = [model.config.id2label[index] for index in range(model.config.num_labels)]
        # a mean of 1 over the training rows; classes that never occur get weight 0
        weights = [len(labels) / (len(counts) * counts[name]) if counts[name] else 0.0 for name in names]
        model.config.class_weights = weights
    return model


def build_rows(arguments: ClassifierDataArguments, seed: int) -> tuple[Dataset, Dataset | None]:
    """Training and evaluation rows, without common speakers if speakers are held out.

    Raises:
        ArgumentError: sources that stream or have no rows, or speakers to hold out that no row names.
        ManifestError: a row that cannot be used.
    """
    train_rows = _load(arguments.train, arguments, seed)
    if arguments.held_out_speakers:
        return hold_out_speakers(train_rows, arguments.speaker_field, arguments.held_out_speakers, seed)
    if not arguments.eval:
        return train_rows, None
    eval_rows = _load(arguments.eval, arguments, seed)
    shared = row_speakers(train_rows, arguments.speaker_field) & row_speakers(eval_rows, arguments.speaker_field)
    if shared:
        logger.warning(f"{len(shared)} speakers are in both training and evaluation: {sorted(shared)[:5]}")
    return train_rows, eval_rows


def encode_rows(
    model: ListenForAudioClassification, collator: ClipCollator, rows: Dataset, batch_size: int
) -> list[dict[str, Any]]:
    """Encode each clip once with the frozen encoder.

    Returns:
        For each row `layer_states` `(steps, layers, width)` on the CPU and the id of its label.
    """
    items: list[dict[str, Any]] = []
    for start in range(0, len(rows), batch_size):
        inputs = collator([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        labels = inputs.pop("labels").tolist()
        states, mask = model.encode(**{name: value.to(model.device) for name, value in inputs.items()})
        for clip, real, label in zip(states.cpu(), mask.cpu(), labels, strict=True):
            items.append({"layer_states": clip[:, real].transpose(0, 1).contiguous(), "labels": label})
    return items


def classification_metrics(names: Mapping[int, str], prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, unweighted average recall over the classes that occur, and the recall of each of them."""
    truths, guesses = prediction.label_ids, prediction.predictions.argmax(-1)
    present = np.unique(truths)
    recalls = recall_score(truths, guesses, labels=present, average=None, zero_division=0.0)
    single = {f"recall_{names[int(index)]}": float(recall) for index, recall in zip(present, recalls, strict=True)}
    return {"accuracy": float(accuracy_score(truths, guesses)), "uar": float(recalls.mean()), **single}


def _extractor_of(
    model: ListenForAudioClassification, checkpoint: str | None
) -> ListenAudioClassificationFeatureExtractor:
    """The extractor of the encoder; a checkpoint that includes its encoder has its own."""
    if checkpoint and not model.config.base_models and model.config.speech_config.model_type != "whisper":
        return ListenAudioClassificationFeatureExtractor.from_pretrained(checkpoint)
    return ListenAudioClassificationFeatureExtractor.from_config(model.config)


def _build_trainer(
    model: ListenForAudioClassification,
    extractor: ListenAudioClassificationFeatureExtractor,
    train_rows: Dataset,
    eval_rows: Dataset | None,
    data: ClassifierDataArguments,
    training: ClassifierTrainingArguments,
) -> ResumableTrainer:
    if eval_rows is not None:
        _check_known({row_label(row, data.label_field) for row in eval_rows}, model.config, "evaluation")
    collator: Any = ClipCollator(extractor, model.config.label2id, data.label_field)
    train_set, eval_set = train_rows, eval_rows
    if data.precompute:
        model.to(training.device)
        train_set = encode_rows(model, collator, train_rows, training.per_device_eval_batch_size)
        if eval_rows is not None:
            eval_set = encode_rows(model, collator, eval_rows, training.per_device_eval_batch_size)
        collator = collate_states
    names = model.config.id2label
    return ResumableTrainer(
        model=model,
        args=training,
        data_collator=collator,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=extractor,
        compute_metrics=lambda prediction: classification_metrics(names, prediction),
    )


def _run(trainer: ResumableTrainer, extractor: ListenAudioClassificationFeatureExtractor, run: Run) -> ClassifierResult:
    folder, metrics = train_and_save(trainer, run)
    eval_metrics: dict[str, float] = {}
    if trainer.eval_dataset is not None:
        eval_metrics = trainer.evaluate()
        trainer.save_metrics("eval", eval_metrics)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    history = list(trainer.state.log_history)
    return ClassifierResult(model, extractor, folder, metrics, eval_metrics, history)


def _load(sources: Sequence[DataSource], arguments: ClassifierDataArguments, seed: int) -> Dataset:
    parts = [load(source, DataArguments(check_files=arguments.check_files), seed) for source in sources]
    if any(isinstance(part, IterableDataset) for part in parts):
        raise ArgumentError("a classifier's data cannot stream: its classes are counted first; give streaming=false")
    return concatenate_datasets(parts)


def _check_known(labels: Any, config: ListenAudioClassificationConfig, where: str) -> None:
    unknown = sorted(set(labels) - set(config.label2id))
    if unknown:
        raise ArgumentError(f"the {where} rows name the classes {unknown}; the model knows {sorted(config.label2id)}")
