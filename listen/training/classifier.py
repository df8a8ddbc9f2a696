"""Training of a classifier of speech from arguments to a saved model. `examples/train_classifier.py` calls it."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from sklearn.metrics import accuracy_score, recall_score
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction, Trainer, set_seed
from transformers.utils import logging

from ..configuration_audio_classification import ListenAudioClassificationConfig
from ..data.audio import read_clips
from ..data.manifest import extra_fields
from ..feature_extraction_audio_classification import ListenAudioClassificationFeatureExtractor
from ..modeling_audio_classification import ListenForAudioClassification
from .arguments import ArgumentError, DataArguments, DataSource
from .classifier_arguments import (
    ClassifierDataArguments,
    ClassifierModelArguments,
    ClassifierTrainingArguments,
)
from .datasets import load
from .run import MODEL_FOLDER, checkpoint_to_resume
from .run_folder import write_run_folder

logger = logging.get_logger(__name__)


@dataclass
class ClassifierResult:
    """What a run left.

    Attributes:
        model: the trained classifier.
        feature_extractor: makes its inputs.
        model_folder: where both were saved.
        metrics: figures of the Trainer.
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


class ClipCollator:
    """Turns rows of the manifest schema into inputs of `ListenForAudioClassification`.

    Args:
        feature_extractor: the classifier's.
        label2id: id of each class; `None` leaves labels out.
        label_field: see `ClassifierDataArguments`.
    """

    def __init__(
        self,
        feature_extractor: ListenAudioClassificationFeatureExtractor,
        label2id: Mapping[str, int] | None = None,
        label_field: str = "response",
    ) -> None:
        self.feature_extractor = feature_extractor
        self.label2id = label2id
        self.label_field = label_field

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Inputs for a batch, one clip a row.

        Raises:
            ValueError: a row that cannot be read, or with several recordings; the message names it.
        """
        rate = self.feature_extractor.sampling_rate
        inputs = dict(self.feature_extractor([_read(row, rate) for row in rows], rate))
        if self.label2id is not None:
            inputs["labels"] = torch.tensor([self.label2id[row_label(row, self.label_field)] for row in rows])
        return inputs


def collate_states(items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Inputs of `ListenForAudioClassification` from clips that its encoder has heard, see `encode_rows`."""
    states = [item["layer_states"] for item in items]  # (steps, layers, width) each
    lengths = torch.tensor([len(clip) for clip in states])
    padded = pad_sequence(states, batch_first=True).transpose(1, 2)  # (clips, layers, steps, width)
    mask = torch.arange(padded.shape[2]) < lengths[:, None]  # (clips, steps)
    return {
        "layer_states": padded,
        "layer_states_mask": mask,
        "labels": torch.tensor([item["labels"] for item in items]),
    }


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
        raw: what the user wrote, for the run folder.

    Raises:
        ArgumentError: arguments that exclude each other, or rows without a label.
        ValueError: data or an encoder that cannot be used.
    """
    if training_arguments.num_threads is not None:
        torch.set_num_threads(training_arguments.num_threads)
    set_seed(training_arguments.seed)  # before the fresh head is drawn
    train_rows, eval_rows = build_rows(data_arguments, training_arguments.seed)
    labels = [row_label(row, data_arguments.label_field) for row in train_rows]
    model = build_classifier(model_arguments, labels)
    extractor = _extractor_of(model, model_arguments.checkpoint)
    trainer = _build_trainer(model, extractor, train_rows, eval_rows, data_arguments, training_arguments)
    if trainer.is_world_process_zero():
        data = {"train": dict(Counter(labels)), "eval": len(eval_rows or ())}
        write_run_folder(training_arguments.output_dir, raw or {}, training_arguments.seed, data)
    return _run(trainer, extractor)


def build_classifier(arguments: ClassifierModelArguments, labels: Sequence[str]) -> ListenForAudioClassification:
    """Load the checkpoint, or put a fresh head on the named encoder.

    Args:
        arguments: section `model`.
        labels: class of each training row; a fresh head knows these, in alphabetical order.

    Raises:
        ArgumentError: a class that the checkpoint does not know, or a fresh head for fewer than two classes.
    """
    counts = Counter(labels)
    if arguments.checkpoint:
        model = ListenForAudioClassification.from_pretrained(arguments.checkpoint, dtype=arguments.dtype)
        _check_known(counts, model.config, "training")
    elif len(counts) < 2:
        raise ArgumentError(f"the training rows name the classes {sorted(counts)}; two or more can be told apart")
    else:
        config = ListenAudioClassificationConfig.from_backbones(
            arguments.speech_encoder, sorted(counts), revision=arguments.revision, **arguments.head
        )
        model = ListenForAudioClassification.from_backbones(config, dtype=arguments.dtype)
    if arguments.balance_classes:
        names = [model.config.id2label[index] for index in range(model.config.num_labels)]
        # a mean of 1 over the training rows; classes that never occur weigh nothing
        weights = [len(labels) / (len(counts) * counts[name]) if counts[name] else 0.0 for name in names]
        model.config.class_weights = weights
    return model


def build_rows(arguments: ClassifierDataArguments, seed: int) -> tuple[Dataset, Dataset | None]:
    """Training and evaluation rows; the latter of other speakers, where the data tells speakers.

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
    shared = _speakers(train_rows, arguments.speaker_field) & _speakers(eval_rows, arguments.speaker_field)
    if shared:
        logger.warning(f"{len(shared)} speakers are in both training and evaluation: {sorted(shared)[:5]}")
    return train_rows, eval_rows


def hold_out_speakers(rows: Dataset, speaker_field: str, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Divide rows so that no speaker is on both sides.

    Args:
        rows: all rows.
        speaker_field: field beyond the schema that names the speaker.
        share: share of the speakers whose rows go to the second part, at least one speaker.
        seed: which speakers these are.

    Raises:
        ArgumentError: rows without the field, or fewer than two speakers.
    """
    names = [extra_fields(row).get(speaker_field) for row in rows.select_columns(["extra"])]
    speakers = sorted({str(name) for name in names})
    if None in names or len(speakers) < 2:
        raise ArgumentError(
            f"held_out_speakers={share} needs two or more speakers in the field {speaker_field!r} of all rows; name "
            "the field with data.speaker_field"
        )
    count = min(max(1, round(share * len(speakers))), len(speakers) - 1)
    chosen = set(random.Random(seed).sample(speakers, count))
    places = {side: [i for i, name in enumerate(names) if (str(name) in chosen) is side] for side in (False, True)}
    return rows.select(places[False]), rows.select(places[True])


def row_label(row: Mapping[str, Any], label_field: str) -> str:
    """The class of a row.

    Raises:
        ArgumentError: the row does not name exactly one.
    """
    value = row["response"] if label_field == "response" else extra_fields(row).get(label_field)
    names = value if isinstance(value, list) else [] if value is None else [value]
    if len(names) != 1 or not str(names[0]).strip():
        raise ArgumentError(
            f"row {row['id']!r}: data.label_field={label_field!r} must hold one class, found {value!r}; beyond "
            f"'response' the row has {sorted(extra_fields(row))}"
        )
    return str(names[0]).strip()


def encode_rows(
    model: ListenForAudioClassification, collator: ClipCollator, rows: Dataset, batch_size: int
) -> list[dict[str, Any]]:
    """Let the frozen encoder hear each clip once.

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
    """That of the encoder's checkpoint; a classifier that holds its encoder has one of its own beside it."""
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
) -> Trainer:
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
    return Trainer(
        model=model,
        args=training,
        data_collator=collator,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=extractor,
        compute_metrics=lambda prediction: classification_metrics(names, prediction),
    )


def _run(trainer: Trainer, extractor: ListenAudioClassificationFeatureExtractor) -> ClassifierResult:
    output = trainer.train(resume_from_checkpoint=checkpoint_to_resume(trainer.args))
    trainer.save_state()
    trainer.save_metrics("train", output.metrics)
    folder = Path(trainer.args.output_dir) / MODEL_FOLDER
    trainer.save_model(str(folder))
    if trainer.args.should_save:
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, which no model needs
    eval_metrics: dict[str, float] = {}
    if trainer.eval_dataset is not None:
        eval_metrics = trainer.evaluate()
        trainer.save_metrics("eval", eval_metrics)
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    history = list(trainer.state.log_history)
    return ClassifierResult(model, extractor, folder, output.metrics, eval_metrics, history)


def _load(sources: Sequence[DataSource], arguments: ClassifierDataArguments, seed: int) -> Dataset:
    parts = [load(source, DataArguments(check_files=arguments.check_files), seed) for source in sources]
    if any(isinstance(part, IterableDataset) for part in parts):
        raise ArgumentError("a classifier's data cannot stream: its classes are counted first; give streaming=false")
    return concatenate_datasets(parts)


def _speakers(rows: Dataset, speaker_field: str) -> set[str]:
    names = (json.loads(extra).get(speaker_field) for extra in rows["extra"] if extra)
    return {str(name) for name in names if name is not None}


def _check_known(labels: Any, config: ListenAudioClassificationConfig, where: str) -> None:
    unknown = sorted(set(labels) - set(config.label2id))
    if unknown:
        raise ArgumentError(f"the {where} rows name the classes {unknown}; the model knows {sorted(config.label2id)}")


def _read(row: Mapping[str, Any], sampling_rate: int) -> np.ndarray:
    try:
        clips = read_clips(row["audio"], sampling_rate, bool(row.get("join")))
    except (OSError, ValueError) as error:
        raise ValueError(f"row {row['id']!r}: {error}") from error
    if len(clips) != 1:
        raise ValueError(
            f"row {row['id']!r} has {len(clips)} recordings; a class is told of one, join them or split it"
        )
    return clips[0]
