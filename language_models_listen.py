"""What a LiSTEN model knows of the causal LLM that it gives ears to, whichever that is.

Audio embeddings and prompts live where the LLM's embedding layer ends: the space of its `inputs_embeds`. LLMs differ in
what lies on either side of that point, and the rule holds for all of them:

- Gemma's embedding layer multiplies its rows by sqrt(width). That lies before: the connector's output is not
  multiplied, and prompts start at the mean of what the layer gives, not of the rows that it stores.
- Granite multiplies all that enters by `embedding_multiplier`. That lies behind, for text, audio and prompts alike.
- Gemma 3n and 4 look up a second embedding for every layer by id. Text has its own, placeholders have the padding's,
  as the images and sounds of those models do.

No scale is built into the connector: its last layer is linear and learns it.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

_ROWS_AT_ONCE = 4096  # 64 MiB of a width of 4096 in fp32


@torch.no_grad()
def mean_embedding(language_model: PreTrainedModel) -> torch.Tensor:
    """The mean over the vocabulary of what the LLM's embedding layer gives, `(text width,)` in fp32.

    The layer is called, so that its scale counts and quantised or offloaded weights are read as it reads them.
    """
    layer = language_model.get_input_embeddings()
    size = layer.num_embeddings
    total: torch.Tensor | float = 0.0
    for ids in torch.arange(size, device=language_model.device).split(_ROWS_AT_ONCE):
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
    decoder = language_model.get_decoder()
    if not getattr(decoder, "hidden_size_per_layer_input", 0):
        return {"inputs_embeds": embeds}
    padding = getattr(decoder.config, "pad_token_id", None) or 0
    ids = input_ids.masked_fill(is_placeholder, padding)
    return {"inputs_embeds": embeds, "per_layer_inputs": decoder.get_per_layer_inputs(ids)}


def is_4bit(layer: nn.Module) -> bool:
    """Whether bitsandbytes holds the weight of this layer in 4 bits."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def unpack_4bit(layer: nn.Module) -> None:
    """Undo what a 4-bit layer does to its weight on some CPUs when it first answers without gradients.

    In eval mode it packs the weight for a kernel of AVX-512, many times faster, through which no gradient passes, and
    stays with it. Asking for its state unpacks the weight; its scales stay rounded to bf16.
    """
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        layer.state_dict()


__all__ = ["embedded_inputs", "is_4bit", "mean_embedding", "unpack_4bit"]
