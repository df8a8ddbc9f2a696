"""Spectrograms in torch: Whisper's log-mel and the Kaldi filter bank of BEATs, for batches of clips.

Log-mel (Radford et al. 2022; `transformers.WhisperFeatureExtractor`): reflected edges, periodic Hann window, power
spectrum, Slaney mel filters, log10 with a floor of 1e-10, then at most 8 below the clip's own maximum, `(x + 4) / 4`.

Filter bank (Kaldi's `compute-fbank-feats` as BEATs uses it): samples times 2**15, frames of 25 ms every 10 ms that lie
wholly inside the clip, mean of each frame removed, pre-emphasis 0.97, Povey window, FFT of the next power of two, power
spectrum, triangular filters on Kaldi's mel scale from 20 Hz to the Nyquist frequency, natural log with float32's
epsilon as floor.

No value depends on the other clips of a batch.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from transformers.audio_utils import mel_filter_bank

HIGHEST_WHISPER_HERTZ = 8000.0
_LOWEST_KALDI_HERTZ = 20.0
_FULL_SCALE = 2.0**15  # Kaldi reads 16-bit samples as integers
_PREEMPHASIS = 0.97


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
    padding = ~prefix_mask(counts, log_mel.shape[1]).unsqueeze(-1)  # (clips, frames, 1)
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
    emphasised[..., 0] = frames[..., 0] * (1.0 - _PREEMPHASIS)  # the first sample counts as its own predecessor
    # Povey window: a Hann window to the power 0.85
    emphasised[..., :window] *= torch.hann_window(window, periodic=False, dtype=torch.float32).pow(0.85)
    power = _power_spectrum(emphasised)  # (clips, frames, n_fft // 2 + 1)
    mel = power @ _kaldi_filters(num_mel_bins, n_fft, sampling_rate)  # (clips, frames, num_mel_bins)
    return mel.clamp_(min=torch.finfo(torch.float32).eps).log_()


def kaldi_framing(sampling_rate: int) -> tuple[int, int]:
    """Samples of a Kaldi window (25 ms) and of its shift (10 ms)."""
    return int(sampling_rate * 0.025), int(sampling_rate * 0.010)


def prefix_mask(counts: torch.Tensor, length: int) -> torch.Tensor:
    """`(clips,)` counts -> `(clips, length)` boolean, True at the first `counts[i]` positions of row `i`."""
    return torch.arange(length) < counts[:, None]


def _reflect_edges(waveforms: torch.Tensor, lengths: torch.Tensor, width: int) -> torch.Tensor:
    """Mirror `width` samples around both ends of each clip: `(clips, samples)` -> `(clips, samples + 2 * width)`.

    A clip is `waveforms[i, : lengths[i]]`; what follows its mirrored end is not touched.
    """
    padded = torch.nn.functional.pad(waveforms, (width, width))
    padded[:, :width] = waveforms[:, 1 : width + 1].flip(1)
    steps = torch.arange(width)
    mirrored = waveforms.gather(1, (lengths - 2)[:, None] - steps)  # (clips, width)
    return padded.scatter_(1, (lengths + width)[:, None] + steps, mirrored)


def _power_spectrum(frames: torch.Tensor) -> torch.Tensor:
    """`(..., n_fft)` -> `(..., n_fft // 2 + 1)`."""
    spectrum = torch.fft.rfft(frames)
    return spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)


@lru_cache(maxsize=8)
def _whisper_filters(num_mel_bins: int, n_fft: int, sampling_rate: int) -> torch.Tensor:
    """Slaney mel filters, `(n_fft // 2 + 1, num_mel_bins)`."""
    filters = mel_filter_bank(
        num_frequency_bins=1 + n_fft // 2,
        num_mel_filters=num_mel_bins,
        min_frequency=0.0,
        max_frequency=HIGHEST_WHISPER_HERTZ,
        sampling_rate=sampling_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).float()


@lru_cache(maxsize=8)
def _kaldi_filters(num_mel_bins: int, n_fft: int, sampling_rate: int) -> torch.Tensor:
    """Triangles that are evenly spaced on Kaldi's mel scale, `1127 ln(1 + f / 700)`: `(n_fft // 2 + 1, num_mel_bins)`.

    In float32 throughout, as BEATs was trained: near a corner, rounding alone changes a weight by a thousandth.
    """
    lowest = 1127.0 * math.log(1.0 + _LOWEST_KALDI_HERTZ / 700.0)
    highest = 1127.0 * math.log(1.0 + sampling_rate / 2 / 700.0)
    steps = torch.arange(num_mel_bins + 2, dtype=torch.float32)
    corners = lowest + steps * ((highest - lowest) / (num_mel_bins + 1))
    hertz = torch.arange(n_fft // 2, dtype=torch.float32) * (sampling_rate / n_fft)
    mels = 1127.0 * (1.0 + hertz / 700.0).log().unsqueeze(1)  # (n_fft // 2, 1)
    rising = (mels - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - mels) / (corners[2:] - corners[1:-1])
    filters = torch.minimum(rising, falling).clamp_(min=0.0)
    return torch.nn.functional.pad(filters, (0, 0, 0, 1))  # no filter holds the Nyquist frequency


__all__ = ["HIGHEST_WHISPER_HERTZ", "kaldi_fbank", "kaldi_framing", "log_mel_spectrogram", "prefix_mask"]
