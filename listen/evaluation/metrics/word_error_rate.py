"""Word and character error rate of speech recognition (jiwer) on Whisper-normalised English."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jiwer
import numpy as np
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from .row_metric import RowMetric, reference_lists


class WordErrorRate(RowMetric):
    """WER and CER: edits over reference length, summed over the corpus.

    Texts are normalised first, `normalizer="english"` being Whisper's (arXiv 2212.04356, appendix C; transformers'
    `EnglishTextNormalizer`): lower case, no punctuation, contractions spelt out, numbers in figures. It joins digits
    read one by one ("two nine six" is the single word "296"). Its table of British spellings belongs to Whisper's
    checkpoints: pass it as `spelling_mapping`, or spellings that differ count as errors. `"basic"` only lower-cases
    and drops symbols; `"none"` leaves the texts as they are. With several references the nearest one counts. CER
    counts characters of the normalised texts, spaces included.

    Returns `wer` and `cer` as fractions; `nan` where every reference is empty.
    """

    names = ("wer", "cer")

    def row_statistics(
        self,
        predictions: Sequence[str],
        references: Sequence[str | Sequence[str]],
        normalizer: str = "english",
        spelling_mapping: Mapping[str, str] | None = None,
    ) -> np.ndarray:
        """`(examples, 4)`: word edits, reference words, character edits, reference characters.

        Raises:
            ValueError: an unknown `normalizer`, or an example without reference.
        """
        normalize = _normalizer(normalizer, spelling_mapping)
        rows = []
        for prediction, options in zip(predictions, reference_lists(references), strict=True):
            hypothesis = normalize(prediction)
            rows.append(min((_edits(normalize(option), hypothesis) for option in options), key=_word_error_rate))
        return np.array(rows, dtype=np.float64)

    def aggregate(self, rows: np.ndarray) -> dict[str, float]:
        """`{"wer", "cer"}` of a set of examples."""
        word_edits, words, character_edits, characters = rows.sum(axis=0)
        return {
            "wer": float(word_edits / words) if words else float("nan"),
            "cer": float(character_edits / characters) if characters else float("nan"),
        }


def _normalizer(name: str, spelling_mapping: Mapping[str, str] | None) -> Callable[[str], str]:
    choices: dict[str, Callable[[], Callable[[str], str]]] = {
        "english": lambda: EnglishTextNormalizer(dict(spelling_mapping or {})),
        "basic": BasicTextNormalizer,
        "none": lambda: str,
    }
    if name not in choices:
        raise ValueError(f"normalizer={name!r} is unknown; choose one of {', '.join(choices)}")
    normalize = choices[name]()
    return lambda text: normalize(text).strip()


def _edits(reference: str, hypothesis: str) -> tuple[int, int, int, int]:
    words = jiwer.process_words(reference, hypothesis)
    characters = jiwer.process_characters(reference, hypothesis)
    return (
        words.substitutions + words.deletions + words.insertions,
        words.substitutions + words.deletions + words.hits,
        characters.substitutions + characters.deletions + characters.insertions,
        characters.substitutions + characters.deletions + characters.hits,
    )


def _word_error_rate(row: tuple[int, int, int, int]) -> float:
    # an empty reference has no rate: order it by its insertions
    return row[0] / max(row[1], 1)
