"""Generated answers to all rows of a data set: batched, divided among processes, in the order of the rows."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from ..data.collator import ListenCollator
from .batches import BatchOptions, map_rows, split_options

logger = logging.getLogger(__name__)

GREEDY = {"do_sample": False, "max_new_tokens": 200}
"""Arguments of `generate` that evaluations use by default."""


@dataclass
class Prediction:
    """A model's answer to one row.

    Attributes:
        index: place of the row in the data set.
        instruction: wording of the task.
        text: the answer, without special tokens and outer spaces.
        prompt_indices: prompts selected from the pool, best first; empty without a pool.
        prompt_scores: their scores by the pool's strategy.
        yes_no_score: logit of yes minus logit of no at the first position of the response; `nan` where both begin with
            the same token.
        query: `(width,)` query of the pool; `None` without a pool.
    """

    index: int
    instruction: str
    text: str
    prompt_indices: list[int]
    prompt_scores: list[float]
    yes_no_score: float
    query: np.ndarray | None = None


@dataclass
class _Prefill:
    """Output of the first forward pass of a `generate` call."""

    output: Any = None


def generate_predictions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: Dataset,
    **options: Any,
) -> list[Prediction]:
    """Generate the model's answer to every row once, in batches that processes share as in `map_rows`.

    Args:
        model: a LiSTEN model, wrapped for parallel training or not. Its mode is restored afterwards.
        processor: its processor.
        dataset: rows of `listen.data.manifest`.
        **options: fields of `BatchOptions`; all others go to `model.generate`, such as `num_beams=4`.

    Raises:
        ValueError: `batch_size` below 1, several answers per row, or a row that cannot be read; the message names it.
        FeatureStoreError: `features` were computed by other encoders or settings, or lack a recording.
    """
    model = extract_model_from_parallel(model)
    batch, generate_kwargs = split_options(options)
    settings = BatchOptions(**batch)
    collator = settings.collator(processor)
    answer = partial(_answer_batch, model, processor, answers=answer_ids(collator), generate_kwargs=generate_kwargs)
    return map_rows(answer, model, collator, dataset, settings, description="answering")


def answer_ids(collator: ListenCollator) -> tuple[int, int] | None:
    """Ids of the first token of yes and of no, as in training at the start of a response.

    Returns:
        The two ids; `None` where both answers begin with the same token, so that the first position of the response
        does not distinguish them.
    """
    row = {"id": "", "audio": [], "instruction": "yes or no?"}
    texts = [collator.word({**row, "response": [answer]}, random.Random(0)).answer for answer in ("yes", "no")]
    yes, no = collator.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    if yes[0] == no[0]:
        logger.warning("yes and no begin with the same token: no score of yes against no")
        return None
    return yes[0], no[0]


def _answer_batch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    indices: Sequence[int],
    inputs: dict[str, Any],
    answers: tuple[int, int] | None,
    generate_kwargs: Mapping[str, Any],
) -> list[Prediction]:
    rows = inputs.pop("rows")
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    with first_forward(model) as prefill:
        ids = model.generate(**inputs, **generate_kwargs)  # (batch, sequence)
    if len(ids) != len(indices):  # they would be assigned to the wrong rows
        raise ValueError(f"{len(ids)} answers for {len(indices)} rows; leave num_return_sequences at 1")
    texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    first = prefill.output
    beams = len(first.logits) // len(indices)  # each row is repeated for its beams
    selected, strengths, queries = (
        None if tensor is None else tensor[::beams].detach().cpu()
        for tensor in (first.prompt_indices, first.prompt_scores, first.query)
    )
    preferences = _yes_no_scores(first.logits[::beams, -1], answers)
    return [
        Prediction(
            index=index,
            instruction=rows[row]["instruction"],
            text=texts[row].strip(),
            prompt_indices=[] if selected is None else selected[row][selected[row] >= 0].tolist(),
            prompt_scores=[] if selected is None else strengths[row][selected[row] >= 0].tolist(),
            yes_no_score=preferences[row],
            query=None if queries is None else queries[row].float().numpy(),
        )
        for row, index in enumerate(indices)
    ]


def _yes_no_scores(logits: torch.Tensor, answers: tuple[int, int] | None) -> list[float]:
    """Preference for yes from `logits` `(batch, vocabulary)` of the first position."""
    if answers is None:
        return [float("nan")] * len(logits)
    yes, no = answers
    return (logits[:, yes].float() - logits[:, no].float()).tolist()


@contextmanager
def first_forward(model: PreTrainedModel) -> Iterator[_Prefill]:
    """Keep the output of the next forward pass: `generate` runs the input there and selects prompts."""
    prefill = _Prefill()

    def keep(module: torch.nn.Module, args: tuple, output: Any) -> None:
        handle.remove()
        prefill.output = output

    handle = model.register_forward_hook(keep)
    try:
        yield prefill
    finally:
        handle.remove()
