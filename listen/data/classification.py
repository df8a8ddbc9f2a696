"""Rows of a data set as labelled clips of a classifier: the collator, the class of a row, and held-out speakers."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import FeatureExtractionMixin

from .audio import read_clips
from .manifest import ManifestError, extra_fields


class ClipCollator:
    """Turns rows of the manifest schema into inputs of `ListenForAudioClassification`.

    Args:
        feature_extractor: a `ListenAudioClassificationFeatureExtractor`.
        label2id: id of each class; `None` leaves labels out.
        label_field: field of a row that names its class: `response`, or one beyond the schema such as `emotion`.
    """

    def __init__(
        self,
        feature_extractor: FeatureExtractionMixin,
        label2id: Mapping[str, int] | None = None,
        label_field: str = "response",
    ) -> None:
        self.feature_extractor = feature_extractor
        self.label2id = label2id
        self.label_field = label_field

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Inputs for a batch, one clip a row.

        Raises:
            ValueError: a row that cannot be read, or with several recordings; the message names it.
        """
        rate = self.feature_extractor.sampling_rate
        inputs = dict(self.feature_extractor([_read(row, rate) for row in rows], rate))
        if self.label2id is not None:
            inputs["labels"] = torch.tensor([self.label2id[row_label(row, self.label_field)] for row in rows])
        return inputs


def collate_states(items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Inputs of `ListenForAudioClassification` from clips that its encoder has encoded already.

    Args:
        items: for each clip `layer_states` `(steps, layers, width)` and `labels`, the id of its class.
    """
    states = [item["layer_states"] for item in items]  # (steps, layers, width) each
    lengths = torch.tensor([len(clip) for clip in states])
    padded = pad_sequence(states, batch_first=True).transpose(1, 2)  # (clips, layers, steps, width)
    mask = torch.arange(padded.shape[2]) < lengths[:, None]  # (clips, steps)
    return {
        "layer_states": padded,
        "layer_states_mask": mask,
        "labels": torch.tensor([item["labels"] for item in items]),
    }


def hold_out_speakers(rows: Dataset, speaker_field: str, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Divide rows so that no speaker is on both sides.

    Args:
        rows: all rows.
        speaker_field: field beyond the schema that names the speaker.
        share: share of the speakers whose rows go to the second part, at least one speaker.
        seed: which speakers these are.

    Raises:
        ManifestError: rows without the field, or fewer than two speakers.
    """
    names = [extra_fields(row).get(speaker_field) for row in rows.select_columns(["extra"])]
    speakers = sorted({str(name) for name in names})
    if None in names or len(speakers) < 2:
        raise ManifestError(
            f"held_out_speakers={share} needs two or more speakers in the field {speaker_field!r} of all rows; name "
            "the field with data.speaker_field"
        )
    count = min(max(1, round(share * len(speakers))), len(speakers) - 1)
    chosen = set(random.Random(seed).sample(speakers, count))
    places = {side: [i for i, name in enumerate(names) if (str(name) in chosen) is side] for side in (False, True)}
    return rows.select(places[False]), rows.select(places[True])


def row_label(row: Mapping[str, Any], label_field: str) -> str:
    """The class of a row.

    Raises:
        ManifestError: the row does not name exactly one.
    """
    value = row["response"] if label_field == "response" else extra_fields(row).get(label_field)
    names = value if isinstance(value, list) else [] if value is None else [value]
    if len(names) != 1 or not str(names[0]).strip():
        raise ManifestError(
            f"row {row['id']!r}: data.label_field={label_field!r} must hold one class, found {value!r}; beyond "
            f"'response' the row has {sorted(extra_fields(row))}"
        )
    return str(names[0]).strip()


def row_speakers(rows: Dataset, speaker_field: str) -> set[str]:
    """The speakers that rows name in a field beyond the schema."""
    names = (json.loads(extra).get(speaker_field) for extra in rows["extra"] if extra)
    return {str(name) for name in names if name is not None}


def _read(row: Mapping[str, Any], sampling_rate: int) -> np.ndarray:
    try:
        clips = read_clips(row["audio"], sampling_rate, bool(row.get("join")))
    except (OSError, ValueError) as error:
        raise ValueError(f"row {row['id']!r}: {error}") from error
    if len(clips) != 1:
        raise ValueError(
            f"row {row['id']!r} has {len(clips)} recordings, but a classifier takes one; join them or split the row"
        )
    return clips[0]
