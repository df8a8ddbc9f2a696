"""Statistics of the prompt pool and the signs of collapse."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

from listen.training import PoolMonitor
from listen.training.pool_health import mean_cosine


def monitor(**pool: object) -> PoolMonitor:
    config = {"pool_size": 12, "num_prompts": 4, **pool}
    return PoolMonitor(tiny_model(prompt_pool_config=config).adapters["default"].prompt_pool)


def test_mean_cosine_is_the_mean_over_pairs() -> None:
    vectors = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).double()
    unit = F.normalize(vectors, dim=-1)
    pairs = [unit[i] @ unit[j] for i in range(9) for j in range(9) if i != j]
    assert mean_cosine(unit.sum(0), 9) == pytest.approx(sum(pairs).item() / len(pairs))
    assert math.isnan(mean_cosine(unit[0], 1))


def test_share_and_entropy_of_usage() -> None:
    one = monitor()
    one.add(torch.tensor([[0, 1], [0, 1], [2, -1]]), torch.randn(3, 48))
    health = one.health()
    assert health.used_share == pytest.approx(3 / 12)
    shares = [2 / 5, 2 / 5, 1 / 5]
    assert health.usage_entropy == pytest.approx(-sum(p * math.log(p) for p in shares) / math.log(12))
    assert (health.num_rows, health.largest_k) == (3, 2)
    one.reset()
    assert one.health().used_share == 0.0


def test_figures_of_processes_are_those_of_all_rows_together() -> None:
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(12, (6, 3), generator=generator)
    query = torch.randn(6, 48, generator=generator)
    together, left, right = monitor(), monitor(), monitor()
    together.add(indices, query)
    left.add(indices[:2], query[:2])
    right.add(indices[2:, :2], query[2:])
    states = torch.stack([left.state(), right.state()])
    assert left.health(states).query_cosine == pytest.approx(together.health().query_cosine)
    assert left.health(states).largest_k == 3


def test_inputs_that_all_pick_the_same_prompts_are_a_collapse() -> None:
    same, spread = monitor(), monitor()
    generator = torch.Generator().manual_seed(0)
    same.add(torch.tensor([[3, 1, 7]]).expand(40, -1), torch.randn(40, 48, generator=generator))
    spread.add(torch.stack([torch.randperm(12, generator=generator)[:3] for _ in range(40)]),
               torch.randn(40, 48, generator=generator))  # fmt: skip
    assert "usage" in same.health().warnings()
    assert spread.health().warnings() == {}


def test_alike_queries_and_collapsed_keys_are_told() -> None:
    one = monitor()
    with torch.no_grad():
        one.pool.keys.copy_(torch.ones_like(one.pool.keys) + 0.01 * torch.randn_like(one.pool.keys))
    one.add(torch.arange(12).view(6, 2), torch.ones(6, 48) + 0.01 * torch.randn(6, 48))
    assert {"queries", "keys"} <= set(one.health().warnings())


def test_a_centred_query_is_judged_after_centring() -> None:
    one = monitor(center_query=True)
    with torch.no_grad():
        one.pool.query_mean.fill_(5.0)
    query = 5.0 + torch.randn(40, 48, generator=torch.Generator().manual_seed(0))
    one.add(torch.randint(12, (40, 3)), query)
    assert one.health().query_cosine < 0.2


def test_a_soft_prompt_has_no_query_to_collapse() -> None:
    fixed = monitor(strategy="fixed")
    fixed.add(torch.arange(4).expand(40, -1), torch.ones(40, 48))
    health = fixed.health()
    assert health.warnings() == {}
    assert set(health.as_logs()) == {"pool_used_share", "pool_usage_entropy"}
