"""Training steps against the cost that no method avoids, and against other ways to train."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn

from listen import ListenModel

from .harness import Figure, both_figures, memory_figure, time_figure
from .models import Setting

Step = Callable[[], object]
Loss = Callable[[torch.Tensor, nn.Linear, torch.Tensor], torch.Tensor]
PADDED_SECONDS = 30.0  # what Whisper's own extractor pads clips to
LARGE_VOCABULARY = 128_256  # Llama 3
CHUNK = 64  # positions whose logits exist at a time


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
    stored, onthefly, bare, with_encoders, lora, lora_all, plain = setting.compare(
        stored=listen_step(setting, {**inputs, **encoded}, kept),
        onthefly=listen_step(setting, {**inputs, **audio}, kept),
        bare=floor,
        with_encoders=lambda: (model.encode_audio(**audio), floor()),
        lora=lora_step(setting, inputs, ["q_proj", "v_proj"]),
        lora_all=lora_step(setting, inputs, "all-linear"),
        plain=listen_step(setting, {**setting.inputs(padded), **padded}, 0),
    )
    return [
        *both_figures("training_step.stored", stored, bare, 1.10),
        *both_figures("training_step.encoders", onthefly, with_encoders, 1.05),
        *both_figures("training_step.lora", stored, lora, 1 / 1.2),
        *both_figures("training_step.lora_all_linear", stored, lora_all, 1 / 1.2),
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


def lora_step(setting: Setting, inputs: dict[str, torch.Tensor], modules: list[str] | str) -> Step:
    """A step of LoRA, rank 8, by PEFT on these modules of a copy of the LLM, on ready embeddings."""
    language_model = copy.deepcopy(setting.model.language_model)
    language_model.add_adapter(LoraConfig(r=8, target_modules=modules))
    optimizer = torch.optim.AdamW([p for p in language_model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    pass_once = bare_step(setting, language_model, inputs)

    def step() -> None:
        pass_once()
        optimizer.step()
        optimizer.zero_grad()

    return step


def padding(setting: Setting) -> list[Figure]:
    """A step of the LLM on clips of 2 to 10 s, padded on the left, against as many positions without padding.

    The part above 1 is the most that packing of sequences could save in batches of random clips.
    """
    language_model = setting.model.train().language_model
    clips = [setting.audio(1, seconds) for seconds in torch.linspace(2, 10, setting.options.batch).tolist()]
    lengths = torch.tensor([setting.inputs(clip)["input_ids"].shape[1] for clip in clips])  # (batch,)

    def step(mask: torch.Tensor) -> Step:
        mask = mask.to(setting.device)  # (batch, positions)
        return bare_step(setting, language_model, {"input_ids": torch.zeros_like(mask), "attention_mask": mask})

    positions = torch.arange(int(lengths.max()))  # (positions,)
    padded = (positions >= positions.numel() - lengths[:, None]).long()  # (batch, positions)
    even = torch.ones(len(lengths), round(lengths.float().mean().item()), dtype=torch.long)
    return both_figures("padding", *setting.compare(padded=step(padded), even=step(even)))


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


def chunked_loss(setting: Setting) -> list[Figure]:
    """The loss from all logits of the response, as the model computes it, against chunks of 64 positions.

    Forward and backward with stored features, once with the LLM's own head and once with a random one of 128,256
    tokens. The chunks are those of `torch.nn.functional.linear_cross_entropy`.
    """
    own = setting.model.train().get_output_embeddings()
    like = {"device": own.weight.device, "dtype": own.weight.dtype}
    large = nn.Linear(own.in_features, LARGE_VOCABULARY, bias=False, **like).requires_grad_(False)
    audio = setting.audio(setting.options.batch, setting.options.seconds)
    inputs = {**setting.inputs(audio), **setting.encoded(audio)}
    figures = []
    for name, head in {"chunked_loss": own, "chunked_loss.128k": large}.items():
        steps = {loss.__name__: loss_step(setting, inputs, head, loss) for loss in (whole_loss, loss_in_chunks)}
        figures += both_figures(name, *setting.compare(**steps))
    return figures


def loss_step(setting: Setting, inputs: dict[str, torch.Tensor], head: nn.Linear, loss: Loss) -> Step:
    """Forward to the LLM's last states, `loss` on those of the response, and the backward pass."""
    model, answer = setting.model, response_length(setting)
    targets = inputs["input_ids"][:, -answer:].flatten().clamp_max(head.out_features - 1)  # (batch * answer,)

    def step() -> None:
        states = ListenModel.forward(model, **inputs).last_hidden_state  # (batch, positions, width)
        loss(states[:, -answer - 1 : -1].flatten(0, 1), head, targets).backward()
        model.zero_grad()

    return step


def whole_loss(states: torch.Tensor, head: nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy from float32 logits of all positions."""
    return F.cross_entropy(head(states).float(), targets)


def loss_in_chunks(states: torch.Tensor, head: nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """The same, without all logits at once."""
    chunks = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
    return F.linear_cross_entropy(states, head.weight, targets, linear_bias=head.bias, options=chunks)
