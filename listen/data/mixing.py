"""Mixing of tasks in training: proportional, equal, by temperature or by explicit weights, with a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

STRATEGIES = ("proportional", "equal", "temperature", "weights")


def mixing_weights(
    sizes: Mapping[str, int],
    strategy: str = "proportional",
    temperature: float = 2.0,
    weights: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Share of each task in the training rows.

    Args:
        sizes: number of rows of each task.
        strategy: `"proportional"` to the sizes; `"equal"`; `"temperature"`, proportional to size ** (1 / temperature)
            as in multilingual training; `"weights"`, as given.
        temperature: 1 is proportional, large values approach equal shares.
        weights: weight of each task for `"weights"`; they need not sum to 1.

    Returns:
        Shares that sum to 1, in the order of `sizes`.

    Raises:
        ValueError: an unknown strategy, a temperature that is not positive, or weights that do not fit the tasks.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"mixing strategy {strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}")
    if temperature <= 0:
        raise ValueError(f"mixing temperature={temperature} must be positive")
    if strategy == "weights":
        raw = _explicit(sizes, weights or {})
    elif strategy == "equal":
        raw = dict.fromkeys(sizes, 1.0)
    else:
        exponent = 1.0 / temperature if strategy == "temperature" else 1.0
        raw = {name: float(size) ** exponent for name, size in sizes.items()}
    total = sum(raw.values())
    if total <= 0:
        raise ValueError(f"mixing weights {raw} add up to 0; give at least one row or one positive weight")
    return {name: weight / total for name, weight in raw.items()}


def mix_datasets(
    datasets: Mapping[str, Dataset | IterableDataset],
    strategy: str = "proportional",
    temperature: float = 2.0,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
    stopping_strategy: str = "all_exhausted",
) -> Dataset | IterableDataset:
    """Mix the data of several tasks into one data set.

    With `"proportional"` every row occurs once per epoch. Otherwise tasks are interleaved with the shares of
    `mixing_weights`; by default until each row of each task has occurred, so rare tasks repeat.

    Args:
        datasets: data set of each task, in the manifest schema. Streams have no length, so they need `"equal"` or
            `"weights"`.
        strategy: see `mixing_weights`.
        temperature: see `mixing_weights`.
        weights: see `mixing_weights`.
        seed: seed of the order.
        stopping_strategy: `"all_exhausted"` or `"first_exhausted"`, as in `datasets.interleave_datasets`.

    Returns:
        The mixture, shuffled within each task.

    Raises:
        ValueError: see `mixing_weights`; or a stream with a strategy that needs sizes.
    """
    if not datasets:
        raise ValueError("no data sets to mix; give at least one")
    streams = [name for name, part in datasets.items() if isinstance(part, IterableDataset)]
    if streams and strategy in ("proportional", "temperature") and len(datasets) > 1:
        raise ValueError(f"mixing={strategy!r} needs the sizes of {streams}, which stream; use 'equal' or 'weights'")
    sizes = {name: 1 if name in streams else len(part) for name, part in datasets.items()}
    shares = mixing_weights(sizes, strategy, temperature, weights)
    parts = [part for name, part in datasets.items() if shares[name] > 0]
    if len(parts) == 1:  # the trainer shuffles a data set but not a stream
        return parts[0].shuffle(seed=seed) if streams else parts[0]
    if strategy == "proportional":
        return concatenate_datasets(parts).shuffle(seed=seed)
    return interleave_datasets(
        [part.shuffle(seed=seed) for part in parts],
        probabilities=[share for share in shares.values() if share > 0],
        seed=seed,
        stopping_strategy=stopping_strategy,
    )


def split_by_task(dataset: Dataset, column: str = "task") -> dict[str, Dataset]:
    """Rows of each task, in the order in which tasks first occur."""
    rows: dict[str, list[int]] = {}
    for index, task in enumerate(dataset[column]):
        rows.setdefault(task, []).append(index)
    return {task: dataset.select(indices) for task, indices in rows.items()}


def subset_per_task(dataset: Dataset, num_rows: int, seed: int = 0) -> Dataset:
    """A random subset with at most `num_rows` rows per task, in the order of the data set; for quick evaluations."""
    chosen: list[int] = []
    tasks: Sequence[str] = dataset["task"]
    order = Dataset.from_dict({"index": range(len(tasks))}).shuffle(seed=seed)["index"]
    left = dict.fromkeys(tasks, num_rows)
    for index in order:
        if left[tasks[index]] > 0:
            left[tasks[index]] -= 1
            chosen.append(index)
    return dataset.select(sorted(chosen))


def _explicit(sizes: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, float]:
    unknown, absent = sorted(set(weights) - set(sizes)), sorted(set(sizes) - set(weights))
    if unknown or absent:
        raise ValueError(
            f"mixing weights must name each task of the data once: {sorted(sizes)}; unknown {unknown}, absent {absent}"
        )
    negative = [name for name, weight in weights.items() if weight < 0]
    if negative:
        raise ValueError(f"mixing weights of {negative} are negative; use 0 to leave a task out")
    return {name: float(weights[name]) for name in sizes}
