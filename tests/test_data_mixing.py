"""How often each task is seen."""

from __future__ import annotations

from collections import Counter

import pytest
from datasets import Dataset

from listen.data.mixing import mix_datasets, mixing_weights, split_by_task, subset_per_task

SIZES = {"asr": 400, "er": 100, "sv": 25}


def tasks() -> dict[str, Dataset]:
    return {
        name: Dataset.from_dict({"task": [name] * size, "id": [f"{name}{i}" for i in range(size)]})
        for name, size in SIZES.items()
    }


def test_weights_of_each_strategy() -> None:
    assert mixing_weights(SIZES) == pytest.approx({"asr": 400 / 525, "er": 100 / 525, "sv": 25 / 525})
    assert mixing_weights(SIZES, "equal") == pytest.approx(dict.fromkeys(SIZES, 1 / 3))
    assert mixing_weights(SIZES, "temperature", temperature=2.0) == pytest.approx(
        {"asr": 20 / 35, "er": 10 / 35, "sv": 5 / 35}
    )
    assert mixing_weights(SIZES, "temperature", temperature=1.0) == pytest.approx(mixing_weights(SIZES))
    assert mixing_weights(SIZES, "weights", weights={"asr": 1, "er": 3, "sv": 0}) == pytest.approx(
        {"asr": 0.25, "er": 0.75, "sv": 0.0}
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "even"}, "'even' is unknown; choose one of proportional"),
        ({"strategy": "temperature", "temperature": 0}, "temperature=0 must be positive"),
        ({"strategy": "weights"}, r"absent \['asr', 'er', 'sv'\]"),
        ({"strategy": "weights", "weights": {"asr": 1, "er": 1, "sv": 1, "st": 1}}, r"unknown \['st'\]"),
        ({"strategy": "weights", "weights": {"asr": 1, "er": -1, "sv": 1}}, r"\['er'\] are negative"),
    ],
)
def test_impossible_weights_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixing_weights(SIZES, **options)


def test_proportional_sees_every_row_once_and_mixed() -> None:
    mixed = mix_datasets(tasks(), seed=3)
    assert Counter(mixed["id"]) == Counter(row for part in tasks().values() for row in part["id"])
    assert len(set(mixed["task"][:40])) > 1


def test_other_strategies_keep_their_shares_and_see_every_row() -> None:
    for strategy in ("equal", "temperature"):
        mixed = mix_datasets(tasks(), strategy, seed=3)
        counts = Counter(mixed["task"])
        for name, share in mixing_weights(SIZES, strategy).items():
            assert counts[name] / len(mixed) == pytest.approx(share, abs=0.05)
        assert len(set(mixed["id"])) == sum(SIZES.values())


def test_mixing_is_fixed_by_its_seed() -> None:
    first, again, other = (mix_datasets(tasks(), "equal", seed=seed)["id"][:] for seed in (1, 1, 2))
    assert first == again and first != other


def test_a_task_of_weight_zero_is_left_out() -> None:
    mixed = mix_datasets(tasks(), "weights", weights={"asr": 1, "er": 1, "sv": 0})
    assert set(mixed["task"]) == {"asr", "er"}


def test_streams_mix_by_explicit_shares_only() -> None:
    streams = {name: part.to_iterable_dataset() for name, part in tasks().items()}
    with pytest.raises(ValueError, match="needs the sizes of"):
        mix_datasets(streams)
    rows = list(mix_datasets(streams, "equal", seed=0, stopping_strategy="first_exhausted"))
    assert set(Counter(row["task"] for row in rows)) == set(SIZES)


def test_split_and_subset_by_task() -> None:
    mixed = mix_datasets(tasks(), seed=0)
    assert {name: len(part) for name, part in split_by_task(mixed).items()} == SIZES
    subset = subset_per_task(mixed, 30, seed=0)
    assert Counter(subset["task"]) == {"asr": 30, "er": 30, "sv": 25}
    assert subset["id"][:] == subset_per_task(mixed, 30, seed=0)["id"][:]
