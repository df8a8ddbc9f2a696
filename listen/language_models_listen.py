"""What differs between causal LLMs: input embeddings, training around a frozen LLM, context length, unsupported LLMs.

Audio embeddings and prompts are placed in the space of the LLM's `inputs_embeds`, the output of its embedding layer.
What LLMs do before and after that point differs:

- Gemma's embedding layer multiplies its rows by sqrt(width), before that point: the connector's output is not
  multiplied, and prompts start at the mean of the layer's output, not of its weights.
- Granite multiplies its whole input by `embedding_multiplier`, after that point: text, audio and prompts alike.
- Gemma 3n and 4 look up a second embedding for every layer by id, Qwen4-Exp one for runs of ids. Text uses its own ids,
  placeholders the padding id, as for the images and audio of those models.

No scale is built into the connector: its last layer is linear and learns it.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

_READ_IDS_ALONE = ("cpmant",)
_BLIND_TO_MASKS = ("recurrent_gemma", "rwkv", "xlstm")
_STRETCHED = ("linear", "dynamic", "yarn")
PACKING_KWARGS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
UNPACK = "give each sequence a row of its own, as prompts are selected for each row"
_ROWS_AT_ONCE = 4096  # 64 MiB at a width of 4096 in fp32


@torch.no_grad()
def mean_embedding(language_model: PreTrainedModel) -> torch.Tensor:
    """The mean output of the LLM's embedding layer over the vocabulary, `(text width,)` in fp32.

    The layer is called, so that its scale is included and quantised or offloaded weights are read correctly.
    """
    layer = language_model.get_input_embeddings()
    size, device = layer.num_embeddings, language_model.device
    if device.type == "meta":  # offloaded: weights are fetched to the CPU
        device = torch.device("cpu")
    total: torch.Tensor | float = 0.0
    for ids in torch.arange(size, device=device).split(_ROWS_AT_ONCE):
        total = total + layer(ids).float().sum(0)  # (width,)
    return total / size


@torch.no_grad()
def random_embeddings(language_model: PreTrainedModel, count: int) -> torch.Tensor:
    """Outputs of the LLM's embedding layer for `count` random ids, `(count, text width)` in fp32.

    No id is drawn twice while there are enough. The layer is called, as in `mean_embedding`.
    """
    layer, device = language_model.get_input_embeddings(), language_model.device
    if device.type == "meta":  # offloaded: weights are fetched to the CPU
        device = torch.device("cpu")
    rounds = -(-count // layer.num_embeddings)
    ids = torch.cat([torch.randperm(layer.num_embeddings) for _ in range(rounds)])[:count]  # (count,)
    return layer(ids.to(device)).float()


def embedded_inputs(
    language_model: PreTrainedModel, input_ids: torch.Tensor, is_placeholder: torch.Tensor, embeds: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Arguments of the LLM's forward for embeddings with filled placeholders.

    Args:
        language_model: Any causal LLM.
        input_ids: `(batch, sequence)`, with placeholder ids.
        is_placeholder: `(batch, sequence)`, true at placeholders of audio and prompts.
        embeds: `(batch, sequence, text width)`.
    """
    decoder, config = language_model.get_decoder(), language_model.config.get_text_config()
    ids = input_ids.masked_fill(is_placeholder, getattr(config, "pad_token_id", None) or 0)
    if getattr(decoder, "hidden_size_per_layer_input", 0):
        return {"inputs_embeds": embeds, "per_layer_inputs": decoder.get_per_layer_inputs(ids)}
    if getattr(config, "ple_layer_ids", None):
        return {"inputs_embeds": embeds, "ple_input_ids": ids}
    return {"inputs_embeds": embeds}


def is_outdated(cache: Cache | None, length: int, text_config: PreTrainedConfig) -> bool:
    """Whether a cache no longer fits its input: past a certain length, Phi 3 rotates all positions by other angles."""
    limit = getattr(text_config.get_text_config(), "original_max_position_embeddings", None)
    return cache is not None and limit is not None and cache.get_seq_length() <= limit < length


def context_limit(text_config: PreTrainedConfig) -> int | None:
    """Maximum number of positions of an LLM; `None` without a limit.

    That is `max_position_embeddings`, extended by scaled rotary positions. Sliding-window attention does not limit
    positions. Recurrent models and linear biases (ALiBi) have no limit, except for the table of MPT's biases.

    Args:
        text_config: The LLM's config.
    """
    config = text_config.get_text_config()
    limit = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))
    if limit is None or getattr(config, "alibi", False):
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in _STRETCHED:  # others give the extended length
        return limit
    trained = rope.get("original_max_position_embeddings") or limit
    return max(limit, int(trained * (rope.get("factor") or 1.0)))


def train_frozen(language_model: PreTrainedModel, mode: bool) -> None:
    """Prepare a frozen LLM in eval mode for training the modules around it.

    Gradient checkpointing, 4-bit layers and a LoRA's dropout depend on a module's `training` flag. Only the flags of
    those modules change; their own dropout (OPT) is set to 0, so that the LLM has none.
    """
    for name, module in language_model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = mode
            for setting, value in vars(module).items():
                if "drop" in setting and isinstance(value, float):
                    setattr(module, setting, 0.0)
        elif _is_4bit(module):
            module.training = mode
            if mode:
                _unpack_4bit(module)  # gradients must pass
        elif "lora_dropout" in name:
            module.training = mode


def _is_4bit(layer: nn.Module) -> bool:
    """Whether bitsandbytes holds the weight of this layer in 4 bits."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def _unpack_4bit(layer: nn.Module) -> None:
    """Restore the weight of a 4-bit layer that was packed for a CPU kernel without gradients.

    In eval mode, such a layer packs its weight for a much faster AVX-512 kernel and keeps it packed. Reading its
    state dict unpacks the weight; its scales stay rounded to bf16.
    """
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        layer.state_dict()


# ---------------------------------------------------------------------- checks


def check_not_packed(position_ids: torch.Tensor, mask: torch.Tensor | None, is_prompt: torch.Tensor) -> None:
    """Refuse rows that pack several sequences: one query would select the prompts of all of them.

    Args:
        position_ids: `(batch, sequence)`, or with axes in front.
        mask: `(batch, sequence)`, 1 on real positions; `None` where all are real.
        is_prompt: `(batch, sequence)` prompt placeholders; packed rows without any are fine.

    Raises:
        ValueError: positions restart inside a row with prompts.
    """
    restarts = position_ids.diff(dim=-1) < 0  # (batch, sequence - 1)
    if mask is not None:  # padding may have any position
        restarts = restarts & mask[:, 1:].bool() & mask[:, :-1].bool()
    if (restarts & is_prompt.any(-1, keepdim=True)).any():
        raise ValueError(f"position_ids restart inside a row with prompts: it packs several sequences; {UNPACK}")


def check_language_model(text_config: PreTrainedConfig) -> None:
    """Refuse an LLM that takes only token ids.

    Raises:
        ValueError: it does; audio embeddings have no ids.
    """
    config = text_config.get_text_config()
    if config.model_type in _READ_IDS_ALONE or "hash_moe" in (getattr(config, "mlp_layer_types", None) or ()):
        raise ValueError(
            f"an LLM of type {config.model_type!r} reads token ids, not embeddings, which audio needs; choose another"
        )


def check_context(limit: int | None, positions: int, num_prompts: int, num_audio: int) -> None:
    """Refuse an input with audio or prompts that is longer than the LLM's context; text alone is left to the LLM.

    Args:
        limit: See `context_limit`.
        positions: Length of the longest row without padding.
        num_prompts: Prompts among them.
        num_audio: Audio embeddings among them.

    Raises:
        ValueError: it does not fit.
    """
    if limit is None or positions <= limit or not num_prompts + num_audio:
        return
    text = positions - num_prompts - num_audio
    raise ValueError(
        f"the input has {positions} positions ({num_prompts} prompts, {num_audio} audio embeddings, {text} of text), "
        f"more than the LLM's context of {limit}; cut the clips with max_audio_seconds=, ask for fewer prompts, or ask "
        "about one part of the audio after the other"
    )


def check_later(holds: torch.Tensor, message: str, **given: int) -> None:
    """Raise a `RuntimeError` unless all of `holds` is true, without waiting for the device: from a GPU it comes later.

    Devices that cannot fail later are not checked. The message ends with the values of `given`.
    """
    if holds.device.type in ("cpu", "cuda"):
        if not torch.compiler.is_compiling():  # values in the message would break the graph
            message = ", ".join([message, *map("{0[0]}={0[1]}".format, given.items())])
        torch._assert_async(holds.all(), message)


def shape_error(name: str, value: torch.Tensor, shape: tuple[int, ...]) -> ValueError:
    """The error for a mask or labels of another shape than the inputs that they belong to."""
    return ValueError(
        f"{name} has the shape {tuple(value.shape)}, but needs {tuple(shape)}; give it as the processor does"
    )


def frame_mask(name: str, frames: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask of encoder frames `(chunks, frames, width)`: `(chunks, frames)`, all ones by default.

    Raises:
        ValueError: another shape.
    """
    if frames is None or mask is None:
        return torch.ones_like(frames[..., 0], dtype=torch.long) if frames is not None else None
    if mask.shape != frames.shape[:2]:
        raise shape_error(name, mask, frames.shape[:2])
    return mask


def unfit_stream(config: PreTrainedConfig, name: str) -> ValueError:
    """The error for the input of an audio encoder that the model lacks, or for one that is missing."""
    if config.audio_config is None:
        return ValueError(f"{name} was given but the model has no audio encoder; use the model's own processor")
    return ValueError(f"the model has an audio encoder but {name} is missing; use the model's own processor")


def check_input(
    config: PreTrainedConfig,
    input_ids: torch.Tensor | None,
    attention_mask: Any,
    labels: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
    cached: bool = True,
) -> None:
    """Refuse an input that the LLM cannot read, before its audio is encoded.

    Args:
        config: A `ListenConfig`.
        input_ids: `(batch, sequence)` with placeholder ids; `None` where embeddings are given in their place.
        attention_mask: `(batch, positions)`, 1 on real positions, those in the cache too; masks of other shapes, which
            static caches make, are not looked at.
        labels: `(batch, sequence)`.
        query_mask: `(batch, positions)`, see `ListenModel.embed`.
        cached: Whether there may be more positions in a cache.

    Raises:
        ValueError: audio or prompts do not fit into the LLM's context (text alone is left to the LLM), a mask or labels
            have another shape, or there is padding and the LLM's layers ignore masks.
    """
    mask = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 else None
    if input_ids is not None:
        if mask is not None and (len(mask) != len(input_ids) or (mask.shape != input_ids.shape and not cached)):
            raise shape_error("attention_mask", mask, input_ids.shape)
        if labels is not None and labels.shape != input_ids.shape:
            raise shape_error("labels", labels, input_ids.shape)
        if query_mask is not None and (query_mask.dim() != 2 or len(query_mask) != len(input_ids)):
            raise shape_error("query_mask", query_mask, input_ids.shape)
    limit = context_limit(config.text_config)
    positions = 0 if input_ids is None else max(input_ids.shape[1], 0 if mask is None else mask.shape[1])
    if limit is not None and positions > limit:
        lengths = mask.sum(-1) if mask is not None else torch.full_like(input_ids[:, 0], positions)  # (batch,)
        row = int(lengths.argmax())
        prompts, audio = (input_ids[row].tolist().count(i) for i in (config.prompt_token_id, config.audio_token_id))
        check_context(limit, int(lengths[row]), prompts, audio)
    model_type = config.text_config.get_text_config().model_type
    if model_type in _BLIND_TO_MASKS and mask is not None and not mask.all():
        raise ValueError(f"LLMs of type {model_type!r} read padding as if it were text; give one row at a time")


def check_cache(language_model: PreTrainedModel) -> None:
    """Refuse to generate with a cache if the LLM has no cache of keys and values.

    Raises:
        ValueError: it has another state, or none.
    """
    if "past_key_values" not in inspect.signature(language_model.forward).parameters:
        model_type = language_model.config.model_type
        raise ValueError(f"LLMs of type {model_type!r} have no attention cache; pass use_cache=False to generate")


__all__ = [
    "PACKING_KWARGS",
    "UNPACK",
    "check_cache",
    "check_context",
    "check_input",
    "check_later",
    "frame_mask",
    "shape_error",
    "unfit_stream",
    "check_language_model",
    "check_not_packed",
    "context_limit",
    "embedded_inputs",
    "is_outdated",
    "mean_embedding",
    "random_embeddings",
    "train_frozen",
]
