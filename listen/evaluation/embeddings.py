"""Mean-pooled audio embeddings of recordings: what a probe classifies and a map shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from ..outputs_listen import EncodedAudio
from .batches import BatchOptions, map_rows


def pooled_embeddings(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: Dataset,
    **options: Any,
) -> np.ndarray:
    """Mean over time of the audio embeddings that the LLM is given for each row.

    Args:
        model: a LiSTEN model; its active adapter encodes.
        processor: its processor.
        dataset: rows of `listen.data.manifest`; several clips of a row are pooled together.
        **options: fields of `BatchOptions`; no prompts are selected, whatever `num_prompts` is.

    Returns:
        `(rows, text width)` float32.

    Raises:
        ValueError: a row that cannot be read; the message names it.
    """
    model = extract_model_from_parallel(model)
    settings = replace(BatchOptions(**options), num_prompts=0)
    pool = partial(_pool_batch, model)
    return np.stack(map_rows(pool, model, settings.collator(processor), dataset, settings, description="encoding"))


def _pool_batch(model: PreTrainedModel, indices: Sequence[int], inputs: dict[str, Any]) -> list[np.ndarray]:
    counts = (inputs.pop("input_ids") == model.config.audio_token_id).sum(-1).tolist()  # embeddings of each row
    audio = {
        name: tensor.to(model.device)
        for name, tensor in inputs.items()
        if name not in ("rows", "attention_mask", "task_ids")
    }
    encoded = EncodedAudio(**audio) if "speech_hidden_states" in audio else model.encode_audio(**audio)
    embeddings = model.get_audio_features(encoded=encoded).pooler_output.float()  # (total, text width)
    return [torch.mean(part, dim=0).cpu().numpy() for part in embeddings.split(counts)]
