"""Any audio encoder of transformers in the place of Whisper's: Wav2Vec2-BERT, HuBERT, WavLM, AST, Moonshine and others.

A wrapper gives each of them the interface of `ListenWhisperEncoder`: real frames come out for real input, a row of a
batch equals the clip alone, and the decoder or head of a checkpoint is never built.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .geometry_listen import EncoderGeometry, speech_geometry, speech_width
from .modeling_speech_encoder import ListenWhisperEncoder

# Rows of a padded batch equal the clips alone under an attention mask, given what `_pads_safely` asks besides.
_PADS_SAFELY = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "wav2vec2-bert")
_SPECTROGRAM = "audio-spectrogram-transformer"
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_ENCODER_OF_WHOLE = {r"^(model\.)?encoder\.": ""}
_DECODER_KEYS = (r"^(model\.)?decoder\.", r"^proj_out\.", r"^lm_head\.")


class MaskedGroupNorm(nn.GroupNorm):
    """A group norm over time whose statistics take in the first `lengths` frames of each row alone.

    `lengths` `(batch,)` is set for a forward pass; `None`, and rows that are all real, give `nn.GroupNorm`.
    """

    lengths: torch.Tensor | None = None

    @classmethod
    def like(cls, norm: nn.GroupNorm) -> MaskedGroupNorm:
        """One with the weights of `norm`."""
        made = cls(norm.num_groups, norm.num_channels, norm.eps, device=norm.weight.device, dtype=norm.weight.dtype)
        made.weight, made.bias = norm.weight, norm.bias
        return made.train(norm.training)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Normalise `(batch, channels, frames)`."""
        if self.lengths is None or bool((self.lengths >= frames.shape[2]).all()):
            return super().forward(frames)
        real = torch.arange(frames.shape[2], device=frames.device) < self.lengths[:, None]  # (batch, frames)
        real = real[:, None, None].float()  # (batch, 1, 1, frames)
        groups = frames.float().unflatten(1, (self.num_groups, -1))  # (batch, groups, channels of one, frames)
        count = real.sum(-1, keepdim=True) * groups.shape[2]
        mean = (groups * real).sum((2, 3), keepdim=True) / count
        variance = ((groups - mean).square() * real).sum((2, 3), keepdim=True) / count
        normal = ((groups - mean) * (variance + self.eps).rsqrt()).flatten(1, 2)
        return (normal * self.weight.float()[:, None] + self.bias.float()[:, None]).to(frames.dtype)


class ListenSpeechEncoder(nn.Module):
    """An audio encoder of transformers that takes `input_features` with their mask and tells which frames are real.

    `input_features` are what the encoder's own feature extractor makes: `(batch, samples)` for waveform encoders,
    `(batch, frames, bins)` for the others.

    Many of these encoders let the padding of a batch reach real frames. Where the cause is the group norm of the
    features (wav2vec2-base and other base sizes), its statistics are taken over real frames. Where it is unmasked
    convolutions between layers (Wav2Vec2-Conformer, data2vec, SEW, length adapters) or Moonshine's masks, rows are
    encoded at their true lengths, those of one length together. So no row depends on its batch mates.

    Args:
        encoder: A model of transformers whose config `geometry_listen` knows.
    """

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.geometry: EncoderGeometry = speech_geometry(encoder.config)
        if self._pads_safely() and getattr(encoder.config, "feat_extract_norm", None) == "group":
            first = encoder.feature_extractor.conv_layers[0]
            first.layer_norm = MaskedGroupNorm.like(first.layer_norm)

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> ListenSpeechEncoder:
        """The encoder with random weights.

        Raises:
            ValueError: the config is not one of an audio encoder known here.
        """
        speech_geometry(config)
        encoder_class = _encoder_class(config)
        attention = _supported_attention(encoder_class, config._attn_implementation)
        return cls(encoder_class._from_config(config, attn_implementation=attention))

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, config: PreTrainedConfig, **options: Any
    ) -> ListenSpeechEncoder:
        """Load the encoder of a checkpoint that may hold a decoder or a head besides, neither of which is read.

        Args:
            source: Folder or Hub id.
            config: The checkpoint's config.
            **options: As in `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: a weight of the encoder is missing, or the checkpoint holds more of it than its config tells.
        """
        encoder_class = _encoder_class(config)
        if options.get("attn_implementation"):
            options["attn_implementation"] = _supported_attention(encoder_class, options["attn_implementation"])
        if config.is_encoder_decoder:
            options["key_mapping"] = _ENCODER_OF_WHOLE
        encoder, info = encoder_class.from_pretrained(source, config=config, output_loading_info=True, **options)
        if config.is_encoder_decoder:
            encoder._weight_conversions = None  # what it saves is the encoder alone, not to be renamed again
        _check_loaded(os.fspath(source), encoder, info)
        return cls(encoder)

    def save_pretrained(self, save_directory: str | os.PathLike, **options: Any) -> None:
        """Write the encoder as its own class does; arguments as in `PreTrainedModel.save_pretrained`."""
        self.encoder.save_pretrained(save_directory, **options)

    @property
    def config(self) -> PreTrainedConfig:
        """The encoder's config."""
        return self.encoder.config

    @property
    def dtype(self) -> torch.dtype:
        """Type of its weights."""
        return self.encoder.dtype

    @property
    def frame_seconds(self) -> float:
        """Time from one frame to the next."""
        return self.geometry.frame_seconds

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
    ) -> BaseModelOutput:
        """Encode what the feature extractor made.

        Args:
            input_features: `(batch, samples)` or `(batch, frames, bins)`.
            input_features_mask: `(batch, time)`, 1 at real positions, which come first; none means that all are real.
            output_hidden_states: Whether to return the input of the first layer and the output of each layer too.

        Returns:
            `BaseModelOutput` with `last_hidden_state` `(batch, frames, width)`, as long as `output_mask`. Rows equal
            those of the clip alone at real frames; padded frames hold finite numbers without meaning.
            `hidden_states` are `(batch, frames, hidden_size)` each, as transformers records them. Layers of another
            frame rate than the output (SEW's, those before an adapter) are repeated or averaged to meet its frames.

        Raises:
            ValueError: shapes do not fit.
        """
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
        """What comes out, and before it, if wanted, what goes in and out of each layer: last state first."""
        encoded = self.encoder(input_features, output_hidden_states=all_layers, **options)
        return [encoded.last_hidden_state, *(encoded.hidden_states if all_layers else ())]

    def _run_whole(self, input_features: torch.Tensor, frames: int, all_layers: bool) -> list[torch.Tensor]:
        """As `_run` for rows without padding, every state at the output's `(batch, frames, width)`."""
        last, *layers = self._run(input_features, all_layers)
        return [last[:, :frames], *(_at_frames(layer, frames) for layer in layers)]

    def _pads_safely(self) -> bool:
        config = self.config
        unmasked = getattr(config, "add_adapter", False) or getattr(config, "conv_pos_batch_norm", False)
        # activation checkpointing runs the norm again when the lengths are forgotten
        recomputed = self.training and self.encoder.is_activation_checkpointing and bool(self._norms())
        return config.model_type in _PADS_SAFELY and not unmasked and not recomputed

    def _norms(self) -> list[MaskedGroupNorm]:
        return [module for module in self.encoder.modules() if isinstance(module, MaskedGroupNorm)]

    @contextmanager
    def _norms_over(self, lengths: torch.Tensor) -> Iterator[None]:
        """Within it the group norm, which follows the first convolution, takes in rows of that many samples."""
        try:
            for norm in self._norms():
                kernel, stride, _ = self.geometry.encoder[0]
                norm.lengths = (lengths - kernel) // stride + 1
            yield
        finally:
            for norm in self._norms():
                norm.lengths = None

    def _encode_spectrogram(self, input_features: torch.Tensor, all_layers: bool) -> list[torch.Tensor]:
        """AST reads a fixed number of frames, padding included, as it was trained: `(batch, steps * bands, width)`."""
        bands = self.geometry.frames_per_step
        patches = [states[:, 2:] for states in self._run(input_features, all_layers)]  # no classification tokens
        # all bands of one moment together
        return [states.unflatten(1, (bands, -1)).transpose(1, 2).flatten(1, 2) for states in patches]

    def _encode_by_length(
        self, input_features: torch.Tensor, mask: torch.Tensor, all_layers: bool
    ) -> list[torch.Tensor]:
        """Rows at their true lengths, those of one length together: `(batch, longest, width)` each."""
        lengths = mask.sum(-1)  # (batch,)
        rows: list[list[torch.Tensor]] = [[] for _ in lengths]
        for length in lengths.unique().tolist():
            count = self.geometry.num_outputs(length)
            if not count:
                continue
            members = (lengths == length).nonzero()[:, 0]
            states = self._run_whole(input_features[members, :length], count, all_layers)
            for place, row in enumerate(members.tolist()):
                rows[row] = [each[place] for each in states]
        heard = max(rows, key=len) or self._nothing(input_features, all_layers)
        filled = [row or [each[:0] for each in heard] for row in rows]  # rows too short for a frame have none
        return [pad_sequence(list(each), batch_first=True) for each in zip(*filled, strict=True)]

    def _nothing(self, like: torch.Tensor, all_layers: bool) -> list[torch.Tensor]:
        """The states of a row without frames, `(0, width)` each."""
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


def build_speech_encoder(config: PreTrainedConfig) -> ListenWhisperEncoder | ListenSpeechEncoder:
    """A speech encoder with random weights.

    Raises:
        ValueError: the config is not one of an audio encoder known here.
    """
    if config.model_type == "whisper":
        return ListenWhisperEncoder._from_config(config)
    return ListenSpeechEncoder.from_config(config)


def load_speech_encoder(source: str | os.PathLike, **options: Any) -> ListenWhisperEncoder | ListenSpeechEncoder:
    """The speech encoder of any checkpoint, without the decoder or head that stands beside it.

    Args:
        source: Folder or Hub id.
        **options: As in `PreTrainedModel.from_pretrained`.

    Raises:
        ValueError: it is no audio encoder known here, or its weights are not all there.
    """
    config = AutoConfig.from_pretrained(source, **{name: options[name] for name in _HUB_OPTIONS if name in options})
    speech_geometry(config)
    if config.model_type == "whisper":
        encoder, info = ListenWhisperEncoder.from_pretrained(source, output_loading_info=True, **options)
        _check_loaded(os.fspath(source), encoder, info)
        return encoder
    return ListenSpeechEncoder.from_pretrained(source, config=config, **options)


def _at_frames(states: torch.Tensor, frames: int) -> torch.Tensor:
    """States of a layer at the rate of the encoder's output: `(rows, layer frames, width)` -> `(rows, frames, width)`.

    Each frame is the mean of the layer's frames that lie in its time: SEW's are repeated for what it pools, those
    before a length adapter averaged.
    """
    if states.shape[1] == frames:
        return states
    return F.adaptive_avg_pool1d(states.transpose(1, 2), frames).transpose(1, 2)


def _input_bins(config: PreTrainedConfig) -> int | None:
    """Bins of one input frame; `None` where the encoder reads samples."""
    if config.model_type == _SPECTROGRAM:
        return config.num_mel_bins
    return getattr(config, "feature_projection_input_dim", None)


def _encoder_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of transformers that holds the encoder and nothing else."""
    whole = MODEL_MAPPING[type(config)]
    if not config.is_encoder_decoder:
        return whole
    with torch.device("meta"):
        encoder = type(whole(copy.deepcopy(config)).get_encoder())
    # the same class, which does not report the decoder's weights as odd
    return type(
        encoder.__name__,
        (encoder,),
        {"__module__": encoder.__module__, "_keys_to_ignore_on_load_unexpected": list(_DECODER_KEYS)},
    )


def _supported_attention(encoder_class: type[PreTrainedModel], requested: str | None) -> str | None:
    """`requested`, or the best that the encoder has where it lacks that kernel."""
    if requested and requested.startswith("flash_attention") and not encoder_class._supports_flash_attn:
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
            f"{source!r} holds weights of the speech encoder that its config does not tell of: {surplus[:5]} "
            f"({len(surplus)} in all); give the config that belongs to it"
        )
    if any(key.endswith("masked_spec_embed") for key in info["missing_keys"]):
        # Fine-tuned checkpoints often lack what SpecAugment alone reads. A random one would differ at each loading.
        nn.init.zeros_(encoder.masked_spec_embed)


__all__ = ["ListenSpeechEncoder", "MaskedGroupNorm", "build_speech_encoder", "load_speech_encoder"]
