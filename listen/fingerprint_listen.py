"""Fingerprints of frozen weights: whether two models hold the same weights, in whatever dtype or quantisation.

A hash of rounded values fails where a weight was rounded twice (float32 to float16 to bfloat16) and says nothing of
quantised weights. So each tensor is described by its norm and by two sums over fixed random coefficients, which read
every value (a linear sketch, as in Alon, Matias and Szegedy 1999). Rounding changes them by little, other weights by
much.
"""

import base64
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

_PLAIN = {nn.Parameter, torch.Tensor}
_VERSION = "v2:"
_COLUMNS, _ROWS = 4096, 8192
_CHUNK_ROWS, _CHUNK_ROWS_GPU = 64, 4096  # a chunk of 1 MB stays in the cache of a processor
_FLOAT, _QUANTISED, _UNKNOWN, _NOT_FINITE = range(4)
_NORM_STEPS, _SUM_STEPS = 512, 4096  # how finely values are stored in 16 bits
_ENTRY = np.dtype([("norm", "<i2"), ("sums", "<i2", 2), ("kind", "u1")])
# By kind, of the sums and of the norm's logarithm: six standard deviations of what rounding to bfloat16 (a relative
# error of 2 ** -9 at most, twice) does to a sum; errors of 4 bits are about a tenth of the norm.
_TOLERANCES = np.array([(0.0125, 0.01), (0.75, 0.1), (np.inf, np.inf), (-1.0, -1.0)])
# the same where nothing was rounded in between; bitsandbytes stores scales in another way after the first pass on a CPU
_EXACT = np.array([(1e-4, 1e-4), (0.02, 0.02), (np.inf, np.inf), (-1.0, -1.0)])
_TINY = 1e-5  # root mean square below which float16 keeps little precision; such weights count as zeros


@dataclass(frozen=True)
class Sketch:
    """What is known of some weights of a module, in the order of their sorted names.

    Attributes:
        names: the names; empty if it was read from a checkpoint, which keeps `names_digest` alone.
        names_digest: 8 hexadecimal digits.
        norms: `(weights,)` logarithms of the norms to base 2.
        sums: `(weights, 2)` sums of the values of either half of the columns, signed at random, over their norm.
        kinds: `(weights,)` whether the values are floats, dequantised, unknown (offloaded, integers) or not finite.
    """

    names: tuple[str, ...]
    names_digest: str
    norms: np.ndarray
    sums: np.ndarray
    kinds: np.ndarray

    def encode(self) -> str:
        """The sketch as text, 7 bytes in base64 for each weight."""
        entries = np.zeros(len(self.norms), _ENTRY)
        entries["norm"] = np.round(self.norms * _NORM_STEPS)
        entries["sums"] = np.round(np.clip(self.sums, -7.9, 7.9) * _SUM_STEPS)
        entries["kind"] = self.kinds
        return f"{self.names_digest}.{base64.b64encode(entries.tobytes()).decode('ascii')}"

    @classmethod
    def decode(cls, text: str) -> "Sketch":
        """Read what `encode` wrote.

        Raises:
            ValueError: it is malformed.
        """
        digest, _, data = text.partition(".")
        entries = np.frombuffer(base64.b64decode(data, validate=True), _ENTRY)
        return cls((), digest, entries["norm"] / _NORM_STEPS, entries["sums"] / _SUM_STEPS, entries["kind"])

    def differs(self, other: "Sketch", exact: bool = False) -> np.ndarray:
        """`(weights,)`, true where two sketches of the same names are not of the same weights.

        Args:
            other: Its kinds may be others.
            exact: Whether both are of the same dtype, so that nothing was rounded in between.
        """
        kinds = np.stack([self.kinds, other.kinds])  # (2, weights)
        unreadable = (kinds == _UNKNOWN).any(0) | (exact & (kinds == _NOT_FINITE).all(0))
        limits = (_EXACT if exact else _TOLERANCES)[kinds.max(0)]  # (weights, 2), of the coarser kind
        sums = np.abs(self.sums - other.sums).max(-1)
        norms = np.abs(self.norms - other.norms)
        return ((sums > limits[:, 0]) | (norms > limits[:, 1])) & ~unreadable


def fingerprint(module: nn.Module) -> str:
    """A description of all weights of a frozen module that does not depend on its dtype, `v2:vectors-matrices`.

    Reads each value once. One processor core takes about 0.1 s for 100 million values, hence 8 s for 8 billion.
    """
    return encode_sketches(sketches(module))


def encode_sketches(found: tuple[Sketch, Sketch]) -> str:
    """The sketches of vectors and matrices as the text of a fingerprint."""
    return _VERSION + "-".join(sketch.encode() for sketch in found)


@torch.no_grad()
def sketches(module: nn.Module) -> tuple[Sketch, Sketch]:
    """Sketches of the vectors, which are never quantised, and of all other weights. A LoRA is left out."""
    found: dict[bool, list[tuple[str, tuple[float, float, float, int]]]] = {True: [], False: []}
    for name, weight, merged in sorted(_weights(module), key=lambda item: item[0]):
        values, kind = (None, _UNKNOWN) if merged else _values(weight)
        found[weight.dim() == 1].append((name, _describe(values, kind)))
    return _sketch(found[True]), _sketch(found[False])


def changed_weights(before: tuple[Sketch, Sketch], after: tuple[Sketch, Sketch], exact: bool) -> list[str]:
    """Names of the weights that are not the same in two states of one module.

    Raises:
        ValueError: it has other weights than before.
    """
    names = [set(sum((sketch.names for sketch in state), ())) for state in (before, after)]
    if names[0] != names[1]:
        raise ValueError(f"weights {sorted(names[0] ^ names[1])[:3]} were added or taken away")
    pairs = zip(before, after, strict=True)
    return [str(name) for old, new in pairs for name in np.array(old.names, object)[old.differs(new, exact)]]


def differing_weights(wanted: str, module: nn.Module, found: tuple[Sketch, Sketch] | None = None) -> list[str]:
    """Names of the weights of a module that a fingerprint does not describe; empty if it holds the same ones.

    Args:
        wanted: What `fingerprint` gave, or an earlier version of it; that one is a hash, so it names no weight.
        module: In any dtype, or quantised: what cannot be read is left out of the comparison.
        found: Its `sketches`, where they are there already.

    Raises:
        ValueError: `wanted` is malformed.
    """
    if not wanted.startswith(_VERSION):
        return _differing_hashes(wanted, module)
    differing: list[str] = []
    for known, mine in zip(_decode(wanted), found or sketches(module), strict=True):
        if known.names_digest == mine.names_digest and len(known.norms) == len(mine.norms):
            differing += np.array(mine.names, object)[known.differs(mine)].tolist()
        elif not _is_quantised(module):  # some ways of quantising store other tensors
            differing += mine.names or ("all, which are missing",)
    return differing


def same_weights(one: str, other: str) -> bool:
    """Whether two texts of `fingerprint` describe the same weights."""
    if not (one.startswith(_VERSION) and other.startswith(_VERSION)):
        return one == other
    pairs = zip(_decode(one), _decode(other), strict=True)
    return all(a.names_digest == b.names_digest and not a.differs(b).any() for a, b in pairs)


def _decode(text: str) -> list[Sketch]:
    """The sketches of vectors and matrices in a fingerprint."""
    parts = text.removeprefix(_VERSION).split("-")
    try:
        if len(parts) == 2:
            return [Sketch.decode(part) for part in parts]
    except ValueError:
        pass
    raise ValueError(f"fingerprint={text[:40]!r} is malformed: it is not of the form 'vectors-matrices'")


def weights_hash(module: nn.Module) -> str:
    """The earlier form of a fingerprint, a hash of values rounded to bfloat16; it takes no time.

    It has two parts, `vectors-matrices`: one-dimensional weights, which are never quantised, and the first 64 values of
    all other weights. The second part is empty for a quantised module, and both are for an offloaded one.
    """
    parts: dict[bool, Any] = {True: hashlib.sha256(), False: hashlib.sha256()}
    for name, parameter in sorted(module.named_parameters()):
        if "lora_" in name:
            continue
        is_vector = parameter.dim() == 1
        if parameter.device.type == "meta":
            return "-"
        if not parameter.is_floating_point() or {type(parameter), type(parameter.data)} != _PLAIN:  # quantised
            parts[False] = None
        elif parts[is_vector] is not None:
            head = parameter.detach().flatten()[: None if is_vector else 64].to("cpu", torch.bfloat16)
            parts[is_vector].update(name.replace(".base_layer", "").encode() + head.view(torch.int16).numpy().tobytes())
    return "-".join(part.hexdigest()[:12] if part is not None else "" for part in parts.values())


def _differing_hashes(wanted: str, module: nn.Module) -> list[str]:
    if wanted.count("-") != 1:
        raise ValueError(f"fingerprint={wanted[:40]!r} is malformed: it is not of the form 'vectors-matrices'")
    pairs = zip(wanted.split("-"), weights_hash(module).split("-"), ("vectors", "matrices"), strict=True)
    return [what for mine, theirs, what in pairs if mine and theirs and mine != theirs]


def _weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Name, values and whether a LoRA is merged into them, of all weights that a checkpoint holds."""
    merged = {name for name, part in module.named_modules() if getattr(part, "merged", False) is True}
    lasting = {name for name in module.state_dict() if "lora_" not in name}
    for name, weight in (*module.named_parameters(), *module.named_buffers()):
        if name in lasting and (isinstance(weight, nn.Parameter) or weight.is_floating_point()):
            owner = name.partition(".base_layer")[0]
            yield name.replace(".base_layer", ""), weight, owner in merged


def _values(weight: torch.Tensor) -> tuple[torch.Tensor | None, int]:
    """The values of a weight, dequantised where that is known to be right, and their kind."""
    if weight.device.type == "meta" or weight.numel() == 0:  # offloaded, or a shard that another process holds
        return None, _UNKNOWN
    state, scales = getattr(weight, "quant_state", None), getattr(weight, "SCB", None)
    if state is not None:
        # by name: an import would make transformers ask everybody for it who loads the model from the Hub
        dequantize = import_module("bitsandbytes.functional").dequantize_4bit
        return dequantize(weight.data, state), _QUANTISED
    if scales is not None and weight.dtype == torch.int8:  # bitsandbytes: one scale for each row
        return weight.data.float() * (scales.to(weight.device).float() / 127)[:, None], _QUANTISED
    if type(weight.data).__module__.startswith("torchao"):
        return weight.data.dequantize(), _QUANTISED
    if {type(weight), type(weight.data)} <= _PLAIN and weight.is_floating_point() and weight.element_size() > 1:
        return weight.detach(), _FLOAT
    return None, _UNKNOWN


def _is_quantised(module: nn.Module) -> bool:
    return any(_values(weight)[1] != _FLOAT for _, weight, _ in _weights(module))


def _describe(values: torch.Tensor | None, kind: int) -> tuple[float, float, float, int]:
    """Norm, sums and kind of one weight."""
    if values is None:
        return 0.0, 0.0, 0.0, kind
    squares, sums = _sums(values.reshape(-1))  # (2,) of either half of the columns
    if not np.isfinite(squares).all():
        return 0.0, 0.0, 0.0, _NOT_FINITE
    squares = squares + values.numel() * _TINY**2
    return float(np.log2(squares.sum()) / 2), *(sums / np.sqrt(squares)).tolist(), kind


def _sums(flat: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Sum of squares, and sum over random coefficients, of either half of the columns, both `(2,)` in float64."""
    signs, factors = (torch.from_numpy(part).to(flat.device) for part in _coefficients())
    squares, sums = torch.zeros(2, 2, dtype=torch.float64, device=flat.device)
    size = _CHUNK_ROWS if flat.device.type == "cpu" else _CHUNK_ROWS_GPU
    for number, chunk in enumerate(flat.split(size * _COLUMNS)):
        rows = F.pad(chunk.float(), (0, -len(chunk) % _COLUMNS)).view(-1, 2, _COLUMNS // 2)  # (rows, 2, columns / 2)
        start = number * size % _ROWS
        weights = factors[start : start + len(rows), None]  # (rows, 1)
        sums += ((rows * signs).sum(-1).double() * weights).sum(0)
        squares += rows.square().sum(-1).double().sum(0)
    return squares.cpu().numpy(), sums.cpu().numpy()


@lru_cache
def _coefficients() -> tuple[np.ndarray, np.ndarray]:
    """Signs of the columns `(2, columns / 2)` and factors of the rows `(rows,)`; numpy never changes this generator."""
    generator = np.random.RandomState(0)
    signs = generator.randint(0, 2, (2, _COLUMNS // 2)).astype(np.float32) * 2 - 1
    return signs, generator.randint(0, 2, _ROWS) * 2.0 - 1 + generator.uniform(-0.5, 0.5, _ROWS)


def _sketch(entries: list[tuple[str, tuple[float, float, float, int]]]) -> Sketch:
    names = tuple(name for name, _ in entries)
    table = np.array([row for _, row in entries], np.float64).reshape(-1, 4)
    digest = f"{zlib.crc32(' '.join(names).encode()):08x}"
    return Sketch(names, digest, table[:, 0], table[:, 1:3], table[:, 3].astype(np.uint8))


__all__ = [
    "Sketch",
    "changed_weights",
    "differing_weights",
    "encode_sketches",
    "fingerprint",
    "same_weights",
    "sketches",
    "weights_hash",
]
