"""Linear probes and maps of embeddings on constructed cases."""

from __future__ import annotations

import numpy as np
import pytest

from listen.evaluation.probe import Probe, plot_embeddings, probe_groups, probe_split

LABELS = [("glad", "sad", "calm")[i % 3] for i in range(90)]
SPEAKERS = [f"s{i // 9}" for i in range(90)]


def clouds(distance: float, seed: int = 0) -> np.ndarray:
    """Noise around one centre a label."""
    centres = np.eye(12)[[("glad", "sad", "calm").index(name) for name in LABELS]]
    return np.random.default_rng(seed).normal(size=(90, 12)) + distance * centres


def test_classes_that_lie_apart_are_told_and_noise_is_not() -> None:
    apart = probe_split(clouds(8.0), LABELS, clouds(8.0, seed=1), LABELS)
    noise = probe_split(clouds(0.0), LABELS, clouds(0.0, seed=1), LABELS)
    assert apart.accuracy == apart.uar == 1.0 and apart.num_train == 90
    assert noise.accuracy < 0.55 and noise.chance == pytest.approx(1 / 3)


def test_scale_and_offset_of_a_width_do_not_matter() -> None:
    scale = np.logspace(-3, 3, 12)
    plain = probe_split(clouds(1.5), LABELS, clouds(1.5, seed=1), LABELS)
    scaled = probe_split(clouds(1.5) * scale + 7, LABELS, clouds(1.5, seed=1) * scale + 7, LABELS)
    assert plain.predictions == scaled.predictions


def test_held_out_groups_are_never_learned_from() -> None:
    # embeddings that tell the speaker alone, each speaker with a class of its own: known voices are easy, new ones not
    labels = [("glad", "sad")[i // 9 % 2] for i in range(90)]
    voices = np.eye(10)[[i // 9 for i in range(90)]] + 0.01 * np.random.default_rng(0).normal(size=(90, 10))
    known = probe_split(voices[::2], labels[::2], voices[1::2], labels[1::2])
    held_out = probe_groups(voices, labels, SPEAKERS)
    assert known.accuracy == 1.0 and held_out.accuracy < 0.8
    assert len(held_out.predictions) == 90 and set(held_out.predictions) <= {"glad", "sad"}
    assert probe_groups(clouds(8.0), LABELS, SPEAKERS).accuracy == 1.0


def test_scores_by_hand() -> None:
    probe = Probe(["a", "a", "a", "b"], ["a", "a", "b", "b"], num_train=9)
    assert (probe.accuracy, probe.uar, probe.chance) == (3 / 4, pytest.approx(5 / 6), 3 / 4)


def test_what_cannot_be_probed_is_refused() -> None:
    with pytest.raises(ValueError, match="90 embeddings for 3 labels"):
        probe_split(clouds(0.0), LABELS[:3], clouds(0.0), LABELS)
    with pytest.raises(ValueError, match="two classes to train on"):
        probe_split(clouds(0.0), ["a"] * 90, clouds(0.0), LABELS)
    with pytest.raises(ValueError, match="two or more, got \\['x'\\]"):
        probe_groups(clouds(0.0), LABELS, ["x"] * 90)


def test_a_map_names_every_class_in_its_own_style() -> None:
    labels = [f"class {i % 15:02}" for i in range(90)]
    figure = plot_embeddings(clouds(3.0), labels)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == sorted(set(labels))
    drawn = [(c.get_facecolor()[0].tobytes(), c.get_paths()[0].vertices.tobytes()) for c in axes.collections]
    assert len(set(drawn)) == 15 and "t-SNE" in axes.get_title(loc="left")
