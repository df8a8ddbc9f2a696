"""BLEU and chrF of translation (sacrebleu), tokenised for Chinese by default."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from .row_metric import RowMetric, reference_lists


class _RowScores:
    """Opens a sacrebleu metric between its per-segment counts and its score, the seam its own bootstrap uses."""

    def rows(self, predictions: Sequence[str], references: list[list[str | None]]) -> np.ndarray:
        """Counts of each segment, `(examples, statistics)`."""
        return np.array(self._extract_corpus_statistics(predictions, references), dtype=np.int64)

    def score(self, rows: np.ndarray) -> float:
        """Corpus score, 0 to 100, of the summed counts."""
        return float(self._compute_score_from_stats(rows.sum(axis=0).tolist()).score)


class _RowBLEU(_RowScores, BLEU):
    pass


class _RowCHRF(_RowScores, CHRF):
    pass


class Translation(RowMetric):
    """Corpus BLEU (Papineni et al. 2002) and chrF2 (Popovic 2015), both from 0 to 100, as sacrebleu computes them.

    `tokenize` is sacrebleu's tokeniser for BLEU: `"zh"` splits Chinese characters and leaves other words whole,
    `"char"` splits everything into characters, `"13a"` suits European languages. chrF needs none. Any number of
    references an example.
    """

    names = ("bleu", "chrf")

    def row_statistics(
        self, predictions: Sequence[str], references: Sequence[str | Sequence[str]], tokenize: str = "zh"
    ) -> np.ndarray:
        """`(examples, 28)`: sacrebleu's 10 counts for BLEU, then its 18 for chrF.

        Raises:
            ValueError: an unknown tokeniser, an example without reference, or an empty reference.
        """
        if tokenize not in BLEU.TOKENIZERS:
            raise ValueError(f"tokenize={tokenize!r} is unknown; choose one of {', '.join(sorted(BLEU.TOKENIZERS))}")
        lists = reference_lists(references)
        for index, options in enumerate(lists):
            if not all(option.strip() for option in options):
                raise ValueError(f"example {index} has an empty reference translation; give its text")
        streams = [list(stream) for stream in zip_longest(*lists)]  # sacrebleu: one list a reference number
        counts = [scorer.rows(list(predictions), streams) for scorer in (_RowBLEU(tokenize=tokenize), _RowCHRF())]
        return np.concatenate(counts, axis=1).astype(np.float64)

    def aggregate(self, rows: np.ndarray) -> dict[str, float]:
        """`{"bleu", "chrf"}` of a set of examples."""
        counts = rows.astype(np.int64)
        split = 2 + 2 * _RowBLEU().max_ngram_order
        return {"bleu": _RowBLEU().score(counts[:, :split]), "chrf": _RowCHRF().score(counts[:, split:])}
