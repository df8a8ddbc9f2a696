"""Recordings of a data row: the clips that make each one, and their lengths."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import soundfile

from ..audio_listen import read_clips
from ..sources_listen import MAX_SAMPLES, RATES

AUDIO_SUFFIXES = frozenset(
    {".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".mp4", ".webm", ".aiff", ".aif", ".au", ".caf"}
)


def audio_files(folder: Path, pattern: str) -> list[Path]:
    """The audio files below a folder that fit a glob pattern, in order; hidden ones are left out."""
    files = (file for file in folder.glob(pattern) if not file.name.startswith("."))
    return sorted(file for file in files if file.suffix.lower() in AUDIO_SUFFIXES)


def recordings_of(row: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """Clips of each recording of a row: all clips in one where they are joined, else one clip each."""
    clips = list(row["audio"])
    return [clips] if row.get("join") else [[clip] for clip in clips]


def clip_seconds(clip: Mapping[str, Any]) -> float | None:
    """Length of a clip from its header; `None` where it is not plausible or cannot be read, as for URLs and mp4."""
    source = clip["path"] if clip.get("bytes") is None else BytesIO(clip["bytes"])
    try:
        info = soundfile.info(source)
    except (soundfile.LibsndfileError, OSError, TypeError):  # TypeError: a file without a header, named .raw
        return None
    return info.duration if info.frames <= MAX_SAMPLES and info.samplerate >= RATES[0] else None


def row_seconds(row: Mapping[str, Any]) -> float | None:
    """Length of all clips of a row together; `None` where one is unknown."""
    lengths = [clip_seconds(clip) for clip in row["audio"]]
    return None if None in lengths else sum(lengths)


__all__ = ["AUDIO_SUFFIXES", "audio_files", "clip_seconds", "read_clips", "recordings_of", "row_seconds"]
