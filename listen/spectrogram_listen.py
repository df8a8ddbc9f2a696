"""Spectrograms in torch: Whisper's log-mel and the Kaldi filter bank of BEATs.

Log-mel (Radford et al. 2022; `transformers.WhisperFeatureExtractor`): reflected edges, periodic Hann window, power
spectrum, Slaney mel filters, log10 with a floor of 1e-10, then at most 8 below the clip's own maximum, `(x + 4) / 4`.

Filter bank (Kaldi's `compute-fbank-feats` as BEATs uses it): samples times 2**15, frames of 25 ms every 10 ms that lie
wholly inside the clip, mean of each frame removed, pre-emphasis 0.97, Povey window, FFT of the next power of two, power
spectrum, triangular filters on Kaldi's mel scale from 20 Hz to the Nyquist frequency, natural log with float32's
epsilon as floor.
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
_FRAMES_AT_ONCE = 256  # the buffers of a block stay in the cache; fresh memory for whole clips doubles the time
_FILTERS_AT_ONCE = 32  # measured as fast as 16

# Neighbouring filters as one matrix: the FFT bins where they are not zero, their columns, `(bins, filters)` weights.
_Bands = list[tuple[slice, slice, torch.Tensor]]


def log_mel_spectrogram(
    waveform: torch.Tensor, n_fft: int, hop_length: int, sampling_rate: int, out: torch.Tensor
) -> None:
    """Whisper's log-mel of a clip.

    Args:
        waveform: `(samples,)` float32, more than `n_fft // 2` samples.
        out: Takes the result, `(num_mel_bins, samples // hop_length)` float32.
    """
    window = torch.hann_window(n_fft, dtype=torch.float32)
    padded = torch.nn.functional.pad(waveform[None], (n_fft // 2, n_fft // 2), mode="reflect")[0]
    frames = padded.unfold(0, n_fft, hop_length)[: out.shape[1]]  # (frames, n_fft)
    for block, mel in zip(frames.split(_FRAMES_AT_ONCE), out.T.split(_FRAMES_AT_ONCE), strict=True):
        _filter_energies(block * window, _whisper_filters(len(out), n_fft, sampling_rate), mel)
    out.clamp_(min=1e-10).log10_()
    out.clamp_(min=out.amax() - 8.0).add_(4.0).div_(4.0)


def kaldi_fbank(waveform: torch.Tensor, sampling_rate: int, out: torch.Tensor) -> None:
    """Kaldi's log filter bank of a clip without dither.

    Args:
        waveform: `(samples,)` float32 in [-1, 1], at least 25 ms.
        out: Takes the result, `(1 + (samples - window) // shift, num_mel_bins)` float32 with a window of 25 ms and a
            shift of 10 ms.
    """
    window, shift = kaldi_framing(sampling_rate)
    n_fft = 1 << (window - 1).bit_length()
    # Povey window: a Hann window to the power 0.85
    povey = torch.hann_window(window, periodic=False, dtype=torch.float32).pow(0.85)
    buffer = out.new_zeros(min(len(out), _FRAMES_AT_ONCE), n_fft)  # zero after the window
    frames = (waveform * _FULL_SCALE).unfold(0, window, shift)  # (frames, window)
    for block, mel in zip(frames.split(_FRAMES_AT_ONCE), out.split(_FRAMES_AT_ONCE), strict=True):
        block = block - block.mean(-1, keepdim=True)
        emphasised = buffer[: len(block)]
        # product and difference rounded one after the other, as in training: fused, a tone's empty bins differ by 0.02
        torch.sub(block[:, 1:], block[:, :-1] * _PREEMPHASIS, out=emphasised[:, 1:window])
        emphasised[:, 0] = block[:, 0] * (1.0 - _PREEMPHASIS)  # the first sample counts as its own predecessor
        emphasised[:, :window] *= povey
        _filter_energies(emphasised, _kaldi_filters(out.shape[1], n_fft, sampling_rate), mel)
    out.clamp_(min=torch.finfo(torch.float32).eps).log_()


def kaldi_framing(sampling_rate: int) -> tuple[int, int]:
    """Samples of a Kaldi window (25 ms) and of its shift (10 ms)."""
    return int(sampling_rate * 0.025), int(sampling_rate * 0.010)


def prefix_mask(counts: torch.Tensor, length: int) -> torch.Tensor:
    """`(clips,)` counts -> `(clips, length)` boolean, True at the first `counts[i]` positions of row `i`."""
    return torch.arange(length) < counts[:, None]


def _filter_energies(frames: torch.Tensor, bands: _Bands, out: torch.Tensor) -> None:
    """Energy in each filter: `(frames, n_fft)` -> `out`, `(frames, filters)`."""
    spectrum = torch.fft.rfft(frames)
    power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)  # (frames, n_fft // 2 + 1)
    for bins, columns, weights in bands:
        torch.mm(power[:, bins], weights, out=out[:, columns])


def _bands(filters: torch.Tensor) -> _Bands:
    """`(n_fft // 2 + 1, filters)` in bands: most weights are zero, as a filter holds few bins."""
    bands = []
    for start in range(0, filters.shape[1], _FILTERS_AT_ONCE):
        columns = slice(start, start + _FILTERS_AT_ONCE)
        used = filters[:, columns].any(1).nonzero().flatten().tolist() or [0]
        bins = slice(used[0], used[-1] + 1)
        bands.append((bins, columns, filters[bins, columns].contiguous()))
    return bands


@lru_cache(maxsize=8)
def _whisper_filters(num_mel_bins: int, n_fft: int, sampling_rate: int) -> _Bands:
    """Slaney mel filters."""
    filters = mel_filter_bank(
        num_frequency_bins=1 + n_fft // 2,
        num_mel_filters=num_mel_bins,
        min_frequency=0.0,
        max_frequency=HIGHEST_WHISPER_HERTZ,
        sampling_rate=sampling_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    return _bands(torch.from_numpy(filters).float())


@lru_cache(maxsize=8)
def _kaldi_filters(num_mel_bins: int, n_fft: int, sampling_rate: int) -> _Bands:
    """Triangles that are evenly spaced on Kaldi's mel scale, `1127 ln(1 + f / 700)`.

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
    return _bands(filters)  # none holds the Nyquist frequency


__all__ = ["HIGHEST_WHISPER_HERTZ", "kaldi_fbank", "kaldi_framing", "log_mel_spectrogram", "prefix_mask"]
