"""What engines over a pipeline share: the models that they serve, and a queue whose requests run in batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from ..pipeline_listen import ListenPipeline
from .engine import EngineUnavailableError, QueueFullError, Request, model_details, model_names


class QueuedEngine:
    """Base of engines that run waiting requests in batches; see `Engine`. A subclass provides `group`.

    Args:
        pipeline: Its model holds all adapters.
        name: Folder or Hub id of the model, for `models`.
        max_batch: Requests in one batch.
        max_waiting: Requests that may wait; `QueueFullError` beyond.

    Raises:
        ValueError: a number below 1, or two models of one name.
    """

    def __init__(self, pipeline: ListenPipeline, name: str, max_batch: int = 16, max_waiting: int = 256) -> None:
        for option, value in (("max_batch", max_batch), ("max_waiting", max_waiting)):
            if value < 1:
                raise ValueError(f"{option}={value} must be 1 or more")
        self.pipeline, self.model, self.processor = pipeline, pipeline.model, pipeline.processor
        self.max_batch, self.max_waiting = max_batch, max_waiting
        base = (self.model.config.base_models or {}).get("language_model", {}).get("base_model_name_or_path")
        self.models = model_names(name, base, [other for other in self.model.adapters if other != "default"])
        self.details = model_details(self.models, self.model, self.processor)
        self.sampling_rate = self.processor.feature_extractor.sampling_rate
        self.task_instructions = self.processor.task_instructions
        self.on_batch: Callable[[int], None] = lambda size: None
        self.under_way = 0
        self.rows: deque[Any] = deque()  # each with its `request`
        self.closing = False

    @property
    def waiting(self) -> int:
        """See `Engine.waiting`."""
        return len(self.rows)

    def group(self, request: Request) -> tuple[Any, ...]:
        """Requests of equal groups can run in one batch."""
        raise NotImplementedError

    def check_open(self) -> None:
        """Return if the engine takes requests.

        Raises:
            EngineUnavailableError: it is closing.
        """
        if self.closing:
            raise EngineUnavailableError("the server is shutting down; send the request to another one")

    def check_room(self) -> None:
        """Return if one more request may wait.

        Raises:
            QueueFullError: it may not.
        """
        if self.waiting >= self.max_waiting:
            raise QueueFullError(f"{self.waiting} requests wait already; try again later")

    def take_batch(self, most: int) -> list[Any]:
        """The oldest waiting request, and up to `most - 1` behind it that can run with it."""
        group = self.group(self.rows[0].request)
        batch = [row for row in self.rows if self.group(row.request) == group][:most]
        self.rows = deque(row for row in self.rows if row not in batch)
        return batch


__all__ = ["QueuedEngine"]
