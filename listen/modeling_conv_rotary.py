"""The connector of SpeechEmotionLlama (arXiv 2410.01162): convolution, rotary Transformer layer, projection."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import EuroBertConfig, PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.eurobert.modeling_eurobert import (
    EuroBertDecoderLayer,
    EuroBertRMSNorm,
    EuroBertRotaryEmbedding,
)

from .modeling_connector import FusingConnector


class ConvRotary(FusingConnector):
    """Frames of the encoders to one audio embedding for each begun `embedding_seconds`.

    A strided convolution shortens the fused frames, rotary Transformer layers look over the whole chunk in both
    directions, and a linear map brings them to the LLM's width. The layers are those of EuroBERT: Llama's (RMSNorm
    first, rotary attention, SwiGLU) without the causal mask. Padding is zero before the convolution, as the end of a
    clip is, and masked in the attention: a chunk does not depend on its batch mates.

    Args:
        config: A `ListenConnectorConfig` of type `"conv_rotary"`.
        speech_width: Width of the speech encoder's frames.
        audio_width: Width of the audio encoder's frames; 0 without one.
        text_width: Width of the LLM's embeddings.
        frame_seconds: Time from one frame to the next.

    Raises:
        ValueError: `embedding_seconds` is no whole number of frames, or the kernel is shorter than the stride.
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
        self.stride = config.embedding_frames(frame_seconds)
        self.kernel_size = 2 * self.stride - 1 if config.kernel_size is None else config.kernel_size
        if self.kernel_size < self.stride:
            raise ValueError(
                f"connector kernel_size={config.kernel_size} is shorter than its stride of {self.stride} frames "
                f"({config.embedding_seconds} s), so that frames would go unheard; enlarge kernel_size"
            )
        self.conv = nn.Conv1d(speech_width + audio_width, config.hidden_size, self.kernel_size, stride=self.stride)
        self.dropout = nn.Dropout(config.dropout)
        self.layer_config = _layer_config(config)
        self.rotary = EuroBertRotaryEmbedding(self.layer_config)
        self.layers = nn.ModuleList(EuroBertDecoderLayer(self.layer_config, i) for i in range(config.num_hidden_layers))
        self.norm = EuroBertRMSNorm(config.hidden_size, eps=self.layer_config.rms_norm_eps)
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
            speech_mask: `(chunks, speech frames)`, 1 on real frames.
            audio_hidden_states: `(chunks, audio frames, audio width)`, or `None` without an audio encoder.
            audio_mask: `(chunks, audio frames)`.

        Returns:
            The embeddings of all chunks one after the other, `(total, text width)`, and how many each chunk has,
            `(chunks,)`.
        """
        frames, mask = self.fuse(speech_hidden_states, speech_mask, audio_hidden_states, audio_mask)
        hidden, real = self._shorten(frames, mask)  # (chunks, embeddings, hidden), (chunks, embeddings)
        # an empty chunk attends to its padding: a softmax over nothing would be NaN, in the gradient too
        attended = real | ~real.any(-1, keepdim=True)
        attention_mask = create_bidirectional_mask(self.layer_config, inputs_embeds=hidden, attention_mask=attended)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]  # (1, embeddings)
        rotations = self.rotary(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=attention_mask, position_embeddings=rotations)
        return self.projection(self.norm(hidden)[real]), real.sum(-1)  # (total, text width), (chunks,)

    def _shorten(self, frames: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The strided convolution over `(chunks, frames, width)`, and where its output has a real frame of its own."""
        tail = -frames.shape[1] % self.stride
        overlap = self.kernel_size - self.stride
        frames = F.pad(frames.transpose(1, 2), (overlap // 2, overlap - overlap // 2 + tail))  # (chunks, width, frames)
        hidden = self.conv(frames).transpose(1, 2)  # (chunks, embeddings, hidden)
        real = F.pad(mask, (0, tail)).unflatten(1, (-1, self.stride)).any(-1)  # (chunks, embeddings)
        return self.dropout(hidden), real


def _layer_config(config: PreTrainedConfig) -> EuroBertConfig:
    return EuroBertConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        attention_dropout=config.dropout,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="sdpa",
    )


__all__ = ["ConvRotary"]
