"""Inputs of both encoders from 16 kHz waveforms, with masks, in torch.

Whisper reads log-mel and BEATs Kaldi filter banks, both made here (`spectrogram_listen`); the filter bank is returned
as `(x - mean) / (2 * std)`. Other speech encoders read the features of the transformers feature extractor that they
were trained with, in place of log-mel.

No value depends on the other clips of a batch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoFeatureExtractor, BatchFeature, PreTrainedConfig, SequenceFeatureExtractor
from transformers.utils import TensorType, cached_file, logging

from .geometry_listen import SAMPLING_RATE, EncoderGeometry, audio_step, num_resampled, speech_geometry
from .spectrogram_listen import HIGHEST_WHISPER_HERTZ, kaldi_fbank, kaldi_framing, log_mel_spectrogram, prefix_mask

logger = logging.get_logger(__name__)

# What the base classes themselves write to or read from a saved feature extractor.
_INHERITED_ARGUMENTS = frozenset(
    {"auto_map", "feature_extractor_type", "padding_side", "padding_value", "processor_class", "return_attention_mask"}
)
# The transformers extractor of each other speech encoder.
_EXTRACTORS = {"wav2vec2-bert": "SeamlessM4TFeatureExtractor", "audio-spectrogram-transformer": "ASTFeatureExtractor"}
_WAVEFORM_EXTRACTOR = "Wav2Vec2FeatureExtractor"
_SETTINGS_FILES = ("preprocessor_config.json", "processor_config.json")
# Fields that say where an extractor's code came from.
_ORIGIN = ("auto_map", "processor_class", "name_or_path")


class ListenFeatureExtractor(SequenceFeatureExtractor):
    """Log-mel features for the speech encoder and Kaldi filter banks for BEATs, with masks of real frames.

    Clips longer than `chunk_seconds` are split into chunks of that length; the chunks of all clips are the rows of the
    result, in order. Clips too short for one token of either encoder are padded with silence.

    Args:
        feature_size (`int`): Log-mel bins: 80, or 128 for Whisper large-v3.
        sampling_rate (`int`): Sampling rate in Hz that the encoders expect.
        hop_length (`int`): Samples between log-mel frames.
        n_fft (`int`): Samples in a log-mel window.
        chunk_seconds (`float`): Maximum length of a chunk; Whisper has positions for 30 s.
        num_fbank_bins (`int` or `None`): Bins of the BEATs filter bank; 0 or `None` leaves that stream out.
        fbank_mean, fbank_std (`float`): The filter bank is returned as `(x - fbank_mean) / (2 * fbank_std)`.
        pad_to_30s (`bool`): Pad log-mel input with silence to `chunk_seconds`, as Whisper was trained. The mask is
            still 1 on the clip's frames only.
        speech_downsampling (`int`): Log-mel frames per frame of the speech encoder.
        patch_size (`int`): Side of a BEATs patch, in bins and frames.
        speech_features (`dict`, *optional*): Settings of the transformers feature extractor that a speech encoder other
            than Whisper was trained with, see `speech_features()`; it computes `input_features` in place of log-mel.
        speech_geometry (`dict`, *optional*): Steps from samples to frames of that encoder, see `geometry_listen`.

    Raises:
        ValueError: a value is out of range, or two values cannot work together.
        TypeError: an argument is unknown.
    """

    model_input_names = ["input_features", "input_features_mask", "input_values", "input_values_mask"]

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = 16000,
        hop_length: int = 160,
        n_fft: int = 400,
        chunk_seconds: float = 30.0,
        num_fbank_bins: int | None = 128,
        fbank_mean: float = 15.41663,
        fbank_std: float = 6.55582,
        pad_to_30s: bool = False,
        speech_downsampling: int = 2,
        patch_size: int = 16,
        speech_features: dict[str, Any] | None = None,
        speech_geometry: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        unknown = sorted(name for name in kwargs if name not in _INHERITED_ARGUMENTS and not name.startswith("_"))
        if unknown:
            raise TypeError(f"ListenFeatureExtractor got unknown arguments {unknown}.")
        kwargs.setdefault("padding_value", 0.0)
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, **kwargs)
        self.hop_length = hop_length
        self.n_fft = n_fft
        self.chunk_seconds = chunk_seconds
        self.num_fbank_bins = num_fbank_bins or 0
        if not num_fbank_bins:
            self.model_input_names = [name for name in self.model_input_names if not name.startswith("input_values")]
        self.fbank_mean = fbank_mean
        self.fbank_std = fbank_std
        self.pad_to_30s = pad_to_30s
        self.speech_downsampling = speech_downsampling
        self.patch_size = patch_size
        self.speech_features = speech_features
        self.speech_geometry = speech_geometry
        self._check_values()

    def to_dict(self) -> dict[str, Any]:
        """The settings; names of inputs follow from them."""
        return {name: value for name, value in super().to_dict().items() if name != "model_input_names"}

    def _check_values(self) -> None:
        for name in ("feature_size", "sampling_rate", "hop_length", "n_fft", "speech_downsampling", "patch_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"ListenFeatureExtractor: {name}={getattr(self, name)!r} must be a positive integer.")
        self._check_speech()
        if self.sampling_rate < 2 * HIGHEST_WHISPER_HERTZ:
            raise ValueError(
                f"ListenFeatureExtractor: sampling_rate={self.sampling_rate} is too low for Whisper, whose mel "
                f"filters reach {HIGHEST_WHISPER_HERTZ:.0f} Hz; take 16000."
            )
        if self.fbank_std <= 0:
            raise ValueError(f"ListenFeatureExtractor: fbank_std={self.fbank_std!r} must be positive.")
        if self.num_fbank_bins % self.patch_size:
            raise ValueError(
                f"ListenFeatureExtractor: num_fbank_bins={self.num_fbank_bins} is not a multiple of "
                f"patch_size={self.patch_size}."
            )
        if self.chunk_samples < self.min_samples:
            raise ValueError(
                f"ListenFeatureExtractor: chunk_seconds={self.chunk_seconds!r} is shorter than the "
                f"{self.min_samples / self.sampling_rate} s that one token of each encoder takes."
            )

    def _check_speech(self) -> None:
        if (self.speech_features is None) != (self.speech_geometry is None):
            raise ValueError("ListenFeatureExtractor: speech_features and speech_geometry belong together; give both.")
        if self.speech_features is None:
            return
        _check_settings(self.speech_features)
        if self.pad_to_30s or self.sampling_rate != SAMPLING_RATE:
            raise ValueError(
                f"ListenFeatureExtractor: speech_features make clips of true length at {SAMPLING_RATE} Hz, not with "
                f"pad_to_30s={self.pad_to_30s} and sampling_rate={self.sampling_rate}."
            )

    @property
    def geometry(self) -> EncoderGeometry:
        """Steps from samples to frames of the speech encoder."""
        if self.speech_geometry is not None:
            return EncoderGeometry.from_dict(self.speech_geometry)
        hop, step = self.hop_length, self.speech_downsampling
        return EncoderGeometry(((hop, hop, 0),), ((1, step, 0),), chunk_seconds=self.chunk_seconds)

    @property
    def time_axis(self) -> int:
        """Time axis of `input_features`: 2 for log-mel, 1 for all others."""
        return 2 if self.speech_features is None else 1

    @property
    def is_fixed_length(self) -> bool:
        """Whether `input_features` have the same length for all clips."""
        return self.pad_to_30s or "max_length" in (self.speech_features or {})

    @property
    def chunk_samples(self) -> int:
        """Samples in a full chunk."""
        return round(self.chunk_seconds * self.sampling_rate)

    @property
    def min_samples(self) -> int:
        """Minimum samples of a chunk, padded with silence: one frame of speech, and one row of BEATs patches."""
        whisper = self.speech_features is None
        speech = max(self.n_fft, self.hop_length) if whisper else self.geometry.min_samples
        if not self.num_fbank_bins:
            return speech
        window, shift = kaldi_framing(self.sampling_rate)
        return max(speech, window + (self.patch_size - 1) * shift)

    def num_chunks(self, num_samples: int) -> int:
        """Rows of a clip of `num_samples` samples in the batch."""
        if num_samples < 1:
            raise ValueError(f"A clip needs at least one sample, got num_samples={num_samples}.")
        return -(-num_samples // self.chunk_samples)

    def chunk_lengths(self, num_samples: int) -> list[int]:
        """Samples of each chunk of a clip, including the silence after a short one."""
        last = num_samples - (self.num_chunks(num_samples) - 1) * self.chunk_samples
        return [self.chunk_samples] * (self.num_chunks(num_samples) - 1) + [max(last, self.min_samples)]

    def num_encoder_frames(self, num_samples: int) -> list[int]:
        """Frames of each chunk of a clip after both encoders at the speech encoder's rate, the longer of the two."""
        geometry, lengths = self.geometry, self.chunk_lengths(num_samples)
        if not self.num_fbank_bins:
            return [*map(geometry.num_frames, lengths)]
        step = audio_step(geometry, self.patch_size, self.num_fbank_bins)
        window, shift = kaldi_framing(self.sampling_rate)
        frames = []
        for length in lengths:
            columns = (1 + (length - window) // shift) // self.patch_size
            patches = columns * (self.num_fbank_bins // self.patch_size)
            frames.append(max(geometry.num_frames(length), num_resampled(patches, step)))
        return frames

    def fetch_audio(self, audio_url_or_urls: Any) -> Any:
        """The clips as they are: `ListenProcessor` loads them; pipelines of transformers call this before it."""
        return audio_url_or_urls

    def __call__(
        self,
        audio: np.ndarray | torch.Tensor | Sequence[float] | Sequence[np.ndarray | torch.Tensor | Sequence[float]],
        sampling_rate: int | None = None,
        return_tensors: str | TensorType | None = "pt",
    ) -> BatchFeature:
        """Turn clips into encoder inputs.

        Args:
            audio: One mono clip, or a list of them, as floats in [-1, 1].
            sampling_rate: Samples a second of the clips; checked against the one that the encoders expect.
            return_tensors: "pt" or "np".

        Returns:
            The features of `extract` as a `BatchFeature`.

        Raises:
            ValueError: another sampling rate; a clip that is empty, not one-dimensional, not finite or not float.
        """
        self._check_sampling_rate(sampling_rate)
        return BatchFeature(self.extract(_as_clips(audio)), tensor_type=return_tensors)

    # No inference tensors: the filters are cached, and features of a frozen encoder reach trainable modules.
    @torch.autocast("cpu", enabled=False)  # in float32, whatever dtype the model runs in
    @torch.inference_mode(False)
    @torch.no_grad()
    def extract(self, waveforms: Sequence[np.ndarray], pad_to_multiple_of: int = 1) -> dict[str, torch.Tensor]:
        """Encoder inputs of clips that need no check: what `load_waveform` returns.

        Args:
            waveforms: `(samples,)` float32 at `sampling_rate`, one array a clip.
            pad_to_multiple_of: Frames are padded to a multiple of it, unless `is_fixed_length`; few shapes are faster.

        Returns:
            Over C chunks: `input_features` `(C, feature_size, T)` float32, with `speech_features` `(C, samples)` or
            `(C, T, bins)`; `input_features_mask` `(C, T)` int64; with the BEATs stream `input_values`
            `(C, F, num_fbank_bins)` float32 and `input_values_mask` `(C, F)` int64. Padding is zero in features and
            masks.
        """
        size = self.chunk_samples
        chunks = [clip[start : start + size] for clip in waveforms for start in range(0, len(clip), size)]
        chunks = [_with_silence(chunk, self.min_samples) for chunk in chunks]
        make_speech = self._log_mel_features if self.speech_features is None else self._speech_features
        features = make_speech(chunks, pad_to_multiple_of)
        if self.num_fbank_bins:
            features.update(self._audio_features(chunks, pad_to_multiple_of))
        return features

    def _check_sampling_rate(self, sampling_rate: int | None) -> None:
        if sampling_rate is None:
            logger.warning_once(
                "ListenFeatureExtractor was called without sampling_rate; pass it, so that audio at another rate than "
                f"{self.sampling_rate} Hz is noticed."
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"ListenFeatureExtractor takes audio at sampling_rate={self.sampling_rate}, got {sampling_rate}; "
                "resample it first, e.g. with librosa.resample or datasets.Audio(sampling_rate=...)."
            )

    def _log_mel_features(self, chunks: list[np.ndarray], multiple: int) -> dict[str, torch.Tensor]:
        counts = torch.tensor(list(map(len, chunks))) // self.hop_length  # (chunks,)
        if self.pad_to_30s:
            chunks = [_with_silence(chunk, self.chunk_samples) for chunk in chunks]
        total = max(map(len, chunks)) // self.hop_length
        if not self.pad_to_30s:  # Whisper takes no more frames than a whole chunk has
            total = min(total + -total % multiple, self.chunk_samples // self.hop_length)
        features = torch.zeros(len(chunks), self.feature_size, total, dtype=torch.float32)
        for chunk, row in zip(chunks, features, strict=True):
            log_mel = row[:, : len(chunk) // self.hop_length]  # (bins, frames)
            log_mel_spectrogram(torch.from_numpy(chunk), self.n_fft, self.hop_length, self.sampling_rate, out=log_mel)
        return {"input_features": features, "input_features_mask": prefix_mask(counts, total).long()}

    def _speech_features(self, chunks: list[np.ndarray], multiple: int) -> dict[str, torch.Tensor]:
        features = extract_speech(self.speech_features, chunks)  # (chunks, samples) or (chunks, frames, bins)
        missing = 0 if self.is_fixed_length else -features.shape[1] % multiple
        features = torch.nn.functional.pad(features, (0, 0) * (features.dim() - 2) + (0, missing))
        counts = torch.tensor([self.geometry.num_inputs(len(chunk)) for chunk in chunks])  # (chunks,)
        return {"input_features": features, "input_features_mask": prefix_mask(counts, features.shape[1]).long()}

    def _audio_features(self, chunks: list[np.ndarray], multiple: int) -> dict[str, torch.Tensor]:
        window, shift = kaldi_framing(self.sampling_rate)
        counts = 1 + (torch.tensor(list(map(len, chunks))) - window) // shift  # (chunks,)
        longest = int(counts.max())
        total = longest + -longest % multiple
        values = torch.zeros(len(chunks), total, self.num_fbank_bins, dtype=torch.float32)
        for chunk, row, count in zip(chunks, values, counts.tolist(), strict=True):
            fbank = row[:count]  # (frames, bins)
            kaldi_fbank(torch.from_numpy(chunk), self.sampling_rate, out=fbank)
            fbank.sub_(self.fbank_mean).div_(2.0 * self.fbank_std)
        return {"input_values": values, "input_values_mask": prefix_mask(counts, total).long()}


def _with_silence(chunk: np.ndarray, samples: int) -> np.ndarray:
    """A chunk of at least so many samples."""
    return chunk if len(chunk) >= samples else np.pad(chunk, (0, samples - len(chunk)))


def _as_clips(audio: object) -> list[np.ndarray]:
    """One clip or several as a list of one-dimensional float32 arrays."""
    if isinstance(audio, (list, tuple)) and not len(audio):
        raise ValueError("ListenFeatureExtractor got no clip: audio is an empty list.")
    several = isinstance(audio, (list, tuple)) and not isinstance(audio[0], (int, float, np.number))
    return [_as_clip(clip, index) for index, clip in enumerate(audio if several else [audio])]


def _as_clip(clip: object, index: int) -> np.ndarray:
    if isinstance(clip, torch.Tensor):
        clip = clip.detach().cpu()
        clip = clip.float() if clip.is_floating_point() else clip  # numpy has no bfloat16
    array = np.asarray(clip)
    if array.dtype.kind != "f":
        raise ValueError(
            f"Clip {index} has samples of type {array.dtype}, floats in [-1, 1] are needed; divide 16-bit integers by "
            "32768."
        )
    if array.ndim != 1:
        raise ValueError(
            f"Clip {index} has shape {array.shape}: a clip is one-dimensional. Pass a list of clips for a batch, and "
            "the mean over channels for stereo."
        )
    if not array.size:
        raise ValueError(f"Clip {index} is empty.")
    array = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"Clip {index} has NaN or infinite samples; check how it was read.")
    return array


# ---------------------------------------------------------------------- other speech encoders


def speech_features(config: PreTrainedConfig, source: str | None = None, **hub: Any) -> dict[str, Any]:
    """Settings of the feature extractor that a speech encoder was trained with.

    Args:
        config: The encoder's config.
        source: Folder or Hub id of its checkpoint. Without one, and for a checkpoint without an extractor, the
            settings are those that transformers gives such a model.
        **hub: `revision`, `subfolder` and the like.

    Raises:
        ValueError: the checkpoint's extractor does not fit the encoder.
    """
    extractor = None
    if source is not None:
        if any(
            cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub) for name in _SETTINGS_FILES
        ):
            extractor = AutoFeatureExtractor.from_pretrained(source, **hub)
        else:
            logger.warning(f"{source} has no {_SETTINGS_FILES[0]}; using the default features of such a model")
    extractor = _usual_extractor(config) if extractor is None else extractor
    _check_fits(config, extractor, source or "the feature extractor")
    return {name: value for name, value in extractor.to_dict().items() if name not in _ORIGIN}


def speech_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments of `ListenFeatureExtractor` for the speech encoder of a model's config.

    Args:
        config: A config with `speech_config`, `base_models` and `pad_to_30s`.

    Raises:
        ValueError: the extractor in the encoder's checkpoint does not fit it.
    """
    speech, geometry = config.speech_config, speech_geometry(config.speech_config)
    settings: dict[str, Any] = {"chunk_seconds": geometry.chunk_seconds}
    if speech.model_type == "whisper":
        return {**settings, "feature_size": speech.num_mel_bins, "pad_to_30s": config.pad_to_30s}
    place, options = config.backbone_place("speech_encoder") or (None, {})
    features = speech_features(speech, place, **options)
    return {**settings, "speech_geometry": geometry.to_dict(), "speech_features": features}


def feature_extractor_for(config: PreTrainedConfig) -> ListenFeatureExtractor:
    """The feature extractor for the encoders of a config."""
    audio = config.audio_config
    settings = {**speech_settings(config), "num_fbank_bins": None}
    if audio is not None:
        settings |= {"num_fbank_bins": audio.num_mel_bins, "patch_size": audio.patch_size}
    return ListenFeatureExtractor(**settings)


def extract_speech(settings: dict[str, Any], chunks: list[np.ndarray]) -> torch.Tensor:
    """Features of chunks of audio for the encoder.

    Args:
        settings: What `speech_features` returns.
        chunks: One-dimensional float32 arrays.

    Returns:
        `(chunks, samples)` or `(chunks, frames, bins)`, float32, zero after the end of a chunk.
    """
    extractor = _extractor(json.dumps(settings, sort_keys=True))
    features = extractor(chunks, sampling_rate=SAMPLING_RATE, padding=True, return_attention_mask=True)
    return torch.from_numpy(np.stack(features[extractor.model_input_names[0]]).astype(np.float32, copy=False))


def _check_settings(settings: dict[str, Any]) -> None:
    """Raise a `ValueError` for settings of an extractor that is not supported."""
    name = settings.get("feature_extractor_type")
    known = {_WAVEFORM_EXTRACTOR, *_EXTRACTORS.values()}
    if name not in known:
        raise ValueError(
            f"speech_features: feature_extractor_type={name!r} is unknown; choose {', '.join(sorted(known))}"
        )


@lru_cache(maxsize=8)
def _extractor(settings: str) -> SequenceFeatureExtractor:
    fields = json.loads(settings)
    return getattr(transformers, fields["feature_extractor_type"]).from_dict(fields)


def _usual_extractor(config: PreTrainedConfig) -> SequenceFeatureExtractor:
    if config.model_type == "wav2vec2-bert":
        stride = 2
        return transformers.SeamlessM4TFeatureExtractor(
            feature_size=config.feature_projection_input_dim // stride,
            num_mel_bins=config.feature_projection_input_dim // stride,
            stride=stride,
        )
    if config.model_type == "audio-spectrogram-transformer":
        return transformers.ASTFeatureExtractor(num_mel_bins=config.num_mel_bins, max_length=config.max_length)
    return transformers.Wav2Vec2FeatureExtractor(
        do_normalize=config.model_type != "moonshine", return_attention_mask=True
    )


def _check_fits(config: PreTrainedConfig, extractor: SequenceFeatureExtractor, source: str) -> None:
    kind, wanted = type(extractor).__name__, _EXTRACTORS.get(config.model_type, _WAVEFORM_EXTRACTOR)
    if kind != wanted:
        raise ValueError(f"{source} makes features with {kind}, but {config.model_type} takes those of {wanted}")
    wanted_fields: dict[str, Any] = {"sampling_rate": SAMPLING_RATE}
    if config.model_type == "wav2vec2-bert":
        wanted_fields |= {"stride": 2, "num_mel_bins": config.feature_projection_input_dim // 2}
    if config.model_type == "audio-spectrogram-transformer":
        wanted_fields |= {"num_mel_bins": config.num_mel_bins, "max_length": config.max_length}
    for name, value in wanted_fields.items():
        if getattr(extractor, name) != value:
            raise ValueError(
                f"{source} makes features with {name}={getattr(extractor, name)}, but this {config.model_type} takes "
                f"{name}={value}; give the extractor that belongs to it"
            )


ListenFeatureExtractor.register_for_auto_class()

__all__ = [
    "ListenFeatureExtractor",
    "extract_speech",
    "feature_extractor_for",
    "speech_features",
    "speech_settings",
]
