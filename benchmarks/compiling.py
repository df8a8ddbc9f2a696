"""What `torch.compile` gains on the inputs of one shape, and what its first call costs."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .harness import Figure, both_figures
from .models import Setting
from .training import response_length

Call = Callable[[], object]


def compile(setting: Setting) -> list[Figure]:
    """Training pass, prefill and encoders compiled by `torch.compile` against the same without it.

    `.first` is the wall time of the first call, which compiles. The backend `inductor` needs a C++ compiler on the CPU.
    """
    options, model = setting.options, setting.model
    audio = setting.audio(options.batch, options.seconds)
    inputs = setting.inputs(audio)
    is_audio, is_prompt = model.placeholder_masks(inputs["input_ids"])  # (batch, positions)
    inputs |= {"num_audio": int(is_audio.sum()), "num_prompts": int(is_prompt[0].sum()), **setting.encoded(audio)}
    answer = response_length(setting)
    labels = inputs["input_ids"].clone()  # (batch, positions)
    labels[:, :-answer] = -100

    def training(forward: Callable) -> Call:
        return lambda: forward(**inputs, labels=labels, logits_to_keep=answer + 1).loss.backward()

    def prefill(forward: Callable) -> Call:
        return torch.no_grad()(lambda: forward(**inputs, logits_to_keep=1))

    def encoders(encode: Callable) -> Call:
        return lambda: encode(**audio)

    figures = against_compiled(setting, "compile.training", training, model.train().forward)
    figures += against_compiled(setting, "compile.prefill", prefill, model.eval().forward)
    return figures + against_compiled(setting, "compile.encoders", encoders, model.encode_audio)


def against_compiled(setting: Setting, name: str, make: Callable[[Callable], Call], method: Callable) -> list[Figure]:
    """A call of `method` as `make` makes it: compiled against not compiled, and the first compiled one."""
    torch.compiler.reset()
    compiled = make(torch.compile(method, backend=setting.options.backend))
    start = time.perf_counter()
    compiled()
    first = time.perf_counter() - start
    compared = setting.compare(compiled=compiled, plain=make(method))
    setting.model.zero_grad()
    ratio = first / compared[1].seconds
    return [*both_figures(name, *compared), Figure(f"{name}.first", first, compared[1].seconds, ratio, ratio, ratio)]
