"""What the model's methods return."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


@dataclass
class EncodedAudio(ModelOutput):
    """Encoder frames of all audio in a batch. They can be computed once, stored, and given to `forward` again.

    Attributes:
        speech_hidden_states: `(chunks, speech frames, speech width)`.
        speech_hidden_states_mask: `(chunks, speech frames)`, 1 on real frames.
        audio_hidden_states: `(chunks, audio frames, audio width)`; `None` without an audio encoder.
        audio_hidden_states_mask: `(chunks, audio frames)`.
    """

    speech_hidden_states: torch.Tensor | None = None
    speech_hidden_states_mask: torch.Tensor | None = None
    audio_hidden_states: torch.Tensor | None = None
    audio_hidden_states_mask: torch.Tensor | None = None

    def take(self, chunks: list[int]) -> "EncodedAudio":
        """The frames of some chunks, in the order asked for; a chunk may be repeated."""
        return EncodedAudio(**{name: states[chunks] for name, states in self.items()})


@dataclass
class AudioEmbeddings(BaseModelOutputWithPooling):
    """Audio embeddings in the LLM's space.

    Attributes:
        pooler_output: `(total, text width)`, the chunks one after the other.
        lengths: `(chunks,)` embeddings of each chunk.
    """

    lengths: torch.Tensor | None = None


@dataclass
class ListenOutput(ModelOutput):
    """Output of `ListenForConditionalGeneration`.

    Attributes:
        loss: Next-token loss plus the weighted key loss, if `labels` are given.
        logits: `(batch, kept positions, vocabulary)`.
        past_key_values: The LLM's cache.
        hidden_states: The LLM's hidden states, if asked.
        attentions: The LLM's attentions, if asked.
        router_logits: Those of an LLM with experts, if asked. Its balancing loss is left out: the routers are frozen.
        lm_loss: The next-token part of the loss.
        key_loss: The key part of the loss, before its weight.
        prompt_indices: `(batch, k)` prompts selected, best first; -1 where a row asked for fewer.
        prompt_scores: `(batch, k)` their scores under the strategy.
        query: `(batch, text width)` the query they were selected by, before the running mean is subtracted.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    lm_loss: torch.Tensor | None = None
    key_loss: torch.Tensor | None = None
    prompt_indices: torch.Tensor | None = None
    prompt_scores: torch.Tensor | None = None
    query: torch.Tensor | None = None


@dataclass
class ListenModelOutput(ModelOutput):
    """Output of `ListenModel`: the LLM's decoder output beside the prompts that were selected.

    Attributes:
        last_hidden_state: `(batch, sequence, text width)`.
        past_key_values: The LLM's cache.
        hidden_states: The LLM's hidden states, if asked.
        attentions: The LLM's attentions, if asked.
        prompt_indices: As in `ListenOutput`.
        prompt_scores: As in `ListenOutput`.
        query: As in `ListenOutput`.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    prompt_indices: torch.Tensor | None = None
    prompt_scores: torch.Tensor | None = None
    query: torch.Tensor | None = None


@dataclass
class PromptOutput(ModelOutput):
    """Prompts selected for a batch, see `ListenOutput` for the shapes.

    Attributes:
        indices: `(batch, k)`, -1 where a row asked for fewer.
        scores: `(batch, k)`.
        key_loss: `(batch,)`, before its weight.
        key_loss_weight: `(batch,)`, alpha of the pool that each row used.
        query: `(batch, text width)`.
        layers: The prompts that are in the LLM's layers and not in its input, a list of `LayerPrompts`.
    """

    indices: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    key_loss: torch.Tensor | None = None
    key_loss_weight: torch.Tensor | None = None
    query: torch.Tensor | None = None
    layers: list[Any] | None = None


__all__ = ["AudioEmbeddings", "EncodedAudio", "ListenModelOutput", "ListenOutput", "PromptOutput"]
