"""From a clip of a row to samples: decoding, resampling and joining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import fsspec
import numpy as np
import soundfile

from ..audio_listen import load_waveform


def read_clip(clip: Mapping[str, Any], sampling_rate: int) -> np.ndarray:
    """Decode one clip to mono at the wanted rate.

    Args:
        clip: `{"path", "bytes"}`; bytes win. Paths may be local, `http(s)://` or any URL that fsspec opens.
        sampling_rate: rate of the result in Hz.

    Returns:
        Samples `(num_samples,)`, float32 in [-1, 1].

    Raises:
        ValueError: the clip has neither path nor bytes, or no decoder reads it.
    """
    data, path = clip.get("bytes"), clip.get("path")
    if data is None and not path:
        raise ValueError(f"a clip needs 'path' or 'bytes', found {dict(clip)}")
    if data is None and ("::" in path or ("://" in path and not path.startswith(("http://", "https://")))):
        with fsspec.open(path, "rb") as file:
            data = file.read()
    return load_waveform(path if data is None else data, target_rate=sampling_rate)


def read_clips(
    clips: Sequence[Mapping[str, Any]], sampling_rate: int, join: bool = False, silence_seconds: float = 0.0
) -> list[np.ndarray]:
    """Decode the clips of a row, as several recordings or as one.

    Args:
        clips: see `read_clip`.
        sampling_rate: rate of the result in Hz.
        join: whether the clips follow each other in one recording.
        silence_seconds: silence between joined clips; SALMONN puts 0.1 s there.

    Returns:
        One array `(num_samples,)` a clip, or a single one when joined.
    """
    waves = [read_clip(clip, sampling_rate) for clip in clips]
    if not join or len(waves) < 2:
        return waves
    gap = np.zeros(round(silence_seconds * sampling_rate), dtype=np.float32)
    parts = [part for wave in waves for part in (gap, wave)][1:]
    return [np.concatenate(parts)]


def clip_seconds(clip: Mapping[str, Any]) -> float | None:
    """Length of a clip read from its header; `None` where the header is out of reach, as for URLs and mp4."""
    source = clip["path"] if clip.get("bytes") is None else BytesIO(clip["bytes"])
    try:
        return soundfile.info(source).duration
    except (soundfile.LibsndfileError, OSError):
        return None


def row_seconds(row: Mapping[str, Any]) -> float | None:
    """Length of all clips of a row; `None` where one is unknown."""
    lengths = [clip_seconds(clip) for clip in row["audio"]]
    return None if None in lengths else sum(lengths)
