"""Arguments of a classifier's training; recipes and command line are read by `listen.training.parsing`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .arguments import parse_sources
from .precision import choose_bf16
from .values import ArgumentError, check_report_to


@dataclass
class ClassifierModelArguments:
    """What is trained.

    Attributes:
        speech_encoder: folder or Hub id of the frozen encoder, of Whisper or another audio encoder of transformers.
        revision: its revision.
        head: fields of `ListenAudioClassificationConfig` that differ from their defaults.
        checkpoint: folder or Hub id of a classifier to train further, instead of a new one.
        balance_classes: whether the loss weights each class by the inverse of its share of the training rows.
        dtype: dtype of the encoder, such as `bfloat16`; `auto` keeps that of its checkpoint.
    """

    speech_encoder: str | None = None
    revision: str = "main"
    head: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    balance_classes: bool = False
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check that it is clear what to build.

        Raises:
            ArgumentError: neither a checkpoint nor an encoder, or both.
        """
        if bool(self.checkpoint) == bool(self.speech_encoder):
            raise ArgumentError("name either model.speech_encoder, or a model.checkpoint to train on")
        if self.checkpoint and self.head:
            raise ArgumentError(f"model.checkpoint={self.checkpoint!r} brings its own head; leave out model.head")


@dataclass
class ClassifierDataArguments:
    """What is trained and evaluated on.

    Attributes:
        train: sources of training rows, as in `DataArguments`.
        eval: sources of evaluation rows.
        label_field: field of a row that names its class: `response`, or one beyond the schema such as `emotion`.
        speaker_field: field that names the speaker.
        held_out_speakers: share of the training speakers whose rows are kept for evaluation, where `eval` is empty.
        precompute: whether the frozen encoder encodes each clip once, before training, and its averaged states are kept
            in memory; otherwise clips are encoded in each epoch.
        check_files: whether a missing audio file is an error before training starts.
    """

    train: list[Any] = field(default_factory=list)
    eval: list[Any] = field(default_factory=list)
    label_field: str = "response"
    speaker_field: str = "speaker"
    held_out_speakers: float = 0.0
    precompute: bool = True
    check_files: bool = True

    def __post_init__(self) -> None:
        """Parse the sources.

        Raises:
            ArgumentError: no training source, a share out of range, or two sets to evaluate on.
        """
        self.train, self.eval = parse_sources("data.train", self.train), parse_sources("data.eval", self.eval)
        if not self.train:
            raise ArgumentError("data.train names no source; give a manifest, an annotation file or a data set")
        if not 0.0 <= self.held_out_speakers < 1.0:
            raise ArgumentError(f"data.held_out_speakers={self.held_out_speakers} must lie in [0, 1)")
        if self.eval and self.held_out_speakers:
            raise ArgumentError("data.eval and data.held_out_speakers both say what to evaluate on; give one of them")


@dataclass
class ClassifierTrainingArguments(TrainingArguments):
    """Hugging Face's `TrainingArguments` with defaults for the head.

    Attributes:
        bf16: as upstream, or `auto`: where the device computes it in hardware; most CPUs do not.
        num_threads: threads of torch in this process; null keeps torch's default.
        resume: `true` resumes from the last checkpoint of the folder if there is one, a path from that checkpoint.
    """

    output_dir: str | None = field(default="runs/classifier")
    learning_rate: float = field(default=1e-3)
    weight_decay: float = field(default=0.01)
    warmup_steps: float = field(default=0.1)  # a share of all steps
    lr_scheduler_type: str = field(default="cosine")
    logging_steps: float = field(default=10)
    report_to: None | str | list[str] = field(default="tensorboard")
    save_total_limit: int | None = field(default=2)
    remove_unused_columns: bool = field(default=False)
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    bf16: bool | str = field(default=False)
    num_threads: int | None = field(default=None)
    resume: bool | str = field(default=False)
    resume_from_checkpoint: bool | str | None = field(default=None)

    def __post_init__(self) -> None:
        """As upstream.

        Raises:
            ArgumentError: the Trainer's own label smoothing.
        """
        self.bf16 = choose_bf16(self.bf16, self.use_cpu)
        super().__post_init__()
        check_report_to(self.report_to)
        if self.label_smoothing_factor:
            raise ArgumentError("training.label_smoothing_factor would replace the model's loss; use model.head")


CLASSIFIER_SECTIONS: dict[str, type] = {
    "model": ClassifierModelArguments,
    "data": ClassifierDataArguments,
    "training": ClassifierTrainingArguments,
}
"""Section of a file -> its dataclass."""

__all__ = [
    "CLASSIFIER_SECTIONS",
    "ClassifierDataArguments",
    "ClassifierModelArguments",
    "ClassifierTrainingArguments",
]
