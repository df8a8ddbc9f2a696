"""Data: tasks and their wordings, sources of rows, mixing, stored encoder features and the collator."""

from __future__ import annotations

from .collator import ListenCollator
from .features import FeatureStore, FeatureStoreError
from .manifest import ManifestError, from_datasets, load_manifest, load_salmonn, load_source
from .mixing import mix_datasets, mixing_weights, split_by_task
from .precompute import precompute_features
from .tasks import Task, UnknownTaskError, get_task, list_tasks, register_task

__all__ = [
    "FeatureStore",
    "FeatureStoreError",
    "ListenCollator",
    "ManifestError",
    "Task",
    "UnknownTaskError",
    "from_datasets",
    "get_task",
    "list_tasks",
    "load_manifest",
    "load_salmonn",
    "load_source",
    "mix_datasets",
    "mixing_weights",
    "precompute_features",
    "register_task",
    "split_by_task",
]
