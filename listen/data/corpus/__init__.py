"""The built-in corpus: synthetic speech and sounds for all six tasks, made on the spot, the same for every seed.

Speech comes from espeak-ng (extra ``corpus``), sounds from signal processing. It exists to show that everything works
on any machine; it does not measure how well a model understands people.
"""

from .build import CorpusSizes, SplitSizes, build_corpus

__all__ = ["CorpusSizes", "SplitSizes", "build_corpus"]
