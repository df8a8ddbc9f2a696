"""Measure what the model costs beside its frozen LLM and beside other ways to do the same.

    python -m benchmarks.run list
    python -m benchmarks.run training_step decoding --threads 1 --json figures.json
    python -m benchmarks.run all --speech openai/whisper-base --llm HuggingFaceTB/SmolLM2-135M-Instruct --prompts 16
    python -m benchmarks.run all --device cuda

On the CPU the miniature is measured, on a GPU the preset `listen-llama3-8b` with random weights in bf16, and with
`--speech` and `--llm` a model over those backbones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from .answering import decoding, first_token, pool, static_cache
from .audio import beats_attention, encoder_length, front_end
from .compiling import compile
from .growth import growth
from .harness import Figure, machine, report
from .models import Setting
from .precision import bitsandbytes, dtypes
from .serving import serving
from .start import start
from .throughput import profile, utilisation
from .training import chunked_loss, padding, response_logits, training_step

BENCHMARKS: dict[str, Callable[[Setting], list[Figure]]] = {
    function.__name__: function
    for function in (
        *(training_step, padding, utilisation, profile, response_logits, chunked_loss, dtypes, bitsandbytes),
        *(first_token, decoding, static_cache, pool),
        *(front_end, encoder_length, beats_attention, compile, start, growth, serving),
    )
}


def parse(given: list[str] | None) -> argparse.Namespace:
    """The options, with defaults that depend on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"all, list, {', '.join(BENCHMARKS)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--speech", help="folder or Hub id of a speech encoder; with --llm")
    parser.add_argument("--llm", help="folder or Hub id of an LLM; with --speech")
    parser.add_argument("--preset", help="a preset with random weights (default on a GPU: listen-llama3-8b)")
    parser.add_argument("--dtype", help="of the frozen backbones (default: float32 on the CPU, else bfloat16)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw the curves of growth to this file")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="rows (default 8)")
    parser.add_argument("--seconds", type=float, default=5.0, help="audio of each row (default 5)")
    parser.add_argument("--text", type=int, default=32, help="tokens of text, half of them the answer (default 32)")
    parser.add_argument("--prompts", type=int, help="prompts of each row (default: the model's)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of an answer (default 32)")
    parser.add_argument("--batches", type=int, default=3, help="how many of the decoded batches 1, 8, 64 (default all)")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default inductor)")
    parser.add_argument("--points", type=int, default=4, help="points of a curve of growth (default 4)")
    options = parser.parse_args(given)
    if bool(options.speech) != bool(options.llm):
        parser.error("--speech and --llm go together")
    if unknown := [name for name in options.names if name not in (*BENCHMARKS, "all", "list")]:
        parser.error(f"unknown benchmark {unknown[0]!r}; choose from all, list, {', '.join(BENCHMARKS)}")
    on_gpu = options.device != "cpu"
    if on_gpu and not options.preset and not options.llm:
        options.preset = "listen-llama3-8b"
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    return options


def main(given: list[str] | None = None) -> list[Figure]:
    """Run the benchmarks that the command line names, print their tables and write the figures."""
    options = parse(given)
    if "list" in options.names:
        for name, function in BENCHMARKS.items():
            print(f"{name}: {function.__doc__.splitlines()[0]}")
        return []
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    setting, figures = Setting(options), []
    for name in BENCHMARKS if "all" in options.names else options.names:
        figures += (found := BENCHMARKS[name](setting))
        report(f"{name}, {setting.name}, batch {options.batch}, {options.seconds:g} s", found, options.device)
        if options.json:
            write(options.json, figures, machine(options.device))
    return figures


def write(path: Path, figures: list[Figure], where: str) -> None:
    """Write figures as a flat list of JSON objects."""
    rows = [
        {"name": f.name, "ours": f.ours, "baseline": f.baseline, "ratio": f.ratio, "unit": f.unit, "machine": where}
        for f in figures
    ]
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
