"""Evaluation of spoken dialogue: a model's answers, the emotions that it recognises, and a probe of its embeddings."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from ..data.chat_models import ChatModelError
from ..data.files import write_json, write_json_lines
from ..data.manifest import extra_fields
from ..data.processes import launched_processes
from ..data.tasks import get_task
from .batches import split_options
from .bert_score import BertScore
from .cascade import tag_rows
from .confidence import bootstrap_intervals
from .embeddings import pooled_embeddings
from .generate import GREEDY, generate_predictions
from .judge import JudgeItem, Judgement
from .metrics import Classification, Rouge, RowMetric
from .probe import Probe, plot_embeddings, probe_groups, probe_split
from .scoring import check_references
from .ser import EmotionScores, emotion_rows, recognise_emotions, row_emotion, scores_of

logger = logging.getLogger(__name__)

Recogniser = Callable[[Dataset], Sequence[str]]
"""Predicts the emotion of every row, as `listen.evaluation.cascade.classify_rows` does."""

LEAST_MAPPED = 4


@dataclass
class ResponseEvaluation:
    """Result of an evaluation of responses.

    Attributes:
        system: name of the system in tables.
        values: `rouge_1`, `rouge_2`, `rouge_l`, `bertscore` and its parts as fractions; `quality` and `emotion` from 1
            to 10; `ser_accuracy`, `ser_uar`, `probe_accuracy`, `probe_uar`, `probe_chance` as fractions. Values that
            were not measured are missing.
        intervals: 95 % bootstrap intervals of the values that have one.
        responses: one record per answer, with its scores.
        emotions: one record per recording, with the recognised class.
        settings: settings of the evaluation, and the numbers of examples and of verdicts without a score.
        embeddings: `(recordings, width)`, in the order of `emotions`; `None` if they were not computed.
    """

    system: str
    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    responses: list[dict[str, Any]] = field(default_factory=list)
    emotions: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    embeddings: np.ndarray | None = None

    def save(self, folder: str | Path) -> Path:
        """Write `metrics.json`, `responses.jsonl`, `emotions.jsonl` and, of four recordings or more, `embeddings.png`.

        Returns:
            The folder, created if needed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        values = {name: None if math.isnan(value) else value for name, value in self.values.items()}
        details = {"confidence_95": self.intervals, "settings": self.settings}
        write_json(folder / "metrics.json", {"system": self.system, **values, "details": details})
        for name in ("responses", "emotions"):
            write_json_lines(folder / f"{name}.jsonl", getattr(self, name))
        if self.embeddings is not None and len(self.embeddings) >= LEAST_MAPPED:
            truths = [record["emotion"] for record in self.emotions]
            plot_embeddings(self.embeddings, truths, system=self.system).savefig(folder / "embeddings.png", dpi=120)
        return folder

    def add(self, metric: RowMetric, rows: np.ndarray, names: dict[str, str], num_resamples: int) -> None:
        """Add values of a metric and their intervals, renamed by `names` (its name -> ours)."""
        found = metric.aggregate(rows)
        self.values |= {ours: found[name] for name, ours in names.items()}
        if num_resamples:
            intervals = bootstrap_intervals(metric, rows, num_resamples)
            self.intervals |= {ours: intervals[name] for name, ours in names.items() if name in intervals}


def evaluate_responses(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: Dataset,
    system: str = "model",
    references: Dataset | None = None,
    classes: Sequence[str] | None = None,
    probe_train: Dataset | None = None,
    recognise: Recogniser | None = None,
    bert_score: BertScore | None = None,
    judge: Callable[[Sequence[JudgeItem]], Judgement] | None = None,
    num_resamples: int = 1000,
    **options: Any,
) -> ResponseEvaluation:
    """Evaluate as SpeechEmotionLlama does (arXiv 2410.01162, section 4).

    Rows of the task `response` are answered and scored against their responses by ROUGE, by BERTScore and by a judge.
    The emotion of every recording that has one is recognised, see `recognise_emotions`. A linear probe predicts it from
    the mean-pooled embeddings of the same recordings.

    Args:
        model: a LiSTEN model.
        processor: its processor.
        dataset: rows of `listen.data.manifest`, of any tasks, with fields `emotion`, `transcript` and `speaker`.
        system: name of the system in tables.
        references: rows to answer instead of those of the task `response` in `dataset`.
        classes: emotions to choose from, see `emotion_rows`.
        probe_train: rows that the probe is trained on; by default `dataset` with held-out speakers, which each row has
            to name. With too few of them there is no probe, and the log says so.
        recognise: classifier of emotions, for a cascade: its label is written before the speech, its accuracy is the
            system's, and embeddings, which it does not use, are not probed.
        bert_score: the metric over a text model; `None` leaves BERTScore out.
        judge: scores answers, such as `functools.partial(judge_responses, LocalChatModel(...))`; it needs the fields
            `transcript` and `emotion` in the rows. `None` leaves these scores out.
        num_resamples: bootstrap resamples behind the intervals; 0 for none.
        **options: fields of `BatchOptions`; all others go to `model.generate`, which is greedy and writes at most 200
            tokens by default.

    Raises:
        ValueError: neither rows to answer nor emotions, a row without fields that the judge needs, or emotions that are
            none of the classes; found before generation starts.
    """
    batch, generate_kwargs = split_options({**GREEDY, **options})
    asked = _responses(dataset if references is None else references)
    result = ResponseEvaluation(system, settings={"generation": generate_kwargs, "num_responses": len(asked)})
    if references is not None and not len(asked):
        raise ValueError(f"none of the {len(references)} references is of the task 'response'; give rows to answer")
    has_emotions = any(row_emotion(row) for row in dataset)
    if not len(asked) and not has_emotions:
        raise ValueError("nothing to evaluate: no rows of the task 'response', and none with an emotion")
    emotional = emotion_rows(dataset, classes) if has_emotions else None
    learned = None if probe_train is None or emotional is None else emotion_rows(probe_train, _classes(emotional))
    _check(asked, judged=judge is not None)
    scores = None
    if recognise is not None and emotional is not None:
        scores = scores_of(emotional, recognise(emotional), num_resamples)
    if len(asked):
        rows = asked if recognise is None else tag_rows(asked, recognise(asked))
        predictions = generate_predictions(model, processor, rows, **batch, **generate_kwargs)
        _score_responses(result, asked, [p.text for p in predictions], bert_score, num_resamples)
    if emotional is not None:
        scores = scores or recognise_emotions(
            model, processor, emotional, num_resamples=num_resamples, **{"batch_size": 8, **batch}
        )
        if recognise is None:
            _probe(result, model, processor, emotional, learned, num_resamples, batch)
        _add_emotions(result, emotional, scores)
    # last: it may take hours on one process, and the others need not wait for it
    if judge is not None and result.responses and launched_processes().is_main_process:
        _judge(result, judge)
    return result


def _responses(rows: Dataset) -> Dataset:
    return rows.select([place for place, task in enumerate(rows["task"]) if task == "response"])


def _classes(rows: Dataset) -> list[str]:
    """The classes that rows of `emotion_rows` choose from."""
    return extra_fields(rows[0])["options"]


def _check(asked: Dataset, judged: bool) -> None:
    """Refuse rows that cannot be scored, before generation starts."""
    if len(asked):
        check_references(get_task("response"), asked.select_columns(["response"]))
    for row in asked if judged else ():
        known = {name: value for name, value in extra_fields(row).items() if value and isinstance(value, str)}
        missing = [name for name in ("transcript", "emotion") if name not in known]
        if missing:
            raise ValueError(f"row {row['id']!r} has no text {missing[0]!r}, which the judge needs; add the field")


def _score_responses(
    result: ResponseEvaluation, rows: Dataset, texts: Sequence[str], bert_score: BertScore | None, num_resamples: int
) -> None:
    """Add scores against the references, and a record of each answer."""
    references = rows["response"]
    for row, text in zip(rows, texts, strict=True):
        extra = extra_fields(row)
        known = {name: extra[name] for name in ("emotion", "transcript", "speaker") if name in extra}
        result.responses.append({"id": row["id"], **known, "references": row["response"], "prediction": text})
    for metric in (Rouge(), bert_score):
        if metric is None:
            continue
        statistics = metric.row_statistics(texts, references)
        result.add(metric, statistics, {name: name for name in metric.names}, num_resamples)
        for place, record in enumerate(result.responses):
            single = metric.aggregate(statistics[place : place + 1])
            record |= {name: round(value, 6) for name, value in single.items()}
    if bert_score is not None:
        layer = "last" if bert_score.layer is None else bert_score.layer
        result.settings["bertscore"] = {"model": bert_score.model.config.name_or_path, "layer": layer}


def _judge(result: ResponseEvaluation, judge: Callable[[Sequence[JudgeItem]], Judgement]) -> None:
    try:
        found = judge([JudgeItem(r["transcript"], r["emotion"], r["prediction"]) for r in result.responses])
    except ChatModelError as error:  # a wrong key must not discard all other results
        logger.error("no scores by a judge: %s", error)
        result.settings["judge"] = {"error": str(error)}
        return
    result.values |= found.values
    result.intervals |= found.intervals
    counts = {"unparsable": found.unparsable, "failed": found.failed, "errors": found.errors}
    result.settings["judge"] = {**found.settings, **counts}
    for place, record in enumerate(result.responses):
        scores = zip(found.values, found.scores[place].tolist(), strict=True)
        record["judge"] = {name: None if math.isnan(score) else score for name, score in scores}
        if found.verdicts:
            record["verdicts"] = found.verdicts[place]


def _add_emotions(result: ResponseEvaluation, rows: Dataset, scores: EmotionScores) -> None:
    result.values |= {f"ser_{name}": value for name, value in scores.values.items()}
    result.intervals |= {f"ser_{name}": ends for name, ends in scores.intervals.items()}
    result.settings |= {"num_emotions": len(rows), "classes": scores.classes}
    for row, truth, answer in zip(rows, scores.truths, scores.answers, strict=True):
        result.emotions.append({"id": row["id"], "emotion": truth, "answer": answer})


def _probe(
    result: ResponseEvaluation,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Dataset,
    learned: Dataset | None,
    num_resamples: int,
    options: dict[str, Any],
) -> None:
    """Probe the embeddings, trained on other rows or on other speakers."""
    embeddings, labels, speakers = pooled_embeddings(model, processor, rows, **options), _labels(rows), _speakers(rows)
    result.embeddings = embeddings
    how = "other speakers of the same rows" if learned is None else "other rows"
    trained_on = None if learned is None else pooled_embeddings(model, processor, learned, **options)
    try:
        if learned is None:
            probe = probe_groups(embeddings, labels, speakers)
        else:
            probe = probe_split(trained_on, _labels(learned), embeddings, labels)
    except ValueError as error:  # too few examples for a probe must not discard the other scores
        logger.warning("no linear probe: %s", error)
        return
    _add_probe(result, probe, num_resamples)
    result.settings["probe"] = {"learned_from": how, "num_train": probe.num_train}
    shared = set(speakers) & set(_speakers(learned) if learned is not None else ()) - {None}
    if shared:
        logger.warning("the probe was trained on %d of the speakers that it was tested on", len(shared))
        result.settings["probe"]["shared_speakers"] = len(shared)


def _labels(rows: Dataset) -> list[str]:
    return [response[0] for response in rows["response"]]


def _speakers(rows: Dataset) -> list[str | None]:
    names = [extra_fields(row).get("speaker") for row in rows.select_columns(["extra"])]
    return [None if name is None else str(name) for name in names]


def _add_probe(result: ResponseEvaluation, probe: Probe, num_resamples: int) -> None:
    metric = Classification()
    statistics = metric.row_statistics(probe.predictions, probe.truths)
    result.add(metric, statistics, {"accuracy": "probe_accuracy", "uar": "probe_uar"}, num_resamples)
    result.values["probe_chance"] = probe.chance
