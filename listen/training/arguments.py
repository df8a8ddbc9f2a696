"""Arguments of a training run: one documented dataclass for each section of a recipe, with its checks.

`listen.training.parsing` fills them from a YAML file and the command line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import TrainingArguments

from ..data.mixing import STRATEGIES
from ..data.sources import DataSource
from ..data.tasks import UnknownTaskError, get_task
from .precision import choose_bf16
from .values import ArgumentError, check_report_to, check_values, field_names, refuse_unknown

ALIGNMENTS = ("lm", "distill", "ctc")


@dataclass
class ModelArguments:
    """What is trained.

    Either `checkpoint` names a LiSTEN model to continue, or the backbones are named and a new adapter is built.

    Attributes:
        checkpoint: folder or Hub id of a LiSTEN checkpoint whose adapter is trained further.
        preset: named configuration that gives the connector, the pool and the trainable parts; `listen cost --help`
            lists them.
        speech_encoder: folder or Hub id of a Whisper checkpoint, or of another audio encoder of transformers.
        audio_encoder: folder or Hub id of a BEATs checkpoint in this package's format; null leaves this encoder out.
        language_model: folder or Hub id of a causal LLM; its tokenizer is used too.
        revisions: revision of each backbone by its name above; `main` by default.
        connector: fields of `ListenConnectorConfig` (listen/configuration_adapter.py) that differ from the preset.
        prompt_pool: fields of `ListenPromptPoolConfig` (in the same file) that differ from the preset;
            `{pool_size: 0}` is a model without a pool.
        connector_from: folder or Hub id of a LiSTEN checkpoint whose connector initialises that of a new model.
        new_prompts: number of prompts that are appended to the pool of `checkpoint`, to add a task; they alone are
            trained.
        trainable: trainable parts, see `ListenConfig.trainable`; with a checkpoint, they replace its own.
        lora: arguments of `peft.LoraConfig` for a LoRA on the LLM.
        pad_to_30s: whether every clip is padded to 30 s for Whisper.
        dtype: dtype of the frozen backbones, such as `bfloat16`; `auto` keeps those of their checkpoints.
        attn_implementation: `eager`, `sdpa`, `flash_attention_2`, ...; null lets transformers choose.
    """

    checkpoint: str | None = None
    preset: str | None = None
    speech_encoder: str | None = None
    audio_encoder: str | None = None
    language_model: str | None = None
    revisions: dict[str, str] = field(default_factory=dict)
    connector: dict[str, Any] = field(default_factory=dict)
    prompt_pool: dict[str, Any] = field(default_factory=dict)
    connector_from: str | None = None
    new_prompts: int | None = None
    trainable: list[str] | None = None
    lora: dict[str, Any] | None = None
    pad_to_30s: bool | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        """Check that it is clear what to build.

        Raises:
            ArgumentError: neither a checkpoint nor backbones, or both; a revision of something else; or new prompts
                beside other trainable parts.
        """
        sources = ("preset", "speech_encoder", "audio_encoder", "language_model")
        settings = (*sources, "revisions", "connector", "prompt_pool", "connector_from", "pad_to_30s")
        named = [name for name in settings if getattr(self, name) not in (None, {}, "")]
        if self.checkpoint and named:
            raise ArgumentError(
                f"model.checkpoint={self.checkpoint!r} brings its own backbones and settings; "
                f"leave out {', '.join(named)}"
            )
        if not self.checkpoint and not (self.speech_encoder and self.language_model):
            raise ArgumentError("name model.speech_encoder and model.language_model, or a model.checkpoint to train on")
        if self.new_prompts is not None and (not self.checkpoint or self.trainable or self.lora):
            raise ArgumentError(
                f"model.new_prompts={self.new_prompts} adds prompts to the pool of a model.checkpoint and trains them "
                "alone; name a checkpoint, and leave out model.trainable and model.lora"
            )
        unknown = sorted(set(self.revisions) - set(sources[1:]))
        if unknown:
            raise ArgumentError(f"model.revisions names {unknown}; the backbones are {', '.join(sources[1:])}")
        if self.trainable is not None and not self.trainable:
            raise ArgumentError("model.trainable=[] names no part; leave it out, or name the trainable parts")


@dataclass
class DataArguments:
    """What is trained and evaluated on.

    Attributes:
        train: sources of training rows: paths or mappings with the fields of `DataSource`.
        eval: sources of evaluation rows.
        mixing: how tasks are mixed: `proportional`, `equal`, `temperature` or `weights`.
        mixing_temperature: 1 is proportional, large is equal.
        mixing_weights: share of each task, for `weights`.
        features: folder of encoder features from `listen precompute`; null runs the encoders.
        join_tasks: tasks whose clips are joined into one recording; the LiSTEN paper joins the two of `sv`.
        join_silence_seconds: silence between joined clips; SALMONN's data has 0.1.
        max_audio_seconds: leave out longer training rows; their number is logged.
        long_audio: `leave_out`, or `cut`: every recording, also in evaluation, is cut to `max_audio_seconds`, and the
            saved processor cuts too.
        max_eval_rows: max evaluation rows per task.
        check_files: whether a missing audio file is an error before training starts.
    """

    train: list[Any] = field(default_factory=list)
    eval: list[Any] = field(default_factory=list)
    mixing: str = "proportional"
    mixing_temperature: float = 2.0
    mixing_weights: dict[str, float] | None = None
    features: str | None = None
    join_tasks: list[str] = field(default_factory=list)
    join_silence_seconds: float = 0.0
    max_audio_seconds: float | None = None
    long_audio: str = "leave_out"
    max_eval_rows: int | None = None
    check_files: bool = True

    def __post_init__(self) -> None:
        """Parse the sources.

        Raises:
            ArgumentError: an unknown mixing strategy, task or field of a source, or a value out of range.
        """
        self.train, self.eval = parse_sources("data.train", self.train), parse_sources("data.eval", self.eval)
        if self.mixing not in STRATEGIES:
            raise ArgumentError(f"data.mixing={self.mixing!r} is unknown; choose one of {', '.join(STRATEGIES)}")
        if self.long_audio not in ("leave_out", "cut"):
            raise ArgumentError(f"data.long_audio={self.long_audio!r} is unknown; choose leave_out or cut")
        if self.long_audio == "cut" and self.max_audio_seconds is None:
            raise ArgumentError("data.long_audio=cut needs data.max_audio_seconds, the length to cut to")
        if self.long_audio == "cut" and self.features is not None:
            raise ArgumentError("data.long_audio=cut cannot cut data.features, which are of whole clips; leave one out")
        if self.max_eval_rows is not None and self.max_eval_rows < 1:
            raise ArgumentError(
                f"data.max_eval_rows={self.max_eval_rows} must be at least 1; leave out data.eval instead"
            )
        self.join_tasks = task_names("data.join_tasks", self.join_tasks)


_COUNTS = ("min_prompts", "pad_to_multiple_of", "generation_max_new_tokens", "generation_num_beams")
_BATCHES = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_LEAST = {**dict.fromkeys((*_COUNTS, *_BATCHES), 1), **dict.fromkeys(("keys_from_rows", "generation_eval_rows"), 0)}


@dataclass
class ListenTrainingArguments(TrainingArguments):
    """Hugging Face's `TrainingArguments`, with defaults for LiSTEN and a few fields of its own.

    Attributes:
        layerwise_lr_decay: factor between the learning rates of neighbouring layers of a trainable encoder, from the
            connector's rate at its output down to its input; 1 gives all layers the same rate.
        pool_lr_factor: learning rate of the prompt pool as a multiple of the connector's.
        decay_pool: whether `weight_decay` acts on the prompt pool too.
        alignment: target of training: `lm`, the next token; `distill`, the next-token distribution of the frozen LLM
            that reads the words instead of the recording, for rows with a `transcript` or `text_input`; or `ctc`, audio
            embeddings close to the LLM's input embeddings of the words, a start for the connector without the LLM.
        distill_temperature: temperature of both distributions.
        distill_lm_weight: weight of the next-token loss that is added to the distillation loss.
        min_prompts: minimum k that training draws for a batch; the maximum is the pool's `train_prompts`. Used only
            if the pool is `stochastic`.
        generation_eval_rows: max examples per task that every evaluation generates answers for and scores; 0 for none.
        generation_max_new_tokens: max new tokens of these answers.
        generation_num_beams: beams for these answers.
        bf16: as upstream, or `auto`: where the device computes it in hardware; most CPUs do not.
        num_threads: threads of torch in this process; null keeps torch's default. One is best for miniature models.
        keys_from_rows: number of training rows whose queries initialise the keys; 0 is random keys, as in the paper.
        pad_to_multiple_of: sequences are padded to a multiple of it, which limits the number of shapes.
        resume: `true` resumes from the last checkpoint of the folder if there is one, a path from that checkpoint.
    """

    output_dir: str | None = field(default="runs/train")
    learning_rate: float = field(default=3e-5)
    weight_decay: float = field(default=0.05)
    adam_beta2: float = field(default=0.999)
    lr_scheduler_type: str = field(default="cosine")
    logging_steps: float = field(default=10)
    report_to: None | str | list[str] = field(default="tensorboard")
    save_total_limit: int | None = field(default=3)
    # each process reads its own batches of a stream: clips vary in length, so batches cannot be split by rows
    accelerator_config: dict | str | None = field(default_factory=lambda: {"dispatch_batches": False})
    remove_unused_columns: bool = field(default=False)
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    ddp_find_unused_parameters: bool | None = field(default=False)
    layerwise_lr_decay: float = field(default=1.0)
    pool_lr_factor: float = field(default=1.0)
    decay_pool: bool = field(default=True)
    alignment: str = field(default="lm")
    distill_temperature: float = field(default=1.0)
    distill_lm_weight: float = field(default=0.0)
    min_prompts: int = field(default=1)
    keys_from_rows: int = field(default=0)
    generation_eval_rows: int = field(default=0)
    generation_max_new_tokens: int = field(default=128)
    generation_num_beams: int = field(default=1)
    bf16: bool | str = field(default=False)
    num_threads: int | None = field(default=None)
    pad_to_multiple_of: int = field(default=8)
    resume: bool | str = field(default=False)
    resume_from_checkpoint: bool | str | None = field(default=None)

    def __post_init__(self) -> None:
        """As upstream.

        Raises:
            ArgumentError: a value out of range.
        """
        if self.metric_for_best_model in ("loss", "eval_loss"):
            raise ArgumentError(
                f"training.metric_for_best_model={self.metric_for_best_model} holds the key loss too; choose lm_loss, "
                "or a task's score such as asr_wer"
            )
        self.bf16 = choose_bf16(self.bf16, self.use_cpu)
        if self.metric_for_best_model and self.greater_is_better is None:
            self.greater_is_better = not _is_error(self.metric_for_best_model)  # upstream knows the loss alone
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there it only warns, at the start of each data loader
        check_report_to(self.report_to)
        if self.metric_for_best_model == "loss":  # the default of transformers, where one is needed
            self.metric_for_best_model = "lm_loss"
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ArgumentError(f"training.{name}={getattr(self, name)} must be at least {least}")
        if not 0.0 < self.layerwise_lr_decay <= 1.0:
            raise ArgumentError(f"training.layerwise_lr_decay={self.layerwise_lr_decay} must lie in (0, 1]")
        if self.pool_lr_factor <= 0.0:
            raise ArgumentError(f"training.pool_lr_factor={self.pool_lr_factor} must be above 0")
        self._check_alignment()
        if self.label_smoothing_factor:
            raise ArgumentError("training.label_smoothing_factor would replace the model's own loss; leave it at 0")
        if self.neftune_noise_alpha:
            raise ArgumentError("training.neftune_noise_alpha does nothing here: the LLM's embeddings are frozen")

    def _check_alignment(self) -> None:
        if self.alignment not in ALIGNMENTS:
            raise ArgumentError(
                f"training.alignment={self.alignment!r} is unknown; choose one of {', '.join(ALIGNMENTS)}"
            )
        if self.distill_temperature <= 0 or self.distill_lm_weight < 0:
            raise ArgumentError(
                f"training.distill_temperature={self.distill_temperature} must be positive and "
                f"distill_lm_weight={self.distill_lm_weight} not negative"
            )
        if self.alignment != "distill" and (self.distill_temperature, self.distill_lm_weight) != (1.0, 0.0):
            raise ArgumentError(
                f"training.distill_... has no effect with alignment={self.alignment}; set alignment=distill"
            )

    @property
    def sampling_seed(self) -> int:
        """Seed of subsets, mixing, order, wordings and k: `data_seed`, or `seed` if that is not set."""
        return self.seed if self.data_seed is None else self.data_seed


def _is_error(metric: str) -> bool:
    """Whether a metric of evaluation is better where it is lower, such as `lm_loss` or `eval_asr_wer`."""
    from ..evaluation.scoring import LOWER_IS_BETTER  # imports metrics, which most runs do not need

    return metric.endswith(("loss", *(f"_{name}" for name in LOWER_IS_BETTER)))


def task_names(where: str, names: Sequence[str]) -> list[str]:
    """The names of tasks as rows carry them: `sv` for `speaker`.

    Raises:
        ArgumentError: one is not registered.
    """
    try:
        return [get_task(name).name for name in names]
    except UnknownTaskError as error:
        raise ArgumentError(f"{where}: {error}") from error


def parse_sources(where: str, value: Any) -> list[DataSource]:
    """Sources as a recipe gives them: a path, a mapping with the fields of `DataSource`, or a list of these.

    In Python, a data set of the `datasets` library may stand for a path.

    Raises:
        ArgumentError: neither, an unknown field, or fields that do not fit each other.
    """
    return [_source(where, item) for item in (value if isinstance(value, (list, tuple)) else [value])]


def _source(where: str, item: Any) -> DataSource:
    if isinstance(item, DataSource):
        return item
    if isinstance(item, (str, os.PathLike)):
        item = {"path": os.fspath(item)}
    elif isinstance(item, (Dataset, IterableDataset)):
        item = {"path": item}
    if not isinstance(item, Mapping) or "path" not in item:
        raise ArgumentError(f"{where}: a source is a path or a mapping with 'path', found {item!r}")
    refuse_unknown(item, field_names(DataSource), f"{where}: ")
    values = check_values(f"{where}: ", DataSource, item)
    try:
        return DataSource(**values)
    except ValueError as error:
        raise ArgumentError(str(error)) from error


SECTIONS: dict[str, type] = {"model": ModelArguments, "data": DataArguments, "training": ListenTrainingArguments}
"""Section of a file -> its dataclass."""
