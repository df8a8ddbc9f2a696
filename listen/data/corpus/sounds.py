"""Sixteen sound events synthesised by signal processing. Each function draws mono samples with a random generator."""

from collections.abc import Callable

import numpy as np
from scipy import signal

SAMPLING_RATE = 16000

Rng = np.random.Generator


def _time(seconds: float) -> np.ndarray:
    return np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE


def _band_noise(seconds: float, low: float, high: float, rng: Rng) -> np.ndarray:
    sos = signal.butter(2, [low, high], btype="bandpass", fs=SAMPLING_RATE, output="sos")
    return signal.sosfilt(sos, rng.standard_normal(int(seconds * SAMPLING_RATE)))


def _sweep(frequency: np.ndarray) -> np.ndarray:
    """A sine whose frequency in Hz follows `frequency` (num_samples,)."""
    return np.sin(2 * np.pi * np.cumsum(frequency) / SAMPLING_RATE)


def _repeat(burst: Callable[[], np.ndarray], times: int, gap: float) -> np.ndarray:
    silence = np.zeros(int(gap * SAMPLING_RATE))
    return np.concatenate([part for _ in range(times) for part in (burst(), silence)])


def _decay(seconds: float, time_constant: float) -> np.ndarray:
    return np.exp(-_time(seconds) / time_constant)


def dog(rng: Rng) -> np.ndarray:
    """Two to three barks: a falling buzz with breath in it."""
    pitch = rng.uniform(280, 480)

    def bark() -> np.ndarray:
        time = _time(0.2)
        buzz = signal.sawtooth(2 * np.pi * np.cumsum(pitch * (1.4 - 3.0 * time)) / SAMPLING_RATE)
        return (buzz + 0.4 * _band_noise(0.2, 500, 2500, rng)) * np.sin(np.pi * time / 0.2)

    return _repeat(bark, int(rng.integers(2, 4)), rng.uniform(0.12, 0.25))


def bell(rng: Rng) -> np.ndarray:
    """A struck bell: inharmonic partials that die away."""
    seconds, base = rng.uniform(1.0, 1.5), rng.uniform(500, 800)
    time = _time(seconds)
    partials = zip((1.0, 2.76, 5.4, 8.93), (1.0, 0.6, 0.35, 0.2), strict=True)
    return sum(level * np.sin(2 * np.pi * base * ratio * time) for ratio, level in partials) * _decay(seconds, 0.35)


def rain(rng: Rng) -> np.ndarray:
    """A hiss of many drops."""
    seconds = rng.uniform(1.2, 1.8)
    drops = (rng.random(int(seconds * SAMPLING_RATE)) < 0.01) * rng.standard_normal(int(seconds * SAMPLING_RATE))
    return _band_noise(seconds, 2500, 7500, rng) * 0.5 + signal.lfilter([1.0], [1.0, -0.6], drops) * 2.0


def wind(rng: Rng) -> np.ndarray:
    """Low noise whose colour and strength drift."""
    seconds = rng.uniform(1.2, 1.8)
    gust = 0.6 + 0.4 * np.sin(2 * np.pi * (rng.uniform(0.6, 1.0) * _time(seconds) + rng.uniform()))
    return _band_noise(seconds, 200, rng.uniform(600, 900), rng) * gust


def siren(rng: Rng) -> np.ndarray:
    """A tone that rises and falls."""
    time = _time(rng.uniform(1.2, 1.7))
    centre, speed = rng.uniform(800, 1100), rng.uniform(1.2, 2.0)
    return _sweep(centre * (1 + 0.35 * np.sin(2 * np.pi * speed * time)))


def door(rng: Rng) -> np.ndarray:
    """Three or four knocks on wood."""
    tone = rng.uniform(150, 260)

    def knock() -> np.ndarray:
        wood = np.sin(2 * np.pi * tone * _time(0.08)) + 0.6 * _band_noise(0.08, 200, 1200, rng)
        return wood * _decay(0.08, 0.015)

    return _repeat(knock, int(rng.integers(3, 5)), rng.uniform(0.12, 0.2))


def whistle(rng: Rng) -> np.ndarray:
    """A referee's whistle: a high tone that trills."""
    time = _time(rng.uniform(0.7, 1.1))
    frequency = rng.uniform(2300, 3000)
    trill = 1 + 0.5 * np.sign(np.sin(2 * np.pi * 30 * time))
    return _sweep(frequency + 60 * np.sin(2 * np.pi * 30 * time)) * trill


def engine(rng: Rng) -> np.ndarray:
    """A low pulse train with a rumble."""
    seconds, rate = rng.uniform(1.2, 1.8), rng.uniform(28, 45)
    pulses = signal.sawtooth(2 * np.pi * rate * _time(seconds)) ** 3
    return pulses + 0.5 * _band_noise(seconds, 40, 160, rng)


def phone(rng: Rng) -> np.ndarray:
    """Two-tone beeps of a telephone."""
    low = rng.uniform(1200, 1500)

    def beep() -> np.ndarray:
        time = _time(0.24)
        return np.where((time * 25).astype(int) % 2, np.sin(2 * np.pi * low * time), _sweep(time * 0 + low * 1.35))

    return _repeat(beep, int(rng.integers(2, 4)), rng.uniform(0.12, 0.2))


def clock(rng: Rng) -> np.ndarray:
    """Ticks and tocks."""
    pitches = iter(np.tile([rng.uniform(3500, 4200), rng.uniform(2500, 3000)], 8))

    def tick() -> np.ndarray:
        return np.sin(2 * np.pi * next(pitches) * _time(0.03)) * _decay(0.03, 0.005)

    return _repeat(tick, int(rng.integers(5, 8)), rng.uniform(0.18, 0.25))


def thunder(rng: Rng) -> np.ndarray:
    """A crack, then a long low roll."""
    seconds = rng.uniform(1.3, 1.8)
    roll = _band_noise(seconds, 30, 180, rng) * np.exp(-np.abs(_time(seconds) - 0.25) / 0.45) * 3
    crack = _band_noise(seconds, 300, 3000, rng) * _decay(seconds, 0.08)
    return roll + crack


def bird(rng: Rng) -> np.ndarray:
    """Quick upward chirps."""
    start = rng.uniform(3000, 4500)

    def chirp() -> np.ndarray:
        time = _time(0.09)
        return _sweep(start + 18000 * time * (1 - 4 * time)) * np.sin(np.pi * time / 0.09)

    return _repeat(chirp, int(rng.integers(5, 9)), rng.uniform(0.04, 0.09))


def water(rng: Rng) -> np.ndarray:
    """Drops that fall into water: each a short rising blip."""

    def drip() -> np.ndarray:
        time = _time(0.07)
        return _sweep(rng.uniform(500, 900) * (1 + 10 * time)) * _decay(0.07, 0.02)

    return _repeat(drip, int(rng.integers(4, 7)), rng.uniform(0.16, 0.26))


def crowd(rng: Rng) -> np.ndarray:
    """Many hands that clap."""
    seconds = rng.uniform(1.1, 1.6)
    clap = _band_noise(0.03, 800, 3000, rng) * _decay(0.03, 0.006)
    hits = (rng.random(int(seconds * SAMPLING_RATE)) < 40 / SAMPLING_RATE) * rng.uniform(0.5, 1.0)
    return signal.fftconvolve(hits, clap, mode="same")


def cricket(rng: Rng) -> np.ndarray:
    """A high tone in fast pulses, in groups."""
    time = _time(rng.uniform(1.1, 1.6))
    pulses = (np.sin(2 * np.pi * rng.uniform(55, 70) * time) > 0) * (np.sin(2 * np.pi * 2.6 * time) > -0.3)
    return np.sin(2 * np.pi * rng.uniform(4800, 5600) * time) * pulses


def glass(rng: Rng) -> np.ndarray:
    """A crash, then shards that ring."""
    seconds = rng.uniform(0.7, 1.0)
    time = _time(seconds)
    sound = _band_noise(seconds, 2000, 7500, rng) * _decay(seconds, 0.05) * 2
    for _ in range(14):
        late = time - rng.uniform(0.0, 0.35)
        ring = np.sin(2 * np.pi * rng.uniform(2500, 7000) * late) * np.exp(-np.maximum(late, 0) / 0.06)
        sound = sound + 0.5 * ring * (late > 0)
    return sound


SOUNDS: dict[str, Callable[[Rng], np.ndarray]] = {
    make.__name__: make
    for make in (
        dog, bell, rain, wind, siren, door, whistle, engine, phone, clock, thunder, bird, water, crowd, cricket, glass
    )
}  # fmt: skip
PHRASES = {
    "dog": "a dog barks", "bell": "a bell rings", "rain": "rain falls", "wind": "wind blows",
    "siren": "a siren wails", "door": "a door is knocked", "whistle": "a whistle blows", "engine": "an engine hums",
    "phone": "a phone beeps", "clock": "a clock ticks", "thunder": "thunder rolls", "bird": "a bird sings",
    "water": "water drips", "crowd": "a crowd claps", "cricket": "a cricket chirps", "glass": "glass breaks",
}  # fmt: skip
EVENTS = tuple(SOUNDS)
BACKGROUNDS = ("rain", "wind", "engine")
