"""Print what a model costs before it is built: parameters, memory and FLOPs, by module.

    listen cost listen-llama3-8b
    listen cost examples/configs/demo.yaml --audio-seconds 10 --batch-size 8
    listen cost model_cards/listen-tiny --json

Takes the name of a preset, a training recipe or the folder of a saved model. Nothing is downloaded, and the weights of
the backbones are never allocated. `listen.analysis.sizes` says how each figure is counted.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from .. import ListenConfig
from ..analysis.sizes import Sizes, measure_sizes
from ..configuration_listen import BACKBONES
from ..presets_listen import PRESETS
from ..training import ModelArguments, build_config, read_config
from ..training.build import adapter_settings
from ..training.parsing import RECIPES
from ..training.values import check_values, field_names, refuse_unknown
from .help import ArgumentFormatter


def read_model(source: str) -> tuple[PreTrainedConfig, dict[str, Any] | None]:
    """Config and LoRA settings of a preset, a training recipe (`.yaml`) or a saved model's folder.

    A recipe whose backbones are not on this machine is measured with the shapes of its preset.

    Raises:
        ValueError: none of the three, or a recipe without preset whose backbones are not on this machine.
        FileNotFoundError: there is no such recipe.
    """
    if source in PRESETS:
        return ListenConfig.from_preset(source), None
    if Path(source).suffix in (".yaml", ".yml") or (RECIPES / f"{source}.yaml").is_file():
        return _read_recipe(source)
    if not Path(source).is_dir():
        raise ValueError(
            f"{source!r} is neither a preset ({', '.join(PRESETS)}), nor a recipe (.yaml), nor the folder of a model"
        )
    return ListenConfig.from_pretrained(source), None


def _read_recipe(path: str) -> tuple[PreTrainedConfig, dict[str, Any] | None]:
    section = read_config(path).get("model") or {}
    refuse_unknown(section, field_names(ModelArguments), "model.")
    arguments = ModelArguments(**check_values("model.", ModelArguments, section))
    if arguments.checkpoint:
        return ListenConfig.from_pretrained(arguments.checkpoint), arguments.lora
    sources = [getattr(arguments, name) for name in BACKBONES if getattr(arguments, name)]
    if all(_is_here(source) for source in sources):
        return build_config(arguments), arguments.lora
    if not arguments.preset:
        raise ValueError(f"{path} names no preset and not all of {', '.join(sources)} are on this machine")
    return ListenConfig(**{**PRESETS[arguments.preset](), **adapter_settings(arguments)}), arguments.lora


def _is_here(source: str) -> bool:
    return Path(source).is_dir() or isinstance(try_to_load_from_cache(source, "config.json"), str)


def parameter_rows(sizes: Sizes) -> list[tuple[str, str, str, str]]:
    """Rows of the table of parameters: part, all, trainable, memory."""
    rows = [(name, f"{m.parameters:,}", f"{m.learned:,}", _bytes(m.bytes)) for name, m in sizes.modules.items()]
    entries = sizes.modules.values()
    totals = (sum(m.parameters for m in entries), sum(m.learned for m in entries))
    return [*rows, ("all", *(f"{total:,}" for total in totals), _bytes(sizes.weight_bytes))]


def cost_rows(sizes: Sizes) -> list[tuple[str, str]]:
    """Rows of the table of memory and FLOPs: what, how much."""
    audio = sizes.flops_per_audio_second.items()
    return [
        ("weights", _bytes(sizes.weight_bytes)),
        ("cache", _bytes(sizes.cache_bytes)),
        ("training: gradients and AdamW", _bytes(sizes.training_state_bytes)),
        ("training: activations", _bytes(sizes.activation_bytes)),
        *((f"{name}, a second of audio", _flops(flops)) for name, flops in audio),
        ("language_model, a position", _flops(sizes.flops_per_position)),
        ("language_model, a new token", _flops(sizes.flops_per_new_token)),
        ("forward pass", _flops(sizes.forward_flops)),
        ("training step", _flops(sizes.training_flops)),
    ]


def describe(sizes: Sizes) -> str:
    """The batch that the figures are for."""
    text = sizes.positions - sizes.num_prompts - sizes.num_audio
    return (
        f"batch {sizes.batch_size}, {sizes.audio_seconds:g} s of audio each, {sizes.positions} positions: "
        f"{sizes.num_prompts} prompts, {sizes.num_audio} audio embeddings, {text} of text"
    )


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def _flops(number: float) -> str:
    for unit in ("", "K", "M", "G"):
        if number < 1000:
            return f"{number:.3g} {unit}FLOP"
        number /= 1000
    return f"{number:.2f} TFLOP"


def _parse(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ArgumentFormatter)
    parser.add_argument("model", help=f"{', '.join(PRESETS)}, a recipe (.yaml), or the folder of a model")
    parser.add_argument("--batch-size", type=int, default=1, help="samples of the batch")
    parser.add_argument("--audio-seconds", type=float, default=30.0, help="audio of each sample")
    parser.add_argument("--text-tokens", type=int, default=64, help="tokens of its text")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the backbones")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> Sizes:
    """Measure the model that the command line names and print its figures."""
    options = _parse(given)
    try:
        config, lora = read_model(options.model)
        dtype = getattr(torch, options.dtype) if options.dtype else None
        sizes = measure_sizes(config, options.batch_size, options.audio_seconds, options.text_tokens, dtype, lora)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    if options.json:
        print(json.dumps(asdict(sizes), indent=2))
        return sizes
    parameters, costs = Table("part", title=options.model), Table("memory and FLOPs", "", title=describe(sizes))
    for heading in ("parameters", "trainable", "memory"):
        parameters.add_column(heading, justify="right")
    for table, rows in ((parameters, parameter_rows(sizes)), (costs, cost_rows(sizes))):
        for row in rows:
            table.add_row(*row)
        Console(markup=False).print(table)
    return sizes
