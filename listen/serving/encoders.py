"""A model without the layers of its LLM, for engines that run the LLM elsewhere: they are not read from disk."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from .. import ListenForConditionalGeneration
from ..language_models_listen import embedded_inputs
from ..weights_listen import weight_files

logger = logging.get_logger(__name__)


class EncoderSide(ListenForConditionalGeneration):
    """Encoders, adapters and the LLM's input embeddings; the LLM's layers and head stay on the meta device.

    LLMs whose input embeddings are more than a plain table are read whole, and so are checkpoints with a LoRA.
    """

    def load_backbones(self, dtype: Any = None, *args: Any, **kwargs: Any) -> None:
        """As of the model, with input embeddings in place of the whole LLM."""
        place, location = self.config.backbone_place("language_model")
        found = None if self.config.lora_config else embeddings_alone(place, dtype, location)
        if found is None:
            logger.warning("the whole LLM %s is read, as its input embeddings cannot be read alone", place)
        else:
            self._attach("language_model", found, place)
        super().load_backbones(dtype, *args, **kwargs)


class InputEmbeddings(nn.Module):
    """An LLM without its layers and its head: what `ListenModel.embed` reads of it.

    Args:
        language_model: Any causal LLM.
    """

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.embeddings = language_model.get_input_embeddings()
        self.config, self.dtype = language_model.config, language_model.dtype

    def get_input_embeddings(self) -> nn.Module:
        """The input embeddings."""
        return self.embeddings


def embeddings_alone(place: str, dtype: Any, location: dict[str, str]) -> Any:
    """A causal LLM on the meta device but for its input embeddings.

    Args:
        place: Folder or Hub id of the LLM.
        dtype: Of the embeddings, a name or a `torch.dtype`; `None` or `"auto"` for that of the checkpoint's config.
        location: Its revision, and its folder in the repository.

    Returns:
        The LLM; `None` where the embeddings have further weights or buffers, or another name in the checkpoint.
    """
    config = AutoConfig.from_pretrained(place, **location)
    dtype = config.get_text_config().dtype if dtype in (None, "auto") else dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    embeddings = language_model.get_input_embeddings()
    if [name for name, _ in (*embeddings.named_parameters(), *embeddings.named_buffers())] != ["weight"]:
        return None
    (name,) = (name for name, module in language_model.named_modules() if module is embeddings)
    table = _read(f"{name}.weight", weight_files(place, **location))  # (vocabulary, text width)
    if table is None or table.shape != embeddings.weight.shape:
        return None
    embeddings.weight = nn.Parameter(table.to(dtype), requires_grad=False)
    for module in language_model.modules():
        module._is_hf_initialized = True  # `post_init` of the model around it would overwrite the weights
    try:
        language_model.generation_config = GenerationConfig.from_pretrained(place, **location)
    except OSError:
        logger.info("%s has no generation config; the defaults of its class are used", place)
    return language_model.eval()


def _read(name: str, files: list[str]) -> torch.Tensor | None:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            if name in opened.keys():  # noqa: SIM118 (no mapping)
                return opened.get_tensor(name)
    return None


def drop_layers(model: Any) -> None:
    """Keep the input embeddings of a model's LLM alone, and refuse what they do not carry to another server.

    Raises:
        ValueError: prompts or a LoRA in the LLM's layers, or an LLM that also reads ids.
    """
    reason = "which the vLLM server's bare LLM does not have; use --engine transformers"
    for name, adapter in model.adapters.items():
        if adapter.prompt_pool is not None and adapter.prompt_pool.config.form == "layers":
            raise ValueError(f"adapter {name!r} has prompts in the LLM's layers (form='layers'), {reason}")
    if model._lora_layers():
        raise ValueError(f"adapter 'default' has a LoRA in the LLM's layers, {reason}")
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    embeds = model.get_input_embeddings()(ids)  # (1, 1, text width)
    if embedded_inputs(model.language_model, ids, ids == 0, embeds).keys() != {"inputs_embeds"}:
        raise ValueError("the LLM reads token ids in its layers too, which embeddings lack; use --engine transformers")
    model.language_model = InputEmbeddings(model.language_model)


__all__ = ["EncoderSide", "InputEmbeddings", "drop_layers", "embeddings_alone"]
