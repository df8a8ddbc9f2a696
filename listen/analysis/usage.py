"""Which prompts each task selects from the pool."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.tasks import list_tasks


@dataclass
class PromptUsage:
    """How often each task selects each prompt.

    Attributes:
        tasks: names, in the order of the rows.
        shares: `(tasks, pool)` share of the task's examples that select the prompt, 0 to 1.
    """

    tasks: list[str]
    shares: np.ndarray

    @property
    def share_used(self) -> float:
        """Share of the pool that at least one example selects."""
        return float((self.shares > 0).any(axis=0).mean())

    def entropy(self, task: str | None = None) -> float:
        """Entropy of the selections over the pool: 1 for uniform use of all prompts, 0 for a single one.

        Args:
            task: only this task; by default all tasks with equal weight.
        """
        usage = self.shares.mean(axis=0) if task is None else self.shares[self.tasks.index(task)]  # (pool,)
        if usage.size < 2 or not usage.any():
            return 0.0
        probabilities = usage[usage > 0] / usage.sum()
        # + 0.0 turns the -0.0 of a single prompt into 0.0
        return float(-(probabilities * np.log(probabilities)).sum() / np.log(usage.size)) + 0.0

    def jaccard(self, min_share: float = 0.0) -> np.ndarray:
        """`(tasks, tasks)` overlap of the sets of prompts that two tasks use: size of the intersection over the union.

        Args:
            min_share: a prompt belongs to a task's set if more than this share of its examples selects it.
        """
        used = self.shares > min_share  # (tasks, pool)
        shared = (used[:, None] & used[None]).sum(-1)  # (tasks, tasks)
        either = (used[:, None] | used[None]).sum(-1)
        return np.divide(shared, either, out=np.zeros(shared.shape), where=either > 0)

    def weighted_jaccard(self) -> np.ndarray:
        """`(tasks, tasks)` overlap weighted by how often prompts are selected: sum of the smaller shares over that of
        the larger ones."""
        smaller = np.minimum(self.shares[:, None], self.shares[None]).sum(-1)  # (tasks, tasks)
        larger = np.maximum(self.shares[:, None], self.shares[None]).sum(-1)
        return np.divide(smaller, larger, out=np.zeros(smaller.shape), where=larger > 0)

    def by_owner(self) -> np.ndarray:
        """`(used,)` the prompts in use: those that most tasks share, then those of each task, most selected first."""
        used = np.flatnonzero(self.shares.any(axis=0))
        shares = self.shares[:, used]  # (tasks, used)
        shared = (shares > 0.5).mean(axis=0) > 0.5
        owner = np.where(shared, -1, shares.argmax(axis=0))
        strength = np.where(shared, shares.mean(axis=0), shares.max(axis=0))
        return used[np.lexsort((-strength, owner))]


def task_names(tasks: Iterable[str]) -> list[str]:
    """The different tasks that occur, in the order in which they are registered, then any others as they appear."""
    found = list(dict.fromkeys(tasks))
    known = [name for name in list_tasks() if name in found]
    return [*known, *(name for name in found if name not in known)]


def prompt_usage(tasks: Sequence[str], prompt_indices: Sequence[Sequence[int]], pool_size: int) -> PromptUsage:
    """Count the selections of each task.

    Args:
        tasks: task of each example.
        prompt_indices: prompts selected for each example; negative entries mark empty places.
        pool_size: P.

    Raises:
        ValueError: the two lists differ in length or are empty, or an index lies outside the pool.
    """
    if not tasks or len(tasks) != len(prompt_indices):
        raise ValueError(f"got {len(tasks)} tasks and {len(prompt_indices)} lists of prompts; give one each, or more")
    names = task_names(tasks)
    shares = np.zeros((len(names), pool_size))
    for task, indices in zip(tasks, prompt_indices, strict=True):
        selected = [index for index in indices if index >= 0]
        if selected and max(selected) >= pool_size:
            raise ValueError(f"prompt {max(selected)} lies outside a pool of {pool_size}; pass the model's pool_size")
        shares[names.index(task), selected] += 1
    return PromptUsage(names, shares / np.array([[tasks.count(name)] for name in names]))
