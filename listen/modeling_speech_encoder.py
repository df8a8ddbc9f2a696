"""Whisper's encoder for clips of any length up to 30 s, loadable without the decoder it was trained with.

Whisper pads every clip to 30 s and lets silence be attended to. Here only real frames are encoded: positions are cut
to the length of the batch, padding is zeroed before each convolution, as the edge of the clip would be, and masked in
the attention. A 3 s clip costs a tenth and a row does not depend on its batch mates. Given 30 s without a mask the
operations are those of `transformers.models.whisper.modeling_whisper.WhisperEncoder`, bit for bit.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import WhisperConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .geometry_listen import speech_geometry


class ListenWhisperEncoder(WhisperEncoder):
    """Whisper's encoder at the true length of its input.

    `from_pretrained` takes a folder or Hub id of any Whisper checkpoint (encoder with decoder, or this class's own) and
    reads no decoder weight.
    """

    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?decoder\.", r"^proj_out\."]
    # frames in for one frame out
    downsampling = 2

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, *model_args: object, **kwargs: object
    ) -> ListenWhisperEncoder | tuple[ListenWhisperEncoder, dict]:
        """Load the encoder of a Whisper checkpoint; arguments as in `PreTrainedModel.from_pretrained`."""
        kwargs.setdefault("key_mapping", {r"^(model\.)?encoder\.": ""})
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Forget the renaming: `save_pretrained` would undo it, but the folder it writes is this class's own.
        model._weight_conversions = None
        return loaded

    @property
    def frame_seconds(self) -> float:
        """Time from one frame to the next."""
        return speech_geometry(self.config).frame_seconds

    def full_mask(self, input_features: torch.Tensor) -> torch.Tensor:
        """The mask of `(batch, mel bins, frames)` without padding, `(batch, frames)`."""
        return torch.ones_like(input_features[:, 0], dtype=torch.long)

    def trim(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and mask without the frames that are padding in all rows."""
        longest = int(input_features_mask.sum(-1).max())
        return input_features[..., :longest], input_features_mask[:, :longest]

    def output_mask(self, input_features_mask: torch.Tensor) -> torch.Tensor:
        """Real output frames: `(batch, frames)` of 0/1, real ones first -> `(batch, ceil(frames / 2))` boolean.

        `n` real frames give `ceil(n / 2)`, the length that the strided convolution has for the clip alone.
        """
        return input_features_mask[:, :: self.downsampling].bool()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None, **kwargs: object
    ) -> BaseModelOutput:
        """Encode log-mel features.

        Args:
            input_features: `(batch, mel bins, frames)`.
            input_features_mask: `(batch, frames)`, 1 at real frames, which come first; none means that all are real,
                as Whisper itself takes its 30 s.

        Returns:
            `BaseModelOutput` with `last_hidden_state` `(batch, ceil(frames / 2), d_model)`. Rows equal those of the
            clip alone at real frames; padded frames hold finite numbers without meaning.

        Raises:
            ValueError: shapes do not fit, or there are more frames than the encoder has positions for.
        """
        self._check_input(input_features, input_features_mask)
        hidden_states = self._embed(input_features, input_features_mask)  # (batch, positions, d_model)
        attention_mask = None
        if input_features_mask is not None:
            attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=self.output_mask(input_features_mask),
            )
        for layer in self.layers:
            if self.training and self.layerdrop > 0.0 and torch.rand([]) < self.layerdrop:
                continue
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layer_norm(hidden_states))

    def _embed(self, input_features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Convolutions and positions: `(batch, mel bins, frames)` -> `(batch, ceil(frames / 2), d_model)`."""
        padding = None if mask is None else ~mask.bool().unsqueeze(1)  # (batch, 1, frames)
        frames = input_features if padding is None else input_features.masked_fill(padding, 0.0)
        frames = nn.functional.gelu(self.conv1(frames))  # (batch, d_model, frames)
        if padding is not None:
            frames = frames.masked_fill(padding, 0.0)
        frames = nn.functional.gelu(self.conv2(frames)).permute(0, 2, 1)  # (batch, positions, d_model)
        positions = torch.arange(frames.shape[1], device=frames.device)
        hidden_states = frames + self.embed_positions(positions)
        return nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)

    def _check_input(self, input_features: torch.Tensor, mask: torch.Tensor | None) -> None:
        config: WhisperConfig = self.config
        if input_features.dim() != 3 or input_features.shape[1] != config.num_mel_bins:
            raise ValueError(
                f"ListenWhisperEncoder needs input_features (batch, {config.num_mel_bins}, frames), got "
                f"{tuple(input_features.shape)}; set the feature extractor's feature_size to {config.num_mel_bins}."
            )
        batch, _, frames = input_features.shape
        limit = config.max_source_positions * self.downsampling
        if not 0 < frames <= limit:
            raise ValueError(
                f"ListenWhisperEncoder takes 1 to {limit} frames ({limit // 100} s at 10 ms), got {frames}; cut longer "
                "clips into chunks."
            )
        if mask is not None and tuple(mask.shape) != (batch, frames):
            raise ValueError(
                f"ListenWhisperEncoder needs input_features_mask of shape {(batch, frames)}, got {tuple(mask.shape)}."
            )


__all__ = ["ListenWhisperEncoder"]
