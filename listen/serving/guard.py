"""The API key, the limit of body size and the count of requests, below all routes."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .engine import Engine
from .metrics import Metrics
from .responses import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
OPEN_PATHS = ("/health",)
"""Paths that need no API key."""
_DRAINED = 4  # times the limit that is read of a body that is refused
_COUNTED = ("/v1/chat/completions", "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/models")


class Guard:
    """ASGI middleware around an app.

    Args:
        app: The app.
        api_key: Wanted as `Authorization: Bearer`; `None` for none.
        max_body_bytes: Larger bodies are refused with 413, before they are read where they state their length.
        metrics: Counts requests.
        engine: Its `under_way` counts the requests that may reach it.
    """

    def __init__(self, app: Any, api_key: str | None, max_body_bytes: int, metrics: Metrics, engine: Engine) -> None:
        self.app, self.api_key, self.max_body_bytes = app, api_key, max_body_bytes
        self.metrics, self.engine = metrics, engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 500
        path = scope["path"] if scope["path"] in _COUNTED else "other"
        is_post = scope["method"] == "POST"

        async def counted_send(message: Scope) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        self.engine.under_way += is_post
        try:
            with self.metrics.under_way.track_inprogress():
                self._check_headers(scope)
                await self.app(scope, self._limited(receive), counted_send)
        except ApiError as error:
            await _drain(receive, True, _DRAINED * self.max_body_bytes)
            await _refuse(error, counted_send)
        finally:
            self.engine.under_way -= is_post
            self.metrics.requests.labels(path, status).inc()

    def _check_headers(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        if self.api_key is not None and scope["path"] not in OPEN_PATHS:
            wanted = f"Bearer {self.api_key}".encode()
            if not hmac.compare_digest(given, wanted):
                raise ApiError(401, "wrong or missing key; send 'Authorization: Bearer KEY'", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body_bytes:
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        received = 0

        async def limited() -> Scope:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                await _drain(receive, message.get("more_body", False), _DRAINED * self.max_body_bytes)
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        message = f"the body has more than {self.max_body_bytes} bytes, the limit here; send less audio"
        return ApiError(413, message, code="request_too_large")


async def _drain(receive: Receive, more: bool, most: int) -> None:
    """Read the rest of a body that is refused: clients that still send do not read the answer."""
    while more and most > 0:
        message = await receive()
        more, most = message.get("more_body", False), most - len(message.get("body", b""))


async def _refuse(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


__all__ = ["OPEN_PATHS", "Guard"]
