"""BEATs as plain float64 loops over one clip, on checkpoints in the published format.

Written from the paper's formulas and the names of the published tensors, independent of the library's own modules:
nothing is batched, fused or cached, and the scores are divided by 32 and multiplied again as published. The fast model
must match it.
"""

from __future__ import annotations

import math

import torch

PUBLISHED_CONFIG = {
    "input_patch_size": 16,
    "embed_dim": 512,
    "conv_bias": False,
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "activation_fn": "gelu",
    "layer_wise_gradient_decay_ratio": 1.0,
    "layer_norm_first": False,
    "deep_norm": True,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "dropout_input": 0.0,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "relative_position_embedding": True,
    "num_buckets": 320,
    "max_distance": 800,
    "gru_rel_pos": True,
    "finetuned_model": False,
    "predictor_dropout": 0.1,
    "predictor_class": 527,
}
TINY = {
    "embed_dim": 24,
    "encoder_layers": 3,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_attention_heads": 4,
    "conv_pos": 8,
    "conv_pos_groups": 4,
    "num_buckets": 16,
    "max_distance": 20,
    "predictor_class": 5,
}


def tensor_shapes(cfg: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a published checkpoint."""
    width, heads, inner = cfg["encoder_embed_dim"], cfg["encoder_attention_heads"], cfg["encoder_ffn_embed_dim"]
    embed, patch, kernel = cfg["embed_dim"], cfg["input_patch_size"], cfg["conv_pos"]
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (embed, 1, patch, patch),
        "layer_norm.weight": (embed,),
        "layer_norm.bias": (embed,),
        "encoder.pos_conv.0.bias": (width,),
        "encoder.pos_conv.0.weight_g": (1, 1, kernel),
        "encoder.pos_conv.0.weight_v": (width, width // cfg["conv_pos_groups"], kernel),
        "encoder.layer_norm.weight": (width,),
        "encoder.layer_norm.bias": (width,),
    }
    if embed != width:
        shapes |= {"post_extract_proj.weight": (width, embed), "post_extract_proj.bias": (width,)}
    if cfg["finetuned_model"]:
        shapes |= {"predictor.weight": (cfg["predictor_class"], width), "predictor.bias": (cfg["predictor_class"],)}
    for layer in range(cfg["encoder_layers"]):
        name = f"encoder.layers.{layer}."
        shapes[name + "self_attn.relative_attention_bias.weight"] = (cfg["num_buckets"], heads)
        shapes[name + "self_attn.grep_a"] = (1, heads, 1, 1)
        shapes |= linear_shapes(name + "self_attn.grep_linear", 8, width // heads)
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= linear_shapes(f"{name}self_attn.{projection}", width, width)
        shapes |= linear_shapes(name + "fc1", inner, width) | linear_shapes(name + "fc2", width, inner)
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{name}{norm}.weight": (width,), f"{name}{norm}.bias": (width,)}
    return shapes


def linear_shapes(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def synthetic_checkpoint(seed: int = 0, **cfg: object) -> dict:
    """Random weights in the published format, spread so that every term of the formulas matters."""
    cfg = {**PUBLISHED_CONFIG, **cfg}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in tensor_shapes(cfg).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(("norm.weight", "grep_a", "weight_g")):
            weights[name] = 1.0 + 0.3 * noise
        elif name.endswith("relative_attention_bias.weight"):
            weights[name] = weights.get("encoder.layers.0.self_attn.relative_attention_bias.weight", 1.5 * noise)
        elif len(shape) == 1:
            weights[name] = 0.1 * noise
        else:
            weights[name] = noise / math.sqrt(math.prod(shape[1:]))
    return {"cfg": cfg, "model": weights}


def encode(checkpoint: dict, fbank: torch.Tensor, real: list[bool] | None = None) -> torch.Tensor:
    """Tokens of one clip: `(frames, 128)` -> `(8 * (frames // 16), width)`; `real` tells the tokens in force."""
    cfg, w = checkpoint["cfg"], {name: tensor.double() for name, tensor in checkpoint["model"].items()}
    x = layer_norm(patches(cfg, w, fbank.double()), w, "layer_norm")
    if "post_extract_proj.weight" in w:
        x = linear(x, w, "post_extract_proj")
    real = real or [True] * len(x)
    for token, is_real in enumerate(real):
        if not is_real:
            x[token] = 0.0
    x = layer_norm(x + gelu(positional_convolution(cfg, w, x)), w, "encoder.layer_norm")
    alpha = (2 * cfg["encoder_layers"]) ** 0.25 if cfg["deep_norm"] else 1.0
    for layer in range(cfg["encoder_layers"]):
        name = f"encoder.layers.{layer}."
        x = layer_norm(alpha * x + attention(cfg, w, name, x, real), w, name + "self_attn_layer_norm")
        inner = linear(gelu(linear(x, w, name + "fc1")), w, name + "fc2")
        x = layer_norm(alpha * x + inner, w, name + "final_layer_norm")
    return x


def probabilities(checkpoint: dict, fbank: torch.Tensor, real: list[bool] | None = None) -> torch.Tensor:
    """Label probabilities of a fine-tuned checkpoint: `(predictor_class,)`."""
    w = {name: tensor.double() for name, tensor in checkpoint["model"].items()}
    scores = linear(encode(checkpoint, fbank, real), w, "predictor")
    kept = [row for row, is_real in zip(scores, real or [True] * len(scores), strict=True) if is_real]
    return torch.sigmoid(sum(kept) / len(kept))


def patches(cfg: dict, w: dict, fbank: torch.Tensor) -> torch.Tensor:
    """One row for each square patch: all bands of the first time step, then of the next."""
    p = cfg["input_patch_size"]
    rows = []
    for step in range(fbank.shape[0] // p):
        for band in range(fbank.shape[1] // p):
            square = fbank[step * p : (step + 1) * p, band * p : (band + 1) * p]
            rows.append((w["patch_embedding.weight"][:, 0] * square).sum((1, 2)))
    return torch.stack(rows)


def positional_convolution(cfg: dict, w: dict, x: torch.Tensor) -> torch.Tensor:
    """Token i reads tokens i - kernel // 2 ... i + (kernel - 1) // 2, group by group."""
    kernel, groups = cfg["conv_pos"], cfg["conv_pos_groups"]
    direction, magnitude = w["encoder.pos_conv.0.weight_v"], w["encoder.pos_conv.0.weight_g"][0, 0]
    taps = [magnitude[t] * direction[..., t] / direction[..., t].norm() for t in range(kernel)]
    weight = torch.stack(taps, dim=-1)  # (width, width / groups, kernel)
    channels = x.shape[1] // groups
    padded = torch.cat([x.new_zeros(kernel // 2, x.shape[1]), x, x.new_zeros(kernel // 2, x.shape[1])])
    out = torch.zeros_like(x)
    for token in range(len(x)):
        window = padded[token : token + kernel]  # (kernel, width)
        for group in range(groups):
            part = slice(group * channels, (group + 1) * channels)
            out[token, part] = torch.einsum("oit,ti->o", weight[part], window[:, part])
    return out + w["encoder.pos_conv.0.bias"]


def attention(cfg: dict, w: dict, name: str, x: torch.Tensor, real: list[bool]) -> torch.Tensor:
    """Every head and every query on its own."""
    heads = cfg["encoder_attention_heads"]
    size = x.shape[1] // heads
    q, k, v = (linear(x, w, f"{name}self_attn.{kind}_proj") for kind in "qkv")
    bias = w["encoder.layers.0.self_attn.relative_attention_bias.weight"]
    bucket_of = {d: bucket(d, cfg["num_buckets"], cfg["max_distance"]) for d in range(1 - len(x), len(x))}
    out = torch.zeros_like(x)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(x)):
            scores = k[:, part] @ (q[i, part] * size**-0.5 / 32)
            scores = (scores - scores.max()) * 32
            distance_bias = torch.stack([bias[bucket_of[j - i], head] for j in range(len(x))])
            scores = scores + gate(w, name, head, q[i, part]) * distance_bias
            scores[[j for j in range(len(x)) if not real[j]]] = -math.inf
            out[i, part] = torch.softmax(scores, dim=0) @ v[:, part]
    return linear(out, w, name + "self_attn.out_proj")


def gate(w: dict, name: str, head: int, query: torch.Tensor) -> torch.Tensor:
    eight = linear(query, w, name + "self_attn.grep_linear")
    first, second = torch.sigmoid(eight[:4].sum()), torch.sigmoid(eight[4:].sum())
    return first * (second * w[name + "self_attn.grep_a"][0, head, 0, 0] - 1.0) + 2.0


def bucket(distance: int, num_buckets: int, max_distance: int) -> int:
    """Bucket of `key position - query position`."""
    half = num_buckets // 2
    exact = half // 2
    base = half if distance > 0 else 0
    if abs(distance) < exact:
        return base + abs(distance)
    grown = math.log(abs(distance) / exact) / math.log(max_distance / exact) * (half - exact)
    return base + min(exact + int(grown), half - 1)


def official_rule(padded: list[bool], length: int) -> list[bool]:
    """Padding over a shorter sequence: cut the surplus, then a target is padding if all it covers is."""
    padded = padded[: len(padded) - len(padded) % length]
    size = len(padded) // length
    return [all(padded[i * size : (i + 1) * size]) for i in range(length)]


def linear(x: torch.Tensor, w: dict, name: str) -> torch.Tensor:
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def layer_norm(x: torch.Tensor, w: dict, name: str) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"] + w[name + ".bias"]


def gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))
