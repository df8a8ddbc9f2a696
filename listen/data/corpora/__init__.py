"""Readers of published corpora in their own layouts: `format: librispeech` and the other names of `CORPORA`.

Each reader yields rows of the manifest schema one by one and states licence, splits, text normalisation and the number
of rows that it must find. Nothing is downloaded: the corpora are got from their homepages.
"""

from __future__ import annotations

from .base import Corpus
from .digits import FSDD_QUESTIONS
from .emotion import EXPRESSO, IEMOCAP, RAVDESS
from .pairs import COVOST2, LIBRISQA, VOXCELEB1
from .sounds import AUDIOCAPS, CLOTHO, ESC50
from .speech import FSDD, LIBRISPEECH, SPEECHOCEAN762

_ALL = (
    *(LIBRISPEECH, COVOST2, IEMOCAP, VOXCELEB1, LIBRISQA, CLOTHO),  # those of the LiSTEN paper
    *(AUDIOCAPS, EXPRESSO, RAVDESS, ESC50, FSDD, FSDD_QUESTIONS, SPEECHOCEAN762),
)
CORPORA: dict[str, Corpus] = {corpus.name: corpus for corpus in _ALL}
"""Format -> corpus."""

__all__ = ["CORPORA", "Corpus"]
