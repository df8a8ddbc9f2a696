"""espeak-ng through ctypes: from text to samples and word times.

The library comes from the PyPI package ``espeakng-loader`` (extra ``corpus``). espeak-ng is licensed GPL-3.0-or-later:
it is an optional run-time dependency, none of it is part of this package.
"""

import ctypes
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..extras import DISTRIBUTION

ESPEAK_SAMPLING_RATE = 22050

_SYNCHRONOUS_OUTPUT = 2
_TEXT_IS_UTF8 = 1
_EVENT_LIST_END, _EVENT_WORD = 0, 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4


class _Event(ctypes.Structure):
    """``espeak_EVENT`` of ``speak_lib.h``."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclass(frozen=True)
class EspeakVoice:
    """Parameters of espeak: a `name` like ``"en-us+f3"``, `pitch` and `pitch_range` 0-99, `rate` in words/minute."""

    name: str
    pitch: int
    pitch_range: int
    rate: int


@dataclass(frozen=True)
class Synthesis:
    """Samples (float32, 22 050 Hz, -1..1) and the start time of every word of the text, in seconds."""

    samples: np.ndarray
    word_starts: list[float]


def find_espeak_library() -> tuple[Path, str]:
    """Return the path of the shared library and its data path.

    Raises:
        ImportError: `espeakng-loader` is not installed.
    """
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError(
            "The built-in corpus is synthesised by espeak-ng (GPL-3.0-or-later), which is not installed. "
            "Install it with `pip install espeakng-loader==0.2.4`, or all that the demo needs with "
            f"`pip install '{DISTRIBUTION}[corpus]'`."
        ) from error
    return Path(espeakng_loader.get_library_path()), espeakng_loader.get_data_path()


class EspeakSynthesizer:
    """espeak-ng in a known initial state: the same calls in the same order give the same samples.

    espeak keeps its state (phases, flutter, random numbers) in static variables that initialisation does not reset, so
    every instance loads its own copy of the library.

    Args:
        seed: seed of espeak's random numbers; at least 1, as 0 would mean the time of day.

    Raises:
        ImportError: `espeakng-loader` is not installed.
        RuntimeError: espeak-ng can't start, doesn't know a voice, or fails to speak.
        ValueError: `seed` is below 1.
    """

    def __init__(self, seed: int = 1) -> None:
        if seed < 1:
            raise ValueError(f"seed must be at least 1, got {seed}.")
        path, data_path = find_espeak_library()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            self._library = ctypes.CDLL(shutil.copy(path, Path(folder) / path.name))
        rate = self._library.espeak_Initialize(_SYNCHRONOUS_OUTPUT, 0, data_path.encode(), 0)
        if rate != ESPEAK_SAMPLING_RATE:
            raise RuntimeError(f"espeak_Initialize returned {rate}, expected the sampling rate {ESPEAK_SAMPLING_RATE}.")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        self._chunks: list[np.ndarray] = []
        self._word_events: list[tuple[int, int]] = []
        self._callback = _Callback(self._receive)  # kept: ctypes does not hold a reference
        self._library.espeak_SetSynthCallback(self._callback)
        self._voice_name: str | None = None

    def speak(self, text: str, voice: EspeakVoice) -> Synthesis:
        """Speak `text` (words separated by single spaces) and return its samples and word starts."""
        self._set_voice(voice)
        self._chunks, self._word_events = [], []
        encoded = text.encode()
        status = self._library.espeak_Synth(
            encoded, ctypes.c_size_t(len(encoded) + 1), 0, 1, 0, _TEXT_IS_UTF8, None, None
        )
        if status != 0 or not self._chunks:
            raise RuntimeError(f"espeak_Synth failed with status {status} on the text {text!r}.")
        samples = np.concatenate(self._chunks).astype(np.float32) / 32768.0
        return Synthesis(samples, _word_starts(text, self._word_events, len(samples) / ESPEAK_SAMPLING_RATE))

    def _set_voice(self, voice: EspeakVoice) -> None:
        if voice.name != self._voice_name:
            if self._library.espeak_SetVoiceByName(voice.name.encode()) != 0:
                raise RuntimeError(f"espeak-ng has no voice {voice.name!r}.")
            self._voice_name = voice.name
        settings = {_RATE: voice.rate, _VOLUME: 90, _PITCH: voice.pitch, _RANGE: voice.pitch_range}
        for parameter, value in settings.items():
            self._library.espeak_SetParameter(parameter, int(value), 0)

    def _receive(self, wav: "ctypes._Pointer", num_samples: int, events: "ctypes._Pointer") -> int:
        if wav and num_samples > 0:
            self._chunks.append(np.ctypeslib.as_array(wav, (num_samples,)).copy())
        index = 0
        while events[index].type != _EVENT_LIST_END:
            if events[index].type == _EVENT_WORD:
                self._word_events.append((events[index].text_position - 1, events[index].audio_position))
            index += 1
        return 0  # 0: continue


def _word_starts(text: str, events: list[tuple[int, int]], duration: float) -> list[float]:
    """Give every word a start time. espeak reports runs such as "in the" as one word: spread those by letters."""
    offsets = [match.start() for match in re.finditer(r"\S+", text)]
    known = {0: 0.0, len(text) + 1: duration}
    for position, milliseconds in events:
        if position in offsets:
            known[position] = milliseconds / 1000.0
    positions = sorted(known)
    return np.interp(offsets, positions, [known[position] for position in positions]).tolist()
