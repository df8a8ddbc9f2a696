"""What the prompt pool learned: prompts by task, overlap, query clusters, scores over the number of prompts."""

from __future__ import annotations

from .pool import PoolAnalysis, analyse_pool
from .probe import Probe, plot_embeddings, probe_groups, probe_split
from .queries import QueryClusters, project_queries, query_clusters, query_key_similarity
from .sweep import Sweep, default_counts, sweep_num_prompts
from .usage import PromptUsage, prompt_usage, task_names

__all__ = [
    "PoolAnalysis",
    "Probe",
    "PromptUsage",
    "QueryClusters",
    "Sweep",
    "analyse_pool",
    "default_counts",
    "plot_embeddings",
    "probe_groups",
    "probe_split",
    "project_queries",
    "prompt_usage",
    "query_clusters",
    "query_key_similarity",
    "sweep_num_prompts",
    "task_names",
]
