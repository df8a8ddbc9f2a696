"""One training run from arguments to a saved model. `examples/train.py` and the demo call `train`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..data.collator import ListenCollator
from ..data.features import FeatureStore, store_info
from ..data.files import write_json
from ..data.mixing import subset_per_task
from ..data.tasks import get_task
from ..model_card_listen import write_model_card
from ..modeling_listen import ListenForConditionalGeneration
from ..processing_listen import ListenProcessor
from .arguments import SECTIONS, DataArguments, ListenTrainingArguments, ModelArguments
from .build import build_model, initialize_keys
from .ctc import CtcTrainer
from .datasets import build_eval_dataset, build_train_dataset, count_tasks
from .distillation import DistillationTrainer
from .progress import task_scores
from .push import MODEL_FOLDER
from .resumable import ResumableTrainer, read_run_state
from .run_folder import Run, chosen_settings, open_run
from .trainer import GenerationEvaluator, ListenTrainer
from .values import ArgumentError

logger = logging.get_logger(__name__)

_SCORES_FILE = "metrics.json"  # from which the model card takes its scores
# settings that may differ once a run is finished: another machine may still evaluate it, with another `bf16: auto`
_FREE_AT_END = ("training.max_steps", "training.num_train_epochs", "training.bf16")


@dataclass
class TrainResult:
    """Result of a run.

    Attributes:
        model: the trained model; the best one with `load_best_model_at_end`.
        processor: its processor.
        model_folder: where both were saved.
        metrics: metrics of the Trainer, such as `train_runtime` and `train_loss`.
        eval_metrics: metrics of the last evaluation; empty without evaluation data.
        history: everything that was logged, in order.
    """

    model: ListenForConditionalGeneration
    processor: ListenProcessor
    model_folder: Path
    metrics: dict[str, float]
    eval_metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def train(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    training_arguments: ListenTrainingArguments,
    raw: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Train an adapter.

    Args:
        model_arguments: section `model`.
        data_arguments: section `data`.
        training_arguments: section `training`.
        raw: recipe and overrides as given, for the run folder; the arguments themselves by default.
        callbacks: further callbacks of the Trainer.

    Returns:
        The trained model and the metrics of the run.

    Raises:
        ArgumentError: arguments that exclude each other, or a folder that holds another run, see `open_run`.
        ValueError: data, features or backbones that do not fit.
        FolderInUseError: another process trains in the folder.
        TrainingStopped: SIGTERM came; the state is saved.
    """
    if model_arguments.new_prompts and not training_arguments.keys_from_rows:
        raise ArgumentError(
            "model.new_prompts needs training.keys_from_rows: random keys are hardly selected beside trained ones, and "
            "prompts that are not selected are not trained"
        )
    if training_arguments.num_threads is not None:
        torch.set_num_threads(training_arguments.num_threads)
    arguments = raw or _as_sections(model_arguments, data_arguments, training_arguments)
    arguments = chosen_settings(arguments, training_arguments)
    with open_run(training_arguments, arguments) as run:
        set_seed(training_arguments.seed)  # before the new adapter is initialised
        model, processor = build_model(model_arguments)
        trainer = build_trainer(model, processor, data_arguments, training_arguments)
        for callback in callbacks:
            trainer.add_callback(callback)
        _check_checkpoint(trainer, run)
        model.card_data = _card_data(data_arguments, count_tasks(trainer.train_dataset))
        if trainer.is_world_process_zero():
            data = {"train": count_tasks(trainer.train_dataset), "eval": count_tasks(trainer.eval_dataset)}
            run.write(arguments, training_arguments.seed, data)
        return _run(trainer, run)


def build_trainer(
    model: ListenForConditionalGeneration,
    processor: ListenProcessor,
    data_arguments: DataArguments,
    training_arguments: ListenTrainingArguments,
) -> ListenTrainer:
    """A Trainer for a given model over the data that the arguments name.

    Args:
        model: a model with trainable parameters.
        processor: its processor.
        data_arguments: section `data`.
        training_arguments: section `training`.

    Raises:
        ArgumentError: arguments that exclude each other.
        FeatureStoreError: stored features of other encoders, or of a trainable one.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ArgumentError(
            f"no parameter is trainable with trainable={model.config.trainable}; name another part as model.trainable"
        )
    _refuse_layer_drop(model, training_arguments)
    seed = training_arguments.sampling_seed
    grouped = training_arguments.train_sampling_strategy in ("group_by_length", "batch_rebalance")
    rate = _embeddings_per_second(processor) if grouped else None
    train_dataset = build_train_dataset(data_arguments, seed, rate)
    eval_dataset = build_eval_dataset(data_arguments, seed, rate)
    features = _open_features(model, processor, data_arguments)
    if data_arguments.long_audio == "cut":
        processor.max_audio_seconds = data_arguments.max_audio_seconds
    common = {
        "features": features,
        "join_silence_seconds": data_arguments.join_silence_seconds,
        "pad_to_multiple_of": training_arguments.pad_to_multiple_of,
    }
    if training_arguments.keys_from_rows:
        _take_keys_from_data(model, processor, train_dataset, training_arguments.keys_from_rows, seed, common)
    make, options = _alignment(training_arguments)
    return make(
        **options,
        model=model,
        args=training_arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        data_collator=ListenCollator(
            processor,
            train=True,
            teacher=training_arguments.alignment == "distill",
            **_drawn_prompts(model, training_arguments),
            seed=seed,
            **common,
        ),
        eval_collator=ListenCollator(processor, **common),
        generation_evaluator=_generation_evaluator(
            processor, eval_dataset, features, data_arguments, training_arguments
        ),
    )


def _alignment(arguments: ListenTrainingArguments) -> tuple[type[ListenTrainer], dict[str, float]]:
    """The Trainer class for the alignment, and its options."""
    if arguments.alignment != "distill":
        return {"lm": ListenTrainer, "ctc": CtcTrainer}[arguments.alignment], {}
    options = {"temperature": arguments.distill_temperature, "lm_weight": arguments.distill_lm_weight}
    return DistillationTrainer, options


def _refuse_layer_drop(model: ListenForConditionalGeneration, arguments: ListenTrainingArguments) -> None:
    """Refuse LayerDrop in several processes: waiting for gradients of a skipped layer would fail during the run."""
    if arguments.world_size == 1 or arguments.ddp_find_unused_parameters:
        return
    for name in model.config.learned_backbones:
        config = getattr(model, name).config
        dropped = [field for field in ("layerdrop", "encoder_layerdrop") if getattr(config, field, 0.0)]
        if dropped:
            raise ArgumentError(
                f"the trainable {name} has {dropped[0]}={getattr(config, dropped[0])}, which leaves layers without "
                f"gradients in {arguments.world_size} processes; give training.ddp_find_unused_parameters=true"
            )


def run_trainer(trainer: ListenTrainer) -> TrainResult:
    """Train, evaluate, and save model and processor into the run's folder.

    Args:
        trainer: see `build_trainer`.

    Returns:
        The trained model and the metrics of the run.

    Raises:
        ArgumentError: the folder holds another run, or the checkpoint to resume from has no optimiser state.
        ValueError: it was trained over other backbones.
        FolderInUseError: another process trains in the folder.
        TrainingStopped: SIGTERM came; the state is saved.
    """
    with open_run(trainer.args) as run:
        _check_checkpoint(trainer, run)
        return _run(trainer, run)


def _check_checkpoint(trainer: ListenTrainer, run: Run) -> None:
    if run.checkpoint is not None:
        config = trainer.model.config_class.from_pretrained(run.checkpoint)
        trainer.model.check_same_backbones(run.checkpoint, config)


def _run(trainer: ListenTrainer, run: Run) -> TrainResult:
    folder, metrics = train_and_save(trainer, run)
    eval_metrics = _evaluate(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.args.should_save:
        _save_scores(folder, model, eval_metrics, count_tasks(trainer.eval_dataset), trainer.args.generation_eval_rows)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    return TrainResult(
        model=model.eval(),
        processor=trainer.processing_class,
        model_folder=folder,
        metrics=metrics,
        eval_metrics=eval_metrics,
        history=list(trainer.state.log_history),
    )


def train_and_save(trainer: ResumableTrainer, run: Run) -> tuple[Path, dict[str, float]]:
    """Train from the start or from a checkpoint, and save the model and the state of the run.

    A run that is finished is loaded, and not a step is added.

    Args:
        trainer: see `build_trainer`.
        run: the folder of the run, which this process holds.

    Returns:
        The folder of the model, and the Trainer's training metrics.

    Raises:
        ArgumentError: the run is finished, but other settings are asked for.
    """
    trainer.run_id = run.id
    if _is_finished(trainer, run):
        metrics = _load_finished(trainer, run)
    else:
        output = trainer.train(resume_from_checkpoint=run.checkpoint)
        metrics = output.metrics
        trainer.save_state()
        trainer.save_metrics("train", metrics)
    folder = run.folder / MODEL_FOLDER
    if run.finished is None or run.finished < trainer.state.global_step:
        if trainer.args.should_save:
            (folder / _SCORES_FILE).unlink(missing_ok=True)  # of earlier weights; the model card would show them
        trainer.save_to_folder()
        if trainer.args.should_save:
            run.finish(trainer.state.global_step)
    return folder, metrics


def _is_finished(trainer: ResumableTrainer, run: Run) -> bool:
    if run.checkpoint is None and run.finished is None:
        return False
    planned = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    done = max(run.finished or 0, _steps_of(run.checkpoint) if run.checkpoint else 0)
    if done < planned:
        if run.checkpoint is None:
            raise ArgumentError(
                f"the run in {run.folder} is finished after {done} steps and has no checkpoint to go on from to "
                f"{planned}; choose another training.output_dir, and continue training with model.checkpoint"
            )
        return False
    changed = [name for name in run.changed if name not in _FREE_AT_END]
    if changed:
        raise ArgumentError(
            f"the run in {run.folder} is finished, with other settings: {', '.join(changed)} differ; choose another "
            "training.output_dir"
        )
    logger.warning(
        f"the run in {run.folder} is finished after {done} of {planned} steps; no step is added. To train on, raise "
        "training.max_steps or training.num_train_epochs"
    )
    return True


def _load_finished(trainer: ResumableTrainer, run: Run) -> dict[str, float]:
    """Load model and state of a finished run; returns its training metrics."""
    is_saved = run.finished is not None and (run.checkpoint is None or run.finished >= _steps_of(run.checkpoint))
    place = run.folder if is_saved else Path(run.checkpoint)
    trainer.state = TrainerState.load_from_json(str(place / TRAINER_STATE_NAME))
    if is_saved:
        trainer._load_from_checkpoint(str(run.folder / MODEL_FOLDER))
        return json.loads((run.folder / "train_results.json").read_text(encoding="utf-8"))
    # it ended between its last checkpoint and its results
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    trainer._load_from_checkpoint(best or run.checkpoint)
    window = read_run_state(run.checkpoint).get("window", {})
    loss = window.get("logged_loss_sum", float("nan")) + window.get("loss_sum", 0.0)
    metrics = {"train_loss": loss / max(trainer.state.global_step, 1)}
    trainer.save_state()
    trainer.save_metrics("train", metrics)
    return metrics


def _steps_of(checkpoint: str) -> int:
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step


def _evaluate(trainer: ListenTrainer) -> dict[str, float]:
    """Metrics of the final model; those of the log if its last step was evaluated already."""
    if trainer.eval_dataset is None:
        return {}
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), {})
    fresh = last.get("step") == trainer.state.global_step and not trainer.args.load_best_model_at_end
    metrics = {k: v for k, v in last.items() if k.startswith("eval_")} if fresh else trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    return metrics


def _save_scores(
    folder: Path, model: ListenForConditionalGeneration, metrics: dict[str, float], rows: dict[str, int], most: int
) -> None:
    """Put the scores of the final evaluation into the model's folder and its card, unless it has scores already."""
    scores = task_scores(metrics)
    if scores and not (folder / _SCORES_FILE).exists():
        counted = {task: {**values, "n": min(rows.get(task, most), most)} for task, values in scores.items()}
        write_json(folder / _SCORES_FILE, counted)
        write_model_card(folder, model)


def _embeddings_per_second(processor: ListenProcessor) -> float:
    """Audio embeddings of a second, over clips of half a minute."""
    return processor.num_audio_embeddings(30 * processor.feature_extractor.sampling_rate) / 30


def _open_features(
    model: ListenForConditionalGeneration, processor: ListenProcessor, arguments: DataArguments
) -> FeatureStore | None:
    if arguments.features is None:
        return None
    store = FeatureStore(arguments.features)
    store.check(store_info(model, processor.feature_extractor, arguments.join_silence_seconds))
    return store


def _drawn_prompts(model: ListenForConditionalGeneration, arguments: ListenTrainingArguments) -> dict[str, int | None]:
    """The collator's range of k in training; nothing where k is fixed."""
    pool = model.config.prompt_pool_config
    if pool is None or not pool.stochastic:
        return {}
    return {"min_prompts": arguments.min_prompts, "max_prompts": pool.train_prompts}


def _take_keys_from_data(
    model: ListenForConditionalGeneration,
    processor: ListenProcessor,
    dataset: Dataset | IterableDataset,
    num_rows: int,
    seed: int,
    common: dict[str, Any],
) -> None:
    collator = ListenCollator(processor, for_generation=True, **common)
    initialize_keys(model, collator, dataset.shuffle(seed=seed), num_rows)


def _generation_evaluator(
    processor: ListenProcessor,
    dataset: Dataset | None,
    features: FeatureStore | None,
    data_arguments: DataArguments,
    arguments: ListenTrainingArguments,
) -> GenerationEvaluator | None:
    if dataset is None or not arguments.generation_eval_rows:
        return None
    subset = subset_per_task(dataset, arguments.generation_eval_rows, arguments.seed)

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        from ..evaluation import evaluate_model  # imports metrics and plots, which training itself does not need

        result = evaluate_model(
            model,
            processor,
            subset,
            features=features,
            join_silence_seconds=data_arguments.join_silence_seconds,
            batch_size=arguments.per_device_eval_batch_size,
            num_resamples=0,
            progress=not arguments.disable_tqdm,
            max_new_tokens=arguments.generation_max_new_tokens,
            num_beams=arguments.generation_num_beams,
        )
        scores = [(task, name, value) for task, found in result.metrics.items() for name, value in found.items()]
        return {f"{task}_{name}": value for task, name, value in scores if name != "n"}

    return evaluate


def _card_data(arguments: DataArguments, tasks: Iterable[str]) -> dict[str, Any]:
    """Languages and data sets of the Hub for the model's card."""
    paths = [source.path for source in arguments.train]
    ids = [path for path in paths if isinstance(path, str) and path.count("/") == 1 and not Path(path).exists()]
    languages = sorted({get_task(task).language for task in tasks} - {None, ""})
    found = {"datasets": list(dict.fromkeys(ids)), "language": languages}
    return {name: value for name, value in found.items() if value}


def _as_sections(*arguments: Any) -> dict[str, Any]:
    """Arguments that differ from their defaults, as in a recipe."""
    sections: dict[str, Any] = {}
    for name, item in zip(SECTIONS, arguments, strict=True):
        values = {entry.name: getattr(item, entry.name) for entry in dataclasses.fields(item) if entry.init}
        defaults = _defaults(item)
        sections[name] = {key: _plain(value) for key, value in values.items() if value != defaults.get(key)}
    return sections


def _defaults(item: Any) -> dict[str, Any]:
    return {
        entry.name: entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default
        for entry in dataclasses.fields(item)
    }


def _plain(value: Any) -> Any:
    """The value as plain data for YAML."""
    if dataclasses.is_dataclass(value):
        return {key: item for key, item in dataclasses.asdict(value).items() if item not in (None, {}, [])}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return getattr(value, "value", value)
