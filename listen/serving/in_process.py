"""The engine `transformers`: a pipeline in this process, which answers waiting requests in batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging
from transformers.utils.chat_template_utils import Chat

from ..adapter_listen import BASE_ADAPTER
from ..language_models_listen import context_limit
from ..pipeline_listen import ListenPipeline
from .answers import GrowingAnswer
from .engine import Delta, EngineUnavailableError, Request, Sampling, TokenLogprob
from .queued import QueuedEngine

logger = logging.get_logger(__name__)

MAX_TOKENS = 256
"""New tokens at most where a request does not say, as in the pipeline."""
GATHER_SECONDS = 0.01
"""How long an idle engine waits for each further request that the server is reading already."""


@dataclass(eq=False)
class _Row:
    """A request between its arrival and the end of its answer."""

    request: Request
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Delta | Exception] = field(default_factory=asyncio.Queue)
    dropped: bool = False
    answer: GrowingAnswer | None = None

    def send(self, piece: Delta | Exception) -> None:
        """Hand a piece over to the event loop; called by the thread of the model."""
        _send([(self, piece)])


def _send(pieces: list[tuple[_Row, Delta | Exception]]) -> None:
    """Hand over the pieces of several rows at once: each call wakes the event loop."""

    def put() -> None:
        for row, piece in pieces:
            row.pieces.put_nowait(piece)

    if pieces:
        pieces[0][0].loop.call_soon_threadsafe(put)


class TransformersEngine(QueuedEngine):
    """Answers in batches of up to `max_batch` requests, by one thread. Greedy answers are the pipeline's.

    A batch holds requests with the same sampling settings and k. Each row has its own adapter, limit and stop strings.
    Requests that arrive while a batch runs wait for its end. An idle engine waits for those that the server is reading
    when the first one arrives, see `GATHER_SECONDS`. A sampled request with a seed runs on its own.

    Args:
        pipeline: Its model holds all adapters.
        name: Folder or Hub id of the model, for `models`.
        max_batch: Requests in one batch.
        max_waiting: Requests that may wait; `QueueFullError` beyond.
    """

    def __init__(self, pipeline: ListenPipeline, name: str, max_batch: int = 16, max_waiting: int = 256) -> None:
        super().__init__(pipeline, name, max_batch, max_waiting)
        ends = self.model.generation_config.eos_token_id
        self._end_ids = set(ends if isinstance(ends, list) else [ends])
        self._arrived = asyncio.Event()
        self._streams = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._dispatcher: asyncio.Task | None = None

    # ------------------------------------------------------------------ on the event loop

    async def stream(self, request: Request) -> AsyncIterator[Delta]:
        """The answer, see `Engine.stream`."""
        await self.check_health()
        self.check_room()
        if self._dispatcher is None:
            self._dispatcher = asyncio.create_task(self._dispatch())
        row = _Row(request, asyncio.get_running_loop())
        self.rows.append(row)
        self._streams += 1
        self._arrived.set()
        try:
            while True:
                piece = await row.pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            self._streams -= 1
            row.dropped = True  # a running batch ends this row, a waiting one is skipped
            if row in self.rows:
                self.rows.remove(row)

    async def check_health(self) -> None:
        """See `Engine.check_health`."""
        self.check_open()
        if self._dispatcher is not None and self._dispatcher.done():
            raise EngineUnavailableError("the engine has stopped after an error; restart the server")

    async def close(self) -> None:
        """See `Engine.close`."""
        self.closing = True
        self._arrived.set()
        if self._dispatcher is not None:
            await self._dispatcher
        self._thread.shutdown()

    async def _dispatch(self) -> None:
        """Run batch after batch until the engine is closed and nothing waits."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            await self._gather()
            while self.rows:
                sampling = self.rows[0].request.sampling
                is_seeded = sampling.seed is not None and sampling.temperature
                batch = self.take_batch(1 if is_seeded else self.max_batch)
                await asyncio.get_running_loop().run_in_executor(self._thread, self._answer, batch)
            if self.closing:
                return

    async def _gather(self) -> None:
        """Wait for requests that are not here yet but under way, while further ones arrive in time."""
        clock, known, end = asyncio.get_running_loop().time, 0, 0.0
        while self.under_way > self._streams and len(self.rows) < self.max_batch:
            if len(self.rows) > known:
                known, end = len(self.rows), clock() + GATHER_SECONDS
            if clock() >= end:
                return
            await asyncio.sleep(0.001)

    def group(self, request: Request) -> tuple[Any, ...]:
        """Requests of equal groups can run in one batch: one k, one sampling, and audio windows of one length."""
        sampling = request.sampling
        windows = None
        if request.adapter is not None:
            windows = str(sorted(self.model.adapters[request.adapter].connector.config.settings().items()))
        chosen = (sampling.temperature, sampling.top_p) if sampling.temperature != 0 else (0, None)
        return request.adapter is None, windows, request.num_prompts, *chosen, sampling.seed

    # ------------------------------------------------------------------ in the thread of the model

    def _answer(self, batch: list[_Row]) -> None:
        """Answer a batch. Where its input is refused, each row is tried alone, so that only the faulty one fails."""
        batch = [row for row in batch if not row.dropped]
        if not batch:
            return
        try:
            self._generate(batch)
        except Exception as error:  # of any type: the sender of each request has to know, and the engine goes on
            unstarted = all(row.answer is None for row in batch)
            if len(batch) > 1 and unstarted:
                for row in batch:
                    self._answer([row])
                return
            if not isinstance(error, ValueError):
                logger.error("a batch of %d requests failed", len(batch), exc_info=error)
            for row in batch:
                row.send(error)

    def _generate(self, batch: list[_Row]) -> None:
        self.on_batch(len(batch))
        requests = [row.request for row in batch]
        is_base = requests[0].adapter is None
        inputs = self._inputs(requests)
        lengths = inputs["attention_mask"].sum(-1).tolist()
        if self.processor.prompts_in_layers and not is_base:
            k = self.processor.num_prompts if requests[0].num_prompts is None else requests[0].num_prompts
            lengths = [length + k for length in lengths]
        limit = context_limit(self.model.config.text_config)
        inputs = inputs.to(self.model.device)
        for row, length in zip(batch, lengths, strict=True):
            row.answer = self._growing(row.request.sampling, length, limit)
        rows = _Rows(batch, self.processor.tokenizer)
        names = [BASE_ADAPTER if r.adapter is None else r.adapter for r in requests]
        options = _generation_options(requests[0].sampling)
        options["max_new_tokens"] = max(row.answer.sampling.max_tokens for row in batch)
        adapters = self.model.disable_adapter() if is_base else nullcontext()
        with torch.inference_mode(), _seeded(requests[0].sampling, self.model.device), adapters:
            self.model.generate(
                **inputs,
                **self.pipeline._prepare_generate_kwargs(options),
                adapter_names=names,
                stopping_criteria=StoppingCriteriaList([rows]),
                logits_processor=LogitsProcessorList([rows.recorder]) if rows.recorder else None,
            )
        for row in batch:  # an end that the model's own config adds, such as a time limit
            if not row.answer.finished and not row.dropped:
                raise RuntimeError("generation ended before the answer did; see max_time in the generation config")

    def _inputs(self, requests: list[Request]) -> Any:
        k = 0 if requests[0].adapter is None else requests[0].num_prompts
        owns = self.processor.tasks is not None  # the pool is divided among tasks
        samples = [
            self.pipeline.preprocess(Chat(r.messages), task=r.task if owns else None, num_prompts=k) for r in requests
        ]
        return self.pipeline.collate(samples)

    def _growing(self, sampling: Sampling, length: int, context: int | None) -> GrowingAnswer:
        most = MAX_TOKENS if sampling.max_tokens is None else sampling.max_tokens
        if context is not None:
            most = min(most, context - length)
        if most < 1:
            raise ValueError(f"the input fills the context of {context} positions; shorten the audio or the messages")
        decode = self.processor.decode
        return GrowingAnswer(
            lambda ids: decode(ids, skip_special_tokens=True), replace(sampling, max_tokens=most), self._end_ids, length
        )


class _Rows(StoppingCriteria):
    """Sends each new token to its row, and ends the rows that are finished or dropped."""

    def __init__(self, batch: list[_Row], tokenizer: Any) -> None:
        self.batch = batch
        self.recorder = _LogprobRecorder() if any(r.request.sampling.top_logprobs is not None for r in batch) else None
        self.token = tokenizer.decode

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        """`input_ids` `(rows, sequence)`; whether each row is done, `(rows,)`."""
        _send(
            [
                (row, row.answer.push(token_id, self._logprob(index, token_id)))
                for index, (row, token_id) in enumerate(zip(self.batch, input_ids[:, -1].tolist(), strict=True))
                if not (row.answer.finished or row.dropped)
            ]
        )
        done = [row.answer.finished or row.dropped for row in self.batch]
        return torch.tensor(done, device=input_ids.device)

    def _logprob(self, index: int, token_id: int) -> TokenLogprob | None:
        count = self.batch[index].request.sampling.top_logprobs
        if count is None:
            return None
        logprobs = self.recorder.logprobs[index]  # (vocabulary,)
        values, ids = logprobs.topk(count) if count else (logprobs[:0], logprobs[:0])
        top = [TokenLogprob(self.token([i]), v) for v, i in zip(values.tolist(), ids.tolist(), strict=True)]
        return TokenLogprob(self.token([token_id]), float(logprobs[token_id]), tuple(top))


class _LogprobRecorder(LogitsProcessor):
    """Keeps the log probabilities of the newest position, before temperature and top_p, and changes nothing."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`scores` `(rows, vocabulary)`, returned as they are."""
        self.logprobs = scores.float().log_softmax(-1)  # (rows, vocabulary)
        return scores


def _generation_options(sampling: Sampling) -> dict[str, Any]:
    if sampling.temperature is None:
        return {"num_beams": 1}
    if sampling.temperature == 0:
        return {"num_beams": 1, "do_sample": False}
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    return {"num_beams": 1, "do_sample": True, "temperature": sampling.temperature, "top_p": top_p, "top_k": 0}


@contextmanager
def _seeded(sampling: Sampling, device: torch.device) -> Iterator[None]:
    if sampling.seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        yield


__all__ = ["MAX_TOKENS", "TransformersEngine"]
