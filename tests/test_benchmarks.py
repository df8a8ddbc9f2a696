"""Benchmarks run, and what they measure is right."""

import importlib
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from listen.configuration_listen import BACKBONES
from listen.presets_listen import PRESETS

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SMALLEST = {
    "encoder_length": ["--seconds", "1", "--batch", "1", "--width", "64", "--layers", "1"],
    "beats_attention": ["--seconds", "0.5", "--batch", "1", "--layers", "1"],
    "feature_extractor": ["--seconds", "0.5", "--batch", "2"],
    "response_logits": [
        "--vocabularies",
        "1000",
        "--batch",
        "1",
        "--context",
        "16",
        "--response",
        "4",
        "--width",
        "64",
    ],
    "cached_features": ["--seconds", "1", "--batch", "2"],
    "full_size": [
        "--preset",
        "listen-tiny",
        "--dtype",
        "float32",
        "--batch",
        "2",
        "--seconds",
        "0.5",
        "--text",
        "4",
        "--new-tokens",
        "2",
    ],
}
MOST_HOPS = {"row to batch": (90, 9), "batch to loss": (35, 7)}  # functions, files
MIB = 2**20


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch):
    """The module that the benchmarks share, imported as they do it."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("harness")


def test_every_benchmark_is_run_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*SMALLEST, "harness", "hops"}


@pytest.mark.parametrize("name", SMALLEST)
def test_benchmark_compares_with_its_baseline(name: str, harness, capsys: pytest.CaptureFixture) -> None:
    threads = torch.get_num_threads()
    rows = importlib.import_module(name).main(["--repeats", "1", "--device", "cpu", *SMALLEST[name]])
    assert torch.get_num_threads() == threads
    assert len(rows) >= 2 and all(row.seconds > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "1.00x" in printed and "torch" in printed


@pytest.mark.parametrize("preset", PRESETS)
def test_whole_models_are_made_on_one_device(preset: str, harness) -> None:
    build = importlib.import_module("full_size").build
    model = build(Namespace(preset=preset, device="meta", dtype="bfloat16"))
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    for name in BACKBONES:
        backbone, dtype = getattr(model, name), torch.float32 if name in model.config.trainable else torch.bfloat16
        assert backbone is None or {parameter.dtype for parameter in backbone.parameters()} == {dtype}
    assert {parameter.dtype for parameter in model.adapters.parameters()} == {torch.float32}


def test_hops_counts_own_functions_of_a_row_and_of_a_batch(harness) -> None:
    hops = importlib.import_module("hops").measure()
    assert "data/collator.py:ListenCollator.__call__" in hops["row to batch"].functions
    assert "modeling_listen.py:ListenForConditionalGeneration.forward" in hops["batch to loss"].functions
    counts = {name: (len(found.functions), len(found.files)) for name, found in hops.items()}
    assert {name: count for name, count in counts.items() if any(map(int.__gt__, count, MOST_HOPS[name]))} == {}


def test_ratios_tell_time_and_memory_apart(harness) -> None:
    held = [torch.ones(16 * MIB)]  # what lies about before a run is not counted
    variants = {
        "slow": lambda: (time.sleep(0.05), torch.ones(2 * MIB).sum()),
        "large": lambda: torch.ones(16 * MIB).sum(),
    }
    slow, large = harness.compare(variants, "cpu", repeats=2)
    assert slow.fastest <= slow.seconds <= slow.slowest
    assert slow.seconds > 0.05
    if large.peak_bytes is not None:
        assert 60 * MIB < large.peak_bytes < 80 * MIB  # 16 Mi float32
        assert 6 * MIB < slow.peak_bytes < 20 * MIB
    assert held[0][0] == 1
