"""Five emotions, rendered by prosody: pitch, intonation range, speed and a little signal processing."""

from dataclasses import dataclass

import numpy as np
from scipy import signal


@dataclass(frozen=True)
class Emotion:
    """How an emotion changes a voice: parameters of espeak, then effects on its samples, in this order.

    Attributes:
        pitch_shift: added to espeak's pitch (0-99).
        pitch_range: espeak's intonation range (0-99).
        rate_factor: multiplies the speaking rate.
        warp: multiplies formants and pitch; a smile shortens the vocal tract.
        tilt: first-order spectral tilt in -1..1; negative is muffled, positive is sharp.
        drive: gain before a soft clip; 0 leaves the signal linear.
        breath: level of high-passed noise that follows the loudness of the speech.
        tremor: depth of a 7 Hz tremble of the loudness, 0..1.
    """

    pitch_shift: int
    pitch_range: int
    rate_factor: float
    warp: float = 1.0
    tilt: float = 0.0
    drive: float = 0.0
    breath: float = 0.0
    tremor: float = 0.0


EMOTIONS = {
    "neutral": Emotion(0, 40, 1.0),
    "happy": Emotion(14, 99, 1.12, warp=1.05, tilt=0.3),
    "sad": Emotion(-12, 5, 0.82, tilt=-0.7),
    "angry": Emotion(6, 70, 1.1, tilt=0.5, drive=6.0),
    "fearful": Emotion(14, 25, 1.15, breath=0.4, tremor=0.6),
}


def colour_samples(samples: np.ndarray, emotion: Emotion, sampling_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Apply tilt, drive, breath and tremor of `emotion` to mono `samples` (num_samples,) float32."""
    if emotion.tilt:
        samples = _tilt(samples, emotion.tilt + float(rng.uniform(-0.05, 0.05)))
    if emotion.drive:
        peak = np.abs(samples).max() + 1e-6
        samples = np.tanh(emotion.drive * float(rng.uniform(0.8, 1.25)) * samples / peak)
    if emotion.breath:
        samples = samples + emotion.breath * float(rng.uniform(0.8, 1.25)) * _breath(samples, sampling_rate, rng)
    if emotion.tremor:
        time = np.arange(len(samples)) / sampling_rate
        wave = np.sin(2 * np.pi * (rng.uniform(6.0, 8.0) * time + rng.uniform()))
        samples = samples * (1.0 - emotion.tremor * (0.5 + 0.5 * wave))
    return samples.astype(np.float32)


def _tilt(samples: np.ndarray, amount: float) -> np.ndarray:
    if amount > 0:  # pre-emphasis: y[n] = x[n] - a x[n-1]
        return signal.lfilter([1.0, -amount], [1.0], samples)
    return signal.lfilter([1.0 + amount], [1.0, amount], samples)  # one-pole low-pass of unit gain


def _breath(samples: np.ndarray, sampling_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Noise above 2 kHz with the loudness of `samples`."""
    loudness = signal.sosfilt(signal.butter(1, 20.0, fs=sampling_rate, output="sos"), np.abs(samples))
    hiss = signal.butter(2, 2000.0, btype="highpass", fs=sampling_rate, output="sos")
    return np.maximum(loudness, 0.0) * signal.sosfilt(hiss, rng.standard_normal(len(samples)))
