"""Speech encoders: Whisper's at the true length of its input, and any other audio encoder of transformers.

All give real frames for real input, rows of a batch equal the clips alone, and no decoder or head of a checkpoint is
built.

Whisper pads every clip to 30 s and lets silence be attended to. Here only real frames are encoded: positions are cut
to the length of the batch, padding is zeroed before each convolution, as the edge of the clip would be, and masked in
the attention. A 3 s clip costs a tenth. Given 30 s without a mask the operations are those of
`transformers.models.whisper.modeling_whisper.WhisperEncoder`, bit for bit.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .geometry_listen import EncoderGeometry, speech_geometry, speech_width

# Families whose batched rows equal the clips alone under an attention mask; `_pads_safely` names the exceptions.
_PADS_SAFELY = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "wav2vec2-bert")
_SPECTROGRAM = "audio-spectrogram-transformer"
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class _EncoderOfPair:
    """Loading for an encoder whose checkpoints may hold a decoder too, which is not read."""

    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?decoder\.", r"^proj_out\.", r"^lm_head\."]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Load the encoder of a checkpoint; arguments as in `PreTrainedModel.from_pretrained`."""
        kwargs.setdefault("key_mapping", {r"^(model\.)?encoder\.": ""})
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Forget the renaming: `save_pretrained` would undo it, but it writes the encoder alone.
        model._weight_conversions = None
        return loaded


class ListenWhisperEncoder(_EncoderOfPair, WhisperEncoder):
    """Whisper's encoder at the true length of its input.

    `from_pretrained` takes a folder or Hub id of any Whisper checkpoint (encoder with decoder, or this class's own) and
    reads no decoder weight.
    """

    # log-mel frames for one output frame
    downsampling = 2

    @property
    def frame_seconds(self) -> float:
        """Seconds from one frame to the next."""
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
            input_features_mask: `(batch, frames)`, 1 at real frames, which come first; `None` means that all are real,
                as Whisper itself takes its 30 s.
            **kwargs: As in `WhisperEncoder.forward`, for instance `output_hidden_states`.

        Returns:
            `BaseModelOutput` with `last_hidden_state` `(batch, ceil(frames / 2), d_model)`. Rows equal those of the
            clip alone at real frames; padded frames hold finite values without meaning.

        Raises:
            ValueError: shapes do not fit, or there are more frames than the encoder has positions for.
        """
        bins = self.config.num_mel_bins
        if input_features.dim() != 3 or input_features.shape[1] != bins:
            raise ValueError(
                f"ListenWhisperEncoder needs input_features (batch, {bins}, frames), got "
                f"{tuple(input_features.shape)}; set the feature extractor's feature_size to {bins}."
            )
        batch, _, frames = input_features.shape
        limit = self.config.max_source_positions * self.downsampling
        if not 0 < frames <= limit:
            raise ValueError(
                f"ListenWhisperEncoder takes 1 to {limit} frames ({limit // 100} s at 10 ms), got {frames}; cut longer "
                "clips into chunks."
            )
        if input_features_mask is not None and tuple(input_features_mask.shape) != (batch, frames):
            shape = tuple(input_features_mask.shape)
            raise ValueError(f"ListenWhisperEncoder needs input_features_mask of shape {(batch, frames)}, got {shape}.")
        frames, padding, attention_mask = input_features, None, None
        if input_features_mask is not None:
            padding = ~input_features_mask.bool().unsqueeze(1)  # (batch, 1, frames)
            frames = frames.masked_fill(padding, 0.0)
        frames = F.gelu(self.conv1(frames))  # (batch, d_model, frames)
        if padding is not None:
            frames = frames.masked_fill(padding, 0.0)
        frames = F.gelu(self.conv2(frames)).permute(0, 2, 1)  # (batch, positions, d_model)
        positions = torch.arange(frames.shape[1], device=frames.device)
        hidden_states = frames + self.embed_positions(positions)
        hidden_states = F.dropout(hidden_states, p=self.dropout, training=self.training)
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


class MaskedGroupNorm(nn.GroupNorm):
    """A group norm over time with statistics over the first `lengths` frames of each row.

    `lengths` `(batch,)` is set for one forward pass, by each thread for itself. With `None`, or rows without padding,
    it equals `nn.GroupNorm`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lengths: dict[int, torch.Tensor | None] = {}  # by thread: several may run one model

    @property
    def lengths(self) -> torch.Tensor | None:
        """Real frames of each row in the forward pass of this thread, `(batch,)`."""
        return self._lengths.get(threading.get_ident())

    @lengths.setter
    def lengths(self, lengths: torch.Tensor | None) -> None:
        """Set them for this thread, or forget them."""
        if lengths is None:
            self._lengths.pop(threading.get_ident(), None)
        else:
            self._lengths[threading.get_ident()] = lengths

    @classmethod
    def like(cls, norm: nn.GroupNorm) -> MaskedGroupNorm:
        """A masked norm that shares the weights of `norm`."""
        made = cls(norm.num_groups, norm.num_channels, norm.eps, device=norm.weight.device, dtype=norm.weight.dtype)
        made.weight, made.bias = norm.weight, norm.bias
        return made.train(norm.training)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Normalise `(batch, channels, frames)`."""
        lengths = self.lengths
        if lengths is None or bool((lengths >= frames.shape[2]).all()):
            return super().forward(frames)
        real = torch.arange(frames.shape[2], device=frames.device) < lengths[:, None]  # (batch, frames)
        real = real[:, None, None].float()  # (batch, 1, 1, frames)
        groups = frames.float().unflatten(1, (self.num_groups, -1))  # (batch, groups, channels per group, frames)
        count = real.sum(-1, keepdim=True) * groups.shape[2]
        mean = (groups * real).sum((2, 3), keepdim=True) / count
        variance = ((groups - mean).square() * real).sum((2, 3), keepdim=True) / count
        normal = ((groups - mean) * (variance + self.eps).rsqrt()).flatten(1, 2)
        return (normal * self.weight.float()[:, None] + self.bias.float()[:, None]).to(frames.dtype)


class ListenSpeechEncoder(nn.Module):
    """An audio encoder of transformers with the interface of `ListenWhisperEncoder`: features and mask in, frames out.

    `input_features` are what the encoder's own feature extractor makes: `(batch, samples)` for waveform encoders,
    `(batch, frames, bins)` for the others.

    In many of these encoders, padding changes real frames. Where the cause is the group norm of the features
    (wav2vec2-base and other base sizes), its statistics are taken over real frames. Where it is unmasked convolutions
    between layers (Wav2Vec2-Conformer, data2vec, SEW, length adapters) or Moonshine's masks, rows are encoded at their
    true lengths, rows of equal length together. So batched and single outputs are identical.

    Args:
        encoder: A model of transformers that `geometry_listen` supports.
    """

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.geometry: EncoderGeometry = speech_geometry(encoder.config)
        if self._pads_safely() and getattr(encoder.config, "feat_extract_norm", None) == "group":
            first = encoder.feature_extractor.conv_layers[0]
            first.layer_norm = MaskedGroupNorm.like(first.layer_norm)

    def save_pretrained(self, save_directory: str | os.PathLike, **options: Any) -> None:
        """Write the encoder as its own class does; arguments as in `PreTrainedModel.save_pretrained`."""
        self.encoder.save_pretrained(save_directory, **options)

    @property
    def config(self) -> PreTrainedConfig:
        """The encoder's config."""
        return self.encoder.config

    @property
    def dtype(self) -> torch.dtype:
        """Data type of its weights."""
        return self.encoder.dtype

    @property
    def frame_seconds(self) -> float:
        """Seconds from one frame to the next."""
        return self.geometry.frame_seconds

    def set_attn_implementation(self, attn_implementation: str, allow_all_kernels: bool = False) -> None:
        """As upstream, but the best kernel that the encoder has in place of one that it lacks, as on loading."""
        supported = _supported_attention(type(self.encoder), attn_implementation)
        self.encoder.set_attn_implementation(supported, allow_all_kernels)

    @property
    def _no_split_modules(self) -> list[str]:
        return list(self.encoder._no_split_modules or ())

    def full_mask(self, input_features: torch.Tensor) -> torch.Tensor:
        """The mask of input without padding, `(batch, time)`."""
        return torch.ones(input_features.shape[:2], dtype=torch.long, device=input_features.device)

    def trim(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and mask without the positions that are padding in all rows; AST's fixed length stays."""
        if self.config.model_type == _SPECTROGRAM:
            return input_features, input_features_mask
        longest = int(input_features_mask.sum(-1).max())
        return input_features[:, :longest], input_features_mask[:, :longest]

    def output_mask(self, input_features_mask: torch.Tensor) -> torch.Tensor:
        """Real output frames: `(batch, time)` of 0/1, real ones first -> `(batch, frames)` boolean."""
        frames = self.geometry.num_outputs(input_features_mask.shape[1])
        counts = [self.geometry.num_outputs(length) for length in input_features_mask.sum(-1).tolist()]
        real = torch.tensor(counts, device=input_features_mask.device)  # (batch,)
        return torch.arange(frames, device=real.device) < real[:, None]

    def forward(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BaseModelOutput:
        """Encode what the feature extractor made.

        Args:
            input_features: `(batch, samples)` or `(batch, frames, bins)`.
            input_features_mask: `(batch, time)`, 1 at real positions, which come first; `None` means that all are
                real.
            output_hidden_states: Whether to return the input of the first layer and the output of each layer too.
            output_attentions: Refused: rows may be encoded one length after the other.

        Returns:
            `BaseModelOutput` with `last_hidden_state` `(batch, frames, width)`, as long as `output_mask`. Rows equal
            those of the clip alone at real frames; padded frames hold finite values without meaning.
            `hidden_states` are `(batch, frames, hidden_size)` each, as transformers records them. Layers with another
            frame rate (SEW's, those before an adapter) are repeated or averaged to the rate of the output.

        Raises:
            ValueError: shapes do not fit, or attention weights are asked for.
        """
        if output_attentions:
            raise ValueError(f"output_attentions=True: a {self.config.model_type} encoder does not return them here")
        whole = input_features_mask is None
        if whole:
            input_features_mask = self.full_mask(input_features)
        self._check_input(input_features, input_features_mask)
        frames = self.geometry.num_outputs(input_features.shape[1])
        if self.config.model_type == _SPECTROGRAM:
            states = self._encode_spectrogram(input_features, output_hidden_states)
        elif whole and frames:
            states = self._run_whole(input_features, frames, output_hidden_states)
        elif self._pads_safely() and self.output_mask(input_features_mask).any(-1).all():
            with self._norms_over(input_features_mask.sum(-1)):
                states = self._run(input_features, output_hidden_states, attention_mask=input_features_mask)
        else:
            states = self._encode_by_length(input_features, input_features_mask, output_hidden_states)
        last, *layers = [F.pad(each, (0, 0, 0, frames - each.shape[1])) for each in states]  # (batch, frames, width)
        return BaseModelOutput(last_hidden_state=last, hidden_states=tuple(layers) or None)

    def _run(self, input_features: torch.Tensor, all_layers: bool, **options: torch.Tensor) -> list[torch.Tensor]:
        """The last state and, with `all_layers`, then the input of the first layer and the output of each layer."""
        encoded = self.encoder(input_features, output_hidden_states=all_layers, **options)
        return [encoded.last_hidden_state, *(encoded.hidden_states if all_layers else ())]

    def _run_whole(self, input_features: torch.Tensor, frames: int, all_layers: bool) -> list[torch.Tensor]:
        """As `_run` for rows without padding, all states at the rate of the output: `(batch, frames, width)`."""
        last, *layers = self._run(input_features, all_layers)
        return [last[:, :frames], *(_at_frames(layer, frames) for layer in layers)]

    def _pads_safely(self) -> bool:
        config = self.config
        unmasked = getattr(config, "add_adapter", False) or getattr(config, "conv_pos_batch_norm", False)
        # activation checkpointing runs the norm again after its lengths have been reset
        recomputed = self.training and self.encoder.is_activation_checkpointing and bool(self._norms())
        return config.model_type in _PADS_SAFELY and not unmasked and not recomputed

    def _norms(self) -> list[MaskedGroupNorm]:
        return [module for module in self.encoder.modules() if isinstance(module, MaskedGroupNorm)]

    @contextmanager
    def _norms_over(self, lengths: torch.Tensor) -> Iterator[None]:
        """Context in which group norms, which follow the first convolution, know the samples of each row."""
        try:
            for norm in self._norms():
                kernel, stride, _ = self.geometry.encoder[0]
                norm.lengths = (lengths - kernel) // stride + 1
            yield
        finally:
            for norm in self._norms():
                norm.lengths = None

    def _encode_spectrogram(self, input_features: torch.Tensor, all_layers: bool) -> list[torch.Tensor]:
        """AST encodes a fixed number of frames, padding included, as in training: `(batch, steps * bands, width)`."""
        bands = self.geometry.frames_per_step
        patches = [states[:, 2:] for states in self._run(input_features, all_layers)]  # no classification tokens
        # band by band -> time step by time step
        return [states.unflatten(1, (bands, -1)).transpose(1, 2).flatten(1, 2) for states in patches]

    def _encode_by_length(
        self, input_features: torch.Tensor, mask: torch.Tensor, all_layers: bool
    ) -> list[torch.Tensor]:
        """Encode rows at their true lengths, rows of equal length together: `(batch, longest, width)` each."""
        lengths = mask.sum(-1)  # (batch,)
        rows: list[list[torch.Tensor]] = [[] for _ in lengths]
        for length in lengths.unique().tolist():
            count = self.geometry.num_outputs(length)
            if not count:
                continue
            members = (lengths == length).nonzero()[:, 0]
            states = self._run_whole(input_features[members, :length], count, all_layers)
            for index, row in enumerate(members.tolist()):
                rows[row] = [layer[index] for layer in states]
        like = max(rows, key=len) or self._empty_states(input_features, all_layers)
        filled = [row or [states[:0] for states in like] for row in rows]  # rows too short for a frame have none
        return [pad_sequence(list(states), batch_first=True) for states in zip(*filled, strict=True)]

    def _empty_states(self, like: torch.Tensor, all_layers: bool) -> list[torch.Tensor]:
        """States of a row without frames, `(0, width)` each, where no row of the batch has one."""
        config = self.config
        depth = getattr(config, "encoder_num_hidden_layers", config.num_hidden_layers) + 1 if all_layers else 0
        return [like.new_zeros(0, width) for width in (speech_width(config), *[config.hidden_size] * depth)]

    def _check_input(self, input_features: torch.Tensor, mask: torch.Tensor) -> None:
        config, shape = self.config, tuple(input_features.shape)
        bins = _input_bins(config)
        if len(shape) != (2 if bins is None else 3) or (bins is not None and shape[2] != bins):
            wanted = "(batch, samples)" if bins is None else f"(batch, frames, {bins})"
            raise ValueError(
                f"{config.model_type} needs input_features {wanted}, got {shape}; use the model's own processor"
            )
        if config.model_type == _SPECTROGRAM and shape[1] != config.max_length:
            raise ValueError(f"{config.model_type} reads {config.max_length} frames, got {shape[1]}; pad or cut them")
        if tuple(mask.shape) != shape[:2]:
            raise ValueError(f"input_features_mask must have shape {shape[:2]}, got {tuple(mask.shape)}")


def _at_frames(states: torch.Tensor, frames: int) -> torch.Tensor:
    """States of a layer at the rate of the encoder's output: `(rows, layer frames, width)` -> `(rows, frames, width)`.

    Each frame is the mean of the layer's frames in its time span. Frames that SEW pools are repeated; frames before a
    length adapter are averaged.
    """
    if states.shape[1] == frames:
        return states
    return F.adaptive_avg_pool1d(states.transpose(1, 2), frames).transpose(1, 2)


def _input_bins(config: PreTrainedConfig) -> int | None:
    """Bins of one input frame; `None` where the encoder reads samples."""
    if config.model_type == _SPECTROGRAM:
        return config.num_mel_bins
    return getattr(config, "feature_projection_input_dim", None)


# ---------------------------------------------------------------------- building and loading


def build_speech_encoder(config: PreTrainedConfig) -> ListenWhisperEncoder | ListenSpeechEncoder:
    """A speech encoder with random weights.

    Raises:
        ValueError: the config is not one of a supported speech encoder.
    """
    encoder_class = _encoder_class(config)
    attention = _supported_attention(encoder_class, config._attn_implementation)
    return _with_mask(encoder_class._from_config(config, attn_implementation=attention))


def load_speech_encoder(source: str | os.PathLike, **options: Any) -> ListenWhisperEncoder | ListenSpeechEncoder:
    """The speech encoder of any checkpoint, without its decoder or head.

    Args:
        source: Folder or Hub id.
        **options: As in `PreTrainedModel.from_pretrained`.

    Raises:
        ValueError: it is no supported speech encoder, weights are missing, or it holds more layers than its config
            describes.
    """
    config = AutoConfig.from_pretrained(source, **{name: options[name] for name in _HUB_OPTIONS if name in options})
    encoder_class = _encoder_class(config)
    if options.get("attn_implementation"):
        options["attn_implementation"] = _supported_attention(encoder_class, options["attn_implementation"])
    encoder, info = encoder_class.from_pretrained(source, config=config, output_loading_info=True, **options)
    _check_loaded(os.fspath(source), encoder, info)
    return _with_mask(encoder)


def _with_mask(encoder: PreTrainedModel) -> ListenWhisperEncoder | ListenSpeechEncoder:
    return encoder if isinstance(encoder, ListenWhisperEncoder) else ListenSpeechEncoder(encoder)


def _encoder_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that holds the encoder of such a checkpoint and nothing else.

    Raises:
        ValueError: the config is not one of a supported speech encoder.
    """
    speech_geometry(config)
    if config.model_type == "whisper":
        return ListenWhisperEncoder
    whole = MODEL_MAPPING[type(config)]
    if not config.is_encoder_decoder:
        return whole
    with torch.device("meta"):
        encoder = type(whole(copy.deepcopy(config)).get_encoder())
    return type(encoder.__name__, (_EncoderOfPair, encoder), {"__module__": encoder.__module__})


def _supported_attention(encoder_class: type[PreTrainedModel], requested: str | None) -> str | None:
    """`requested`, or the best kernel that the encoder has."""
    flash, flex = (requested or "").startswith("flash_attention"), requested == "flex_attention"
    if (flash and not encoder_class._supports_flash_attn) or (flex and not encoder_class._supports_flex_attn):
        requested = "sdpa"
    return "eager" if requested == "sdpa" and not encoder_class._supports_sdpa else requested


def _check_loaded(source: str, encoder: PreTrainedModel, info: dict[str, Any]) -> None:
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("masked_spec_embed"))
    if missing:
        raise ValueError(f"{source!r} lacks weights of the speech encoder: {missing[:5]} ({len(missing)} in all)")
    prefix = f"{encoder.base_model_prefix}."
    surplus = sorted(
        key for key in info["unexpected_keys"] if key.removeprefix(prefix).split(".")[0] in encoder._modules
    )
    if surplus:
        raise ValueError(
            f"{source!r} holds weights of the speech encoder that its config does not describe: {surplus[:5]} "
            f"({len(surplus)} in all); give the config that belongs to it"
        )
    if any(key.endswith("masked_spec_embed") for key in info["missing_keys"]):
        # Only SpecAugment uses it, and fine-tuned checkpoints often lack it. A random one would differ between loads.
        nn.init.zeros_(encoder.masked_spec_embed)


__all__ = [
    "ListenSpeechEncoder",
    "ListenWhisperEncoder",
    "MaskedGroupNorm",
    "build_speech_encoder",
    "load_speech_encoder",
]
