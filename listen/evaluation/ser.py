"""Emotion recognition by prompting with answers constrained to the classes, by the likelihood of every class."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset
from scipy.special import softmax
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, ProcessorMixin

from ..data.collator import ListenCollator
from ..data.manifest import FEATURES, extra_fields
from ..data.tasks import get_task
from .batches import BatchOptions, map_rows
from .confidence import bootstrap_intervals
from .metrics import Classification
from .metrics.label_parser import LabelParser, plain_words


@dataclass
class EmotionScores:
    """Emotion recognition of a set of recordings.

    Attributes:
        classes: the allowed answers.
        truths: class of each recording.
        log_likelihoods: `(recordings, classes)` natural logarithm of the probability of each answer.
        values: `accuracy` and `uar`, the mean over the classes that occur of their recall.
        intervals: 95 % bootstrap intervals of the two.
    """

    classes: list[str]
    truths: list[str]
    log_likelihoods: np.ndarray
    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def answers(self) -> list[str]:
        """The most likely class of each recording."""
        return [self.classes[place] for place in self.log_likelihoods.argmax(axis=1)]

    @property
    def probabilities(self) -> np.ndarray:
        """`(recordings, classes)` probability of each class among the classes."""
        return softmax(self.log_likelihoods, axis=1)


def recognise_emotions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: Dataset,
    classes: Sequence[str] | None = None,
    num_resamples: int = 1000,
    **options: Any,
) -> EmotionScores:
    """Ask a model for the emotion of every recording and score its constrained answers.

    Args:
        model: a LiSTEN model.
        processor: its processor.
        dataset: rows with an emotion, see `emotion_rows`.
        classes: see `emotion_rows`.
        num_resamples: bootstrap resamples behind the intervals; 0 for none.
        **options: further arguments of `score_answers`.

    Raises:
        ValueError: see `emotion_rows` and `score_answers`.
    """
    rows = emotion_rows(dataset, classes)
    names = extra_fields(rows[0])["options"]
    return _scored(rows, score_answers(model, processor, rows, names, **options), num_resamples)


def scores_of(rows: Dataset, answers: Sequence[str], num_resamples: int = 1000) -> EmotionScores:
    """Scores of given classes for rows of `emotion_rows`, such as those of the classifier of a cascade.

    Raises:
        ValueError: an answer that is none of the classes, or a number of answers other than that of the rows.
    """
    names = extra_fields(rows[0])["options"]
    places = [_place(answer, names) for answer in answers]
    if None in places or len(places) != len(rows):
        foreign = sorted({a for a, place in zip(answers, places, strict=True) if place is None})
        raise ValueError(f"got {len(places)} answers for {len(rows)} rows, {foreign} none of the classes {names}")
    certain = np.where(np.arange(len(names)) == np.array(places)[:, None], 0.0, -np.inf)  # (rows, classes)
    return _scored(rows, certain, num_resamples)


def _scored(rows: Dataset, log_likelihoods: np.ndarray, num_resamples: int) -> EmotionScores:
    names = extra_fields(rows[0])["options"]
    scores = EmotionScores(names, [response[0] for response in rows["response"]], log_likelihoods)
    metric = Classification()
    statistics = metric.row_statistics(scores.answers, scores.truths, labels=names)
    scores.values = {name: metric.aggregate(statistics)[name] for name in metric.names}
    if num_resamples:
        intervals = bootstrap_intervals(metric, statistics, num_resamples)
        scores.intervals = {name: ends for name, ends in intervals.items() if name in metric.names}
    return scores


def emotion_rows(dataset: Dataset, classes: Sequence[str] | None = None) -> Dataset:
    """Rows of the task `ser` for the recordings of a data set, each recording once.

    Args:
        dataset: rows of `listen.data.manifest`. The emotion is the response of the tasks `ser` and `er`, else the
            field `emotion`; rows without one are left out. If a recording is in several rows, that of `ser` is used.
        classes: the classes to choose from, which the instruction lists. By default the `options` of the rows if
            they have any, else the classes of the task.

    Raises:
        ValueError: no row has an emotion, rows have different `options`, an emotion is none of the classes, or two
            classes are the same.
    """
    emotions = [row_emotion(row) for row in dataset]
    tasks = dataset["task"]
    first: dict[tuple, int] = {}
    for place in sorted(range(len(dataset)), key=lambda place: tasks[place] != "ser"):  # its rows have options
        if emotions[place]:
            first.setdefault(_recording(dataset[place]["audio"]), place)
    kept = sorted(first.values())
    if not kept:
        raise ValueError("no row has an emotion: give rows of the task 'ser' or 'er', or a field 'emotion'")
    rows = dataset.select(kept)
    names = LabelParser(classes or _options(rows)).labels
    foreign = sorted({emotions[i] for i in kept if _place(emotions[i], names) is None})
    if foreign:
        raise ValueError(f"emotions {foreign} are none of the classes {names}; pass classes= that hold them")

    rows = [_ask(row, emotions[i], names) for i, row in zip(kept, rows, strict=True)]
    return Dataset.from_list(rows, features=FEATURES)


def _ask(row: dict[str, Any], emotion: str, classes: list[str]) -> dict[str, Any]:
    """The row as an example of the task `ser`."""
    extra = json.dumps({**extra_fields(row), "options": classes}, ensure_ascii=False)
    emotion = classes[_place(emotion, classes)]  # in the spelling of the classes
    return {**row, "task": "ser", "response": [emotion], "question": None, "instruction": None, "extra": extra}


def row_emotion(row: dict[str, Any]) -> str | None:
    """Emotion of a row, as `emotion_rows` finds it.

    Raises:
        ValueError: it is not text.
    """
    emotion = row["response"][0] if row["task"] in ("ser", "er") else extra_fields(row).get("emotion")
    if not isinstance(emotion, str | None):
        raise ValueError(f"row {row['id']!r}: emotion={emotion!r} must be the name of a class; write it as text")
    return emotion


def _recording(audio: Sequence[dict[str, Any]]) -> tuple:
    """Key that identifies a recording."""
    return tuple((clip["path"], clip["bytes"]) for clip in audio)


def _options(rows: Dataset) -> Sequence[str]:
    found = {tuple(extra_fields(row).get("options") or get_task("ser").labels) for row in rows}
    if len(found) > 1:
        raise ValueError(f"the rows have {len(found)} different lists of options; pass classes=")
    return found.pop()


def _place(emotion: str, classes: Sequence[str]) -> int | None:
    """Place of an emotion among the classes, whatever its case."""
    words = [plain_words(name) for name in classes]
    return words.index(plain_words(emotion)) if plain_words(emotion) in words else None


def score_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: Dataset,
    answers: Sequence[str],
    **options: Any,
) -> np.ndarray:
    """Log-likelihood of each answer for every row.

    An answer's log-likelihood is the sum over all its tokens, including the token that ends the turn: the logarithm of
    the probability that the model gives exactly this answer. So long names are not favoured, as they are by a mean over
    tokens, nor is a name that is the beginning of another one. The most likely answer is the one that decoding
    constrained to the answers finds with as many beams as answers. Answers are formatted as in training.

    Args:
        model: a LiSTEN model. Its mode is restored afterwards.
        processor: its processor.
        dataset: rows of `listen.data.manifest`; their own responses are not used.
        answers: two or more different texts.
        **options: fields of `BatchOptions`. `batch_size` is 4 by default, as the LLM runs over this number of rows for
            each answer.

    Returns:
        `(rows, answers)` natural logarithms, float64.

    Raises:
        ValueError: fewer than two answers or equal ones, or a row that cannot be read.
        FeatureStoreError: `features` were computed by other encoders or settings, or lack a recording.
    """
    if len(set(answers)) < max(2, len(answers)):
        raise ValueError(f"answers={list(answers)} must be two or more different texts")
    model = extract_model_from_parallel(model)
    settings = BatchOptions(**{"batch_size": 4, **options})
    collator = settings.collator(processor)
    score = partial(_score_batch, model, _answer_ids(collator, answers))
    rows = map_rows(score, model, collator, dataset, settings, description="scoring answers")
    return np.array(rows, dtype=np.float64)


def _answer_ids(collator: ListenCollator, answers: Sequence[str]) -> list[torch.Tensor]:
    """Ids of each answer with the end of its turn, as the collator writes them in training."""
    tokenizer = collator.processor.tokenizer
    texts = [collator.render({"role": "user", "content": "?"}, answer)[1] for answer in answers]
    return [torch.tensor(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _score_batch(
    model: PreTrainedModel, answers: list[torch.Tensor], indices: Sequence[int], inputs: dict[str, Any]
) -> list[list[float]]:
    """Log-likelihoods of all answers for each row; the encoders run once per row."""
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items() if name != "rows"}
    rows, count = len(indices), len(answers)
    prompt, inputs = model._expand_inputs_for_generation(expand_size=count, **inputs)  # each row once for each answer
    ids = pad_sequence(answers, batch_first=True, padding_value=0).to(model.device).repeat(rows, 1)
    is_real = pad_sequence([torch.ones_like(a) for a in answers], batch_first=True).to(model.device).repeat(rows, 1)
    mask = torch.cat([inputs.pop("attention_mask"), is_real], dim=1)  # (rows * answers, prompt + longest answer)
    longest = ids.shape[1]
    logits = model(
        input_ids=torch.cat([prompt, ids], dim=1), attention_mask=mask, logits_to_keep=longest + 1, **inputs
    ).logits[:, :-1]  # (rows * answers, longest, vocabulary)
    chosen = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]  # (rows * answers, longest)
    return (chosen * is_real).sum(-1).view(rows, count).tolist()
