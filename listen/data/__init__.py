"""Data: tasks and their instructions, sources of rows, targets, mixing, stored encoder features and the collator."""

from __future__ import annotations

from .collator import ListenCollator
from .features import FeatureStore, FeatureStoreError
from .manifest import ManifestError, from_datasets, load_manifest, load_salmonn, load_source
from .mixing import mix_datasets, mixing_weights, split_by_task
from .precompute import precompute_features
from .sources import DataSource, load_rows
from .targets import TargetError, generate_targets
from .tasks import Task, UnknownTaskError, get_task, list_tasks, register_task
from .utterances import Utterance, read_utterances

__all__ = [
    "DataSource",
    "FeatureStore",
    "FeatureStoreError",
    "ListenCollator",
    "ManifestError",
    "TargetError",
    "Task",
    "UnknownTaskError",
    "Utterance",
    "from_datasets",
    "generate_targets",
    "get_task",
    "list_tasks",
    "load_manifest",
    "load_rows",
    "load_salmonn",
    "load_source",
    "mix_datasets",
    "mixing_weights",
    "precompute_features",
    "read_utterances",
    "register_task",
    "split_by_task",
]
