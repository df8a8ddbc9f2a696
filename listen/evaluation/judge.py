"""An LLM as judge of spoken dialogue: two scores from 1 to 10, for the answer and for how it suits the emotion.

The rubrics below are the whole prompt of a judge. It reads the transcript and does not get the recording. Each score is
a request of its own, and the order of the requests is random with a fixed seed, so that neither the position of an
answer nor its other score influences the judge. A verdict without exactly one score is counted and left out; scores are
never guessed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..data.chat_models import ChatModel
from ..data.files import hold_folder, json_text
from .confidence import bootstrap_intervals

logger = logging.getLogger(__name__)

RUBRICS = {
    "quality": """\
You judge one turn of a spoken conversation. Somebody said:

"{transcript}"

and was answered:

"{response}"

Judge the answer alone: does it take up what was said, does it make sense as a reply, is it helpful or at least good \
company, and is it well put? Do not judge how it treats feelings, nor its length as such. Use the whole scale:

1-2: no reply at all, gibberish, or beside the point
3-4: touches the subject, but does not answer what was said or contradicts it
5-6: a fitting reply that is vague, generic or clumsy
7-8: a good reply: to the point, sensible and clear
9-10: could hardly be better: as attentive and useful as from a thoughtful person

Give one sentence of reasons. Then write, on a last line of its own, the score as a whole number: Score: N""",
    "emotion": """\
You judge one turn of a spoken conversation. Somebody said, in a voice that sounded {emotion}:

"{transcript}"

and was answered:

"{response}"

Judge only whether the answer suits that voice: would it fit somebody who sounds {emotion}, in tone and in content, \
even where the words by themselves tell of another feeling or of none? Do not judge knowledge or style. Use the whole \
scale:

1-2: goes against the feeling, as good cheer to somebody in grief
3-4: overlooks the feeling: the same answer would go to anybody
5-6: hints at the feeling, or takes it for a similar one
7-8: clearly answers the feeling, in tone or in words
9-10: could hardly suit the feeling better, and overdoes nothing

Give one sentence of reasons. Then write, on a last line of its own, the score as a whole number: Score: N""",
}
"""Prompt of the judge for each of the two scores."""

LOWEST, HIGHEST = 1, 10
VERDICTS_FILE = "verdicts.jsonl"
_MAX_ERRORS = 20  # different ones in the results
_SCORE = re.compile(  # spaces at both ends stay within the line, so that long blanks are not read again and again
    r"^[ \t*_#>]*(?:final )?score[\s*_]*[:=][\s*_]*(-?\d+(?:[.,]\d+)?)(?:[ \t]*/[ \t]*10)?[ \t\r*_.]*$",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class JudgeItem:
    """An answer to be judged.

    Attributes:
        transcript: what was said.
        emotion: how it was said.
        response: what was answered.
    """

    transcript: str
    emotion: str
    response: str


@dataclass
class Judgement:
    """Scores of a set of answers.

    Attributes:
        scores: `(items, 2)` quality and emotion, 1 to 10; `nan` where there is no score.
        values: mean `quality` and `emotion` of the answers that have a score; `nan` where none has.
        intervals: their 95 % bootstrap intervals.
        unparsable: verdicts without a score, of each of the two.
        failed: requests that got no verdict, of each of the two.
        errors: the most common reasons why requests failed, and how often.
        verdicts: `{"quality", "emotion"}` of each item: text of the judge; `None` where the request failed.
        settings: the judge and its settings.
    """

    scores: np.ndarray
    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    unparsable: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    verdicts: list[dict[str, str | None]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


class _Means:
    """Means of the columns of `scores`, without missing values."""

    def aggregate(self, rows: np.ndarray) -> dict[str, float]:
        """Mean of each column by its name; `nan` for a column without any score."""
        columns = [column[~np.isnan(column)] for column in rows.T]
        means = [float(column.mean()) if len(column) else float("nan") for column in columns]
        return dict(zip(RUBRICS, means, strict=True))


def parse_score(verdict: str) -> int | None:
    """The score that a verdict names, or `None`.

    A verdict must be a whole number from 1 to 10, or hold exactly one line `Score: N`, also `Score: N/10` or in bold.
    Text before `</think>` is ignored. Anything else, such as 7.5, 11, or two lines that differ, has no
    score.
    """
    text = verdict.rpartition("</think>")[2].strip()
    found = {text} if re.fullmatch(r"-?\d+", text) else set(_SCORE.findall(text))
    if len(found) != 1:
        return None
    (number,) = found
    if not number.isdecimal() or len(number) > len(str(HIGHEST)):  # longer ones may be too long for int()
        return None
    return int(number) if LOWEST <= int(number) <= HIGHEST else None


def judge_responses(
    judge: ChatModel,
    items: Sequence[JudgeItem],
    seed: int = 0,
    batch_size: int = 16,
    num_resamples: int = 1000,
    progress: bool = True,
    folder: str | os.PathLike[str] | None = None,
) -> Judgement:
    """Score answers by an LLM.

    Args:
        judge: a `LocalChatModel` or an `EndpointChatModel`, preferably with greedy decoding.
        items: answers to judge.
        seed: seed of the order of the requests.
        batch_size: requests of a batch.
        num_resamples: bootstrap resamples behind the intervals; 0 for none.
        progress: whether to show a progress bar.
        folder: where `verdicts.jsonl` stores each verdict as it comes. Another call with the same judge, items and seed
            goes on there; requests that failed are repeated.

    Raises:
        ValueError: nothing to judge, or `batch_size` below 1.
        FolderInUseError: another process judges into that folder.
    """
    if not items or batch_size < 1:
        raise ValueError(
            f"{len(items)} items to judge in batches of batch_size={batch_size}; give at least one of each"
        )
    requests = [(place, name) for place in range(len(items)) for name in RUBRICS]
    order = np.random.default_rng(seed).permutation(len(requests))
    settings = {"judge": judge.describe(), "seed": seed, "rubrics": RUBRICS}
    verdicts: list[dict[str, str | None]] = [{} for _ in items]
    errors: Counter[str] = Counter()
    held = nullcontext() if folder is None else hold_folder(folder, "judging")
    with held, tqdm(total=len(requests), desc="judging", disable=not progress) as bar:
        store = _VerdictFile(folder, settings)
        for start in range(0, len(order), batch_size):
            some = [requests[i] for i in order[start : start + batch_size]]
            asked = []
            for place, name in some:
                prompt = _conversation(items[place], name)
                verdicts[place][name] = known = store.find(place, name, prompt)
                if known is None:
                    asked.append((place, name, prompt))
            answers = judge.answer([prompt for *_, prompt in asked], seed=seed + start) if asked else []
            for (place, name, prompt), answer in zip(asked, answers, strict=True):
                verdicts[place][name] = answer.text
                store.add(place, name, prompt, answer.text)
            errors.update(answer.error for answer in answers if answer.text is None)
            bar.update(len(some))
    common = dict(errors.most_common(_MAX_ERRORS))
    if errors:
        logger.warning("%d of %d requests to the judge failed: %s", errors.total(), len(requests), common)
    judgement = _summarise(verdicts, settings, num_resamples)
    judgement.errors = common
    return judgement


class _VerdictFile:
    """Verdicts in the order in which they come, so that none is lost and none is asked for twice."""

    def __init__(self, folder: str | os.PathLike[str] | None, settings: dict[str, Any]) -> None:
        self._path = None if folder is None else Path(folder) / VERDICTS_FILE
        self._settings = json_text(settings)
        self._known: dict[str, str] = {}
        if self._path is None or not self._path.is_file():
            return
        text = self._path.read_text(encoding="utf-8", errors="replace")
        if text and not text.endswith("\n"):  # a line that was cut off must not absorb the next one
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n")
        for line in text.split("\n"):
            with suppress(ValueError, KeyError, TypeError):  # cut off by an interruption
                record = json.loads(line)
                self._known[record["key"]] = record["verdict"]

    def find(self, place: int, name: str, prompt: list[dict[str, str]]) -> str | None:
        """The stored verdict on one score of an item."""
        return self._known.get(self._key(place, name, prompt))

    def add(self, place: int, name: str, prompt: list[dict[str, str]], verdict: str | None) -> None:
        """Store a verdict; a failed request has none and is repeated."""
        if self._path is None or verdict is None:
            return
        record = {"key": self._key(place, name, prompt), "item": place, "score": name, "verdict": verdict}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json_text(record) + "\n")

    def _key(self, place: int, name: str, prompt: list[dict[str, str]]) -> str:
        text = json_text([self._settings, place, name, prompt])
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:24]


def scored(scores: np.ndarray, settings: dict[str, Any], num_resamples: int = 1000) -> Judgement:
    """A judgement from scores `(items, 2)` of quality and emotion that are given."""
    judgement = Judgement(scores, values=_Means().aggregate(scores), settings=settings)
    if num_resamples:
        judgement.intervals = bootstrap_intervals(_Means(), scores, num_resamples)
    return judgement


def judge_by_rules(items: Sequence[JudgeItem], num_resamples: int = 1000) -> Judgement:
    """Score answers to the built-in corpus by the rules that its targets follow, exactly and without an LLM.

    Raises:
        ValueError: a transcript that is not a sentence of the corpus.
    """
    from ..data.corpus.responses import rate_response

    rated = [rate_response(item.response, item.transcript, item.emotion) for item in items]
    return scored(np.array(rated, dtype=np.float64), {"judge": "rules of the built-in corpus"}, num_resamples)


def _conversation(item: JudgeItem, name: str) -> list[dict[str, str]]:
    fields = {"transcript": item.transcript, "emotion": item.emotion, "response": item.response}
    # one pass over the rubric, so that braces in the transcript are not replaced
    text = re.sub(r"\{(transcript|emotion|response)\}", lambda match: fields[match[1]], RUBRICS[name])
    return [{"role": "user", "content": text}]


def _summarise(verdicts: list[dict[str, str | None]], settings: dict[str, Any], num_resamples: int) -> Judgement:
    parsed = [[None if row[name] is None else parse_score(row[name]) for name in RUBRICS] for row in verdicts]
    scores = np.array([[np.nan if score is None else score for score in row] for row in parsed], dtype=np.float64)
    judgement = scored(scores, settings, num_resamples)
    judgement.verdicts = verdicts
    judgement.failed = {name: sum(row[name] is None for row in verdicts) for name in RUBRICS}
    missing = dict(zip(RUBRICS, np.isnan(scores).sum(axis=0).tolist(), strict=True))
    judgement.unparsable = {name: missing[name] - judgement.failed[name] for name in RUBRICS}
    return judgement
