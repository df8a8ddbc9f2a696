"""What a LiSTEN model knows of the causal LLM that it gives ears to, whichever that is.

Audio embeddings and prompts live where the LLM's embedding layer ends: the space of its `inputs_embeds`. LLMs differ in
what lies on either side of that point, and the rule holds for all of them:

- Gemma's embedding layer multiplies its rows by sqrt(width). That lies before: the connector's output is not
  multiplied, and prompts start at the mean of what the layer gives, not of the rows that it stores.
- Granite multiplies all that enters by `embedding_multiplier`. That lies behind, for text, audio and prompts alike.
- Gemma 3n and 4 look up a second embedding for every layer by id, Qwen4-Exp one for runs of ids. Text has its own,
  placeholders have the padding's, as the images and sounds of those models do.

No scale is built into the connector: its last layer is linear and learns it.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .context_listen import check_context, context_limit

_READ_IDS_ALONE = ("cpmant",)
_BLIND_TO_MASKS = ("recurrent_gemma", "rwkv", "xlstm")
_ROWS_AT_ONCE = 4096  # 64 MiB of a width of 4096 in fp32


@torch.no_grad()
def mean_embedding(language_model: PreTrainedModel) -> torch.Tensor:
    """The mean over the vocabulary of what the LLM's embedding layer gives, `(text width,)` in fp32.

    The layer is called, so that its scale counts and quantised or offloaded weights are read as it reads them.
    """
    layer = language_model.get_input_embeddings()
    size, device = layer.num_embeddings, language_model.device
    if device.type == "meta":  # offloaded: ids go where the weights are fetched to
        device = torch.device("cpu")
    total: torch.Tensor | float = 0.0
    for ids in torch.arange(size, device=device).split(_ROWS_AT_ONCE):
        total = total + layer(ids).float().sum(0)  # (width,)
    return total / size


def embedded_inputs(
    language_model: PreTrainedModel, input_ids: torch.Tensor, is_placeholder: torch.Tensor, embeds: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Arguments of the LLM's forward for embeddings in which placeholders are filled.

    Args:
        language_model: Any causal LLM.
        input_ids: `(batch, sequence)` that the embeddings were made from.
        is_placeholder: `(batch, sequence)`, true where audio or a prompt stands.
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
    """Whether an input has outgrown a cache: behind so many positions Phi 3 turns all of them by other angles."""
    limit = getattr(text_config.get_text_config(), "original_max_position_embeddings", None)
    return cache is not None and limit is not None and cache.get_seq_length() <= limit < length


def train_frozen(language_model: PreTrainedModel, mode: bool) -> None:
    """Prepare a frozen LLM in eval mode for training what stands around it.

    Gradient checkpointing, 4-bit layers and a LoRA's dropout go by a module's own mode. Those modules alone change
    theirs, and lose the dropout that they do themselves (OPT): none is left in the LLM.
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
    """Undo what a 4-bit layer does to its weight on some CPUs when it first answers without gradients.

    In eval mode it packs the weight for a kernel of AVX-512, many times faster, through which no gradient passes, and
    stays with it. Asking for its state unpacks the weight; its scales stay rounded to bf16.
    """
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        layer.state_dict()


# ---------------------------------------------------------------------- what cannot work


def check_language_model(text_config: PreTrainedConfig) -> None:
    """Refuse an LLM that reads nothing but ids.

    Raises:
        ValueError: it does; an audio embedding has no id.
    """
    config = text_config.get_text_config()
    if config.model_type in _READ_IDS_ALONE or "hash_moe" in (getattr(config, "mlp_layer_types", None) or ()):
        raise ValueError(
            f"an LLM of type {config.model_type!r} reads token ids, not embeddings, so it cannot hear; choose another"
        )


def check_input(config: PreTrainedConfig, input_ids: torch.Tensor | None, attention_mask: Any) -> None:
    """Refuse an input that the LLM cannot read, before its audio is encoded.

    Args:
        config: A `ListenConfig`.
        input_ids: `(batch, sequence)` with placeholder ids; `None` where embeddings are given in their place.
        attention_mask: `(batch, positions)`, 1 on real positions, those in the cache too; masks of other shapes, which
            static caches make, are not looked at.

    Raises:
        ValueError: audio or prompts do not fit into the LLM's context (text alone is left to the LLM), or there is
            padding and the LLM's layers ignore masks.
    """
    mask = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 else None
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
    """Refuse to generate with a cache where the LLM keeps none of keys and values.

    Raises:
        ValueError: it keeps another state, or none.
    """
    if "past_key_values" not in inspect.signature(language_model.forward).parameters:
        model_type = language_model.config.model_type
        raise ValueError(f"LLMs of type {model_type!r} have no attention cache; pass use_cache=False to generate")


__all__ = [
    "check_cache",
    "check_input",
    "check_language_model",
    "embedded_inputs",
    "is_outdated",
    "mean_embedding",
    "train_frozen",
]
