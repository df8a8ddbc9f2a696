"""One spoken clip: a sentence, a speaker and an emotion become 16 kHz samples with the time of every word."""

from dataclasses import dataclass

import numpy as np

from .espeak import ESPEAK_SAMPLING_RATE, EspeakSynthesizer, EspeakVoice
from .prosody import EMOTIONS, colour_samples
from .speakers import ACCENTS, TIMBRES, Speaker

SAMPLING_RATE = 16000
_SILENCE = 0.02  # of the peak: quieter than this is not speech


@dataclass(frozen=True)
class Utterance:
    """Samples (num_samples,) float32 at 16 kHz and, for every word, its (start, end) in seconds."""

    samples: np.ndarray
    word_times: list[tuple[float, float]]


def speak(
    synthesizer: EspeakSynthesizer, text: str, speaker: Speaker, emotion: str, rng: np.random.Generator
) -> Utterance:
    """Render `text` in the voice of `speaker` with `emotion`, at a random level, over faint noise.

    Raises:
        ValueError: unknown `emotion`.
    """
    import soxr

    if emotion not in EMOTIONS:
        raise ValueError(f"Unknown emotion {emotion!r}: choose one of {sorted(EMOTIONS)}.")
    style = EMOTIONS[emotion]
    warp = speaker.warp * style.warp
    voice = EspeakVoice(
        name=f"{ACCENTS[speaker.accent]}+{TIMBRES[speaker.timbre]}",
        pitch=int(np.clip(speaker.pitch + style.pitch_shift, 0, 99)),
        pitch_range=style.pitch_range,
        rate=int(speaker.rate * style.rate_factor / warp),  # warping speeds up by as much
    )
    synthesis = synthesizer.speak(text, voice)
    source_rate = round(ESPEAK_SAMPLING_RATE * warp)
    samples = soxr.resample(synthesis.samples, source_rate, SAMPLING_RATE, quality="HQ")
    starts = np.asarray(synthesis.word_starts) / warp
    return _finish(colour_samples(samples, style, SAMPLING_RATE, rng), starts, rng)


def _finish(samples: np.ndarray, starts: np.ndarray, rng: np.random.Generator) -> Utterance:
    """Trim the silence around the speech, pad it with some, set the level, add noise."""
    loud = np.flatnonzero(np.abs(samples) > _SILENCE * np.abs(samples).max())
    first, last = loud[0], loud[-1] + 1
    lead, tail = (int(rng.uniform(0.05, 0.25) * SAMPLING_RATE) for _ in range(2))
    speech = np.pad(samples[first:last], (lead, tail))
    offset = (lead - first) / SAMPLING_RATE
    ends = np.append(starts[1:], last / SAMPLING_RATE)
    times = [(max(0.0, start + offset), max(0.0, end + offset)) for start, end in zip(starts, ends, strict=True)]
    return Utterance(add_noise(speech, rng), times)


def add_noise(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scale to a random peak of 0.3-0.9 and add white noise, 30-50 dB below that peak."""
    peak = rng.uniform(0.3, 0.9)
    scaled = samples * (peak / (np.abs(samples).max() + 1e-9))
    noise = rng.standard_normal(len(samples)) * peak * 10 ** (-rng.uniform(30.0, 50.0) / 20)
    return (scaled + noise).astype(np.float32)
