"""How the cost grows with audio length, batch, pool size, prompts and adapters: fitted exponents, and a plot."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch

from listen.configuration_adapter import ListenPromptPoolConfig
from listen.modeling_prompt_pool import ListenPromptPool

from .harness import Figure
from .models import Setting

SECONDS, BATCHES, ADAPTERS = (2.0, 4.0, 8.0, 16.0), (1, 2, 4, 8), (1, 2, 4, 8)
POOL_SIZES, PROMPTS = (64, 256, 1024, 4096), (4, 8, 16, 32)


def growth(setting: Setting) -> list[Figure]:
    """Fitted exponents: 1 is growth in proportion, 0 none. `--plot FILE` draws the times."""
    steps = setting.options.points
    curves = {
        "audio_seconds": _times(setting, SECONDS[:steps], lambda n: _forward(setting, 1, n)),
        "batch": _times(setting, BATCHES[:steps], lambda n: _forward(setting, n, 2.0)),
        "pool_size": _times(setting, POOL_SIZES[:steps], lambda n: _pool(setting, n, 16)),
        "prompts": _times(setting, PROMPTS[:steps], lambda n: _pool(setting, 256, n)),
        "adapters": _times(setting, ADAPTERS[:steps], lambda n: _adapters(setting, n)),
    }
    if setting.options.plot:
        _plot(curves, setting)
    return [_exponent(name, *curve) for name, curve in curves.items()]


def _times(setting: Setting, sizes: tuple[float, ...], make: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Sizes `(points,)` and seconds of each round `(rounds, points)`."""
    rows = setting.compare(**{str(size): torch.no_grad()(make(size)) for size in sizes})
    return np.array(sizes, float), np.array([row.rounds for row in rows]).T


def _forward(setting: Setting, batch: int, seconds: float) -> Callable[[], object]:
    audio = setting.audio(batch, seconds)
    inputs = setting.inputs(audio)
    return lambda: setting.model(**inputs, **audio, logits_to_keep=1)


def _pool(setting: Setting, pool_size: int, k: int) -> Callable[[], object]:
    config = ListenPromptPoolConfig(pool_size=pool_size, num_prompts=k)
    pool = ListenPromptPool(config, setting.model.config.text_width).to(setting.device)
    for parameter in pool.parameters():
        torch.nn.init.normal_(parameter)
    query = torch.randn(8, setting.model.config.text_width, device=setting.device)  # (batch, width)
    counts = torch.full((8,), k, device=setting.device)
    return lambda: pool(query, counts)


def _adapters(setting: Setting, count: int) -> Callable[[], object]:
    """A batch of 8 rows that `count` adapters share."""
    model = setting.model
    for i in range(1, count):
        if f"growth{i}" not in model.adapters:
            model.adapters[f"growth{i}"] = copy.deepcopy(model.adapters["default"])
    names = ["default", *(f"growth{i}" for i in range(1, count))] * 8
    audio = setting.audio(8, 2.0)
    inputs = setting.inputs(audio)
    return lambda: model(**inputs, **audio, logits_to_keep=1, adapter_names=names[:8])


def _exponent(name: str, sizes: np.ndarray, rounds: np.ndarray) -> Figure:
    slopes = [np.polyfit(np.log(sizes), np.log(times), 1)[0] for times in rounds]
    middle = float(np.median(slopes))
    return Figure(f"growth.{name}", middle, 1.0, middle, float(min(slopes)), float(max(slopes)), "exponent", 1.0)


def _plot(curves: dict[str, tuple[np.ndarray, np.ndarray]], setting: Setting) -> None:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(3 * len(curves), 3), layout="constrained")
    for axes, (name, (sizes, rounds)) in zip(canvas.subplots(1, len(curves)), curves.items(), strict=True):
        axes.loglog(sizes, np.median(rounds, axis=0), marker="o")
        axes.set(xlabel=name.replace("_", " "), ylabel="seconds")
    canvas.suptitle(setting.name)
    canvas.savefig(setting.options.plot)
