"""Cascades: a classifier predicts the emotion, which is written before the speech (arXiv 2410.01162, sec. 3).

>>> from listen.evaluation.cascade import classify_rows, tag_rows
>>> tagged = tag_rows(dataset, classify_rows(classifier, feature_extractor, dataset))  # doctest: +SKIP
>>> evaluate_model(model, processor, tagged)  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from accelerate.utils import extract_model_from_parallel
from datasets import Dataset
from transformers import FeatureExtractionMixin, PreTrainedModel

from ..chat_listen import INPUT_FIELD, place_input
from ..data.classification import ClipCollator
from ..data.manifest import FEATURES, extra_fields
from ..data.processes import launched_processes
from ..data.tasks import get_task, tagged_text
from ..feature_extraction_audio_classification import ListenAudioClassificationFeatureExtractor
from ..modeling_audio_classification import ListenForAudioClassification
from .batches import BatchOptions, map_rows


def load_recogniser(checkpoint: str, batch_size: int) -> Callable[[Dataset], list[str]]:
    """A function that predicts the class of each row's recording: `classify_rows` with the classifier of a checkpoint.

    Args:
        checkpoint: folder or Hub id of a `ListenForAudioClassification` with its feature extractor.
        batch_size: rows of a batch, in each process.
    """
    classifier = ListenForAudioClassification.from_pretrained(checkpoint).to(launched_processes().device)
    extractor = ListenAudioClassificationFeatureExtractor.from_pretrained(checkpoint)
    return partial(classify_rows, classifier, extractor, batch_size=batch_size)


def classify_rows(
    model: PreTrainedModel,
    feature_extractor: FeatureExtractionMixin,
    dataset: Dataset,
    batch_size: int = 16,
    num_workers: int = 0,
    progress: bool = True,
) -> list[str]:
    """The class of each row's recording, in the data set's order.

    Processes share the batches as in `map_rows`.

    Args:
        model: a `ListenForAudioClassification`.
        feature_extractor: its feature extractor.
        dataset: rows of `listen.data.manifest`.
        batch_size: rows of a batch, in each process.
        num_workers: processes that load audio ahead, for each process.
        progress: whether the main process shows a progress bar.

    Raises:
        ValueError: a row that cannot be read, or with several recordings; the message names it.
    """
    model = extract_model_from_parallel(model)

    def classify(_: Sequence[int], inputs: dict[str, Any]) -> list[str]:
        logits = model(**{name: value.to(model.device) for name, value in inputs.items()}).logits  # (batch, labels)
        return [model.config.id2label[index] for index in logits.argmax(-1).tolist()]

    options = BatchOptions(batch_size=batch_size, num_workers=num_workers, progress=progress)
    return map_rows(classify, model, ClipCollator(feature_extractor), dataset, options, "classifying")


def tag_rows(dataset: Dataset, labels: Sequence[str]) -> Dataset:
    """Add the class before the recording in each row's instruction: `<happy>` and the speech.

    A row without an instruction gets the test wording of its task. The recording keeps its place in the wording, with
    the tag in front of it.

    Args:
        dataset: rows of `listen.data.manifest`.
        labels: class of each row.

    Raises:
        ValueError: the numbers of labels and rows differ.
    """
    if len(labels) != len(dataset):
        raise ValueError(f"{len(labels)} labels for {len(dataset)} rows; give each row one")

    def tag(row: dict[str, Any], index: int) -> dict[str, str]:
        options = extra_fields(row).get("options")
        wording = row["instruction"] or get_task(row["task"]).instruction(row["question"], options=options)
        return {"instruction": place_input(wording, tagged_text(INPUT_FIELD, labels[index]))}

    return dataset.map(tag, with_indices=True, features=FEATURES)


__all__ = ["classify_rows", "load_recogniser", "tag_rows"]
