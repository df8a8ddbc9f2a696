"""The speaker bank: every voice is a combination of four audible attributes with small individual differences.

Attributes: accent (espeak accent), timbre (espeak variant), size (vocal-tract length, by resampling) and register
(pitch). Held-out speakers are combinations that no training speaker has.
"""

import itertools
from dataclasses import dataclass

import numpy as np

ACCENTS = {"american": "en-us", "english": "en-gb-x-rp", "scottish": "en-gb-scotland", "caribbean": "en-029"}
TIMBRES = {"plain": "m3", "bright": "f3", "dark": "m7", "buzzing": "klatt4"}
SIZES = {"large": 0.87, "medium": 1.0, "small": 1.15}
REGISTERS = {"low": 12, "middle": 45, "high": 78}

SPLIT_SIZES = {"train": 96, "dev": 20, "test": 28}


@dataclass(frozen=True)
class Speaker:
    """One voice. `warp` scales formants and pitch, `pitch` is espeak's 0-99, `rate` is words per minute."""

    name: str
    accent: str
    timbre: str
    size: str
    register: str
    warp: float
    pitch: int
    rate: float

    @property
    def attributes(self) -> tuple[str, str, str, str]:
        """The four words that describe this voice: register, timbre, size, accent."""
        return self.register, self.timbre, self.size, self.accent

    @property
    def description(self) -> str:
        """The voice in words, such as ``"a low dark large scottish voice"``."""
        return f"a {' '.join(self.attributes)} voice"


def make_speakers(split: str, variants: int = 1, seed: int = 0) -> list[Speaker]:
    """Return the speakers of `split`: the same combinations for every seed, disjoint between splits.

    Args:
        split: "train", "dev" or "test".
        variants: how many speakers to draw for each combination of attributes.
        seed: seed of the individual differences in pitch, rate and size.

    Raises:
        ValueError: unknown `split`.
    """
    if split not in SPLIT_SIZES:
        raise ValueError(f"Unknown split {split!r}: choose one of {sorted(SPLIT_SIZES)}.")
    rng = np.random.default_rng([seed, *split.encode()])
    return [
        _draw_speaker(f"{split}-{number:03d}-{variant}", combination, rng)
        for number, combination in enumerate(_combinations(split))
        for variant in range(variants)
    ]


def _combinations(split: str) -> list[tuple[str, str, str, str]]:
    everything = list(itertools.product(ACCENTS, TIMBRES, SIZES, REGISTERS))
    order = np.random.default_rng(18517).permutation(len(everything))  # fixed: splits never change
    first = 0
    for name, size in SPLIT_SIZES.items():
        if name == split:
            return [everything[index] for index in order[first : first + size]]
        first += size
    return []


def _draw_speaker(name: str, combination: tuple[str, str, str, str], rng: np.random.Generator) -> Speaker:
    accent, timbre, size, register = combination
    return Speaker(
        name=name,
        accent=accent,
        timbre=timbre,
        size=size,
        register=register,
        warp=SIZES[size] * float(rng.uniform(0.98, 1.02)),
        pitch=REGISTERS[register] + int(rng.integers(-6, 7)),
        rate=float(rng.uniform(140.0, 165.0)),
    )
