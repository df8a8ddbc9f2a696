"""Recordings of a data set as short MP3 files inside data URIs, so that a report is one file that plays them.

MP3, as every browser of every phone plays it; 16 kHz mono at about 40 kbit/s.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterable
from io import BytesIO

import numpy as np
import soundfile
from datasets import Dataset

from ..audio_listen import cut_waveform
from ..data.audio import read_clips, recordings_of

logger = logging.getLogger(__name__)

MAX_CLIP_SECONDS = 20.0
MAX_CLIPS = 120  # of a report
MAX_CLIP_BYTES = 6_000_000  # of a report, as base64; mail servers refuse about 20 MB
_RATE = 16000
_COMPRESSION = 0.8  # of libsndfile's range from 0 to 1


def embed_clips(dataset: Dataset, places: Iterable[int], share: float = 1.0) -> dict[int, list[str]]:
    """Data URIs of the recordings of rows, in the order of `places` until a report's limit is reached.

    Args:
        dataset: rows of `listen.data.manifest`.
        places: numbers of the rows, the most important first.
        share: share of the limits `MAX_CLIPS` and `MAX_CLIP_BYTES` that these rows may take, 0 to 1.

    Returns:
        The URIs of each row that was reached, one for each of its recordings; none for a row that cannot be read,
        which the log names. A recording is cut to `MAX_CLIP_SECONDS`.
    """
    clips_left, bytes_left = share * MAX_CLIPS, share * MAX_CLIP_BYTES
    found: dict[int, list[str]] = {}
    for place in places:
        row = dataset[place]
        try:
            uris = [_uri(read_clips(clips, _RATE, True, 0.0, MAX_CLIP_SECONDS)[0]) for clips in recordings_of(row)]
        except (OSError, RuntimeError, TypeError, ValueError) as error:  # RuntimeError: libsndfile
            logger.warning("row %s has no player in the report: %s", row["id"], error)
            uris = []
        clips_left, bytes_left = clips_left - len(uris), bytes_left - sum(map(len, uris))
        if clips_left < 0 or bytes_left < 0:
            break
        found[place] = uris
    return found


def _uri(waveform: np.ndarray) -> str:
    """A waveform `(samples,)` as a data URI."""
    file = BytesIO()
    cut = cut_waveform(waveform, MAX_CLIP_SECONDS, _RATE)
    soundfile.write(file, cut, _RATE, format="MP3", bitrate_mode="CONSTANT", compression_level=_COMPRESSION)
    return "data:audio/mpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
