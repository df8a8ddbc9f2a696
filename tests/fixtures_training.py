"""What training tests share: a character tokenizer, its processor, and clips with manifests on disk."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from conftest import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from listen import ListenForConditionalGeneration
from listen.configuration_listen import ListenConfig
from listen.processing_listen import ListenProcessor

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<s>U:' + message['content'] }}"
    "{%- else -%}{{ 'A:' + message['content'] + '</s>' + '~' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'A:' }}{%- endif -%}"
)
RATE = 16000


def character_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a printable ASCII character: and two more, so that placeholders get the ids 100 and 101."""
    characters = [c for c in string.printable if c.isprintable()]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *characters, "\u00e4", "\u00f6"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = chat_template
    return fast


def save_tiny_llm(folder: Path, chat_template: str | None = CHAT_TEMPLATE, seed: int = 0) -> str:
    """The LLM of `conftest.tiny_model` with the character tokenizer, as a folder of its own."""
    tiny_model(seed=seed).language_model.save_pretrained(folder)
    character_tokenizer(chat_template).save_pretrained(folder)
    return str(folder)


def tiny_processor(config: ListenConfig, chat_template: str | None = CHAT_TEMPLATE) -> ListenProcessor:
    """The processor of `conftest.tiny_config` over the character tokenizer."""
    return ListenProcessor.from_backbones(config, tokenizer=character_tokenizer(chat_template))


def write_clip(path: Path, seconds: float, seed: int = 0) -> Path:
    """Noise of that length as a wav file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.1 * np.random.default_rng(seed).standard_normal(round(RATE * seconds))
    soundfile.write(path, samples.astype(np.float32), RATE)
    return path


def write_manifest(path: Path, rows: list[dict]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def small_corpus(folder: Path, num_rows: int = 8) -> Path:
    """A manifest of clips of different lengths, tasks and answer lengths."""
    answers = ["yes", "no it is not", "a", "three words here", "two", "hello", "well then", "ok"]
    for i in range(num_rows):
        write_clip(folder / "audio" / f"{i}.wav", 0.4 + 0.1 * (i % 4), seed=i)
    rows = [
        {"audio": f"audio/{i}.wav", "task": ("asr", "er", "acap")[i % 3], "response": answers[i % len(answers)]}
        for i in range(num_rows)
    ]
    return write_manifest(folder / "train.jsonl", rows)


__all__ = [
    "CHAT_TEMPLATE",
    "RATE",
    "character_tokenizer",
    "small_corpus",
    "tiny_processor",
    "write_clip",
    "write_manifest",
]


def check_compiled(model: ListenForConditionalGeneration, batch: dict[str, Any], backend: str) -> None:
    """The forward pass compiles into one graph, whose loss and gradients are those of the pass without compilation."""
    torch._dynamo.reset()
    losses, gradients = [], []
    for forward in (model.forward, torch.compile(model.forward, fullgraph=True, backend=backend)):
        model.zero_grad()
        losses.append(forward(**batch).loss)
        losses[-1].backward()
        gradients.append([weight.grad.clone() for weight in model.adapters.parameters()])
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
