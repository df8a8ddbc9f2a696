"""Fingerprints: the same weights in any dtype are told from other weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import tiny_model
from torch import nn

from listen.fingerprint_listen import (
    changed_weights,
    differing_weights,
    fingerprint,
    same_weights,
    sketches,
    weights_hash,
)

PART = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture()
def llm() -> nn.Module:
    return tiny_model().language_model


@pytest.mark.parametrize("dtypes", [["half"], ["bfloat16"], ["half", "bfloat16"], ["bfloat16", "half"], ["double"]])
@pytest.mark.parametrize("scale", [1.0, 1e-7, 1e3])
def test_rounding_makes_no_other_weights(llm: nn.Module, dtypes: list[str], scale: float) -> None:
    """Values below 6e-5 lose their precision in float16, and below 3e-8 all of it."""
    with torch.no_grad():
        llm.get_parameter(PART).mul_(scale)
    mark = fingerprint(llm)
    for dtype in dtypes:
        llm = getattr(llm, dtype)()
    assert differing_weights(mark, llm) == []
    assert same_weights(mark, fingerprint(llm))


@pytest.mark.parametrize("part", ["model.norm.weight", PART, "model.embed_tokens.weight"])
@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.mul_(1.1),
        lambda w: w.flatten()[64:].zero_() if w.numel() > 64 else w.zero_(),
        lambda w: w.flatten()[-1:].fill_(float("nan")),
        lambda w: w.flatten()[:1].add_(w.norm() / 10),
        lambda w: w.copy_(w.flip(0).mul(1.01)),
        lambda w: w.copy_(w.roll(1, 0) + 0.1),
        lambda w: w.neg_(),
    ],
)
def test_any_changed_weight_is_named(llm: nn.Module, part: str, change: object) -> None:
    mark = fingerprint(llm)
    with torch.no_grad():
        change(llm.get_parameter(part))
    assert differing_weights(mark, llm) == [part]
    assert not same_weights(mark, fingerprint(llm))


def test_rows_in_another_order_are_other_weights() -> None:
    layer = nn.Linear(8192, 6, bias=False)
    mark = fingerprint(layer)
    layer.weight.data = layer.weight.data[[1, 0, 2, 3, 4, 5]]
    assert differing_weights(mark, layer) == ["weight"]


def test_in_one_dtype_little_is_seen(llm: nn.Module) -> None:
    before = sketches(llm)
    assert changed_weights(before, sketches(copy.deepcopy(llm)), exact=True) == []
    with torch.no_grad():
        llm.get_parameter(PART).mul_(1 + 3e-4)
    assert changed_weights(before, sketches(llm), exact=True) == [PART]
    assert changed_weights(before, sketches(llm), exact=False) == []


def test_unreadable_matrices_are_left_out_and_vectors_are_not(llm: nn.Module) -> None:
    mark = fingerprint(llm)
    for layer in llm.model.layers:  # as a quantiser does: integers in place of the matrices
        layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.to(torch.int8), requires_grad=False)
    assert differing_weights(mark, llm) == []
    with torch.no_grad():
        llm.model.norm.weight.add_(0.5)
        llm.model.layers[0].mlp.down_proj.weight.neg_()
    assert differing_weights(mark, llm) == ["model.norm.weight", "model.layers.0.mlp.down_proj.weight"]


def test_what_it_says_is_the_same_on_every_machine() -> None:
    layer = nn.Linear(5000, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.sin(np.arange(15000.0)).reshape(3, 5000)))
        layer.bias.fill_(0.5)
    layer.bias.data[1] = 0
    assert same_weights(fingerprint(layer), "v2:42876a5b.AP8AAAAAAA==-07cd5541.3wwl+14dAA==")


def test_fingerprints_of_earlier_versions_hold(llm: nn.Module) -> None:
    mark = weights_hash(llm)
    assert differing_weights(mark, llm.bfloat16()) == []
    with torch.no_grad():
        llm.get_parameter(PART).mul_(1.1)
    assert differing_weights(mark, llm) == ["matrices"]


@pytest.mark.parametrize("mark", ["0123456789ab", "v2:abc", "v2:0.@@-1.@@", "v2:a.AAAA-b.AAAA", "a-b-c"])
def test_a_malformed_one_is_an_error(llm: nn.Module, mark: str) -> None:
    with pytest.raises(ValueError, match="malformed"):
        differing_weights(mark, llm)
