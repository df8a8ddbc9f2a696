"""Bodies of responses, in the formats of the OpenAI API."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

from .engine import Delta, TokenLogprob


class ApiError(Exception):
    """An error in OpenAI's format.

    Args:
        status: HTTP status.
        message: What is wrong and how to mend it.
        param: The field that is wrong.
        code: For programs.
    """

    _TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        kind = self._TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(last: Delta) -> dict[str, int]:
    """Token counts of a finished answer."""
    prompt, completion = last.prompt_tokens or 0, last.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def completion(head: dict[str, Any], pieces: list[Delta]) -> dict[str, Any]:
    """A `chat.completion`. `head` holds id, created and model."""
    message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
    logprobs = _logprobs(entry for piece in pieces for entry in piece.logprobs)
    choice = {"index": 0, "message": message, "finish_reason": pieces[-1].finish_reason, "logprobs": logprobs}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": usage(pieces[-1])}


async def chunks(head: dict[str, Any], pieces: AsyncIterator[Delta], include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events with `chat.completion.chunk`; an error of the engine becomes the last event."""
    head = {**head, "object": "chat.completion.chunk"}
    first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}
    start = _event({**head, "choices": [first]})  # sent with the first text: one write, one wake-up of the client
    try:
        async for piece in pieces:
            if piece.text or piece.finish_reason or piece.logprobs:
                delta = {"content": piece.text} if piece.text else {}
                choice = {"index": 0, "delta": delta, "finish_reason": piece.finish_reason}
                yield start + _event({**head, "choices": [{**choice, "logprobs": _logprobs(piece.logprobs)}]})
                start = ""
    except ApiError as error:
        yield start + _event(error.body)
        return
    if include_usage:
        yield _event({**head, "choices": [], "usage": usage(piece)})
    yield "data: [DONE]\n\n"


async def transcript_events(pieces: AsyncIterator[Delta]) -> AsyncIterator[str]:
    """Server-sent events of a transcription; an error of the engine becomes the last event."""
    text = ""
    try:
        async for piece in pieces:
            text += piece.text
            if piece.text:
                yield _event({"type": "transcript.text.delta", "delta": piece.text})
    except ApiError as error:
        yield _event(error.body)
        return
    counts = usage(piece)
    tokens = {"input_tokens": counts["prompt_tokens"], "output_tokens": counts["completion_tokens"]}
    tokens = {"type": "tokens", **tokens, "total_tokens": counts["total_tokens"]}
    yield _event({"type": "transcript.text.done", "text": text, "usage": tokens})


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _logprobs(entries: Iterable[TokenLogprob]) -> dict[str, Any] | None:
    content = [{**_entry(entry), "top_logprobs": [*map(_entry, entry.top)]} for entry in entries]
    return {"content": content, "refusal": None} if content else None


def _entry(entry: TokenLogprob) -> dict[str, Any]:
    return {"token": entry.token, "logprob": max(entry.logprob, -9999.0), "bytes": [*entry.token.encode()]}


__all__ = ["ApiError", "chunks", "completion", "transcript_events", "usage"]
