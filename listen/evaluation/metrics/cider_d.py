"""CIDEr-D of captions, exact and without Java."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from nltk.tokenize import TreebankWordTokenizer

from .row_metric import RowMetric, reference_lists

_ORDERS = 4
_SIGMA = 6.0
_SCALE = 10.0

_Counts = list[Counter]  # one counter of n-grams for each n


class CiderD(RowMetric):
    """CIDEr-D (Vedantam et al., arXiv 1411.5726, section 4): tf-idf weighted n-gram agreement with the references.

    As in the COCO caption evaluation: n = 1..4, idf from the references of the examples scored, clipped counts, a
    Gaussian penalty of sigma 6 on the difference in length (which that code counts in bigrams), times 10. Texts are
    lower-cased, split by NLTK's Penn Treebank tokeniser and freed of punctuation. COCO runs Stanford's tokeniser in
    Java; the two agree on plain captions. The well-kept libraries that offer this score bring Java archives or
    large models with them, hence our own.

    Returns `cider`, the mean over the examples, at most 10 (papers often print 100 times it); `nan` for a single
    example, where every idf is 0. Its bootstrap keeps the idf of the full set.
    """

    names = ("cider",)

    def row_statistics(self, predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> np.ndarray:
        """`(examples, 1)`: CIDEr-D of each example; `nan` if there is only one."""
        reference_counts = [[_ngrams(option) for option in options] for options in reference_lists(references)]
        idf = _InverseDocumentFrequency(reference_counts)
        rows = [
            _SCALE * np.mean([_similarity(_ngrams(text), counts, idf) for counts in options])
            for text, options in zip(predictions, reference_counts, strict=True)
        ]
        return np.array(rows if len(rows) > 1 else [math.nan], dtype=np.float64)[:, None]

    def aggregate(self, rows: np.ndarray) -> dict[str, float]:
        """`{"cider"}` of a set of examples."""
        return {"cider": float(rows.mean())}


class _InverseDocumentFrequency:
    """log(examples / examples whose references hold the n-gram); an unseen n-gram counts as seen once."""

    def __init__(self, references: Sequence[Sequence[_Counts]]) -> None:
        self._log_examples = math.log(len(references))
        self._documents: Counter = Counter()
        for options in references:
            self._documents.update({ngram for counts in options for order in counts for ngram in order})

    def weigh(self, counts: Counter) -> dict[tuple[str, ...], float]:
        """tf-idf of each n-gram; the length of the text cancels in the cosine."""
        return {g: n * (self._log_examples - math.log(max(1, self._documents[g]))) for g, n in counts.items()}


def _ngrams(text: str) -> _Counts:
    tokens = TreebankWordTokenizer().tokenize(text.lower())
    words = [token for token in tokens if not set(token) <= set(string.punctuation)]
    return [Counter(zip(*(words[i:] for i in range(order)), strict=False)) for order in range(1, _ORDERS + 1)]


def _similarity(candidate: _Counts, reference: _Counts, idf: _InverseDocumentFrequency) -> float:
    penalty = math.exp(-((candidate[1].total() - reference[1].total()) ** 2) / (2 * _SIGMA**2))
    orders = zip(candidate, reference, strict=True)
    return penalty * sum(_clipped_cosine(idf.weigh(c), idf.weigh(r)) for c, r in orders) / _ORDERS


def _clipped_cosine(candidate: dict, reference: dict) -> float:
    overlap = sum(min(weight, reference.get(g, 0.0)) * reference.get(g, 0.0) for g, weight in candidate.items())
    norms = math.hypot(*candidate.values()) * math.hypot(*reference.values())
    return overlap / norms if norms else 0.0
