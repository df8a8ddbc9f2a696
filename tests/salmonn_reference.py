"""SALMONN's window-level Q-Former as plain float64 loops over one clip, on checkpoints in the published format.

Written from the papers' formulas (SALMONN, arXiv 2310.13289, sec. 3; the Q-Former of BLIP-2, arXiv 2301.12597; BERT's
post-norm layers) and the names of the published tensors, independent of the library's own modules: windows and heads
are visited one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

FULL = {"speech": 1280, "audio": 768, "hidden": 768, "inner": 3072, "text": 256, "lora_width": 32}
TINY = {"speech": 32, "audio": 32, "hidden": 24, "inner": 40, "text": 48, "lora_width": 48}
HEADS = 12
LORA_LAYERS, LORA_RANK, LORA_ALPHA = 2, 8, 32


def tensor_shapes(
    speech: int, audio: int, hidden: int, inner: int, text: int, lora_width: int, layers: int = 2, queries: int = 1
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every published tensor; `audio` is 0 without BEATs, `lora_width` without LoRA."""
    bert = "speech_Qformer.bert"
    shapes: dict[str, tuple[int, ...]] = {"speech_query_tokens": (1, queries, hidden)}
    for name, width in (("ln_speech", speech), ("ln_audio", audio), (f"{bert}.embeddings.LayerNorm", hidden)):
        if width:
            shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    linear = {"speech_llama_proj": (text, hidden)}
    for i in range(layers):
        layer = f"{bert}.encoder.layer.{i}"
        for kind, source in (("attention", hidden), ("crossattention", speech + audio)):
            linear[f"{layer}.{kind}.self.query"] = (hidden, hidden)
            linear |= {f"{layer}.{kind}.self.{part}": (hidden, source) for part in ("key", "value")}
            linear[f"{layer}.{kind}.output.dense"] = (hidden, hidden)
            shapes |= {f"{layer}.{kind}.output.LayerNorm.{part}": (hidden,) for part in ("weight", "bias")}
        linear[f"{layer}.intermediate_query.dense"] = (inner, hidden)
        linear[f"{layer}.output_query.dense"] = (hidden, inner)
        shapes |= {f"{layer}.output_query.LayerNorm.{part}": (hidden,) for part in ("weight", "bias")}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for i in range(LORA_LAYERS if lora_width else 0):
        # a value projection onto half as many heads, as in grouped attention
        for name, out in (("q_proj", lora_width), ("v_proj", lora_width // 2)):
            module = f"llama_model.base_model.model.model.layers.{i}.self_attn.{name}"
            shapes[f"{module}.lora_A.default.weight"] = (LORA_RANK, lora_width)
            shapes[f"{module}.lora_B.default.weight"] = (out, LORA_RANK)
    return shapes


def synthetic_checkpoint(seed: int = 0, **sizes: int) -> dict:
    """`{"model": ...}` with random weights, scaled so that signals keep their size."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in tensor_shapes(**sizes).items():
        noise = torch.randn(shape, generator=generator)
        is_norm = name.startswith("ln_") or "LayerNorm" in name
        scale = 1.0 if name == "speech_query_tokens" else 0.2 if noise.dim() == 1 else 2.0 / math.sqrt(shape[-1])
        weights[name] = noise * scale + (1.0 if is_norm and name.endswith("weight") else 0.0)
    return {"model": weights}


def embed(
    checkpoint: dict,
    speech: torch.Tensor,
    audio: torch.Tensor | None = None,
    seconds_per_window: float = 0.333333,
    stride_seconds: float = 0.333333,
    only: Collection[int] | None = None,
) -> torch.Tensor:
    """Audio embeddings of one clip, float64.

    Args:
        checkpoint: in the published format.
        speech: `(frames, speech width)`, Whisper's output for 30 s.
        audio: `(frames, audio width)`, the output of BEATs for the clip.
        seconds_per_window: length of a window.
        stride_seconds: time from one window to the next.
        only: numbers of the windows that are wanted; all by default.

    Returns:
        `(windows * queries, text width)`.
    """
    weights = {name: tensor.double() for name, tensor in checkpoint["model"].items()}
    frames = layer_norm(weights, "ln_speech", speech.double(), 1e-5)  # (frames, speech width)
    if audio is not None:
        heard = layer_norm(weights, "ln_audio", audio.double(), 1e-5)  # (frames, audio width)
        length = max(len(frames), len(heard))
        frames = torch.cat([silence_after(frames, length), silence_after(heard, length)], 1)
    size, stride = (round(1500 * seconds / 30.0) for seconds in (seconds_per_window, stride_seconds))
    found, start = [], 0
    while start + size <= len(frames):
        if only is None or start // stride in only:
            found.append(read_window(weights, frames[start : start + size]))
        start += stride
    return torch.cat(found)


def silence_after(frames: torch.Tensor, length: int) -> torch.Tensor:
    """Zeros up to `length` frames."""
    return torch.cat([frames, torch.zeros(length - len(frames), frames.shape[1]).double()])


def read_window(weights: dict[str, torch.Tensor], frames: torch.Tensor) -> torch.Tensor:
    """What the queries find in `(frames, width)`: `(queries, text width)`."""
    bert = "speech_Qformer.bert"
    states = layer_norm(weights, f"{bert}.embeddings.LayerNorm", weights["speech_query_tokens"][0])
    layer = 0
    while f"{bert}.encoder.layer.{layer}.attention.self.query.weight" in weights:
        prefix = f"{bert}.encoder.layer.{layer}"
        states = attend(weights, f"{prefix}.attention", states, states)
        states = attend(weights, f"{prefix}.crossattention", states, frames)
        states = feed_forward(weights, prefix, states)
        layer += 1
    return linear(weights, "speech_llama_proj", states)


def attend(weights: dict[str, torch.Tensor], name: str, states: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v head by head, projected, added and normalised; nothing is masked."""
    queries, keys, values = (
        linear(weights, f"{name}.self.{part}", rows)
        for part, rows in (("query", states), ("key", source), ("value", source))
    )
    width = states.shape[1] // HEADS
    heads = []
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        scores = queries[:, part] @ keys[:, part].T / math.sqrt(width)  # (queries, source)
        heads.append(torch.softmax(scores, 1) @ values[:, part])
    mixed = linear(weights, f"{name}.output.dense", torch.cat(heads, 1))
    return layer_norm(weights, f"{name}.output.LayerNorm", mixed + states)


def feed_forward(weights: dict[str, torch.Tensor], layer: str, states: torch.Tensor) -> torch.Tensor:
    """The queries' own feed-forward block, with the exact GELU."""
    inner = linear(weights, f"{layer}.intermediate_query.dense", states)
    inner = 0.5 * inner * (1.0 + torch.erf(inner / math.sqrt(2.0)))
    out = linear(weights, f"{layer}.output_query.dense", inner)
    return layer_norm(weights, f"{layer}.output_query.LayerNorm", out + states)


def linear(weights: dict[str, torch.Tensor], name: str, rows: torch.Tensor) -> torch.Tensor:
    """W x + b for each row."""
    return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(weights: dict[str, torch.Tensor], name: str, rows: torch.Tensor, epsilon: float = 1e-12) -> torch.Tensor:
    """Each row normalised to mean 0 and variance 1, scaled and shifted; BERT's epsilon by default."""
    centred = rows - rows.mean(1, keepdim=True)
    variance = centred.square().mean(1, keepdim=True)
    return centred / torch.sqrt(variance + epsilon) * weights[f"{name}.weight"] + weights[f"{name}.bias"]
