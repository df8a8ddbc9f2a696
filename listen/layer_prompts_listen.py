"""Prompts in the LLM's layers (`form="layers"` of the pool): hidden units of a parallel adapter, selected for each row.

Layer l of the LLM maps x to y. For a row with selected prompts S of weights w, this module makes it

    y + 4 * sum_{i in S} w_i * silu(x / rms(x) . r_il) * u_il

That is the scaled parallel adapter of He et al. (arXiv 2110.04366), with their scale of 4; its hidden units are the
prompts of the pool: r_il are the pool's `reads`, u_il its `writes`. It is beyond the paper of LiSTEN.

The layers get the prompts by forward hooks. The prompts of a pass are kept by thread, so that threads do not mix
theirs; a context variable would break the graph of `torch.compile`. Gradient checkpointing runs layers again in the
backward pass, with the prompts of their own forward pass. A cache keeps the prompts of the pass that filled it, for the
tokens that follow.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .language_models_listen import check_later

_SCALE = 4.0
_PROMPT_MASK = (
    "attention_mask must be 0 at the placeholders of prompts in the LLM's layers (form='layers'), and 1 at those of "
    "prompts in the input; process the input with the adapter's own processor"
)


@dataclass
class LayerPrompts:
    """Prompts that rows of a batch selected from one pool.

    Attributes:
        pool: A `ListenPromptPool` of form `"layers"`.
        rows: `(rows,)` their places in the batch.
        indices: `(rows, k)`, any where a row asks for fewer.
        weights: `(rows, k)`, zero where a row asks for fewer.
    """

    pool: nn.Module
    rows: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor

    def add(self, layer: int, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """`outputs` of the LLM's layer number `layer` plus what the prompts add; all `(batch, sequence, width)`."""
        device, dtype = outputs.device, outputs.dtype  # the LLM may be spread over devices
        rows, indices = self.rows.to(device), self.indices.to(self.pool.reads.device)
        states = inputs[rows].float()  # (rows, sequence, width)
        states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6)
        reads, writes = (self.pool.part(name, layer)[indices] for name in ("reads", "writes"))  # (rows, k, width)
        writes = writes * (_SCALE * self.weights.to(writes.device))[..., None]
        hidden = F.silu(states.to(dtype) @ reads.to(device, dtype).transpose(1, 2))  # (rows, sequence, k)
        return outputs.index_add(0, rows, (hidden @ writes.to(device, dtype)).to(dtype))


class _OfThread(threading.local):
    """The prompts of the pass that the current thread runs; `None` in passes without."""

    prompts: list[LayerPrompts] | None = None


_ACTIVE = _OfThread()
_HOOKING = threading.Lock()


def run_with_layer_prompts(
    language_model: PreTrainedModel, prompts: list[LayerPrompts], past_key_values: Any = None, **inputs: Any
) -> Any:
    """Run the LLM, or its decoder, with prompts in its layers.

    Args:
        language_model: The LLM.
        prompts: Those that this pass selected, or those of an earlier pass that its cache kept, see `kept_prompts`.
        past_key_values: The LLM's cache.
        **inputs: Further arguments of its forward.

    Returns:
        The LLM's outputs; their cache keeps the prompts.

    Raises:
        ValueError: the LLM's layers are not found.
    """
    _hook_layers(language_model)
    with _active(prompts):
        outputs = language_model(past_key_values=past_key_values, **inputs)
    if (cache := outputs.get("past_key_values")) is not None:
        cache.layer_prompts = prompts
    return outputs


def kept_prompts(cache: Any) -> list[LayerPrompts] | None:
    """The prompts that shaped what a cache holds; `None` for a cache that was emptied."""
    return cache.layer_prompts if cache.get_seq_length() else None


def checkpoint_with_prompts(
    checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **options: Any
) -> Any:
    """`checkpoint(function, *args, **options)`; the backward pass runs `function` again with its prompts.

    Args:
        checkpoint: A function such as `torch.utils.checkpoint.checkpoint`.
        function: A layer.
        *args: Its inputs.
        **options: Of `checkpoint`.
    """
    prompts = _ACTIVE.prompts
    if prompts is None:
        return checkpoint(function, *args, **options)

    def with_prompts(*inputs: Any) -> Any:
        with _active(prompts):
            return function(*inputs)

    return checkpoint(with_prompts, *args, **options)


def check_prompt_mask(
    prompts: list[LayerPrompts] | None, is_prompt: torch.Tensor, attention_mask: torch.Tensor | None, wait: bool
) -> None:
    """Refuse placeholders that are masked for prompts in the input, or read by the LLM for prompts in its layers.

    Args:
        prompts: Prompts in the layers.
        is_prompt: `(batch, sequence)` prompt placeholders.
        attention_mask: `(batch, sequence)`, 1 on positions that the LLM reads; `None` where it reads all.
        wait: Whether to wait for the device and raise a `ValueError`; else a `RuntimeError` follows later on a GPU.

    Raises:
        ValueError: there is such a placeholder.
        RuntimeError: the same, without `wait`.
    """
    masked = torch.zeros_like(is_prompt)  # (batch, sequence), as it should be
    for item in prompts or ():
        masked[item.rows] = is_prompt[item.rows]
    found = torch.zeros_like(is_prompt)
    if attention_mask is not None:  # candidates of assisted decoding stand behind a shorter mask
        found = F.pad(attention_mask == 0, (0, is_prompt.shape[1] - attention_mask.shape[1])) & is_prompt
    if not wait:
        check_later(masked == found, _PROMPT_MASK)
    elif not torch.equal(masked, found):
        raise ValueError(_PROMPT_MASK)


@contextmanager
def _active(prompts: list[LayerPrompts]) -> Iterator[None]:
    before, _ACTIVE.prompts = _ACTIVE.prompts, prompts
    try:
        yield
    finally:
        _ACTIVE.prompts = before


def _hook_layers(language_model: PreTrainedModel) -> None:
    """Hook each layer of the LLM once."""
    layers = [m for m in language_model.get_decoder().modules() if isinstance(m, GradientCheckpointingLayer)]
    if layers and all(hasattr(layer, "takes_prompts") for layer in layers):
        return
    config = language_model.config.get_text_config()
    with _HOOKING:
        if len(layers) != config.num_hidden_layers:
            raise ValueError(
                f"an LLM of type {config.model_type!r} has {config.num_hidden_layers} layers, of which {len(layers)} "
                "are found, so prompts cannot be in its layers; use form='input'"
            )
        for number, layer in enumerate(layers):
            # by another thread, meanwhile; replicas of `nn.DataParallel` share their hooks, but not later attributes
            if not any(getattr(hook, "func", None) is _add_prompts for hook in layer._forward_hooks.values()):
                layer.register_forward_hook(functools.partial(_add_prompts, number), with_kwargs=True)
            layer.takes_prompts = True


def _add_prompts(number: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook; it changes nothing in passes without prompts."""
    prompts = _ACTIVE.prompts
    if prompts is None:
        return None
    states = args[0] if args else kwargs["hidden_states"]  # (batch, sequence, width)
    result = output[0] if isinstance(output, tuple) else output
    for item in prompts:
        result = item.add(number, states, result)
    return (result, *output[1:]) if isinstance(output, tuple) else result


__all__ = ["LayerPrompts", "check_prompt_mask", "checkpoint_with_prompts", "kept_prompts", "run_with_layer_prompts"]
