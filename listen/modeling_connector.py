"""Connectors: from frames of the frozen encoders to audio embeddings of the LLM's width."""

from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, PreTrainedConfig

from .geometry_listen import num_resampled


class FusingConnector(nn.Module):
    """What all connectors share: the frames of both encoders are laid side by side, and their embeddings counted.

    Args:
        config: A `ListenConnectorConfig`.
        speech_width: Width of the speech encoder's frames.
        audio_width: Width of the audio encoder's frames; 0 without one.
        frame_seconds: Time from one frame to the next.
    """

    def __init__(self, config: PreTrainedConfig, speech_width: int, audio_width: int, frame_seconds: float) -> None:
        super().__init__()
        self.config = config
        self.frame_seconds = frame_seconds
        self.speech_norm = nn.LayerNorm(speech_width)
        self.audio_norm = nn.LayerNorm(audio_width) if audio_width else None

    def lengths(self, frames: torch.Tensor) -> torch.Tensor:
        """Embeddings that chunks of `frames` `(chunks,)` frames give, `(chunks,)`."""
        counts = [self.config.num_embeddings(count, self.frame_seconds) for count in frames.tolist()]
        return torch.tensor(counts, device=frames.device)

    def fuse(
        self,
        speech: torch.Tensor,
        speech_mask: torch.Tensor,
        audio: torch.Tensor | None,
        audio_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalise both streams and lay them side by side: `(chunks, frames, width)` and its mask, bool.

        Frames past the end of a stream are zero after its LayerNorm, as in SALMONN, whatever the batch mates.
        """
        dtype = self.speech_norm.weight.dtype
        speech = self.speech_norm(speech.to(dtype)) * speech_mask[..., None].to(dtype)  # (chunks, frames, speech width)
        if self.audio_norm is None:
            return speech, speech_mask.bool()
        audio = self.audio_norm(audio.to(dtype)) * audio_mask[..., None].to(dtype)  # (chunks, frames, audio width)
        length = max(speech.shape[1], audio.shape[1])
        streams = [F.pad(x, (0, 0, 0, length - x.shape[1])) for x in (speech, audio)]
        masks = [F.pad(x.bool(), (0, length - x.shape[1])) for x in (speech_mask, audio_mask)]
        return torch.cat(streams, dim=-1), masks[0] | masks[1]


class WindowQFormer(FusingConnector):
    """SALMONN's window-level Q-Former (arXiv 2310.13289, sec. 3) over the fused encoder frames.

    Each stream is normalised, the shorter one is padded in time, both are concatenated on the feature axis; learned
    queries then read one window of frames after the other. The last, partial window is kept and masked, and only
    windows with real frames give embeddings. With `config.salmonn_compat` all is as in SALMONN: every frame of a padded
    chunk is attended to, and the last, partial window is dropped.

    Args:
        config: A `ListenConnectorConfig`.
        speech_width: Width of the speech encoder's frames.
        audio_width: Width of the audio encoder's frames; 0 without one.
        text_width: Width of the LLM's embeddings.
        frame_seconds: Time from one frame to the next.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        speech_width: int,
        audio_width: int,
        text_width: int,
        frame_seconds: float,
    ) -> None:
        super().__init__(config, speech_width, audio_width, frame_seconds)
        self.qformer = Blip2QFormerModel(_qformer_config(config, speech_width + audio_width))
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_queries, config.hidden_size))
        self.projection = nn.Linear(config.hidden_size, text_width)

    def forward(
        self,
        speech_hidden_states: torch.Tensor,
        speech_mask: torch.Tensor,
        audio_hidden_states: torch.Tensor | None = None,
        audio_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn encoder frames into audio embeddings.

        Args:
            speech_hidden_states: `(chunks, speech frames, speech width)`.
            speech_mask: `(chunks, speech frames)`, 1 on real frames; not read with `salmonn_compat`.
            audio_hidden_states: `(chunks, audio frames, audio width)`, or `None` without an audio encoder.
            audio_mask: `(chunks, audio frames)`.

        Returns:
            The embeddings of all chunks one after the other, `(total, text width)`, and how many each chunk has,
            `(chunks,)`.

        Raises:
            ValueError: with `salmonn_compat`, fewer frames than one window holds.
        """
        if self.config.salmonn_compat:
            speech_mask = torch.ones_like(speech_mask)  # silence is heard
        frames, mask = self.fuse(speech_hidden_states, speech_mask, audio_hidden_states, audio_mask)
        # (chunks, windows, frames, width), (chunks, windows, frames)
        windows, window_mask = self._windows(frames, mask)
        real = window_mask.any(-1)  # (chunks, windows)
        windows, window_mask = windows[real], window_mask[real]  # (real windows, frames, width), (.., frames)
        queries = self.query_tokens.expand(len(windows), -1, -1)  # (real windows, queries, hidden)
        hidden = self.qformer(
            query_embeds=queries, encoder_hidden_states=windows, encoder_attention_mask=window_mask.long()
        ).last_hidden_state
        embeddings = self.projection(hidden).flatten(0, 1)  # (real windows * queries, text width)
        return embeddings, real.sum(-1) * self.config.num_queries

    def _windows(self, frames: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config.salmonn_compat:
            return self._salmonn_windows(frames)
        size = self.config.window_frames(self.frame_seconds)
        tail = -frames.shape[1] % size
        frames, mask = F.pad(frames, (0, 0, 0, tail)), F.pad(mask, (0, tail))
        return frames.unflatten(1, (-1, size)), mask.unflatten(1, (-1, size))

    def _salmonn_windows(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole windows alone, which may overlap; of T frames, `(T - size) // stride + 1`, all of them to be read."""
        size, stride = (f(self.frame_seconds) for f in (self.config.window_frames, self.config.stride_frames))
        if frames.shape[1] < size:
            raise ValueError(
                f"salmonn_compat reads whole windows of {size} frames, but the chunks have {frames.shape[1]}; give "
                "chunks padded to 30 s"
            )
        windows = frames.unfold(1, size, stride).transpose(2, 3)  # (chunks, windows, frames, width)
        return windows, windows.new_ones(windows.shape[:3], dtype=torch.bool)


def resample_frames(states: torch.Tensor, mask: torch.Tensor, step: Fraction) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames of one encoder at the rate of another: each new one is the mean over its time of those that it covers.

    Args:
        states: `(chunks, frames, width)`.
        mask: `(chunks, frames)`, real frames first.
        step: Old frames that go by during a new one.

    Returns:
        `(chunks, new frames, width)` and its mask; what was given where `step` is 1.
    """
    if step == 1:
        return states, mask
    counts = mask.sum(-1)  # (chunks,)
    length = num_resampled(states.shape[1], step)
    edges = torch.arange(length + 1, device=states.device, dtype=torch.float64) * float(step)  # (new frames + 1,)
    edges = torch.minimum(edges[None], counts[:, None].double())  # (chunks, new frames + 1)
    whole = edges.floor().long().clamp_max(states.shape[1] - 1)[..., None].expand(-1, -1, states.shape[2])
    real = states.double() * mask[..., None]  # (chunks, frames, width)
    area = F.pad(real.cumsum(1), (0, 0, 1, 0)).gather(1, whole) + (edges[..., None] - whole) * real.gather(1, whole)
    real_counts = [num_resampled(count, step) for count in counts.tolist()]
    new_mask = torch.arange(length, device=states.device) < torch.tensor(real_counts, device=states.device)[:, None]
    span = edges.diff(dim=1).masked_fill(~new_mask, 1.0)  # (chunks, new frames)
    return (area.diff(dim=1) / span[..., None]).to(states.dtype), new_mask


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
    )


__all__ = ["FusingConnector", "WindowQFormer", "resample_frames"]
