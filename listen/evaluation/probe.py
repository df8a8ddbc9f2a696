"""Linear probes of embeddings, and a map of embeddings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, recall_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from ..analysis.escape import plot_text
from ..analysis.plots import plot_map
from ..analysis.queries import project_queries, query_clusters


@dataclass(frozen=True)
class Probe:
    """Predictions of a linear classifier for examples that it was not trained on.

    Attributes:
        truths: class of each tested example.
        predictions: its predicted class.
        num_train: examples that the probe was trained on (the mean over folds).
    """

    truths: list[str]
    predictions: list[str]
    num_train: int

    @property
    def accuracy(self) -> float:
        """Share of correct predictions."""
        return float(accuracy_score(self.truths, self.predictions))

    @property
    def uar(self) -> float:
        """Mean over the classes that occur of their recall."""
        labels = sorted(set(self.truths))
        return float(recall_score(self.truths, self.predictions, labels=labels, average="macro", zero_division=0.0))

    @property
    def chance(self) -> float:
        """Accuracy of always predicting the most frequent class."""
        return max(self.truths.count(name) for name in set(self.truths)) / len(self.truths)


def probe_split(
    train: np.ndarray, train_labels: Sequence[str], test: np.ndarray, test_labels: Sequence[str], strength: float = 1.0
) -> Probe:
    """Train a probe on some examples and test it on others.

    Args:
        train: `(examples, width)` embeddings.
        train_labels: their classes.
        test: `(tested examples, width)`.
        test_labels: their classes.
        strength: weight of the data against the L2 penalty, `C` of scikit-learn's `LogisticRegression`; widths are
            standardised by the training examples.

    Raises:
        ValueError: lengths differ, fewer than two classes to train on, or nothing to test.
    """
    _check(train, train_labels)
    _check(test, test_labels)
    if len(set(train_labels)) < 2 or not len(test_labels):
        raise ValueError(
            f"a probe needs two classes to train on and examples to test, got {len(set(train_labels))} classes and "
            f"{len(test_labels)} tested examples"
        )
    found = _classifier(strength).fit(train, list(train_labels)).predict(test)
    return Probe(list(test_labels), [str(name) for name in found], len(train_labels))


def probe_groups(
    embeddings: np.ndarray, labels: Sequence[str], groups: Sequence[str | None], folds: int = 5, strength: float = 1.0
) -> Probe:
    """Test every example once, by a probe that was not trained on its group.

    Args:
        embeddings: `(examples, width)`.
        labels: their classes.
        groups: group of each example, such as its speaker.
        folds: number of folds; fewer if there are fewer groups, or fewer examples of each class.
        strength: see `probe_split`.

    Raises:
        ValueError: lengths differ, an example without a group, fewer than two groups, no class with two examples, or a
            fold with a single class to train on.
    """
    _check(embeddings, labels)
    _check(embeddings, groups)
    if None in groups:
        raise ValueError(f"{list(groups).count(None)} of {len(groups)} examples name no speaker to hold out; name them")
    names, most = sorted(set(groups)), max(Counter(labels).values())
    if len(names) < 2:
        raise ValueError(f"holding speakers out needs two or more, got {names}")
    if most < 2:
        raise ValueError(f"no class has two examples among {len(labels)}; give more")
    splitter = StratifiedGroupKFold(min(folds, len(names), most))
    truths, predictions, sizes = np.array(labels), np.empty(len(labels), dtype=object), []
    for train, test in splitter.split(embeddings, truths, groups):
        if len(test):
            part = probe_split(
                embeddings[train], truths[train].tolist(), embeddings[test], truths[test].tolist(), strength
            )
            predictions[test] = part.predictions
            sizes.append(part.num_train)
    return Probe(truths.tolist(), predictions.tolist(), round(float(np.mean(sizes))))


def plot_embeddings(embeddings: np.ndarray, labels: Sequence[str], seed: int = 0, system: str = "") -> Figure:
    """t-SNE map of embeddings `(examples, width)`, one colour and marker per class; `system` goes into the title.

    Raises:
        ValueError: fewer than four examples.
    """
    _check(embeddings, labels)
    scaled = StandardScaler().fit_transform(embeddings)
    clusters = query_clusters(scaled, labels)
    of_system = f" of {plot_text(system)}" if system else ""
    title = (
        f"Speech embeddings{of_system} (t-SNE)\nsilhouette {clusters.silhouette:.2f}, "
        f"nearest neighbour of the same class {clusters.neighbour_accuracy:.0%} (chance {clusters.chance:.0%})"
    )
    return plot_map(project_queries(scaled, seed), labels, list(dict.fromkeys(sorted(labels))), title)


def _classifier(strength: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))


def _check(embeddings: np.ndarray, labels: Sequence[str]) -> None:
    if len(embeddings) != len(labels):
        raise ValueError(f"got {len(embeddings)} embeddings for {len(labels)} labels; give one each")
