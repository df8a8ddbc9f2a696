"""Connectors: from frames of the frozen encoders to audio embeddings of the LLM's width.

`WindowQFormer` is SALMONN's (arXiv 2310.13289), `ConvRotary` that of SpeechEmotionLlama (arXiv 2410.01162).
"""

import math
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, EuroBertConfig, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerMultiHeadAttention, eager_attention_forward
from transformers.models.eurobert.modeling_eurobert import (
    EuroBertDecoderLayer,
    EuroBertRMSNorm,
    EuroBertRotaryEmbedding,
)

from .attention_listen import additive_attention
from .geometry_listen import num_resampled

# added to the scores of padding, within fp16; transformers' own masks look for padding first: that waits for the device
_PADDING_SCORE = -3e4


class FusingConnector(nn.Module):
    """Base of all connectors: fuses the frames of both encoders and projects the result to the LLM's width.

    A subclass provides `build`, which makes its layers, and `embed`, which runs them. `config.num_embeddings` must
    give as many embeddings as `embed`, since the processor writes that many placeholders.

    Args:
        config: A `ListenConnectorConfig`.
        speech_width: Width of the speech encoder's frames.
        audio_width: Width of the audio encoder's frames; 0 without one.
        text_width: Width of the LLM's embeddings.
        frame_seconds: Seconds from one frame to the next.
    """

    def __init__(
        self, config: PreTrainedConfig, speech_width: int, audio_width: int, text_width: int, frame_seconds: float
    ) -> None:
        super().__init__()
        self.config = config
        self.frame_seconds = frame_seconds
        self.speech_norm = nn.LayerNorm(speech_width)
        self.audio_norm = nn.LayerNorm(audio_width) if audio_width else None
        self.build(speech_width + audio_width)
        self.projection = nn.Linear(config.hidden_size, text_width)

    def build(self, width: int) -> None:
        """Make the layers that read fused frames of that width."""
        raise NotImplementedError

    @property
    def attention_config(self) -> PreTrainedConfig:
        """The config in which the layers look up their attention kernel."""
        raise NotImplementedError

    def set_attn_implementation(self, attn_implementation: str, allow_all_kernels: bool = False) -> None:
        """Switch the attention kernel: eager attention, or sdpa in place of all others.

        Raises:
            ValueError: an unknown kernel.
        """
        chosen = additive_attention(attn_implementation)
        if chosen not in ("eager", "sdpa"):
            raise ValueError(
                f"attn_implementation={attn_implementation!r} is unknown; the connector runs eager or sdpa"
            )
        self.attention_config._attn_implementation_internal = chosen

    def embed(
        self, frames: torch.Tensor, mask: torch.Tensor, total: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of the embeddings, before the projection.

        Args:
            frames: Fused frames `(chunks, frames, width)`, zero where the mask is false.
            mask: `(chunks, frames)`, true on real frames.
            total: Embeddings of all chunks, see `forward`.

        Returns:
            `(total, config.hidden_size)`, the chunks one after the other, and embeddings of each chunk, `(chunks,)`.
        """
        raise NotImplementedError

    def lengths(self, frames: torch.Tensor) -> torch.Tensor:
        """Embeddings of chunks with `frames` `(chunks,)` frames, `(chunks,)`."""
        counts = [self.config.num_embeddings(count, self.frame_seconds) for count in frames.tolist()]
        return torch.tensor(counts, device=frames.device)

    def forward(
        self,
        speech_hidden_states: torch.Tensor,
        speech_mask: torch.Tensor,
        audio_hidden_states: torch.Tensor | None = None,
        audio_mask: torch.Tensor | None = None,
        total: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn encoder frames into audio embeddings.

        Args:
            speech_hidden_states: `(chunks, speech frames, speech width)`.
            speech_mask: `(chunks, speech frames)`, 1 on real frames; ignored with `config.salmonn_compat`.
            audio_hidden_states: `(chunks, audio frames, audio width)`, or `None` without an audio encoder.
            audio_mask: `(chunks, audio frames)`.
            total: Embeddings of all chunks, where it is known, so that it is not read from the device. The caller
                compares it with the lengths that are returned.

        Returns:
            The embeddings of all chunks one after the other, `(total, text width)`, and how many each chunk has,
            `(chunks,)`.

        Raises:
            ValueError: with `salmonn_compat`, fewer frames than one window.
        """
        if self.config.salmonn_compat:
            speech_mask = torch.ones_like(speech_mask)  # padding is encoded too
        frames, mask = self.fuse(speech_hidden_states, speech_mask, audio_hidden_states, audio_mask)
        hidden, counts = self.embed(frames, mask, total)  # (total, hidden), (chunks,)
        return self.projection(hidden), counts

    def fuse(
        self,
        speech: torch.Tensor,
        speech_mask: torch.Tensor,
        audio: torch.Tensor | None,
        audio_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalise both streams and concatenate their features: `(chunks, frames, width)` and its mask, bool.

        Frames after the end of a stream are zero after its LayerNorm, as in SALMONN, so batch mates have no effect.
        """
        dtype = self.speech_norm.weight.dtype
        speech = self.speech_norm(speech.to(dtype)) * speech_mask[..., None].to(dtype)  # (chunks, frames, speech width)
        if self.audio_norm is None:
            return speech, speech_mask.bool()
        audio = self.audio_norm(audio.to(dtype)) * audio_mask[..., None].to(dtype)  # (chunks, frames, audio width)
        longer = audio.shape[1] - speech.shape[1]
        speech, audio = F.pad(speech, (0, 0, 0, max(longer, 0))), F.pad(audio, (0, 0, 0, max(-longer, 0)))
        mask = F.pad(speech_mask.bool(), (0, max(longer, 0))) | F.pad(audio_mask.bool(), (0, max(-longer, 0)))
        return torch.cat((speech, audio), dim=-1), mask


class FewQueriesAttention(Blip2QFormerMultiHeadAttention):
    """Cross-attention of few queries to many frames, with the same weights and results as upstream's, in less time.

    A head's score is q . (K x + b), which is (K' q) . x + q . b: it is cheaper to project the one query of a window
    than each of its frames. Likewise, V is applied to the attended mean of the frames. A frame of constant 1 behind x
    carries both biases. The cost is Q (1/F + 1/d) of upstream's, for Q queries, F frames and heads of width d.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As upstream; `hidden_states` are `(windows, queries, hidden)`, the encoder's `(windows, frames, width)`."""
        count, num_queries, _ = hidden_states.shape
        heads, size = self.num_attention_heads, self.attention_head_size
        many = num_queries * (1 / encoder_hidden_states.shape[1] + 1 / size) > 0.5  # nothing is gained
        if many or self.key.weight.is_meta:  # offloaded weights are there only while their own layer runs
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, **kwargs
            )
        frames = F.pad(encoder_hidden_states, (0, 1), value=1.0)[:, None]  # (windows, 1, frames, width + 1)
        key = torch.cat((self.key.weight, self.key.bias[:, None]), 1)  # (heads * size, width + 1)
        value = torch.cat((self.value.weight, self.value.bias[:, None]), 1)  # (heads * size, width + 1)
        queries = self.query(hidden_states).view(-1, heads, size).transpose(0, 1)  # (heads, windows * queries, size)
        queries = (queries @ key.unflatten(0, (heads, size))).unflatten(1, (count, num_queries)).transpose(0, 1)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, weights = attend(
            self,
            queries.reshape(count, 1, heads * num_queries, -1),
            frames,
            frames,
            encoder_attention_mask[:, :, :1] if encoder_attention_mask is not None else None,  # queries share it
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attended = attended.view(count, heads, num_queries, -1).transpose(0, 1)  # (heads, windows, queries, width + 1)
        value = value.unflatten(0, (heads, size)).transpose(1, 2)  # (heads, width + 1, size)
        outputs = attended.flatten(1, 2) @ value  # (heads, windows * queries, size)
        if weights is not None:
            weights = weights.view(count, heads, num_queries, -1)
        return outputs.transpose(0, 1).reshape(count, num_queries, -1), weights


class WindowQFormer(FusingConnector):
    """SALMONN's window-level Q-Former (arXiv 2310.13289, sec. 3): learned queries read one window of frames at a time.

    The last, partial window is kept and masked, and only windows with real frames give embeddings. With
    `config.salmonn_compat` all is as in SALMONN: every frame of a padded chunk is attended to, and the last, partial
    window is dropped. Arguments are those of `FusingConnector`.
    """

    @property
    def attention_config(self) -> PreTrainedConfig:
        """The Q-Former's config."""
        return self.qformer.config

    def build(self, width: int) -> None:
        """Make the Q-Former and its queries."""
        self.window = self.config.window_frames(self.frame_seconds)
        self.qformer = Blip2QFormerModel(_qformer_config(self.config, width))
        for layer in self.qformer.encoder.layer:
            layer.crossattention.attention.__class__ = FewQueriesAttention  # the same parameters
        self.query_tokens = nn.Parameter(torch.empty(1, self.config.num_queries, self.config.hidden_size))

    def embed(
        self, frames: torch.Tensor, mask: torch.Tensor, total: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read each window with the queries; see `FusingConnector.embed`."""
        if self.config.salmonn_compat:
            windows, window_mask = self._salmonn_windows(frames)
        else:
            tail = -frames.shape[1] % self.window
            windows = F.pad(frames, (0, 0, 0, tail)).unflatten(1, (-1, self.window))  # (chunks, windows, frames, width)
            window_mask = F.pad(mask, (0, tail)).unflatten(1, (-1, self.window))  # (chunks, windows, frames)
        real = window_mask.any(-1)  # (chunks, windows)
        count = int(real.sum()) if total is None else total // self.config.num_queries
        kept = (~real.flatten()).long().argsort(stable=True)[:count]  # (real windows,): their places, in order
        windows = windows.flatten(0, 1)[kept]  # (real windows, frames, width)
        window_mask = window_mask.flatten(0, 1)[kept]  # (real windows, frames)
        queries = self.query_tokens.expand(len(windows), -1, -1)  # (real windows, queries, hidden)
        padding = (_PADDING_SCORE * ~window_mask[:, None, None]).to(windows.dtype)  # (real windows, 1, 1, frames)
        outputs = self.qformer(query_embeds=queries, encoder_hidden_states=windows, encoder_attention_mask=padding)
        hidden = outputs.last_hidden_state  # (real windows, queries, hidden)
        return hidden.flatten(0, 1), real.sum(-1) * self.config.num_queries

    def _salmonn_windows(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole windows only, which may overlap: of T frames `(T - size) // stride + 1`, all of them real."""
        size, stride = self.window, self.config.stride_frames(self.frame_seconds)
        if frames.shape[1] < size:
            raise ValueError(
                f"salmonn_compat reads whole windows of {size} frames, but the chunks have {frames.shape[1]}; give "
                "chunks padded to 30 s"
            )
        windows = frames.unfold(1, size, stride).transpose(2, 3)  # (chunks, windows, frames, width)
        return windows, windows.new_ones(windows.shape[:3], dtype=torch.bool)


class ConvRotary(FusingConnector):
    """The connector of SpeechEmotionLlama (arXiv 2410.01162): one audio embedding per started `embedding_seconds`.

    A strided convolution shortens the fused frames, and rotary Transformer layers attend over the whole chunk in both
    directions. The layers are EuroBERT's: Llama's (RMSNorm first, rotary attention, SwiGLU) without the causal mask.
    Padding is zero before the convolution, as after the end of a clip, and masked in the attention: batch mates have no
    effect. Arguments are those of `FusingConnector`.

    Raises:
        ValueError: `embedding_seconds` is no whole number of frames, or the kernel is shorter than the stride.
    """

    @property
    def attention_config(self) -> PreTrainedConfig:
        """The config of the layers."""
        return self.layer_config

    def build(self, width: int) -> None:
        """Make the convolution and the layers."""
        config = self.config
        self.stride = config.embedding_frames(self.frame_seconds)
        self.kernel_size = 2 * self.stride - 1 if config.kernel_size is None else config.kernel_size
        if self.kernel_size < self.stride:
            raise ValueError(
                f"connector kernel_size={config.kernel_size} is shorter than its stride of {self.stride} frames "
                f"({config.embedding_seconds} s), so frames would be skipped; enlarge kernel_size"
            )
        self.conv = nn.Conv1d(width, config.hidden_size, self.kernel_size, stride=self.stride)
        self.dropout = nn.Dropout(config.dropout)
        self.layer_config = _layer_config(config)
        self.rotary = EuroBertRotaryEmbedding(self.layer_config)
        self.layers = nn.ModuleList(EuroBertDecoderLayer(self.layer_config, i) for i in range(config.num_hidden_layers))
        self.norm = EuroBertRMSNorm(config.hidden_size, eps=self.layer_config.rms_norm_eps)

    def embed(
        self, frames: torch.Tensor, mask: torch.Tensor, total: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shorten the frames and attend over the chunk; see `FusingConnector.embed`."""
        tail = -frames.shape[1] % self.stride
        overlap = self.kernel_size - self.stride
        frames = F.pad(frames.transpose(1, 2), (overlap // 2, overlap - overlap // 2 + tail))  # (chunks, width, frames)
        hidden = self.dropout(self.conv(frames).transpose(1, 2))  # (chunks, embeddings, hidden)
        real = F.pad(mask, (0, tail)).unflatten(1, (-1, self.stride)).any(-1)  # (chunks, embeddings)
        # an empty chunk attends to its padding: a softmax over nothing would be NaN, in the gradient too
        attended = real | ~real.any(-1, keepdim=True)
        attention_mask = (_PADDING_SCORE * ~attended[:, None, None]).to(hidden.dtype)  # (chunks, 1, 1, embeddings)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]  # (1, embeddings)
        rotations = self.rotary(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=attention_mask, position_embeddings=rotations)
        count = int(real.sum()) if total is None else total
        kept = (~real.flatten()).long().argsort(stable=True)[:count]  # (total,): places of real embeddings, in order
        return self.norm(hidden).flatten(0, 1)[kept], real.sum(-1)  # (total, hidden), (chunks,)


def resample_frames(states: torch.Tensor, mask: torch.Tensor, step: Fraction) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames of one encoder at the rate of another: each new frame is the mean of the old ones over its time span.

    Args:
        states: `(chunks, frames, width)`.
        mask: `(chunks, frames)`, real frames first.
        step: Old frames per new frame.

    Returns:
        `(chunks, new frames, width)` and its mask, bool; the input where `step` is 1.
    """
    if step == 1:
        return states, mask
    counts = mask.sum(-1)  # (chunks,)
    length, size = num_resampled(states.shape[1], step), step.denominator  # an old frame is `size` units of time long
    # whole units are exact on every device; float64 is missing on some (Apple's MPS)
    edges = torch.arange(length + 1, device=states.device) * step.numerator  # (new frames + 1,)
    edges = torch.minimum(edges[None], counts[:, None] * size)  # (chunks, new frames + 1)
    start, end = edges[:, :-1], edges[:, 1:]
    span = (end - start).clamp_min(1)  # (chunks, new frames)
    total = states.new_zeros((), dtype=torch.float32)
    for offset in range(math.ceil(step) + 1):  # the old frames that one new frame overlaps
        old = start // size + offset  # (chunks, new frames)
        units = (torch.minimum(end, (old + 1) * size) - torch.maximum(start, old * size)).clamp_min(0)
        index = old.clamp_max(states.shape[1] - 1)[..., None].expand(-1, -1, states.shape[2])
        total = total + (units / span)[..., None] * states.gather(1, index).float()  # (chunks, new frames, width)
    real_counts = [num_resampled(count, step) for count in counts.tolist()]
    new_mask = torch.arange(length, device=states.device) < torch.tensor(real_counts, device=states.device)[:, None]
    return total.to(states.dtype), new_mask


def _qformer_config(config: PreTrainedConfig, encoder_width: int) -> Blip2QFormerConfig:
    return Blip2QFormerConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        encoder_hidden_size=encoder_width,
        cross_attention_frequency=1,
        attn_implementation=additive_attention(config._attn_implementation),
    )


def _layer_config(config: PreTrainedConfig) -> EuroBertConfig:
    return EuroBertConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        attention_dropout=config.dropout,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation=additive_attention(config._attn_implementation) or "sdpa",
    )


__all__ = ["ConvRotary", "FusingConnector", "WindowQFormer", "resample_frames"]
