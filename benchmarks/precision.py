"""The dtype of the weights, and weights of 4 and 8 bit: training steps and decoding against the weights as they are."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from .harness import MIB, Figure, both_figures
from .models import MINIATURE, Setting
from .training import Step, listen_step, response_length


def dtypes(setting: Setting) -> list[Figure]:
    """bf16 autocast over fp32 weights, and bf16 weights, against fp32 alone: training step and decoding of one row."""
    own = setting.options.dtype
    full, half = (
        setting if own == name else Setting(Namespace(**{**vars(setting.options), "dtype": name}))
        for name in ("float32", "bfloat16")
    )

    def autocast(call: Step) -> Step:
        return torch.autocast(setting.device.split(":")[0], torch.bfloat16)(call)

    figures = []
    for name, make in {"training": training, "decoding": decoding}.items():
        call = make(full)
        fp32, cast, bf16 = setting.compare(fp32=call, autocast=autocast(call), bf16=make(half))
        figures += both_figures(f"dtypes.{name}.autocast", cast, fp32)
        figures += both_figures(f"dtypes.{name}.bfloat16", bf16, fp32)
    return figures


def bitsandbytes(setting: Setting) -> list[Figure]:
    """The LLM in 4 and 8 bit by bitsandbytes against its own dtype: weights, training step, decoding of one row."""
    model = setting.model
    whole, figures = model.language_model, []
    blocks = setting.device != "cpu" or model.config.text_width % 64 == 0  # which the kernel of 4 bits on CPUs needs
    with TemporaryDirectory() as scratch:
        for bits in (4, 8) if blocks else (8,):
            small = quantised(setting, Path(scratch), bits)
            sizes = [sum(w.numel() * w.element_size() for w in llm.parameters()) / MIB for llm in (small, whole)]
            ratio = sizes[0] / sizes[1]
            figures.append(Figure(f"bitsandbytes.{bits}bit.weights", *sizes, ratio, ratio, ratio, "MiB"))
            for name, make in {"training": training, "decoding": decoding}.items():
                call = make(setting)
                compared = setting.compare(small=over(model, small, call), whole=over(model, whole, call))
                figures += both_figures(f"bitsandbytes.{bits}bit.{name}", *compared)
            model.language_model = whole
    return figures


def quantised(setting: Setting, scratch: Path, bits: int) -> PreTrainedModel:
    """The frozen LLM of the setting in `bits` bit; weights that lie in no folder are saved in `scratch`."""
    options = setting.options
    folder = options.llm or (scratch if options.preset else MINIATURE / "backbones" / "language_model")
    if options.preset and not options.llm and not any(scratch.iterdir()):
        setting.model.language_model.save_pretrained(scratch)
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    given = {"dtype": setting.model.language_model.dtype, "device_map": setting.device, "quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, **given).requires_grad_(False)


def over(model: torch.nn.Module, language_model: PreTrainedModel, call: Step) -> Step:
    """`call` with another LLM in the model."""

    def run() -> None:
        model.language_model = language_model
        call()

    return run


def training(setting: Setting) -> Callable[[], object]:
    """A training step with stored features."""
    options = setting.options
    audio = setting.audio(options.batch, options.seconds)
    step = listen_step(setting, {**setting.inputs(audio), **setting.encoded(audio)}, response_length(setting) + 1)

    def run() -> None:
        setting.model.train()
        step()

    return run


def decoding(setting: Setting) -> Callable[[], object]:
    """The greedy answer to one clip with stored encoder frames."""
    options = setting.options
    audio = setting.audio(1, options.seconds)
    inputs, tokens = {**setting.inputs(audio), **setting.encoded(audio)}, options.new_tokens
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return lambda: setting.model.eval().generate(**inputs, **length)
