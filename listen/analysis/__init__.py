"""Analysis of a trained prompt pool (prompts by task, their overlap, clusters of queries) and of a model's cost."""

from __future__ import annotations

from ..data.extras import extra

with extra("eval"):
    from .pool import PoolAnalysis, analyse_pool
    from .queries import QueryClusters, project_queries, query_clusters, query_key_similarity, task_cosines
    from .usage import PromptUsage, prompt_usage, task_names

__all__ = [
    "PoolAnalysis",
    "PromptUsage",
    "QueryClusters",
    "analyse_pool",
    "project_queries",
    "prompt_usage",
    "query_clusters",
    "query_key_similarity",
    "task_cosines",
    "task_names",
]
