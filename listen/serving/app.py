"""The HTTP server: routes of the OpenAI API over an `Engine`."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any, NamedTuple

from ..data.extras import extra

with extra("serve"):
    from fastapi import FastAPI, Form, HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from . import engine as engines
from .bodies import ChatBody, Message, UploadBody, add_task, stable_temperature
from .clips import ClipLimits, RequestClips
from .engine import Delta, Engine, Sampling
from .guard import Guard
from .metrics import Metrics
from .responses import ApiError, chunks, completion, transcript_events, usage

TRANSLATION = "Translate the speech into English."
"""Instruction of `/v1/audio/translations`, in place of which a request may give `prompt` or `task`."""


class Options(NamedTuple):
    """Limits of the server.

    Attributes:
        api_key: Wanted from clients; `None` for none.
        max_body_bytes: Of one request.
        clip: Of the clips of one request.
        timeout: Seconds until an answer must be complete.
    """

    api_key: str | None = None
    max_body_bytes: int = 25 * 2**20
    clip: ClipLimits = ClipLimits()
    timeout: float = 300.0


def create_app(engine: Engine, options: Options | None = None) -> FastAPI:
    """The ASGI app. It closes the engine when it ends."""
    options = options or Options()
    server = Server(engine, options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.close()

    app = FastAPI(title="LiSTEN", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.post("/v1/chat/completions", response_model=None)(server.chat)
    app.post("/v1/audio/transcriptions", response_model=None)(server.transcribe)
    app.post("/v1/audio/translations", response_model=None)(server.translate)
    app.get("/v1/models")(server.models)
    app.get("/v1/models/{name:path}")(server.model)
    app.get("/health")(server.health)
    app.get("/metrics", response_model=None)(server.show_metrics)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    for status in (400, 404, 405):
        app.add_exception_handler(status, _http_error)
    app.add_middleware(Guard, options.api_key, options.max_body_bytes, server.metrics, engine)
    return app


class Server:
    """The routes."""

    def __init__(self, engine: Engine, options: Options) -> None:
        self.engine, self.options, self.metrics = engine, options, Metrics()
        self.metrics.waiting.set_function(lambda: engine.waiting)
        engine.on_batch = self.metrics.batch.observe
        self.started = int(time.time())

    # ------------------------------------------------------------------ chat

    async def chat(self, body: ChatBody, http: Request) -> Response | dict[str, Any]:
        """`POST /v1/chat/completions`."""
        name, adapter = self._adapter(body.model)
        try:
            sampling = body.sampling()
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        clips = self._new_clips()
        messages = [await self._message(message, i, clips) for i, message in enumerate(body.messages)]
        messages = self._with_task(messages, body.task)
        if adapter is None:
            _check_text_alone(name, messages, body)
        request = engines.Request(messages, adapter, body.task, body.num_prompts, sampling)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if not body.stream:
            return completion(head, await self._whole(request, name, http))
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return _event_stream(chunks(head, await self._started(request, name), include_usage))

    async def _message(self, message: Message, index: int, clips: RequestClips) -> dict[str, Any]:
        role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            return {"role": role, "content": message.content}
        content = []
        for position, part in enumerate(message.content):
            field = f"messages.{index}.content.{position}.{part.type}"
            if part.type == "text":
                content.append({"type": "text", "text": part.text})
            elif part.type == "input_audio":
                content.append(await self._clip({"data": part.input_audio.data}, f"{field}.data", clips))
            else:
                content.append(await self._clip(part.audio_url.url, f"{field}.url", clips))
        return {"role": role, "content": content}

    def _new_clips(self) -> RequestClips:
        return RequestClips(self.engine.sampling_rate, self.options.clip)

    async def _clip(self, clip: Any, field: str, clips: RequestClips) -> dict[str, Any]:
        """Content with the decoded samples `(samples,)`; a string is an address."""
        try:
            waveform = await clips.decode(clip)
        except (ValueError, TypeError, OSError) as error:
            raise ApiError(400, str(error), field, "invalid_audio") from error
        self.metrics.audio.inc(len(waveform) / clips.rate)
        return {"type": "audio", "array": waveform, "sampling_rate": clips.rate}

    def _with_task(self, messages: list[dict[str, Any]], task: str | None) -> list[dict[str, Any]]:
        try:
            return messages if task is None else add_task(messages, task, self.engine.task_instructions)
        except ValueError as error:
            raise ApiError(400, str(error), "task") from error

    # ------------------------------------------------------------------ transcriptions and translations

    async def transcribe(self, body: Annotated[UploadBody, Form()], http: Request) -> Response | dict[str, Any]:
        """`POST /v1/audio/transcriptions`. `prompt` is an instruction in place of the wording of the task."""
        return await self._upload(body, body.prompt, body.task or ("asr" if not body.prompt else None), http)

    async def translate(self, body: Annotated[UploadBody, Form()], http: Request) -> Response | dict[str, Any]:
        """`POST /v1/audio/translations`: as `transcribe`, with an instruction to translate into English."""
        return await self._upload(body, body.prompt or (None if body.task else TRANSLATION), body.task, http)

    async def _upload(
        self, body: UploadBody, prompt: str | None, task: str | None, http: Request
    ) -> Response | dict[str, Any]:
        names = [name for name, _ in (await http.form()).multi_items()]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ApiError(400, f"field {twice[0]!r} is given twice; give it once, and one file a request", twice[0])
        if body.prompt and body.task:
            raise ApiError(400, "prompt and task exclude each other; give one", "prompt")
        if body.stream and body.response_format != "json":
            raise ApiError(400, "stream needs response_format json, whose events it sends", "response_format")
        name, adapter = self._adapter(body.model)
        if adapter is None:
            raise ApiError(400, f"model {name!r} is the base LLM, which takes no audio; choose another", "model")
        clip = await self._clip(await body.file.read(), "file", self._new_clips())
        messages = [{"role": "user", "content": [clip, *([{"type": "text", "text": prompt}] if prompt else [])]}]
        messages = self._with_task(messages, task)
        sampling = Sampling(temperature=stable_temperature(body.temperature))
        request = engines.Request(messages, adapter, task, body.num_prompts, sampling)
        if body.stream:
            return _event_stream(transcript_events(await self._started(request, name)))
        pieces = await self._whole(request, name, http)
        text = "".join(piece.text for piece in pieces)
        if body.response_format == "text":
            return PlainTextResponse(text + "\n")
        if body.response_format == "json":
            return {"text": text}
        seconds = len(clip["array"]) / clip["sampling_rate"]
        return {"text": text, "task": task or "prompt", "duration": seconds, "usage": usage(pieces[-1])}

    # ------------------------------------------------------------------ answers

    async def _pieces(self, request: engines.Request, name: str) -> AsyncIterator[Delta]:
        """The engine's answer, measured, with its errors as `ApiError` and a deadline."""
        start, has_text = time.monotonic(), False
        try:
            async with asyncio.timeout(self.options.timeout), aclosing(self.engine.stream(request)) as stream:
                async for piece in stream:
                    if not has_text and (piece.text or piece.finish_reason):
                        has_text = True
                        self.metrics.first_token.observe(time.monotonic() - start)
                    yield piece
        except engines.QueueFullError as error:
            raise ApiError(429, str(error), code="queue_full") from error
        except engines.EngineUnavailableError as error:
            raise ApiError(503, str(error), code="engine_unavailable") from error
        except TimeoutError as error:
            message = f"no complete answer within {self.options.timeout:g} s; lower max_tokens or try again later"
            raise ApiError(504, message, code="timeout") from error
        except ValueError as error:
            raise ApiError(400, str(error), "messages") from error
        except Exception as error:  # of any type: the engine has logged it, and its text stays inside
            raise ApiError(500, "the engine failed on this request; see the server's log", code="engine") from error
        self.metrics.duration.observe(time.monotonic() - start)
        for kind, count in (("prompt", piece.prompt_tokens or 0), ("completion", piece.completion_tokens)):
            self.metrics.tokens.labels(name, kind).inc(count)

    async def _started(self, request: engines.Request, name: str) -> AsyncIterator[Delta]:
        """The pieces, once the first one is there: errors before it still have an HTTP status."""
        pieces = self._pieces(request, name)
        return _chained(await anext(pieces), pieces)

    async def _whole(self, request: engines.Request, name: str, http: Request) -> list[Delta]:
        """All pieces of an answer; the request is dropped where its client disconnects."""

        async def collect() -> list[Delta]:
            async with aclosing(self._pieces(request, name)) as pieces:
                return [piece async for piece in pieces]

        task = asyncio.create_task(collect())
        try:
            while not (await asyncio.wait({task}, timeout=0.2))[0]:
                if await http.is_disconnected():
                    raise ApiError(499, "the client has disconnected")
            return task.result()
        finally:
            task.cancel()

    # ------------------------------------------------------------------ models and state

    def _adapter(self, name: str | None) -> tuple[str, str | None]:
        """Model id and adapter that a request asks for."""
        name = next(iter(self.engine.models)) if name is None else name
        if name not in self.engine.models:
            known = ", ".join(self.engine.models)
            raise ApiError(404, f"model {name!r} is unknown; models: {known}", "model", "model_not_found")
        return name, self.engine.models[name]

    async def models(self) -> dict[str, Any]:
        """`GET /v1/models`."""
        return {"object": "list", "data": [await self.model(name) for name in self.engine.models]}

    async def model(self, name: str) -> dict[str, Any]:
        """`GET /v1/models/{name}`."""
        self._adapter(name)
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "listen",
            **self.engine.details[name],
        }

    async def health(self) -> dict[str, str]:
        """`GET /health`."""
        try:
            await self.engine.check_health()
        except engines.EngineUnavailableError as error:
            raise ApiError(503, str(error), code="engine_unavailable") from error
        return {"status": "ok"}

    async def show_metrics(self) -> Response:
        """`GET /metrics`."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")


def _check_text_alone(name: str, messages: list[dict[str, Any]], body: ChatBody) -> None:
    """The base LLM has no audio, prompts or tasks."""
    has_audio = any(
        item["type"] == "audio" for m in messages if isinstance(m["content"], list) for item in m["content"]
    )
    for field, given in (("messages", has_audio), ("num_prompts", body.num_prompts), ("task", body.task)):
        if given:
            raise ApiError(400, f"model {name!r} is the base LLM: text alone, no {field} of an adapter", field)


def _event_stream(events: AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _chained(first: Delta, rest: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    async with aclosing(rest):
        yield first
        async for piece in rest:
            yield piece


async def _api_error(http: Request, error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, {"Retry-After": "1"} if error.status in (429, 503) else None)


async def _invalid(http: Request, error: RequestValidationError) -> JSONResponse:
    first, *others = error.errors()
    if first["loc"][-1] == "str":  # text or a list: what is wrong inside the list says more
        place = len(first["loc"]) - 1
        first = max(
            [first, *(e for e in others if e["loc"][:place] == first["loc"][:place])], key=lambda e: len(e["loc"])
        )
    is_json = first["type"] != "json_invalid"  # else its place is a position in the text
    field = ".".join(str(part) for part in first["loc"][1:] if not _is_type(part)) if is_json else ""
    unknown = "unknown field; leave it out" + ("; name the language in prompt" if field == "language" else "")
    reason = unknown if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    return JSONResponse(ApiError(400, f"{field or 'body'}: {reason}", field or None, first["type"]).body, 400)


def _is_type(part: Any) -> bool:
    """Whether a part of an error's place names one of several types, not a field."""
    return part == "str" or str(part).startswith("list[")


async def _http_error(http: Request, error: HTTPException) -> JSONResponse:
    """Errors of the framework; it wraps those that are raised while it reads a body."""
    if isinstance(error.__cause__, ApiError):
        return await _api_error(http, error.__cause__)
    where = f"{http.method} {http.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, where).body, error.status_code)


__all__ = ["TRANSLATION", "Options", "Server", "create_app"]
