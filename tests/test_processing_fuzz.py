"""Odd texts, clips and options: the processor makes inputs whose placeholders match, or raises an error of its own."""

from __future__ import annotations

import traceback
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_tokenizers import GEMMA_TEMPLATE, QWEN_TEMPLATE, build_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import BatchFeature

import listen
from listen.feature_extraction_listen import ListenFeatureExtractor
from listen.processing_listen import ListenProcessor

pytestmark = pytest.mark.slow

OURS = (ValueError, TypeError, FileNotFoundError, ConnectionError)
FOLDER = Path(listen.__file__).parent
LIMITS = settings(
    max_examples=400, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.sampled_from([10**12, -(10**12), 2**70]),
    st.floats(), st.text(max_size=8), st.binary(max_size=8), st.just(object()), st.just(float("nan")),
)  # fmt: skip
KEYS = st.sampled_from(["array", "bytes", "path", "url", "type", "audio", "sampling_rate"])
ODD = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner, inner),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=5,
)  # fmt: skip
PARTS = st.sampled_from(
    [
        "<|audio|>",
        "<|prompt|>",
        "What",
        " is ",
        "said?",
        "\n",
        "<s>",
        "</s>",
        "<pad>",
        "\ud800",
        "\U0001f600",
        "音",
        "\0",
    ]
)
TEXTS = st.lists(PARTS, max_size=6).map("".join)
WAVES = st.integers(1, 3000).map(lambda n: np.sin(np.arange(n), dtype=np.float32))
CLIPS = st.one_of(
    WAVES, WAVES.map(torch.from_numpy), WAVES.map(lambda w: {"array": w, "sampling_rate": 8000}),
    WAVES.map(lambda w: (16000, w)), WAVES.map(lambda w: np.stack([w, w])), WAVES.map(np.ndarray.tolist),
    WAVES.map(lambda w: (w * 2**14).astype(np.int16)), ODD,
)  # fmt: skip
SEVERAL = st.lists(CLIPS, max_size=3)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "sampling_rate": st.sampled_from([16000, 16000, 8000]) | ODD,
        "num_prompts": st.integers(0, 8) | SCALARS,
        "task": st.sampled_from(["asr", "er", "transcribe", ["asr"]]) | ODD,
        "return_tensors": st.sampled_from(["pt", "np", None]) | SCALARS,
        "padding": st.sampled_from([True, False, "longest", "max_length"]) | ODD,
        "max_length": st.integers(1, 60) | SCALARS,
        "pad_to_multiple_of": st.integers(1, 16) | SCALARS,
        "truncation": st.sampled_from([True, False, "longest_first", "only_first"]) | ODD,
        "max_audio_seconds": st.sampled_from([0.01, 0.1, 1, float("inf")]) | SCALARS,
        "add_special_tokens": st.booleans() | SCALARS,
        "return_offsets_mapping": st.booleans() | SCALARS,
        "return_mm_token_type_ids": st.booleans(),
        "text_kwargs": ODD,
        "audio_kwargs": ODD,
        "num_samples": st.lists(st.integers(-1, 20000), max_size=3) | ODD,
        "nonsense": ODD,
    },
)


@lru_cache  # no fixture: hypothesis would print all of it
def make_processor() -> ListenProcessor:
    return ListenProcessor(
        ListenFeatureExtractor(), build_tokenizer(), num_prompts=2, pool_size=8, tasks=["asr", "er"],
        context_length=512, vocab_size=99,
    )  # fmt: skip


def own_error(error: BaseException) -> bool:
    """Whether an error is of the kinds that the processor documents, raised by a line of this package."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return isinstance(error, OURS) and Path(last.filename).is_relative_to(FOLDER)


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """The result, or `None` for an error of our own.

    Raises:
        AssertionError: any other error.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(*args, **kwargs)
        except Exception as error:
            lines = "".join(traceback.format_tb(error.__traceback__)[-3:])
            assert own_error(error), f"{type(error).__name__}: {error}\n{lines}"
            assert str(error).strip()
            return None


def check(processor: ListenProcessor, inputs: Any) -> None:
    """Rows have as many audio placeholders as their chunks have embeddings."""
    assert isinstance(inputs, BatchFeature)
    if "input_ids" not in inputs:
        return
    rows = [list(map(int, row)) for row in inputs["input_ids"]]
    masks = [list(map(int, row)) for row in inputs["attention_mask"]]
    assert [*map(len, rows)] == [*map(len, masks)]
    counts = [row.count(processor.audio_token_id) for row in rows]
    assert sum(counts) == 0 or "input_features" not in inputs or len(inputs["input_features"]) <= sum(counts)
    prompts = [row.count(processor.prompt_token_id) for row in rows]
    assert len(set(prompts)) == 1 and prompts[0] <= processor.pool_size


@given(
    text=st.one_of(TEXTS, st.lists(TEXTS, max_size=3), ODD),
    clips=st.one_of(st.none(), CLIPS, SEVERAL, st.lists(SEVERAL, max_size=3)),
    options=OPTIONS,
)
@LIMITS
def test_calls(text: Any, clips: Any, options: dict[str, Any]) -> None:
    processor = make_processor()
    inputs = call(processor, text, clips, **options)
    if inputs is not None:
        check(processor, inputs)


@given(waves=st.lists(WAVES, max_size=3), options=OPTIONS, before=TEXTS)
@LIMITS
def test_matching_calls(waves: list, options: dict[str, Any], before: str) -> None:
    """Texts with the right number of clips: one option at a time is odd, so that all of the way is reached."""
    processor = make_processor()
    text = before.replace("<|audio|>", "").replace("<|prompt|>", "") + "<|audio|>" * len(waves)
    for name in options:
        inputs = call(processor, text, waves or None, **{"sampling_rate": 16000, name: options[name]})
        if inputs is not None:
            check(processor, inputs)
            expected = [processor.num_audio_embeddings(len(wave)) for wave in waves]
            if name not in ("sampling_rate", "max_audio_seconds", "audio_kwargs", "text_kwargs"):
                assert [*map(int, np.ravel(inputs["input_ids"]))].count(processor.audio_token_id) == sum(expected)


ITEMS = st.one_of(
    TEXTS, TEXTS.map(lambda text: {"type": "text", "text": text}),
    CLIPS.map(lambda clip: {"type": "audio", "audio": clip}),
    ODD.map(lambda value: {"type": "input_audio", "input_audio": value}),
    ODD.map(lambda value: {"type": "audio_url", "audio_url": value}), ODD,
)  # fmt: skip
ROLES = st.sampled_from(["user", "assistant", "system"])
MESSAGES = st.fixed_dictionaries({"role": ROLES | ODD, "content": TEXTS | st.lists(ITEMS, max_size=3) | ODD})
CHATS = st.lists(MESSAGES, max_size=3)
CHAT_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "tokenize": st.booleans(),
        "add_generation_prompt": st.booleans(),
        "continue_final_message": st.booleans(),
        "number_clips": st.booleans(),
        "chat_template": st.sampled_from([None, QWEN_TEMPLATE, GEMMA_TEMPLATE, "{{ broken", "{{ messages + 1 }}", ""]),
        "return_dict": st.booleans(),
        "num_prompts": st.integers(0, 3) | SCALARS,
        "nonsense": ODD,
    },
)


@given(messages=CHATS | st.lists(CHATS, max_size=2) | ODD, options=CHAT_OPTIONS)
@LIMITS
def test_chats(messages: Any, options: dict[str, Any]) -> None:
    processor = make_processor()
    result = call(processor.apply_chat_template, messages, **options)
    if isinstance(result, BatchFeature):
        check(processor, result)
