"""From arguments to a model with its processor."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file, logging

from ..configuration_listen import ListenConfig, ListenPromptPoolConfig
from ..data.collator import ListenCollator
from ..modeling_listen import ListenForConditionalGeneration, ListenModel
from ..presets_listen import PRESETS
from ..processing_listen import ListenProcessor
from .arguments import ModelArguments
from .sharded import undivided
from .values import ArgumentError

logger = logging.get_logger(__name__)


@undivided()
def build_model(arguments: ModelArguments) -> tuple[ListenForConditionalGeneration, ListenProcessor]:
    """Load the checkpoint, or build a new adapter between the named backbones.

    Args:
        arguments: section `model`.

    Returns:
        The model in eval mode, with gradients for its trainable parts only, and its processor.

    Raises:
        ArgumentError: an unknown preset.
        ValueError: backbones and settings that do not fit each other.
    """
    options: dict[str, Any] = {"dtype": arguments.dtype}
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    if arguments.checkpoint:
        model = ListenForConditionalGeneration.from_pretrained(arguments.checkpoint, **options)
        processor = ListenProcessor.from_pretrained(arguments.checkpoint)
        if arguments.trainable:
            model.set_trainable(arguments.trainable)
        if arguments.new_prompts is not None:
            model.grow_pool(arguments.new_prompts)
            processor.pool_size = model.config.prompt_pool_config.pool_size
    else:
        config = build_config(arguments)
        processor = ListenProcessor.from_backbones(config)  # sets the ids of the placeholders
        model = ListenForConditionalGeneration.from_backbones(config, **options)
        _start_connector(model, arguments)
    if arguments.lora:
        from peft import LoraConfig

        model.add_adapter(LoraConfig(**arguments.lora))
    stop_at_end_of_turn(model, processor)
    return model, processor


def build_encoders(arguments: ModelArguments) -> tuple[ListenModel, ListenProcessor]:
    """The encoders and the processor of a model without its LLM, to compute features with.

    Args:
        arguments: section `model`.

    Returns:
        A model that can `encode_audio` and nothing else, and the processor.
    """
    if arguments.checkpoint:
        return build_model(arguments)
    config = build_config(arguments)
    processor = ListenProcessor.from_backbones(config)
    model = ListenModel(config, init_backbones=())
    model.generation_config = None  # this model generates nothing
    model.config.base_models = {k: v for k, v in config.base_models.items() if k != "language_model"}
    options = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    model.load_backbones(dtype=arguments.dtype, **options)
    return model.eval(), processor


def build_config(arguments: ModelArguments) -> PreTrainedConfig:
    """Config of a new model: the preset's adapter, the overrides, and the named backbones.

    Raises:
        ArgumentError: an unknown preset.
    """
    settings = adapter_settings(arguments)
    if arguments.pad_to_30s is not None:
        settings["pad_to_30s"] = arguments.pad_to_30s
    return ListenConfig.from_backbones(
        arguments.speech_encoder,
        arguments.language_model,
        audio_encoder=arguments.audio_encoder,
        revisions=arguments.revisions,
        **settings,
    )


def adapter_settings(arguments: ModelArguments) -> dict[str, Any]:
    """Fields of `ListenConfig` for a new adapter: those of the preset with the overrides.

    Raises:
        ArgumentError: an unknown preset.
    """
    if arguments.preset is not None and arguments.preset not in PRESETS:
        raise ArgumentError(f"model.preset={arguments.preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    preset = PRESETS[arguments.preset]() if arguments.preset else {}
    pool = {**(preset.get("prompt_pool_config") or {}), **arguments.prompt_pool}
    without_pool = pool.get("pool_size") == 0 or (preset and not pool)
    if not without_pool:
        _check_pool(pool)
    return {
        "connector_config": {**(preset.get("connector_config") or {}), **arguments.connector},
        "prompt_pool_config": None if without_pool else pool,
        "trainable": arguments.trainable or preset.get("trainable"),
    }


def _check_pool(settings: Mapping[str, Any]) -> None:
    """Refuse settings that exclude each other, such as a pool smaller than the preset's k, before anything loads."""
    if settings.get("frozen_prompts"):
        raise ArgumentError("model.prompt_pool.frozen_prompts is set by model.new_prompts with a model.checkpoint")
    try:
        ListenPromptPoolConfig(**settings)
    except ValueError as error:
        raise ArgumentError(f"model.prompt_pool: {error}") from error


def stop_at_end_of_turn(model: ListenForConditionalGeneration, processor: ListenProcessor) -> None:
    """Let generation stop at the token that training puts at the end of each answer.

    An LLM's own generation config may name another one, and answers would run on to the length limit.
    """
    _, answer = ListenCollator(processor).render({"role": "user", "content": "?"}, "!")
    end = processor.tokenizer(answer, add_special_tokens=False)["input_ids"][-1]
    known = model.generation_config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    if end not in known:
        model.generation_config.eos_token_id = [*known, end]
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id


def _start_connector(model: ListenForConditionalGeneration, arguments: ModelArguments) -> None:
    is_trained = {"adapter", "connector"} & set(model.config.trainable)
    if not arguments.connector_from:
        if not is_trained:
            raise ArgumentError(
                f"trainable={model.config.trainable} leaves the connector at random values; name a checkpoint with a "
                "trained connector as model.connector_from"
            )
        return
    prefix = "adapters.default.connector."
    try:
        weights = load_file(cached_file(arguments.connector_from, SAFE_WEIGHTS_NAME))
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"model.connector_from={arguments.connector_from!r} is no folder and no Hub id with {SAFE_WEIGHTS_NAME}: "
            f"{error}"
        ) from error
    state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    try:
        model.adapters["default"].connector.load_state_dict(state)
    except RuntimeError as error:
        raise ArgumentError(f"the connector of {arguments.connector_from!r} does not fit: {error}") from error


@torch.no_grad()
def initialize_keys(
    model: ListenForConditionalGeneration, collator: ListenCollator, dataset: Any, num_rows: int, batch_size: int = 16
) -> None:
    """Set the pool's keys to the queries of real inputs, so that all keys are in use from the start.

    Args:
        model: a model whose pool has keys.
        collator: one for generation, so that the queries do not depend on answers.
        dataset: rows of the manifest schema in random order; the first ones are taken.
        num_rows: rows whose queries are taken.
        batch_size: rows of a batch.

    Raises:
        ValueError: the model has no pool, or its strategy has no keys.
    """
    pool = model.adapters[model.active_adapter].prompt_pool
    if pool is None:
        raise ValueError("keys cannot be taken from data: the model has no prompt pool")
    rows, queries = list(itertools.islice(dataset, num_rows)), []
    for start in range(0, len(rows), batch_size):
        inputs = collator(rows[start : start + batch_size])
        inputs = {name: value.to(model.device) for name, value in inputs.items() if name != "rows"}
        queries.append(model.select_prompts(**inputs).query)  # (batch, width)
    pool.initialize_keys(torch.cat(queries))
    logger.info(f"keys of the prompt pool start at the queries of {len(rows)} rows")
