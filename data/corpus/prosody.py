"""Five emotions, rendered by prosody: pitch, intonation range, speed and a little signal processing."""

from dataclasses import dataclass

import numpy as np
from scipy import signal


@dataclass(frozen=True)
class Emotion:
    """How an emotion changes a voice: espeak pitch is shifted, rate multiplied, then `tilt`, `drive`, `tremor` act.

    Attributes:
        pitch_shift: added to espeak's pitch (0-99).
        pitch_range: espeak's intonation range (0-99).
        rate_factor: multiplies the speaking rate.
        tilt: first-order spectral tilt in -1..1; negative is muffled, positive is sharp.
        drive: gain before a soft clip; 0 leaves the signal linear.
        tremor: depth of a 7 Hz tremble of the loudness, 0..1.
    """

    pitch_shift: int
    pitch_range: int
    rate_factor: float
    tilt: float = 0.0
    drive: float = 0.0
    tremor: float = 0.0


EMOTIONS = {
    "neutral": Emotion(0, 40, 1.0),
    "happy": Emotion(12, 99, 1.08, tilt=0.15),
    "sad": Emotion(-12, 5, 0.82, tilt=-0.7),
    "angry": Emotion(6, 70, 1.1, tilt=0.5, drive=6.0),
    "fearful": Emotion(14, 25, 1.12, tremor=0.85),
}


def colour_samples(samples: np.ndarray, emotion: Emotion, sampling_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Apply the tilt, drive and tremor of `emotion` to mono `samples` (num_samples,) float32."""
    if emotion.tilt:
        samples = _tilt(samples, emotion.tilt + float(rng.uniform(-0.05, 0.05)))
    if emotion.drive:
        peak = np.abs(samples).max() + 1e-6
        samples = np.tanh(emotion.drive * float(rng.uniform(0.8, 1.25)) * samples / peak)
    if emotion.tremor:
        time = np.arange(len(samples)) / sampling_rate
        wave = np.sin(2 * np.pi * (rng.uniform(6.0, 8.0) * time + rng.uniform()))
        samples = samples * (1.0 - emotion.tremor * (0.5 + 0.5 * wave))
    return samples.astype(np.float32)


def _tilt(samples: np.ndarray, amount: float) -> np.ndarray:
    if amount > 0:  # pre-emphasis: y[n] = x[n] - a x[n-1]
        return signal.lfilter([1.0, -amount], [1.0], samples)
    return signal.lfilter([1.0 + amount], [1.0, amount], samples)  # one-pole low-pass of unit gain
