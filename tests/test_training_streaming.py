"""Streams over processes and workers: each row once a pass, and a resumed run gets the rows that were left."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from fixtures_processes import place, run_processes
from fixtures_servers import free_port
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from listen.training.arguments import DataArguments
from listen.training.datasets import build_train_dataset
from listen.training.resumable import ResumableTrainer
from listen.training.streaming import StreamReader

SIZE = 3  # rows of a batch


def numbers(ranges: list[list[int]]) -> Iterator[dict[str, int]]:
    for start, end in ranges:
        yield from ({"row": row} for row in range(start, end))


def stream(*sizes: int) -> IterableDataset:
    """Rows 0, 1, 2, ... in as many shards as there are sizes, shuffled as training data are."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    ranges = [[end - size, end] for end, size in zip(ends, sizes, strict=True)]
    return IterableDataset.from_generator(numbers, gen_kwargs={"ranges": ranges}).shuffle(seed=1)


def batches(rows: IterableDataset, count: int, world: int, workers: int, skip: int = 0) -> list[list[list[int]]]:
    """The first batches of each process, for each step."""
    processes = []
    for rank in range(world):
        reader = StreamReader(rows, SIZE, rank, world)
        reader.skipped_batches = skip
        loader = DataLoader(reader, batch_size=SIZE, num_workers=workers, collate_fn=list)
        processes.append([[row and row["row"] for row in batch] for batch in islice(loader, count)])
    return [list(step) for step in zip(*processes, strict=True)]


def flat(steps: list[list[list[int]]]) -> list[int]:
    return [row for step in steps for batch in step for row in batch]


@pytest.mark.parametrize("sizes", [(36,), (30, 4, 2), (9, 9, 9, 9)], ids=["one shard", "uneven", "a shard each"])
def test_each_pass_gives_every_row_once_over_processes_and_workers(sizes: tuple[int, ...]) -> None:
    rows = flat(batches(stream(*sizes), count=18, world=2, workers=2))
    first, second, third = rows[:36], rows[36:72], rows[72:]
    assert sorted(first) == sorted(second) == sorted(third) == list(range(36))
    assert first != second != third != list(range(36))


def test_uneven_passes_of_workers_with_their_own_shards_still_give_every_row() -> None:
    """Workers end a pass at different times, but shards change hands in each pass."""
    rows = flat(batches(stream(1, 2, 3, 30), count=200, world=2, workers=2))
    counts = torch.bincount(torch.tensor(rows), minlength=36).float()
    assert counts.min() > 0.5 * counts.mean() and counts.max() < 2 * counts.mean()


def test_steps_do_not_depend_on_processes_and_workers() -> None:
    rows = stream(30, 4, 1)
    expected = flat(batches(rows, count=24, world=1, workers=0))
    assert flat(batches(rows, count=24, world=1, workers=2)) == expected
    assert flat(batches(rows, count=12, world=2, workers=2)) == expected


@pytest.mark.parametrize("sizes", [(36,), (9, 9, 9, 9)])
def test_skipped_batches_are_empty_and_the_others_are_the_same(sizes: tuple[int, ...]) -> None:
    whole, rest = (batches(stream(*sizes), count=9, world=2, workers=2, skip=skip) for skip in (0, 5))
    assert rest[:5] == [[[None] * SIZE] * 2] * 5
    assert rest[5:] == whole[5:]


def test_a_stream_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="gives no row in part 0 of 1; add rows"):
        next(iter(StreamReader(stream(0), SIZE)))


def test_max_rows_of_a_stream_are_the_same_rows_in_each_pass(tmp_path: Path) -> None:
    lines = [json.dumps({"audio": f"{i}.wav", "task": "asr", "response": str(i)}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    source = {"path": str(tmp_path / "rows.jsonl"), "streaming": True, "max_rows": 12}
    reader = StreamReader(build_train_dataset(DataArguments(train=[source]), 0), SIZE)
    seen = [row["response"][0] for row in islice(reader, 24)]
    assert len(set(seen[:12])) == 12 and set(seen[:12]) == set(seen[12:])
    assert seen[:12] != seen[12:]


class Counter(torch.nn.Module):
    """A model of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, rows: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * rows.float().mean() / 36 - 1) ** 2}


class Recorder(ResumableTrainer):
    """Keeps the rows of each step."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen: list[list[int]] = []

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.seen.append(inputs["rows"].tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)


class Collator:
    """Notes each row whose audio would be loaded."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        with self.log.open("a") as file:
            file.writelines(f"{row['row']}\n" for row in rows)
        return {"rows": torch.tensor([row["row"] for row in rows])}


def fit(folder: Path, rank: int, name: str, steps: int, resume: Path | None = None) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder / name),
        max_steps=steps,
        per_device_train_batch_size=SIZE,
        gradient_accumulation_steps=2,
        save_steps=2,
        dataloader_num_workers=2,
        dataloader_pin_memory=False,
        dataloader_multiprocessing_context="fork",  # as under a launcher
        accelerator_config={"dispatch_batches": False},
        remove_unused_columns=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    collator = Collator(folder / f"{name}-{rank}.log")
    trainer = Recorder(model=Counter(), args=arguments, train_dataset=stream(36), data_collator=collator)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    (folder / f"{name}-{rank}.json").write_text(json.dumps([trainer.seen, trainer.model.weight.item()]))


def worker(rank: int, world: int, port: int, folder: Path) -> None:
    os.environ.update(place(rank, world, port), ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    fit(folder, rank, "whole", steps=5)
    fit(folder, rank, "resumed", steps=5, resume=folder / "whole" / "checkpoint-2")


@pytest.mark.slow
def test_two_processes_with_two_workers_resume_within_a_pass(tmp_path: Path) -> None:
    """Three steps of 12 rows are a pass; the checkpoint is after two of them."""
    run_processes(worker, 2, free_port(), tmp_path)
    results = {
        name: [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        for name in ("whole", "resumed")
    }
    first_pass = [row for seen, _ in results["whole"] for batch in seen[:6] for row in batch]
    assert sorted(first_pass) == list(range(36))
    for (seen, weight), (rest, again) in zip(results["whole"], results["resumed"], strict=True):
        assert rest == seen[4:] and again == weight
    for rank, (seen, _) in enumerate(results["whole"]):  # audio of the batches before is not loaded again
        assert int((tmp_path / f"resumed-{rank}.log").read_text().split()[0]) in seen[4] + seen[5]
