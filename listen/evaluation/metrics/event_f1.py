"""F1 of the sound events that captions name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from .label_parser import plain_words
from .row_metric import RowMetric


class EventF1(RowMetric):
    """How well captions name the events that a recording holds, whatever their wording.

    References are the lists of events of the examples (an empty list: no event). An event counts as named when one
    of its `phrases` stands in the caption as whole words; an event without phrases goes by its own name. The
    vocabulary is every event of the references and of `phrases`; what a caption says beyond it is not seen.

    Returns `event_f1`, the micro F1 over all examples and events, and `event_f1_macro`, the mean over events that
    occur or are named; `nan` where no event occurs and none is named.
    """

    names = ("event_f1",)

    def row_statistics(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        phrases: Mapping[str, Sequence[str]] | None = None,
    ) -> np.ndarray:
        """`(examples, 2 * events)`: 1 for each event that occurs, then 1 for each event that is named.

        Raises:
            ValueError: the references name no event at all, or an event's phrase has no word.
        """
        events = sorted({event for row in references for event in row} | set(phrases or {}))
        if not events:
            raise ValueError("no example has an event; give lists of event names as references, or `phrases`")
        patterns = [_pattern(event, (phrases or {}).get(event, (event,))) for event in events]
        named = [[bool(pattern.search(plain_words(text))) for pattern in patterns] for text in predictions]
        occurring = [[event in row for event in events] for row in references]
        return np.concatenate([occurring, named], axis=1).astype(np.float64)

    def aggregate(self, rows: np.ndarray) -> dict[str, float]:
        """`{"event_f1", "event_f1_macro"}` of a set of examples."""
        occurring, named = np.split(rows, 2, axis=1)  # (examples, events) each
        # sums over the examples: `f1_score` of scikit-learn takes 10 ms, for each of 1000 resamples
        hits, mentions = (occurring * named).sum(0), (occurring + named).sum(0)  # (events,)
        if not mentions.any():
            return {"event_f1": float("nan"), "event_f1_macro": float("nan")}
        # labels that neither occur nor are named have no F1 and stay out of the mean
        scores = 2 * hits[mentions > 0] / mentions[mentions > 0]
        return {"event_f1": float(2 * hits.sum() / mentions.sum()), "event_f1_macro": float(scores.mean())}


def _pattern(event: str, phrases: Sequence[str]) -> re.Pattern[str]:
    words = [plain_words(phrase) for phrase in phrases]
    if not words or not all(words):
        raise ValueError(f"event {event!r} has no phrase with a word in it: {list(phrases)}; add one")
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)")
