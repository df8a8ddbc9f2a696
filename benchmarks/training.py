"""Training steps against the cost that no method avoids, and against other ways to train."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn

from .harness import Figure, both_figures, memory_figure, time_figure
from .models import Setting

Step = Callable[[], object]
PADDED_SECONDS = 30.0  # what Whisper's own extractor pads clips to


def training_step(setting: Setting) -> list[Figure]:
    """A training step against its floor, LoRA, and a plain loop.

    The floor is the frozen LLM on ready embeddings of as many positions, its head on as many of them, and the backward
    pass through its activations. The plain loop pads clips to 30 s, encodes in every step and computes all logits.
    """
    options, model = setting.options, setting.model.train()
    audio = setting.audio(options.batch, options.seconds)
    inputs, encoded = setting.inputs(audio), setting.encoded(audio)
    padded = setting.audio(options.batch, options.seconds, PADDED_SECONDS)
    kept = response_length(setting) + 1
    floor = bare_step(setting, model.language_model, inputs)
    stored, onthefly, bare, with_encoders, lora, plain = setting.compare(
        stored=listen_step(setting, {**inputs, **encoded}, kept),
        onthefly=listen_step(setting, {**inputs, **audio}, kept),
        bare=floor,
        with_encoders=lambda: (model.encode_audio(**audio), floor()),
        lora=lora_step(setting, inputs),
        plain=listen_step(setting, {**setting.inputs(padded), **padded}, 0),
    )
    return [
        *both_figures("training_step.stored", stored, bare, 1.10),
        *both_figures("training_step.encoders", onthefly, with_encoders, 1.05),
        *both_figures("training_step.lora", stored, lora, 1 / 1.2),
        time_figure("training_step.stored_against_encoders", stored, onthefly),
        time_figure("training_step.plain_loop", stored, plain, 1 / 4),
        *memory_figure("training_step.plain_loop", stored, plain, 0.5),
    ]


def response_length(setting: Setting) -> int:
    """Half of the text is the answer."""
    return setting.options.text - setting.options.text // 2


def listen_step(setting: Setting, inputs: dict[str, torch.Tensor], kept: int) -> Step:
    """A step of the whole model: forward, backward to the adapter, fused AdamW as by the Trainer."""
    model, answer = setting.model, response_length(setting)
    labels = torch.full_like(inputs["input_ids"], -100)  # (batch, positions)
    labels[:, -answer:] = inputs["input_ids"][:, -answer:]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> None:
        model(**inputs, labels=labels, logits_to_keep=kept).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bare_step(setting: Setting, language_model: nn.Module, inputs: dict[str, torch.Tensor]) -> Step:
    """Forward of the LLM on ready embeddings and backward down to them."""
    ids, answer = inputs["input_ids"], response_length(setting)
    ready = setting.embeddings(ids)  # (batch, positions, width)

    def step() -> None:
        embeds = ready.clone().requires_grad_()
        outputs = language_model(
            inputs_embeds=embeds,
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            logits_to_keep=answer + 1,
        )
        logits = outputs.logits[:, :-1].flatten(0, 1)  # (batch * answer, vocabulary)
        F.cross_entropy(logits.float(), ids[:, -answer:].flatten().clamp_max(logits.shape[-1] - 1)).backward()

    return step


def lora_step(setting: Setting, inputs: dict[str, torch.Tensor]) -> Step:
    """A step of LoRA, rank 8, by PEFT on a copy of the LLM, on ready embeddings."""
    language_model = copy.deepcopy(setting.model.language_model)
    language_model.add_adapter(LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in language_model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    pass_once = bare_step(setting, language_model, inputs)

    def step() -> None:
        pass_once()
        optimizer.step()
        optimizer.zero_grad()

    return step


def response_logits(setting: Setting) -> list[Figure]:
    """The LLM's head on the response only against the head on all positions, by a step with stored features."""
    options = setting.options
    setting.model.train()
    audio = setting.audio(options.batch, options.seconds)
    inputs = {**setting.inputs(audio), **setting.encoded(audio)}
    kept, everything = setting.compare(
        kept=listen_step(setting, inputs, response_length(setting) + 1), everything=listen_step(setting, inputs, 0)
    )
    return both_figures("response_logits", kept, everything)
