"""Analysis of a trained prompt pool, in numbers and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.numpy import save_file
from torch import nn

from ..data.files import write_json
from .plots import plot_overlap, plot_query_keys, plot_query_map, plot_usage
from .queries import QueryClusters, project_queries, query_clusters, query_key_similarity, task_cosines
from .usage import PromptUsage, prompt_usage

_MOST_MAPPED = 2000


@dataclass
class PoolAnalysis:
    """How the examples of an evaluation use the pool.

    Attributes:
        usage: which task selected which prompt.
        tasks: task of each example that has a query.
        queries: `(examples, width)` as they are compared with the keys, minus the pool's running mean if it has one;
            `None` if the model has none.
        keys: `(pool, width)`; `None` for strategies without keys.
        clusters: how the queries cluster by task; `None` without queries.
    """

    usage: PromptUsage
    tasks: list[str] = field(default_factory=list)
    queries: np.ndarray | None = None
    keys: np.ndarray | None = None
    clusters: QueryClusters | None = None

    def summary(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        usage, names = self.usage, self.usage.tasks
        summary: dict[str, Any] = {
            "pool_size": usage.shares.shape[1],
            "share_used": usage.share_used,
            "entropy": usage.entropy(),
            "entropy_by_task": {name: usage.entropy(name) for name in names},
            "prompts_by_task": {name: _picks(usage.shares[row]) for row, name in enumerate(names)},
            "jaccard": _pairs(names, usage.jaccard()),
            "weighted_jaccard": _pairs(names, usage.weighted_jaccard()),
        }
        if self.clusters is not None:
            summary["query_cosines"] = _pairs(*task_cosines(self.queries, self.tasks))
            summary["queries"] = {k: None if np.isnan(v) else v for k, v in asdict(self.clusters).items()}
        return summary

    def figures(self) -> dict[str, Figure]:
        """Plots by file name without ending: usage, then keys and queries where the model has them.

        Overlap of tasks and map of the queries need two tasks or more.
        """
        figures, several = {"prompt_usage": plot_usage(self.usage)}, len(self.usage.tasks) > 1
        if several:
            figures["prompt_overlap"] = plot_overlap(self.usage)
        if self.queries is None:
            return figures
        if self.keys is not None:
            names, similarity = query_key_similarity(self.queries, self.tasks, self.keys)
            figures["query_keys"] = plot_query_keys(names, similarity, self.usage.by_owner())
        if several and len(self.queries) >= 4:
            shown = np.random.default_rng(0).permutation(len(self.queries))[:_MOST_MAPPED]
            points = project_queries(self.queries[shown])
            figures["query_map"] = plot_query_map(points, [self.tasks[i] for i in shown], self.clusters)
        return figures

    def save(self, folder: str | Path) -> list[Path]:
        """Write `pool.json`, the plots, and `queries.safetensors` with queries and keys where there are any.

        Returns:
            The files of the plots.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "pool.json", self.summary())
        tensors = {"queries": self.queries, "keys": self.keys}
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items() if tensor is not None}
        if tensors:
            save_file(tensors, folder / "queries.safetensors", metadata={"tasks": json.dumps(self.tasks)})
        plots = {folder / f"{name}.png": figure for name, figure in self.figures().items()}
        for path, figure in plots.items():
            figure.savefig(path, dpi=120)
        return list(plots)


def analyse_pool(
    pool: nn.Module,
    tasks: Sequence[str],
    prompt_indices: Sequence[Sequence[int]],
    queries: np.ndarray | None = None,
) -> PoolAnalysis:
    """Analyse which prompts a pool selected for a set of examples.

    Args:
        pool: a `ListenPromptPool`.
        tasks: task of each example.
        prompt_indices: prompts selected for each example, see `prompt_usage`.
        queries: `(examples, width)` the query of each example.

    Raises:
        ValueError: the lengths differ, or an index lies outside the pool.
    """
    keys, center = (_array(part) for part in (pool.part("keys"), getattr(pool, "query_mean", None)))
    if queries is not None and center is not None:
        queries = queries - center
    return PoolAnalysis(
        usage=prompt_usage(list(tasks), prompt_indices, pool.config.pool_size),
        tasks=list(tasks),
        queries=queries,
        keys=keys,
        clusters=None if queries is None else query_clusters(queries, tasks),
    )


def _array(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().float().cpu().numpy()


def _picks(shares: np.ndarray) -> dict[str, float]:
    """Prompts of a task, most selected first."""
    order = np.argsort(-shares, kind="stable")
    return {str(prompt): round(float(shares[prompt]), 4) for prompt in order if shares[prompt] > 0}


def _pairs(names: Sequence[str], matrix: np.ndarray) -> dict[str, dict[str, float]]:
    rows = zip(names, matrix, strict=True)
    return {name: {other: float(v) for other, v in zip(names, row, strict=True)} for name, row in rows}
