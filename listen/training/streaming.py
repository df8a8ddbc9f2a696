"""Rows of a stream, dealt to the processes of a run and to the workers that load data for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Any

from accelerate.data_loader import IterableDatasetShard
from datasets import IterableDataset
from torch.utils import data
from torch.utils.data import DataLoader, get_worker_info

_Row = dict[str, Any]


class StreamReader(data.IterableDataset):
    """The rows that one process reads from a stream, pass after pass without an end, each pass in another order.

    Every pass gives each row once, over all processes and workers together. If the stream's shards (its files) can be
    divided evenly among all workers, each worker reads only its own shards. Else each worker reads the whole stream
    and keeps every n-th batch; the batches of a step are then the same for any number of workers. Only rows are read
    here: their audio is loaded in the collator.

    Args:
        rows: the stream; every pass over it has to end.
        batch_size: rows of a batch of one process.
        rank: index of this process.
        world_size: number of processes.
    """

    def __init__(self, rows: IterableDataset, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.skipped_batches = 0
        """Batches at the start, already used by the run that is resumed; their rows are `None`."""

    def __iter__(self) -> Iterator[_Row | None]:
        """Rows of this worker's batches, in order.

        Raises:
            ValueError: the stream gives this worker no row.
        """
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        reader, readers = worker * self.world_size + self.rank, workers * self.world_size
        by_shards = self.rows.num_shards % readers == 0
        batches = self._batches(self._passes(reader, readers) if by_shards else self._passes(0, 1))
        own = batches if by_shards else islice(batches, reader, None, readers)
        for number, batch in enumerate(own):  # the DataLoader takes one batch from each worker in turn
            is_used = number * workers + worker < self.skipped_batches
            yield from [None] * self.batch_size if is_used else batch

    def _passes(self, shard: int, num_shards: int) -> Iterator[_Row]:
        for number in count():
            rows = self.rows.shuffle(seed=number) if number else self.rows
            rows = rows.shard(num_shards, shard) if num_shards > 1 else rows
            found = False
            for row in rows.iter(batch_size=1):  # unlike iter(rows), it does not divide shards among workers
                found = True
                yield {name: values[0] for name, values in row.items()}
            if not found:
                raise ValueError(f"a pass over the stream gives no row in part {shard} of {num_shards}; add rows")

    def _batches(self, rows: Iterator[_Row]) -> Iterator[list[_Row]]:
        while batch := list(islice(rows, self.batch_size)):
            yield batch


class CollateUnlessSkipped:
    """A collator that leaves out batches which a resumed run has used, so that their audio is not loaded.

    Args:
        collator: of all other batches.
    """

    def __init__(self, collator: Callable[[Sequence[_Row]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[_Row | None]) -> dict[str, Any]:
        """The collator's batch, or an empty one, which the DataLoader's `skip_batches` drops."""
        return {} if rows[0] is None else self.collator(rows)


def keep_whole(loader: DataLoader) -> None:
    """Make accelerate take all rows of a `StreamReader`, which gives each process its own rows already."""
    if isinstance(loader.dataset, IterableDatasetShard):
        loader.dataset.num_processes, loader.dataset.process_index = 1, 0


__all__ = ["CollateUnlessSkipped", "StreamReader", "keep_whole"]
