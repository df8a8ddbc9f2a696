"""Start: import and `from_pretrained` in a process of its own, against the LLM alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .harness import MIB, Figure, Measurement, time_figure
from .models import MINIATURE, Setting

_MEASURED = """
import json, sys, time
{imports}
from benchmarks.harness import read_peak, start_peak
before = start_peak("cpu")
model = {load}.from_pretrained(sys.argv[1])
seconds, peak = time.process_time(), read_peak("cpu")
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps([seconds, None if peak is None else peak - before, weights]))
"""
_OURS = _MEASURED.format(
    imports="from listen import ListenForConditionalGeneration", load="ListenForConditionalGeneration"
)
_BARE = _MEASURED.format(imports="from transformers import AutoModelForCausalLM", load="AutoModelForCausalLM")


def start(setting: Setting) -> list[Figure]:
    """Processor time of import and `from_pretrained` against the LLM alone; memory of loading against the weights."""
    options = setting.options
    with TemporaryDirectory() as folder:
        if options.speech and options.llm:
            setting.model.save_pretrained(folder)
            model, llm = folder, options.llm
        else:
            model, llm = str(MINIATURE), str(MINIATURE / "backbones" / "language_model")
        rounds = [(_run(_OURS, model), _run(_BARE, llm)) for _ in range(options.repeats)]
    ours, bare = (Measurement(name, tuple(run[i][0] for run in rounds)) for i, name in enumerate(("ours", "llm")))
    figures = [time_figure("start", ours, bare, 1.3)]
    peaks, weights = [own[1] for own, _ in rounds if own[1] is not None], rounds[0][0][2]
    if peaks:
        ratio = max(peaks) / weights
        figures.append(Figure("start.memory", max(peaks) / MIB, weights / MIB, ratio, ratio, ratio, "MiB", 1.05))
    return figures


def _run(code: str, folder: str) -> list[Any]:
    """Processor seconds, peak bytes of loading and bytes of weights, from a fresh process."""
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", code, str(Path(folder).resolve())]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
