"""Mean-pooled audio embeddings of recordings: what a probe reads and a map shows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from ..data.collator import ListenCollator
from ..data.features import FeatureStore
from ..outputs_listen import EncodedAudio
from .batches import map_rows


def pooled_embeddings(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: Dataset,
    features: FeatureStore | None = None,
    join_silence_seconds: float = 0.0,
    batch_size: int = 8,
    num_workers: int = 0,
    progress: bool = True,
) -> np.ndarray:
    """Mean over time of the audio embeddings that the LLM is given for each row.

    Args:
        model: a LiSTEN model; its active adapter listens.
        processor: its processor.
        dataset: rows of `listen.data.manifest`; several clips of a row are pooled together.
        features: store of encoder features, used in place of audio.
        join_silence_seconds: silence between the clips of rows that join them, as in training.
        batch_size: rows of a batch, in each process.
        num_workers: processes that read audio ahead, for each process.
        progress: whether the main process shows a progress bar.

    Returns:
        `(rows, text width)` float32.

    Raises:
        ValueError: a row that cannot be read; the message names it.
    """
    model = extract_model_from_parallel(model)
    collator = ListenCollator(
        processor, for_generation=True, num_prompts=0, features=features, join_silence_seconds=join_silence_seconds
    )
    pool = partial(_pool_batch, model)
    return np.stack(
        map_rows(pool, model, collator, dataset, batch_size, num_workers, progress, description="listening")
    )


def _pool_batch(model: PreTrainedModel, indices: Sequence[int], inputs: dict[str, Any]) -> list[np.ndarray]:
    counts = (inputs.pop("input_ids") == model.config.audio_token_id).sum(-1).tolist()  # embeddings of each row
    audio = {
        name: tensor.to(model.device)
        for name, tensor in inputs.items()
        if name not in ("rows", "attention_mask", "task_ids")
    }
    encoded = EncodedAudio(**audio) if "speech_hidden_states" in audio else model.encode_audio(**audio)
    heard = model.get_audio_features(encoded=encoded).pooler_output.float()  # (total, text width)
    return [torch.mean(part, dim=0).cpu().numpy() for part in heard.split(counts)]
