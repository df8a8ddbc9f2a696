"""What the pool learned, on constructed cases whose answer is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from conftest import tiny_model
from safetensors.numpy import load_file

from listen.analysis import (
    analyse_pool,
    project_queries,
    prompt_usage,
    query_clusters,
    query_key_similarity,
    task_cosines,
    task_names,
)

TASKS = ["asr", "asr", "er", "er", "sv", "sv"]
PICKS = [[0, 1], [0, 2], [0, 3], [0, 3], [4, 5], [4, 5]]


def test_usage_by_hand():
    usage = prompt_usage(TASKS, PICKS, pool_size=8)
    assert usage.tasks == ["asr", "er", "sv"]
    expected = [[1, 0.5, 0.5, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0]]
    assert np.array_equal(usage.shares, expected)
    assert usage.share_used == 6 / 8
    # asr {0, 1, 2} and er {0, 3} share one of four prompts; sv shares none
    assert usage.jaccard() == pytest.approx(np.array([[1, 1 / 4, 0], [1 / 4, 1, 0], [0, 0, 1]]))
    # by share: the smaller ones add up to 1, the larger ones to 1 + .5 + .5 + 1
    assert usage.weighted_jaccard()[0, 1] == pytest.approx(1 / 3)
    assert usage.jaccard(min_share=0.5)[0, 1] == pytest.approx(1 / 2)  # {0} and {0, 3}
    # 0 is shared by two of three tasks; then asr's own, er's own and sv's own
    assert usage.by_owner().tolist() == [0, 1, 2, 3, 4, 5]


def test_tasks_come_in_the_order_of_registration():
    assert task_names(["sv", "mine", "asr", "sv", "er"]) == ["asr", "er", "sv", "mine"]
    assert prompt_usage(["sv", "asr"], [[1], [0]], pool_size=2).shares.tolist() == [[1, 0], [0, 1]]


def test_entropy_by_hand():
    even = prompt_usage(["asr"] * 4, [[0], [1], [2], [3]], pool_size=4)
    half = prompt_usage(["asr"] * 4, [[0], [1], [0], [1]], pool_size=4)
    single = prompt_usage(["asr"] * 4, [[2]] * 4, pool_size=4)
    assert even.entropy() == pytest.approx(1.0)
    assert half.entropy() == pytest.approx(0.5)  # log 2 / log 4
    assert single.entropy() == 0.0


def test_entropy_counts_tasks_alike_whatever_their_size():
    usage = prompt_usage(["asr"] * 9 + ["er"], [[0]] * 9 + [[1]], pool_size=2)
    assert usage.entropy() == pytest.approx(1.0)
    assert usage.entropy("asr") == usage.entropy("er") == 0.0


def test_places_left_empty_do_not_count():
    usage = prompt_usage(["asr", "asr"], [[1, -1], [-1, -1]], pool_size=2)
    assert usage.shares.tolist() == [[0.0, 0.5]]


def test_usage_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match="prompt 5 lies outside a pool of 4"):
        prompt_usage(["asr"], [[5]], pool_size=4)
    with pytest.raises(ValueError, match="2 tasks and 1 lists"):
        prompt_usage(["asr", "er"], [[1]], pool_size=4)


def test_clusters_of_queries_that_part_and_of_queries_that_do_not():
    rng = np.random.default_rng(0)
    tasks = ["asr", "er", "sv"] * 30
    noise = rng.normal(size=(90, 16))
    centres = np.eye(16)[[("asr", "er", "sv").index(task) for task in tasks]] * 20
    apart, mixed = query_clusters(noise + centres, tasks), query_clusters(noise, tasks)
    assert apart.neighbour_accuracy == 1.0 and apart.silhouette > 0.8
    assert abs(mixed.silhouette) < 0.05 and mixed.neighbour_accuracy < 0.6
    assert apart.chance == mixed.chance == pytest.approx(29 / 89)


def test_clusters_by_hand():
    # two of asr in the same direction, one of er at a right angle: pairs of cosine 1, 0, 0
    clusters = query_clusters(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]), ["asr", "asr", "er"])
    assert clusters.mean_cosine == pytest.approx(1 / 3)
    assert clusters.neighbour_accuracy == pytest.approx(2 / 3)
    assert clusters.chance == pytest.approx(1 / 3)
    assert clusters.silhouette == pytest.approx(2 / 3)  # 1, 1, and 0 for the task of one query


def test_clusters_that_are_undefined_are_nan():
    one_task = query_clusters(np.eye(3), ["asr"] * 3)
    assert math.isnan(one_task.silhouette) and one_task.neighbour_accuracy == 1.0
    assert math.isnan(query_clusters(np.eye(2)[:1], ["asr"]).mean_cosine)


def test_query_key_similarity_by_hand():
    queries = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    keys = np.array([[5.0, 0.0], [0.0, -1.0], [1.0, 1.0]])
    tasks, similarity = query_key_similarity(queries, ["asr", "asr", "er"], keys)
    assert tasks == ["asr", "er"]
    assert similarity == pytest.approx(np.array([[0.5, -0.5, 0.5**0.5], [1.0, 0.0, 0.5**0.5]]))


def test_cosines_between_the_queries_of_tasks_by_hand():
    queries = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    names, cosines = task_cosines(queries, ["er", "er", "asr"])
    assert names == ["asr", "er"]
    assert cosines == pytest.approx(np.array([[1.0, 0.5], [0.5, 0.0]]))  # a query and itself do not count


def test_projection_keeps_clusters_apart():
    rng = np.random.default_rng(0)
    queries = np.concatenate([rng.normal(size=(20, 8)) + 30 * np.eye(8)[i] for i in range(2)])
    points = project_queries(queries)
    assert points.shape == (40, 2)
    assert query_clusters(points - points.mean(axis=0), ["asr"] * 20 + ["er"] * 20).neighbour_accuracy > 0.95
    with pytest.raises(ValueError, match="four queries"):
        project_queries(queries[:3])


@pytest.mark.parametrize("strategy", ["similarity", "fixed"])
def test_analysis_is_written_with_its_plots(tmp_path, strategy):
    pool = tiny_model(prompt_pool_config={"pool_size": 8, "num_prompts": 2, "strategy": strategy}).adapters["default"]
    queries = np.random.default_rng(0).normal(size=(6, 48)).astype(np.float32)
    analysis = analyse_pool(pool.prompt_pool, TASKS, PICKS, queries)
    analysis.save(tmp_path)
    expected = {"pool.json", "queries.safetensors", "prompt_usage.png", "prompt_overlap.png", "query_map.png"}
    if strategy == "similarity":  # a fixed soft prompt has no keys
        expected.add("query_keys.png")
    assert {path.name for path in tmp_path.iterdir()} == expected
    summary = json.loads((tmp_path / "pool.json").read_text())
    assert summary["pool_size"] == 8 and summary["share_used"] == 0.75
    assert summary["prompts_by_task"]["asr"] == {"0": 1.0, "1": 0.5, "2": 0.5}
    assert summary["jaccard"]["asr"]["er"] == 0.25
    assert np.array_equal(load_file(tmp_path / "queries.safetensors")["queries"], queries)


def test_queries_are_seen_as_the_pool_compares_them():
    pool = tiny_model(prompt_pool_config={"pool_size": 8, "num_prompts": 2, "center_query": True})
    pool = pool.adapters["default"].prompt_pool
    pool.query_mean.fill_(100.0)
    queries = 100.0 + np.random.default_rng(0).normal(size=(6, 48)).astype(np.float32)
    analysis = analyse_pool(pool, TASKS, PICKS, queries)
    assert np.allclose(analysis.queries, queries - 100.0)
    assert analysis.clusters.mean_cosine < 0.5 < query_clusters(queries, TASKS).mean_cosine
