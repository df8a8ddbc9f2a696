"""Both inputs of LiSTEN from 16 kHz waveforms, batched in torch: Whisper's log-mel and the Kaldi filter bank of BEATs.

Other speech encoders read what their own transformers feature extractors make, in place of log-mel.

Log-mel (Radford et al. 2022; `transformers.WhisperFeatureExtractor`): reflected edges, periodic Hann window, power
spectrum, Slaney mel filters, log10 with a floor of 1e-10, then at most 8 below the clip's own maximum, `(x + 4) / 4`.

Filter bank (Kaldi's `compute-fbank-feats` as BEATs uses it): samples times 2**15, frames of 25 ms every 10 ms that lie
wholly inside the clip, mean of each frame removed, pre-emphasis 0.97, Povey window, FFT of the next power of two, power
spectrum, triangular filters on Kaldi's mel scale from 20 Hz to the Nyquist frequency, natural log with float32's
epsilon as floor, then `(x - mean) / (2 * std)`.

Nothing here depends on the batch mates of a clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.audio_utils import mel_filter_bank
from transformers.utils import TensorType, logging

from .geometry_listen import SAMPLING_RATE, EncoderGeometry, audio_step, num_resampled
from .speech_features_listen import check_settings, extract_speech

logger = logging.get_logger(__name__)

_FULL_SCALE = 2.0**15  # Kaldi reads 16-bit samples as integers
_PREEMPHASIS = 0.97
_LOWEST_KALDI_HERTZ = 20.0
_HIGHEST_WHISPER_HERTZ = 8000.0
_CHUNKS_AT_ONCE = 4  # of similar length; bounds the memory of the spectra, whatever the length of the audio
# What the base classes themselves write to or read from a saved feature extractor.
_INHERITED_ARGUMENTS = frozenset(
    {"auto_map", "feature_extractor_type", "padding_side", "padding_value", "processor_class", "return_attention_mask"}
)


@lru_cache(maxsize=8)
def _whisper_filters(num_mel_bins: int, n_fft: int, sampling_rate: int) -> torch.Tensor:
    """Slaney mel filters, `(n_fft // 2 + 1, num_mel_bins)`."""
    filters = mel_filter_bank(
        num_frequency_bins=1 + n_fft // 2,
        num_mel_filters=num_mel_bins,
        min_frequency=0.0,
        max_frequency=_HIGHEST_WHISPER_HERTZ,
        sampling_rate=sampling_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).float()


@lru_cache(maxsize=8)
def _kaldi_filters(num_mel_bins: int, n_fft: int, sampling_rate: int) -> torch.Tensor:
    """Triangles that are even on Kaldi's mel scale, `1127 ln(1 + f / 700)`: `(n_fft // 2 + 1, num_mel_bins)`.

    In float32 throughout, as BEATs was trained: near a corner, rounding alone changes a weight by a thousandth.
    """
    lowest, highest = (1127.0 * math.log(1.0 + hertz / 700.0) for hertz in (_LOWEST_KALDI_HERTZ, sampling_rate / 2))
    steps = torch.arange(num_mel_bins + 2, dtype=torch.float32)
    corners = lowest + steps * ((highest - lowest) / (num_mel_bins + 1))
    hertz = torch.arange(n_fft // 2, dtype=torch.float32) * (sampling_rate / n_fft)
    mels = 1127.0 * (1.0 + hertz / 700.0).log().unsqueeze(1)  # (n_fft // 2, 1)
    rising = (mels - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - mels) / (corners[2:] - corners[1:-1])
    filters = torch.minimum(rising, falling).clamp_(min=0.0)
    return torch.nn.functional.pad(filters, (0, 0, 0, 1))  # the Nyquist frequency is in none


def _povey_window(length: int) -> torch.Tensor:
    """Kaldi's default window, a Hann window to the power 0.85 that is zero at both ends."""
    return torch.hann_window(length, periodic=False, dtype=torch.float32).pow(0.85)


def _power_spectrum(frames: torch.Tensor) -> torch.Tensor:
    """`(..., n_fft)` -> `(..., n_fft // 2 + 1)`."""
    spectrum = torch.fft.rfft(frames)
    return spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)


def _reflect_edges(waveforms: torch.Tensor, lengths: torch.Tensor, width: int) -> torch.Tensor:
    """Mirror `width` samples around both ends of each clip: `(clips, samples)` -> `(clips, samples + 2 * width)`.

    A clip is `waveforms[i, : lengths[i]]`; what follows its mirrored end is not touched.
    """
    padded = torch.nn.functional.pad(waveforms, (width, width))
    padded[:, :width] = waveforms[:, 1 : width + 1].flip(1)
    steps = torch.arange(width)
    mirrored = waveforms.gather(1, (lengths - 2)[:, None] - steps)  # (clips, width)
    return padded.scatter_(1, (lengths + width)[:, None] + steps, mirrored)


def _prefix_mask(counts: torch.Tensor, length: int) -> torch.Tensor:
    """`(clips,)` counts -> `(clips, length)` boolean, True at the first `counts[i]` places of row `i`."""
    return torch.arange(length) < counts[:, None]


def log_mel_spectrogram(
    waveforms: torch.Tensor, lengths: torch.Tensor, num_mel_bins: int, n_fft: int, hop_length: int, sampling_rate: int
) -> torch.Tensor:
    """Whisper's log-mel of clips of different lengths.

    Args:
        waveforms: `(clips, samples)` float32; clip `i` is `waveforms[i, : lengths[i]]`.
        lengths: `(clips,)` samples of each clip, more than `n_fft // 2`.

    Returns:
        `(clips, num_mel_bins, max(lengths) // hop_length)`; clip `i` fills its first `lengths[i] // hop_length` frames
        and zeros the rest.
    """
    counts = lengths // hop_length
    padded = _reflect_edges(waveforms, lengths, n_fft // 2)
    frames = padded.unfold(1, n_fft, hop_length)[:, : int(counts.max())]  # (clips, frames, n_fft)
    power = _power_spectrum(frames * torch.hann_window(n_fft, dtype=torch.float32))  # (clips, frames, bins)
    log_mel = (power @ _whisper_filters(num_mel_bins, n_fft, sampling_rate)).clamp_(min=1e-10).log10_()
    padding = ~_prefix_mask(counts, log_mel.shape[1]).unsqueeze(-1)  # (clips, frames, 1)
    loudest = log_mel.masked_fill(padding, -torch.inf).amax((1, 2), keepdim=True)  # (clips, 1, 1)
    log_mel = (torch.maximum(log_mel, loudest - 8.0) + 4.0) / 4.0
    return log_mel.masked_fill_(padding, 0.0).transpose(1, 2)


def kaldi_fbank(waveforms: torch.Tensor, num_mel_bins: int, sampling_rate: int) -> torch.Tensor:
    """Kaldi's log filter bank without dither.

    Args:
        waveforms: `(clips, samples)` float32 in [-1, 1], at least 25 ms.

    Returns:
        `(clips, 1 + (samples - window) // shift, num_mel_bins)` with a window of 25 ms and a shift of 10 ms.
    """
    window, shift = kaldi_framing(sampling_rate)
    n_fft = 1 << (window - 1).bit_length()
    frames = waveforms.unfold(1, window, shift) * _FULL_SCALE  # (clips, frames, window)
    frames -= frames.mean(-1, keepdim=True)
    emphasised = frames.new_zeros(*frames.shape[:2], n_fft)
    # product and difference rounded one after the other, as in training: fused, a tone's empty bins differ by 0.02
    torch.sub(frames[..., 1:], frames[..., :-1] * _PREEMPHASIS, out=emphasised[..., 1:window])
    emphasised[..., 0] = frames[..., 0] * (1.0 - _PREEMPHASIS)  # the first sample stands before itself
    emphasised[..., :window] *= _povey_window(window)
    power = _power_spectrum(emphasised)  # (clips, frames, n_fft // 2 + 1)
    mel = power @ _kaldi_filters(num_mel_bins, n_fft, sampling_rate)  # (clips, frames, num_mel_bins)
    return mel.clamp_(min=torch.finfo(torch.float32).eps).log_()


def kaldi_framing(sampling_rate: int) -> tuple[int, int]:
    """Samples of a Kaldi window (25 ms) and of its shift (10 ms)."""
    return int(sampling_rate * 0.025), int(sampling_rate * 0.010)


class ListenFeatureExtractor(SequenceFeatureExtractor):
    """Log-mel features for the speech encoder and Kaldi filter banks for BEATs, with masks that tell real frames.

    Clips longer than `chunk_seconds` are cut into pieces of that length; the pieces of all clips are the rows of the
    result, in order. Clips too short for one token of either encoder are followed by silence.

    Args:
        feature_size (`int`): Log-mel bins: 80, or 128 for Whisper large-v3.
        sampling_rate (`int`): Samples a second that the encoders expect.
        hop_length (`int`): Samples between log-mel frames.
        n_fft (`int`): Samples in a log-mel window.
        chunk_seconds (`float`): Longest piece; Whisper has positions for 30 s.
        num_fbank_bins (`int` or `None`): Bins of the BEATs filter bank; 0 or `None` leaves that stream out.
        fbank_mean, fbank_std (`float`): The filter bank is returned as `(x - fbank_mean) / (2 * fbank_std)`.
        pad_to_30s (`bool`): Pad log-mel input with silence to `chunk_seconds`, as Whisper was trained. The mask still
            tells the frames of the clip.
        speech_downsampling (`int`): Log-mel frames for one frame of the speech encoder.
        patch_size (`int`): Side of a BEATs patch, in bins and frames.
        speech_features (`dict`, *optional*): Settings of the transformers feature extractor that a speech encoder other
            than Whisper was trained with, see `speech_features_listen`; it makes `input_features` in place of log-mel.
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
        self.fbank_mean = fbank_mean
        self.fbank_std = fbank_std
        self.pad_to_30s = pad_to_30s
        self.speech_downsampling = speech_downsampling
        self.patch_size = patch_size
        self.speech_features = speech_features
        self.speech_geometry = speech_geometry
        self._check_values()

    def _check_values(self) -> None:
        for name in ("feature_size", "sampling_rate", "hop_length", "n_fft", "speech_downsampling", "patch_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"ListenFeatureExtractor: {name}={getattr(self, name)!r} must be a positive integer.")
        self._check_speech()
        if self.sampling_rate < 2 * _HIGHEST_WHISPER_HERTZ:
            raise ValueError(
                f"ListenFeatureExtractor: sampling_rate={self.sampling_rate} is too low for Whisper, whose mel "
                f"filters reach {_HIGHEST_WHISPER_HERTZ:.0f} Hz; take 16000."
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
        check_settings(self.speech_features)
        if self.pad_to_30s or self.sampling_rate != SAMPLING_RATE:
            raise ValueError(
                f"ListenFeatureExtractor: speech_features make clips of true length at {SAMPLING_RATE} Hz, not with "
                f"pad_to_30s={self.pad_to_30s} and sampling_rate={self.sampling_rate}."
            )

    @property
    def geometry(self) -> EncoderGeometry:
        """The way from samples to the frames of the speech encoder."""
        if self.speech_geometry is not None:
            return EncoderGeometry.from_dict(self.speech_geometry)
        hop, step = self.hop_length, self.speech_downsampling
        return EncoderGeometry(((hop, hop, 0),), ((1, step, 0),), chunk_seconds=self.chunk_seconds)

    @property
    def time_axis(self) -> int:
        """Axis of `input_features` along which time runs: 2 in log-mel, 1 in all others."""
        return 2 if self.speech_features is None else 1

    @property
    def is_fixed_length(self) -> bool:
        """Whether `input_features` are of one length whatever the clips."""
        return self.pad_to_30s or "max_length" in (self.speech_features or {})

    @property
    def chunk_samples(self) -> int:
        """Samples in a full chunk."""
        return round(self.chunk_seconds * self.sampling_rate)

    @property
    def min_samples(self) -> int:
        """Samples below which a chunk is followed by silence: one frame of speech, and one row of BEATs patches."""
        whisper = self.speech_features is None
        speech = max(self.n_fft, self.hop_length) if whisper else self.geometry.min_samples
        if not self.num_fbank_bins:
            return speech
        window, shift = kaldi_framing(self.sampling_rate)
        return max(speech, window + (self.patch_size - 1) * shift)

    def num_chunks(self, num_samples: int) -> int:
        """Rows that a clip of `num_samples` samples takes in the batch."""
        if num_samples < 1:
            raise ValueError(f"A clip needs at least one sample, got num_samples={num_samples}.")
        return -(-num_samples // self.chunk_samples)

    def chunk_lengths(self, num_samples: int) -> list[int]:
        """Samples of each chunk of a clip, the silence after a short one counted in."""
        last = num_samples - (self.num_chunks(num_samples) - 1) * self.chunk_samples
        return [self.chunk_samples] * (self.num_chunks(num_samples) - 1) + [max(last, self.min_samples)]

    @property
    def frame_seconds(self) -> float:
        """Time from one frame of the speech encoder to the next."""
        return self.geometry.frame_seconds

    def num_encoder_frames(self, num_samples: int) -> list[int]:
        """Frames of each chunk of a clip after both encoders at the speech encoder's rate, the longer of the two."""
        geometry = self.geometry
        step = audio_step(geometry, self.patch_size, self.num_fbank_bins) if self.num_fbank_bins else Fraction(1)
        return [
            max(geometry.num_frames(length), num_resampled(self._audio_tokens(length), step))
            for length in self.chunk_lengths(num_samples)
        ]

    def _audio_tokens(self, length: int) -> int:
        """Patches in whole time steps of a chunk; none without the BEATs stream."""
        return self._fbank_frames(length) // self.patch_size * (self.num_fbank_bins // self.patch_size)

    def _fbank_frames(self, length: int) -> int:
        window, shift = kaldi_framing(self.sampling_rate)
        return 1 + (length - window) // shift

    # No inference tensors: the filters that are kept, and features that a frozen encoder passes on to what learns.
    @torch.autocast("cpu", enabled=False)  # as exact as ever, whatever the model runs in
    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self,
        audio: np.ndarray | torch.Tensor | Sequence[float] | Sequence[np.ndarray | torch.Tensor | Sequence[float]],
        sampling_rate: int | None = None,
        return_tensors: str | TensorType | None = "pt",
    ) -> BatchFeature:
        """Turn clips into encoder inputs.

        Args:
            audio: one mono clip, or a list of them, as floats in [-1, 1].
            sampling_rate: samples a second of the clips; checked against the one that the encoders expect.
            return_tensors: "pt" or "np".

        Returns:
            `BatchFeature` over C chunks: `input_features` `(C, feature_size, T)` float32, with `speech_features`
            `(C, samples)` or `(C, T, bins)`; `input_features_mask` `(C, T)` int64; with the BEATs stream `input_values`
            `(C, F, num_fbank_bins)` float32 and `input_values_mask` `(C, F)` int64. Padding is zero in features and
            masks.

        Raises:
            ValueError: another sampling rate; a clip that is empty, not one-dimensional, not finite or not float.
        """
        self._check_sampling_rate(sampling_rate)
        chunks = [chunk for clip in _as_clips(audio) for chunk in self._cut(clip)]
        lengths = torch.tensor([max(len(chunk), self.min_samples) for chunk in chunks])
        features = self._speech_features(chunks, lengths)
        if self.num_fbank_bins:
            features.update(self._audio_features(chunks, lengths))
        return BatchFeature(features, tensor_type=return_tensors)

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

    def _cut(self, clip: np.ndarray) -> list[np.ndarray]:
        return [clip[start : start + self.chunk_samples] for start in range(0, len(clip), self.chunk_samples)]

    def _speech_features(self, chunks: list[np.ndarray], lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.speech_features is None:
            return self._log_mel_features(chunks, lengths)
        silent = [
            np.pad(chunk, (0, length - len(chunk))) for chunk, length in zip(chunks, lengths.tolist(), strict=True)
        ]
        features = extract_speech(self.speech_features, silent)  # (chunks, samples) or (chunks, frames, bins)
        counts = torch.tensor([self.geometry.num_inputs(len(chunk)) for chunk in silent])
        return {"input_features": features, "input_features_mask": _prefix_mask(counts, features.shape[1]).long()}

    def _log_mel_features(self, chunks: list[np.ndarray], lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        counts = lengths // self.hop_length
        spans = torch.full_like(lengths, self.chunk_samples) if self.pad_to_30s else lengths
        total = int(spans.max()) // self.hop_length
        features = torch.zeros(len(chunks), self.feature_size, total, dtype=torch.float32)
        for rows in lengths.argsort().split(_CHUNKS_AT_ONCE):
            waveforms = _stack([chunks[row] for row in rows], int(spans[rows].max()))
            log_mel = log_mel_spectrogram(
                waveforms, spans[rows], self.feature_size, self.n_fft, self.hop_length, self.sampling_rate
            )
            features[rows, :, : log_mel.shape[2]] = log_mel
        return {"input_features": features, "input_features_mask": _prefix_mask(counts, total).long()}

    def _audio_features(self, chunks: list[np.ndarray], lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        counts = torch.tensor([self._fbank_frames(length) for length in lengths.tolist()])
        total = int(counts.max())
        mask = _prefix_mask(counts, total)
        values = torch.zeros(len(chunks), total, self.num_fbank_bins, dtype=torch.float32)
        for rows in lengths.argsort().split(_CHUNKS_AT_ONCE):
            waveforms = _stack([chunks[row] for row in rows], int(lengths[rows].max()))
            fbank = kaldi_fbank(waveforms, self.num_fbank_bins, self.sampling_rate)
            values[rows, : fbank.shape[1]] = fbank.sub_(self.fbank_mean).div_(2.0 * self.fbank_std)
        values.masked_fill_(~mask.unsqueeze(-1), 0.0)
        return {"input_values": values, "input_values_mask": mask.long()}


def _stack(chunks: list[np.ndarray], samples: int) -> torch.Tensor:
    """Chunks followed by silence, `(chunks, samples)` float32."""
    stacked = torch.zeros(len(chunks), samples, dtype=torch.float32)
    for row, chunk in zip(stacked, chunks, strict=True):
        row[: len(chunk)] = torch.from_numpy(chunk)
    return stacked


def _as_clips(audio: object) -> list[np.ndarray]:
    """One clip or several as a list of one-dimensional float32 arrays."""
    if isinstance(audio, (list, tuple)) and not len(audio):
        raise ValueError("ListenFeatureExtractor got no clip: audio is an empty list.")
    several = isinstance(audio, (list, tuple)) and not isinstance(audio[0], (int, float, np.number))
    return [_as_clip(clip, index) for index, clip in enumerate(audio if several else [audio])]


def _as_clip(clip: object, index: int) -> np.ndarray:
    array = clip.detach().cpu().numpy() if isinstance(clip, torch.Tensor) else np.asarray(clip)
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


ListenFeatureExtractor.register_for_auto_class()

__all__ = ["ListenFeatureExtractor", "kaldi_fbank", "log_mel_spectrogram"]
