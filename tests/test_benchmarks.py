"""Benchmarks run, and what they measure is right."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Measurement, compare, rate_figure
from benchmarks.hops import measure
from benchmarks.models import Setting, random_model
from benchmarks.run import BENCHMARKS, main, parse
from benchmarks.throughput import training_flops
from benchmarks.training import bare_step, response_length
from listen.configuration_listen import BACKBONES
from listen.presets_listen import PRESETS

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SMALLEST = [
    *("--device", "cpu", "--repeats", "1", "--batch", "2", "--seconds", "0.5", "--text", "4", "--prompts", "4"),
    *("--new-tokens", "2", "--batches", "1", "--points", "2"),
    *("--backend", "aot_eager"),  # inductor compiles for minutes
]
MOST_HOPS = {"row to batch": (90, 9), "batch to loss": (35, 7)}  # functions, files
MIB = 2**20


def test_every_benchmark_is_in_the_command() -> None:
    """Each module but those that measure nothing gives the command at least one benchmark."""
    found = {function.__module__.split(".")[-1] for function in BENCHMARKS.values()}
    assert {path.stem for path in FOLDER.glob("*.py")} == {*found, "__init__", "harness", "hops", "models", "run"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "compile" else n for n in BENCHMARKS])
def test_benchmark_compares_with_its_baseline(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if name == "bitsandbytes":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra")
    threads = torch.get_num_threads()
    figures = main([name, *SMALLEST, "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "growth.png")])
    assert torch.get_num_threads() == threads
    assert figures and all(
        math.isfinite(figure.ratio) and figure.low <= figure.ratio <= figure.high for figure in figures
    )
    if name != "growth":
        assert all(figure.ours > 0 and figure.baseline > 0 for figure in figures)
    assert (tmp_path / "growth.png").is_file() == (name == "growth")
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in rows] == [figure.name for figure in figures]
    assert all({"name", "ours", "baseline", "ratio"} <= row.keys() for row in rows)
    printed = capsys.readouterr().out
    assert figures[0].name in printed and "torch" in printed


def test_command_lists_its_benchmarks_and_refuses_others(capsys: pytest.CaptureFixture) -> None:
    assert main(["list"]) == []
    assert all(f"{name}: " in capsys.readouterr().out for name in ["training_step"])
    with pytest.raises(SystemExit):
        main(["trainingstep"])
    assert "unknown benchmark 'trainingstep'" in capsys.readouterr().err


@pytest.mark.parametrize("preset", PRESETS)
def test_whole_models_are_made_on_one_device(preset: str) -> None:
    model = random_model(preset, "meta", "bfloat16")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    for name in BACKBONES:
        backbone, dtype = getattr(model, name), torch.float32 if name in model.config.trainable else torch.bfloat16
        assert backbone is None or {parameter.dtype for parameter in backbone.parameters()} == {dtype}
    assert {parameter.dtype for parameter in model.adapters.parameters()} == {torch.float32}


def test_hops_counts_own_functions_of_a_row_and_of_a_batch() -> None:
    hops = measure()
    assert "data/collator.py:ListenCollator.__call__" in hops["row to batch"].functions
    assert "modeling_listen.py:ListenForConditionalGeneration.forward" in hops["batch to loss"].functions
    counts = {name: (len(found.functions), len(found.files)) for name, found in hops.items()}
    assert {name: count for name, count in counts.items() if any(map(int.__gt__, count, MOST_HOPS[name]))} == {}


def test_rates_are_work_per_second() -> None:
    ours, baseline = Measurement("ours", (1.0, 2.0, 4.0)), Measurement("baseline", (1.0, 1.0, 1.0))
    figure = rate_figure("rate", 6.0, ours, 3.0, baseline, "tokens/s")
    assert (figure.ours, figure.baseline, figure.ratio, figure.low, figure.high) == (3.0, 3.0, 1.0, 0.5, 2.0)


def test_flops_of_training_are_four_for_each_weight_and_position() -> None:
    """Those that torch counts in matrix products, without attention scores."""
    setting = Setting(parse([*SMALLEST, "utilisation"]))
    inputs = setting.inputs(setting.audio(2, 0.5))
    step = bare_step(setting, setting.model.language_model, inputs)
    with FlopCounterMode(display=False) as counted:
        step()
    counts = {str(operation): count for operation, count in counted.get_flop_counts()["Global"].items()}
    products = sum(count for name, count in counts.items() if name.split(".")[-1] in ("mm", "addmm", "bmm"))
    expected = training_flops(setting, inputs["input_ids"].numel(), 2 * (response_length(setting) + 1))
    assert products == pytest.approx(expected, rel=0.01)


def test_ratios_tell_time_and_memory_apart() -> None:
    held = [torch.ones(16 * MIB)]  # what lies about before a run is not counted
    variants = {
        "slow": lambda: (time.sleep(0.05), torch.ones(2 * MIB).sum()),
        "large": lambda: torch.ones(16 * MIB).sum(),
    }
    slow, large = compare(variants, "cpu", repeats=2)
    assert slow.fastest <= slow.seconds <= slow.slowest
    assert slow.seconds > 0.05
    if large.peak_bytes is not None:
        assert 60 * MIB < large.peak_bytes < 80 * MIB  # 16 Mi float32
        assert 6 * MIB < slow.peak_bytes < 20 * MIB
    assert held[0][0] == 1
