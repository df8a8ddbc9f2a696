"""The pool against the formulas, written out slowly."""

from __future__ import annotations

import math

import pytest
import torch

from listen.configuration_listen import ListenPromptPoolConfig
from listen.modeling_prompt_pool import STRATEGIES, ListenPromptPool

POOL, WIDTH, BATCH = 10, 8, 5


def make_pool(strategy: str, seed: int = 0, **kwargs: object) -> ListenPromptPool:
    torch.manual_seed(seed)
    config = ListenPromptPoolConfig(pool_size=POOL, num_prompts=4, strategy=strategy, **kwargs)
    pool = ListenPromptPool(config, WIDTH)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.normal_()
    return pool.eval()


@pytest.fixture()
def query() -> torch.Tensor:
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1))


def full(k: int) -> torch.Tensor:
    return torch.full((BATCH,), k)


def test_similarity_takes_the_nearest_keys_by_cosine_best_first(query: torch.Tensor) -> None:
    pool = make_pool("similarity", key_loss_type="distance")
    prompts, selection = pool(query, full(4))
    for row in range(BATCH):
        cosines = [float(torch.cosine_similarity(query[row], key, dim=0)) for key in pool.keys.detach()]
        best = sorted(range(POOL), key=lambda i: -cosines[i])[:4]
        assert selection.indices[row].tolist() == best
        torch.testing.assert_close(selection.scores[row], torch.tensor([cosines[i] for i in best]))
        torch.testing.assert_close(prompts.view(BATCH, 4, WIDTH)[row], pool.values[best])
        distance = sum(float((query[row] - pool.keys[i]).detach().norm()) for i in best)
        assert selection.key_loss[row].item() == pytest.approx(distance, rel=1e-5)


def test_keys_of_one_direction_are_taken_in_their_order() -> None:
    """Their cosines differ in the last digits alone, which differ between a batch and a single row."""
    pool = make_pool("similarity")
    with torch.no_grad():
        pool.keys.copy_(pool.keys[:1] * torch.rand(POOL, 1).add(0.1))
    key = torch.nn.functional.normalize(pool.keys[0].detach(), dim=0)
    across = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(2))
    across = torch.nn.functional.normalize(across - (across @ key)[:, None] * key, dim=-1)
    queries = 0.5 * key + 0.75**0.5 * across  # a cosine of 0.5 to each key
    indices = pool(queries, torch.full((64,), 4))[1].indices
    assert torch.equal(indices, torch.arange(4).expand(64, 4))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_equal_keys_are_taken_in_their_order_by_attention(scale: float) -> None:
    config = ListenPromptPoolConfig(pool_size=500, num_prompts=4, strategy="attention")
    pool = ListenPromptPool(config, WIDTH)
    with torch.no_grad():
        pool.keys.copy_(scale * torch.randn(100, WIDTH).repeat(5, 1))  # key i equals the keys i + 100, i + 200, ...
    queries = torch.randn(33, WIDTH)
    indices = pool(queries, torch.full((33,), 6))[1].indices
    logits = (queries.double() @ pool.keys[:100].double().T).detach()
    best = logits.argsort(descending=True)[:, :2]  # (33, 2)
    assert torch.equal(indices[:, :5], best[:, :1] + 100 * torch.arange(5))
    assert torch.equal(indices[:, 5], best[:, 1])
    alone = [pool(query[None], torch.tensor([6]))[1].indices for query in queries]
    assert torch.equal(torch.cat(alone), indices)


def test_one_long_key_leaves_the_ranking_of_the_others_as_it_is(query: torch.Tensor) -> None:
    pool = make_pool("attention")
    with torch.no_grad():
        pool.keys[7] = -1e6 * query[0]
    best = (query[0] @ pool.keys.T).argsort(descending=True)[:4]
    assert torch.equal(pool(query, full(4))[1].indices[0], best)


def test_similarity_key_loss_of_the_authors_code(query: torch.Tensor) -> None:
    pool = make_pool("similarity", key_loss_type="similarity")
    _, selection = pool(query, full(3))
    for row in range(BATCH):
        cosines = torch.stack([torch.cosine_similarity(query[row], key, dim=0) for key in pool.keys])
        expected = -cosines.softmax(0)[selection.indices[row]].sum()
        torch.testing.assert_close(selection.key_loss[row], expected)


def test_the_relative_key_loss_is_a_mean_over_k_and_moves_the_keys_alone(query: torch.Tensor) -> None:
    pool, query = make_pool("similarity"), query.clone().requires_grad_()
    counts = torch.tensor([4, 1, 0, 2, 4])
    _, selection = pool(query, counts)
    for row, count in enumerate(counts.tolist()):
        distances = (query[row] - pool.keys[selection.indices[row, :count]]).norm(dim=-1) / query[row].norm()
        expected = distances.mean().item() if count else 0.0
        assert selection.key_loss[row].item() == pytest.approx(expected, rel=1e-5)
    selection.key_loss.sum().backward()
    assert query.grad is None or not query.grad.any()
    assert pool.keys.grad.abs().max() > 0


def test_the_relative_key_loss_does_not_grow_with_k_or_scale() -> None:
    config = ListenPromptPoolConfig(pool_size=400, num_prompts=160)
    pool = ListenPromptPool(config, 256).eval()
    for parameter in pool.parameters():
        parameter.data.normal_(std=0.01)
    for scale in (0.1, 1.0, 100.0):
        query = scale * torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
        assert pool(query, torch.tensor([1, 160]))[1].key_loss.max() < 1.1


def test_the_distance_and_similarity_key_losses_move_queries_too(query: torch.Tensor) -> None:
    for key_loss_type in ("distance", "similarity"):
        query = query.detach().clone().requires_grad_()
        make_pool("similarity", key_loss_type=key_loss_type)(query, full(3))[1].key_loss.sum().backward()
        assert query.grad.abs().min() > 0


def test_gated_values_are_weighted_by_a_softmax_over_the_picked(query: torch.Tensor) -> None:
    pool = make_pool("similarity", gate_temperature=0.5)
    prompts, selection = pool(query, full(3))
    expected = 3 * (selection.scores / 0.5).softmax(-1)  # (batch, k)
    torch.testing.assert_close(selection.weights, expected)
    torch.testing.assert_close(prompts.view(BATCH, 3, WIDTH), pool.values[selection.indices] * expected[..., None])
    prompts.sum().backward()
    assert pool.keys.grad.abs().max() > 0
    _, fewer = pool(query, torch.tensor([0, 3, 1, 2, 3]))
    torch.testing.assert_close(fewer.weights.sum(-1), torch.tensor([0.0, 3, 1, 2, 3]))


def test_attention_scales_values_by_renormalised_weights(query: torch.Tensor) -> None:
    pool = make_pool("attention")
    prompts, selection = pool(query, full(4))
    for row in range(BATCH):
        weights = (pool.keys @ query[row] / math.sqrt(WIDTH)).softmax(0)
        top = weights.topk(4)
        assert selection.indices[row].tolist() == top.indices.tolist()
        scale = top.values / top.values.sum() * 4
        expected = pool.values[top.indices] * scale[:, None]
        torch.testing.assert_close(prompts.view(BATCH, 4, WIDTH)[row], expected)
    assert selection.key_loss.tolist() == [0.0] * BATCH


def test_uniform_attention_leaves_the_values_alone(query: torch.Tensor) -> None:
    pool = make_pool("attention")
    pool.keys.data.zero_()
    prompts, selection = pool(query, full(POOL))
    torch.testing.assert_close(prompts.view(BATCH, POOL, WIDTH), pool.values[selection.indices])


def test_attention_teaches_the_keys(query: torch.Tensor) -> None:
    pool = make_pool("attention")
    pool(query, full(3))[0].square().sum().backward()
    assert pool.keys.grad.abs().sum() > 0


def test_residual_picks_greedily_from_what_is_left(query: torch.Tensor) -> None:
    pool = make_pool("residual", key_loss_type="distance")
    _, selection = pool(query, full(4))
    _, relative = make_pool("residual")(query, full(4))
    torch.testing.assert_close(relative.key_loss, selection.key_loss / query.norm(dim=-1))
    for row in range(BATCH):
        residual, used = query[row].clone(), []
        for _ in range(4):
            distances = {i: float((residual - pool.keys[i]).detach().norm()) for i in range(POOL) if i not in used}
            used.append(min(distances, key=distances.get))
            residual = residual - pool.keys[used[-1]]
        assert selection.indices[row].tolist() == used
        torch.testing.assert_close(selection.key_loss[row], residual.norm())


def test_fixed_is_the_same_for_all(query: torch.Tensor) -> None:
    prompts, selection = make_pool("fixed")(query, full(3))
    assert selection.indices.tolist() == [[0, 1, 2]] * BATCH
    assert "keys" not in dict(make_pool("fixed").named_parameters())


def test_random_draws_without_replacement(query: torch.Tensor) -> None:
    pool = make_pool("random")
    torch.manual_seed(3)
    _, first = pool(query, full(POOL))
    _, second = pool(query, full(POOL))
    assert all(sorted(row) == list(range(POOL)) for row in first.indices.tolist())
    assert not torch.equal(first.indices, second.indices)


def test_tasks_own_disjoint_parts_and_share_the_rest(query: torch.Tensor) -> None:
    pool = make_pool("task", tasks=["asr", "er"], shared_fraction=0.4)
    task_ids = torch.tensor([0, 1, 0, 1, 1])
    _, selection = pool(query, full(7), task_ids)
    asr, er = (set(selection.indices[row].tolist()) for row in (0, 1))
    assert asr & er == set(range(4)) and len(asr - er) == 3 and len(er - asr) == 3
    assert asr | er == set(range(POOL))
    _, fewer = pool(query, full(4), task_ids)
    assert 0 < len(set(fewer.indices[0].tolist()) & asr & er) < 4  # any k holds own and shared prompts
    with pytest.raises(ValueError, match="0=asr, 1=er"):
        pool(query, full(2))
    with pytest.raises(ValueError, match="unknown task"):
        pool(query, full(2), torch.tensor([0, 2, 0, 0, 0]))


@pytest.mark.parametrize("strategy", ["similarity", "attention", "residual", "fixed"])
def test_a_row_depends_neither_on_its_mates_nor_on_their_k(strategy: str, query: torch.Tensor) -> None:
    pool = make_pool(strategy)
    counts = torch.tensor([0, 4, 1, 3, 2])
    prompts, selection = pool(query, counts)
    rows = prompts.split(counts.tolist())
    for i, count in enumerate(counts.tolist()):
        if count == 0:
            assert selection.key_loss[i].item() == 0.0
            continue
        alone, single = pool(query[i : i + 1], counts[i : i + 1])
        torch.testing.assert_close(rows[i], alone)
        torch.testing.assert_close(selection.key_loss[i], single.key_loss[0])
        assert selection.indices[i, :count].tolist() == single.indices[0].tolist()


def test_fewer_prompts_are_a_prefix_of_more(query: torch.Tensor) -> None:
    for strategy in ("similarity", "attention", "residual", "fixed"):
        pool = make_pool(strategy)
        assert torch.equal(pool(query, full(8))[1].indices[:, :3], pool(query, full(3))[1].indices)


def test_key_loss_pulls_keys_and_queries_together(query: torch.Tensor) -> None:
    pool = make_pool("similarity", key_loss_type="distance").train()
    optimizer = torch.optim.SGD(pool.parameters(), lr=0.05)
    losses = []
    for _ in range(100):
        loss = pool(query, full(2))[1].key_loss.mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.75 * losses[0]  # several queries share keys: the distance cannot vanish


def test_key_loss_is_finite_where_a_key_equals_the_query(query: torch.Tensor) -> None:
    pool = make_pool("similarity")
    pool.keys.data[:BATCH] = query
    pool(query, full(1))[1].key_loss.sum().backward()
    assert pool.keys.grad.isfinite().all()


@pytest.mark.parametrize("strategy", ["similarity", "attention", "residual"])
def test_score_dropout_acts_in_training_alone(strategy: str, query: torch.Tensor) -> None:
    pool = make_pool(strategy, score_dropout=0.5)
    steady = [pool(query, full(4))[1].indices for _ in range(4)]
    assert all(torch.equal(steady[0], other) for other in steady)
    pool.train()
    torch.manual_seed(0)
    noisy = [pool(query, full(4))[1].indices for _ in range(4)]
    assert any(not torch.equal(steady[0], other) for other in noisy)
    assert all(len(set(row)) == 4 for selection in noisy for row in selection.tolist())


@pytest.mark.parametrize("strategy", ["similarity", "attention", "residual"])
def test_dropped_keys_are_never_picked_though_all_scores_are_negative(strategy: str) -> None:
    pool = make_pool(strategy, score_dropout=0.3)
    pool.keys.data.copy_(-torch.ones(POOL, WIDTH) - 0.01 * torch.arange(POOL)[:, None] * torch.eye(WIDTH)[0])
    query = torch.ones(1, WIDTH)
    best = pool(query, torch.tensor([1]))[1].indices.item()
    pool.train()
    for seed in range(30):
        torch.manual_seed(seed)
        kept = [i for i, draw in enumerate(torch.rand(POOL).tolist()) if draw >= 0.3]
        torch.manual_seed(seed)
        selected = pool(query, torch.tensor([3]))[1].indices[0].tolist()
        assert set(selected) <= set(kept)
        if best in kept:
            assert selected[0] == best


def test_nothing_is_dropped_where_fewer_than_k_would_be_left(query: torch.Tensor) -> None:
    for strategy in ("similarity", "attention", "residual"):
        pool = make_pool(strategy, score_dropout=0.9)
        steady = pool(query, full(POOL))[1].indices
        assert torch.equal(pool.train()(query, full(POOL))[1].indices, steady)


def test_centred_queries_spread_over_keys_that_alike_queries_would_leave(query: torch.Tensor) -> None:
    alike = 100.0 + query  # what all tasks share drowns what sets them apart
    plain, centred = make_pool("similarity"), make_pool("similarity", center_query=True)
    assert len(set(plain(alike, full(1))[1].indices.flatten().tolist())) == 1
    centred.initialize_keys(alike)
    assert len(set(centred(alike, full(1))[1].indices.flatten().tolist())) > 1
    before = centred.query_mean.clone()
    centred(alike + 5, full(1))
    assert torch.equal(before, centred.query_mean)
    centred.train()(alike + 5, full(1))
    torch.testing.assert_close(centred.query_mean, before + 0.01 * 5)


def test_values_start_at_the_mean_embedding() -> None:
    pool = make_pool("similarity")
    before, embedding = pool.values.detach().clone(), torch.randn(50, WIDTH)
    pool.initialize_values(embedding)
    torch.testing.assert_close(pool.values.data, before + embedding.mean(0))


def test_values_start_at_embeddings_of_the_vocabulary() -> None:
    pool, embedding = make_pool("similarity", value_start="vocabulary"), torch.randn(POOL, WIDTH)
    pool.initialize_values(embedding)
    assert torch.equal(pool.values.data, embedding)


def test_keys_start_spread_over_the_queries_and_rare_ones_get_theirs() -> None:
    often, rare = torch.eye(WIDTH)[:1].repeat(200, 1), torch.eye(WIDTH)[1:]
    pool = make_pool("similarity")
    pool.initialize_keys(torch.cat([often, rare]))
    nearest = (torch.nn.functional.normalize(pool.keys.detach(), dim=-1) @ torch.eye(WIDTH)).argmax(-1)
    assert set(nearest.tolist()) == set(range(WIDTH))


def test_mixed_precision_does_not_change_the_choice(query: torch.Tensor) -> None:
    pool = make_pool("similarity")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = pool(query, full(4))[1]
    assert torch.equal(mixed.scores, pool(query, full(4))[1].scores)


def test_too_many_prompts_is_an_error(query: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="asks for 11 prompts but the pool can give 10"):
        make_pool("similarity")(query, full(11))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_follow_the_mode_of_the_pool_and_add_nothing_to_checkpoints(strategy: str) -> None:
    pool = make_pool(strategy, tasks=["asr", "er"] if strategy == "task" else None)
    assert not pool.strategy.training and pool.train().strategy.training
    assert set(pool.state_dict()) == ({"values", "keys"} if pool.config.uses_query else {"values"})


@pytest.mark.parametrize("strategy", ["similarity", "attention", "residual", "fixed", "random"])
def test_places_that_no_row_fills_are_marked(strategy: str, query: torch.Tensor) -> None:
    _, selection = make_pool(strategy)(query, torch.tensor([0, 4, 1, 3, 2]))
    empty = torch.arange(4) >= torch.tensor([0, 4, 1, 3, 2])[:, None]  # (batch, k)
    assert torch.equal(selection.indices == -1, empty)
    assert (selection.scores[empty] == 0).all()
