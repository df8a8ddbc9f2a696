"""The engine `vllm`: audio and prompts are encoded here, a vLLM server that runs the bare LLM answers.

The server is unmodified: `vllm serve LLM --enable-prompt-embeds`. Requests to an adapter reach its `/v1/completions` as
`prompt_embeds`; requests to the base LLM reach its `/v1/chat/completions` as they are.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import httpx
from transformers.utils import logging
from transformers.utils.chat_template_utils import Chat

from ..language_models_listen import context_limit
from ..pipeline_listen import ListenPipeline
from .encoders import InputEmbeddings, drop_layers
from .engine import Delta, EngineUnavailableError, QueueFullError, Request, Sampling, TokenLogprob
from .queued import QueuedEngine

logger = logging.get_logger(__name__)

MAX_TOKENS = 256
"""New tokens at most where a request to an adapter does not say, as in the pipeline."""


class VllmServer(NamedTuple):
    """A vLLM server.

    Attributes:
        url: Its address, with or without `/v1`.
        api_key: What it asks of clients.
        timeout: Seconds without a byte after which a request fails.
    """

    url: str
    api_key: str | None = None
    timeout: float = 300.0


class VllmEngine(QueuedEngine):
    """Sends requests with audio to a vLLM server as embeddings, which it computes in batches of up to `max_batch`.

    The LLM's layers are not used on this side and are freed: its input embeddings are kept. `EncoderSide` loads a model
    without them.

    Args:
        pipeline: Its model holds all adapters. Load it in the server's dtype.
        name: Folder or Hub id of the model, for `models`.
        server: The vLLM server.
        max_batch: Requests that are encoded together.
        max_waiting: Requests that may wait for the encoders; `QueueFullError` beyond.

    Raises:
        ValueError: an adapter or LLM whose input is more than embeddings, or as in `QueuedEngine`.
    """

    def __init__(
        self, pipeline: ListenPipeline, name: str, server: VllmServer, max_batch: int = 16, max_waiting: int = 256
    ) -> None:
        if not isinstance(pipeline.model.language_model, InputEmbeddings):
            drop_layers(pipeline.model)
        super().__init__(pipeline, name, max_batch, max_waiting)
        self.server = server
        headers = {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
        address = server.url.rstrip("/").removesuffix("/v1")
        limits = httpx.Limits(max_connections=None)  # the queue is bounded, and so is vLLM's
        timeout = httpx.Timeout(server.timeout, connect=10)
        self._client = httpx.AsyncClient(base_url=address, headers=headers, timeout=timeout, limits=limits)
        self._encoding: asyncio.Task | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._served: tuple[str, int | None] | None = None
        self._running = 0

    # ------------------------------------------------------------------ requests

    async def stream(self, request: Request) -> AsyncIterator[Delta]:
        """The answer, see `Engine.stream`."""
        self.check_open()
        self._running += 1
        try:
            model, context = await self._served_model()
            is_chat = request.adapter is None
            body = chat_body(request) if is_chat else await self._completion_body(request, context)
            path = "/v1/chat/completions" if is_chat else "/v1/completions"
            async with self._answer(path, {**body, "model": model, **STREAMED}) as events:
                async for delta in _deltas(events):
                    yield delta
        except (ValueError, QueueFullError, EngineUnavailableError):  # the server passes these on
            raise
        except Exception:
            logger.exception("a request failed")
            raise
        finally:
            self._running -= 1

    async def check_health(self) -> None:
        """See `Engine.check_health`."""
        self.check_open()
        try:
            response = await self._client.get("/health", timeout=5)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if not response.is_success:
            raise EngineUnavailableError(f"the vLLM server at {self.server.url} is not healthy: {response.status_code}")

    async def close(self) -> None:
        """See `Engine.close`."""
        self.closing = True
        while self._running:
            await asyncio.sleep(0.05)
        self._thread.shutdown()
        await self._client.aclose()

    # ------------------------------------------------------------------ the vLLM server

    async def _served_model(self) -> tuple[str, int | None]:
        """The server's name of its model and its context; asked for once."""
        if self._served is None:
            try:
                response = await self._client.get("/v1/models", timeout=10)
            except httpx.HTTPError as error:
                raise self._unreachable(error) from error
            if not response.is_success:
                raise _refusal(response.status_code, response.text)
            try:
                first = response.json()["data"][0]
                self._served = first["id"], first.get("max_model_len")
            except (ValueError, LookupError, TypeError, AttributeError) as error:  # a ValueError is the client's fault
                raise EngineUnavailableError(f"{self.server.url} is no vLLM server; check --engine-url") from error
        return self._served

    @asynccontextmanager
    async def _answer(self, path: str, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """The events of a streamed answer."""
        try:
            async with self._client.stream("POST", path, json=body) as response:
                if not response.is_success:
                    raise _refusal(response.status_code, (await response.aread()).decode(errors="replace"))
                yield _events(response)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> EngineUnavailableError:
        reason = str(error) or type(error).__name__
        return EngineUnavailableError(f"the vLLM server at {self.server.url} does not answer ({reason}); check it")

    # ------------------------------------------------------------------ embeddings

    async def _completion_body(self, request: Request, served_context: int | None) -> dict[str, Any]:
        embeds = await self._embeds(request)  # (sequence, text width)
        most = MAX_TOKENS if request.sampling.max_tokens is None else request.sampling.max_tokens
        limits = [limit for limit in (served_context, context_limit(self.model.config.text_config)) if limit]
        room = min(limits) - len(embeds) if limits else most
        if room < 1:
            raise ValueError(
                f"the input of {len(embeds)} positions fills the context of {min(limits)}; shorten the audio or the "
                "messages"
            )
        sampling = sampling_fields(request.sampling, self.model.generation_config.do_sample)
        if request.sampling.top_logprobs is not None:
            sampling["logprobs"] = request.sampling.top_logprobs
        return {**sampling, "prompt_embeds": encoded_tensor(embeds), "max_tokens": min(most, room)}

    async def _embeds(self, request: Request) -> torch.Tensor:
        self.check_room()
        row = _Row(request, asyncio.get_running_loop().create_future())
        self.rows.append(row)
        if self._encoding is None or self._encoding.done():
            self._encoding = asyncio.create_task(self._encode_waiting())
        return await row.embeds

    async def _encode_waiting(self) -> None:
        """Encode batch after batch until nothing waits."""
        while self.rows:
            batch = [row for row in self.take_batch(self.max_batch) if not row.embeds.cancelled()]
            if batch:
                await self._encode(batch)

    async def _encode(self, batch: list[_Row]) -> None:
        """Embeddings of a batch. Where its input is refused, each row is tried alone, so that only one fails."""
        self.on_batch(len(batch))
        run = asyncio.get_running_loop().run_in_executor
        try:
            rows = await run(self._thread, self._embed, [row.request for row in batch])
        except Exception as error:  # of any type: the sender of each request has to know, and the engine goes on
            if len(batch) > 1:
                for row in batch:
                    await self._encode([row])
            elif not batch[0].embeds.done():
                batch[0].embeds.set_exception(error)
            return
        for row, embeds in zip(batch, rows, strict=True):
            if not row.embeds.done():
                row.embeds.set_result(embeds)

    def group(self, request: Request) -> tuple[Any, ...]:
        """Requests with the same k and windows."""
        settings = self.model.adapters[request.adapter].connector.config.settings()
        return request.num_prompts, sorted(settings.items())

    @torch.inference_mode()
    def _embed(self, requests: list[Request]) -> list[torch.Tensor]:
        """The LLM's input of each request, `(sequence, text width)`, without padding; in the encoder's thread."""
        samples = [
            self.pipeline.preprocess(Chat(request.messages), task=request.task, num_prompts=request.num_prompts)
            for request in requests
        ]
        inputs = self.pipeline.collate(samples).to(self.model.device)
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")  # (batch, sequence)
        task_ids = inputs.pop("task_ids", None)  # (batch,)
        encoded = self.model.encode_audio(**inputs) if inputs else None
        names = [request.adapter for request in requests]
        embeds, _ = self.model.embed(ids, mask, encoded, mask, task_ids, names)  # (batch, sequence, text width)
        return [row[kept].cpu() for row, kept in zip(embeds, mask.bool(), strict=True)]


@dataclass(eq=False)
class _Row:
    """A request that waits for its embeddings."""

    request: Request
    embeds: asyncio.Future[torch.Tensor]


def encoded_tensor(embeds: torch.Tensor) -> str:
    """Embeddings `(sequence, text width)` as vLLM takes them: base64 of a file of `torch.save`."""
    file = io.BytesIO()
    torch.save(embeds.clone(), file)  # a view would bring the whole batch along
    return base64.b64encode(file.getvalue()).decode("ascii")


# ---------------------------------------------------------------------- fields of requests

STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


def chat_body(request: Request) -> dict[str, Any]:
    """The body of a chat request to the base LLM.

    Raises:
        ValueError: it holds audio.
    """
    contents = [m["content"] for m in request.messages if isinstance(m["content"], list)]
    if any(part["type"] != "text" for parts in contents for part in parts):
        raise ValueError("the base LLM takes text alone; name an adapter as model for messages with audio")
    body = {"messages": request.messages, **sampling_fields(request.sampling)}
    if request.sampling.max_tokens is not None:
        body["max_tokens"] = request.sampling.max_tokens
    if request.sampling.top_logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": request.sampling.top_logprobs}
    return body


def sampling_fields(sampling: Sampling, do_sample: bool | None = None) -> dict[str, Any]:
    """The fields that both endpoints share; those of the server's own config where the request does not say.

    Args:
        sampling: Of the request.
        do_sample: Whether the model samples where the request does not say; `False` or `None` of an adapter is greedy.
    """
    given = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
    fields = {name: value for name, value in given.items() if value is not None}
    if sampling.temperature is None and do_sample is False:
        fields["temperature"] = 0
    return {**fields, "stop": list(sampling.stop)} if sampling.stop else fields


# ---------------------------------------------------------------------- events of answers


async def _events(response: Any) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events."""
    async for line in response.aiter_lines():
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return
        if data:
            try:
                event = json.loads(data)
            except ValueError as error:  # which would be the client's fault
                raise EngineUnavailableError(f"the vLLM server sent {data[:80]!r}, which is no JSON") from error
            if "error" in event:
                raise _refusal(event["error"].get("code") or 500, data)
            yield event


async def _deltas(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[Delta]:
    """The answer's pieces without white space around the whole, as the pipeline answers; the last one is complete."""
    started, held, reason, usage = False, "", None, {}
    logprobs: list[TokenLogprob] = []
    async for event in events:
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            reason = choice.get("finish_reason") or reason
            logprobs += token_logprobs(choice.get("logprobs") or {})
            text = held + (choice["text"] if "text" in choice else choice["delta"].get("content") or "")
            text = text if started else text.lstrip()
            new = text.rstrip()
            held, started = text[len(new) :], started or bool(new)
            if new:
                yield Delta(new, logprobs=tuple(logprobs))
                logprobs = []
    if reason is None:
        raise EngineUnavailableError("the vLLM server ended its answer early; see its log")
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    yield Delta("", "length" if reason == "length" else "stop", *counts, logprobs=tuple(logprobs))


def token_logprobs(given: dict[str, Any]) -> list[TokenLogprob]:
    """Log probabilities of a piece, in the form of either endpoint."""
    if "content" in given:
        return [
            TokenLogprob(
                t["token"], t["logprob"], tuple(TokenLogprob(o["token"], o["logprob"]) for o in t["top_logprobs"])
            )
            for t in given["content"] or ()
        ]
    tokens = given.get("tokens") or ()
    tops = given.get("top_logprobs") or [None] * len(tokens)
    return [
        TokenLogprob(token, value, tuple(TokenLogprob(*item) for item in (top or {}).items()))
        for token, value, top in zip(tokens, given.get("token_logprobs") or (), tops, strict=True)
    ]


def _refusal(status: int, text: str) -> Exception:
    """The error that an answer of the vLLM server stands for; its own words are kept."""
    try:
        content = json.loads(text)
        reason = content.get("error", content).get("message", text)
    except (ValueError, AttributeError):
        reason = text
    message = f"the vLLM server answered {status}: {reason[:500]}"
    if status == 429:
        return QueueFullError(message)
    if "enable-prompt-embeds" in reason:
        return EngineUnavailableError(f"{message}; start it with --enable-prompt-embeds")
    return ValueError(message) if status in (400, 413, 422) else EngineUnavailableError(message)


__all__ = [
    "MAX_TOKENS",
    "STREAMED",
    "VllmEngine",
    "VllmServer",
    "chat_body",
    "encoded_tensor",
    "sampling_fields",
    "token_logprobs",
]
