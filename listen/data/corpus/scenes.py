"""Sound scenes: one to three events in sequence, sometimes over a background, with a caption."""

from dataclasses import dataclass

import numpy as np

from .sounds import BACKGROUNDS, EVENTS, PHRASES, SAMPLING_RATE, SOUNDS
from .speech import add_noise

BACKGROUND_SHARE = 0.25


@dataclass(frozen=True)
class Scene:
    """Samples (num_samples,) float32 at 16 kHz; `spans` are (event, start, end) in seconds, background last."""

    samples: np.ndarray
    spans: list[tuple[str, float, float]]
    caption: str

    @property
    def events(self) -> list[str]:
        """The events' names in the order in which the caption names them."""
        return [event for event, _, _ in self.spans]


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene of different events."""
    background = str(rng.choice(BACKGROUNDS)) if rng.random() < BACKGROUND_SHARE else None
    choices = [event for event in EVENTS if event != background]
    count = int(rng.integers(1, 3 if background else 4))
    foreground = [str(event) for event in rng.choice(choices, size=count, replace=False)]
    track, spans = _in_a_row(foreground, rng)
    if background is not None:
        track = track + _level(_stretch(background, len(track), rng), rng) * 0.35
        spans.append((background, 0.0, len(track) / SAMPLING_RATE))
    return Scene(add_noise(track, rng), spans, write_caption(foreground, background))


def write_caption(foreground: list[str], background: str | None) -> str:
    """Return e.g. ``"a dog barks and then a bell rings while rain falls"``."""
    caption = " and then ".join(PHRASES[event] for event in foreground)
    return caption if background is None else f"{caption} while {PHRASES[background]}"


def _in_a_row(events: list[str], rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[str, float, float]]]:
    pieces, spans, position = [], [], 0
    for event in events:
        gap = np.zeros(int(rng.uniform(0.05, 0.3) * SAMPLING_RATE))
        sound = _level(SOUNDS[event](rng), rng)
        start = position + len(gap)
        position = start + len(sound)
        spans.append((event, start / SAMPLING_RATE, position / SAMPLING_RATE))
        pieces += [gap, sound]
    return np.concatenate([*pieces, np.zeros(int(rng.uniform(0.05, 0.2) * SAMPLING_RATE))]), spans


def _level(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return samples / (np.abs(samples).max() + 1e-9) * rng.uniform(0.6, 1.0)


def _stretch(event: str, length: int, rng: np.random.Generator) -> np.ndarray:
    """Enough of a continuous sound for `length` samples."""
    pieces = [SOUNDS[event](rng)]
    while sum(map(len, pieces)) < length:
        pieces.append(SOUNDS[event](rng))
    return np.concatenate(pieces)[:length]
