"""Do queries cluster by task, and how similar are they to the keys?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from .usage import task_names

_MAX_TSNE_PERPLEXITY = 30.0


@dataclass(frozen=True)
class QueryClusters:
    """How well queries separate tasks.

    Attributes:
        silhouette: mean silhouette with cosine distance, -1 to 1; `nan` for one task or tasks of one example each.
        neighbour_accuracy: share of queries whose nearest other query has the same task; `nan` for a single query.
        chance: the same for neighbours drawn at random.
        mean_cosine: mean cosine between two different queries; near 1, all queries are the same and cannot select.
    """

    silhouette: float
    neighbour_accuracy: float
    chance: float
    mean_cosine: float


def query_clusters(queries: np.ndarray, tasks: Sequence[str]) -> QueryClusters:
    """Measure how queries cluster by task.

    Args:
        queries: `(examples, width)`.
        tasks: task of each example.

    Raises:
        ValueError: the lengths differ.
    """
    if len(queries) != len(tasks):
        raise ValueError(f"got {len(queries)} queries for {len(tasks)} tasks; give one each")
    names, counts = np.unique(np.asarray(tasks), return_counts=True)
    n = len(queries)
    unit = normalize(queries)  # (examples, width)
    return QueryClusters(
        silhouette=_silhouette(unit, tasks) if 1 < len(names) < n else float("nan"),
        neighbour_accuracy=_neighbour_accuracy(unit, tasks) if n > 1 else float("nan"),
        chance=float((counts * (counts - 1)).sum() / (n * (n - 1))) if n > 1 else float("nan"),
        mean_cosine=float((np.square(unit.sum(axis=0)).sum() - n) / (n * (n - 1))) if n > 1 else float("nan"),
    )


def _silhouette(queries: np.ndarray, tasks: Sequence[str]) -> float:
    return float(silhouette_score(queries, tasks, metric="cosine"))


def _neighbour_accuracy(queries: np.ndarray, tasks: Sequence[str]) -> float:
    nearest = NearestNeighbors(n_neighbors=1, metric="cosine").fit(queries)
    neighbours = nearest.kneighbors(return_distance=False)[:, 0]  # (examples,), never the query itself
    names = np.asarray(tasks)
    return float((names[neighbours] == names).mean())


def query_key_similarity(queries: np.ndarray, tasks: Sequence[str], keys: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Mean cosine of each task's queries to each key.

    Args:
        queries: `(examples, width)`.
        tasks: task of each example.
        keys: `(pool, width)`.

    Returns:
        Names of the tasks and `(tasks, pool)` mean cosines.
    """
    names, of_task = task_names(tasks), np.asarray(tasks)
    cosines = normalize(queries) @ normalize(keys).T  # (examples, pool)
    return names, np.stack([cosines[of_task == name].mean(axis=0) for name in names])


def task_cosines(queries: np.ndarray, tasks: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Mean cosine between the queries of each two tasks, and between different queries of one task.

    Args:
        queries: `(examples, width)`.
        tasks: task of each example.

    Returns:
        Names of the tasks and `(tasks, tasks)` mean cosines; 1 for a task with a single query and itself.
    """
    names, of_task, unit = task_names(tasks), np.asarray(tasks), normalize(queries)
    counts = np.array([(of_task == name).sum() for name in names])  # (tasks,)
    sums = np.stack([unit[of_task == name].sum(axis=0) for name in names])  # (tasks, width)
    cosines = sums @ sums.T / np.outer(counts, counts)
    pairs = np.maximum(counts * (counts - 1), 1)
    own = (np.square(sums).sum(axis=1) - counts) / pairs  # without the cosine of a query and itself
    np.fill_diagonal(cosines, np.where(counts > 1, own, 1.0))
    return names, cosines


def project_queries(queries: np.ndarray, seed: int = 0) -> np.ndarray:
    """`(examples, 2)` t-SNE of the queries by cosine distance (van der Maaten & Hinton 2008).

    Raises:
        ValueError: fewer than four queries, too few for a map.
    """
    if len(queries) < 4:
        raise ValueError(f"t-SNE needs four queries or more, got {len(queries)}")
    perplexity = min(_MAX_TSNE_PERPLEXITY, (len(queries) - 1) / 3)
    return TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=seed).fit_transform(queries)
