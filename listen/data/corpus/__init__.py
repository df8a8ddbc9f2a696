"""The built-in corpus: synthetic speech and sounds for all six tasks, generated locally and reproducible by seed.

Speech comes from espeak-ng (extra ``corpus``), sounds from signal processing. It shows that
everything works on any machine; it does not measure how a model handles real recordings.
"""

from .build import CorpusSizes, SplitSizes, build_corpus

__all__ = ["CorpusSizes", "SplitSizes", "build_corpus"]
