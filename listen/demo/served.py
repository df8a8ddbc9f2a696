"""Where the page gets its answers from: `listen serve`, or any other server with the OpenAI API."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.utils import httpx

from ..chat_listen import INPUT_FIELD
from ..tasks_listen import TASK_INSTRUCTIONS
from .answers import Example, Question

_TIMEOUT = httpx.Timeout(300.0, connect=10.0)  # seconds; the first piece may have to wait in the server's queue


class ServerError(OSError):
    """The server cannot be reached, refuses a request, or fails on it."""


class ServedAnswers:
    """Answers of a server with the OpenAI API; see `Answers`. Its models take the place of adapters.

    `listen serve` says which tasks its models know and how many prompts they have. Other servers do not: they get the
    wording of a task as text, and k is not offered. No server reports which prompts were selected.

    Args:
        url: Address of the API, such as `http://localhost:8000/v1`.
        key: The API key that the server asks for.

    Raises:
        ServerError: the server does not answer, or not to this key.
        ValueError: `url` is no address, or no model of the server takes audio.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is no address of a server; give one such as http://localhost:8000/v1")
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._models = {model["id"]: model for model in self._served_models() if model.get("tasks") != {}}
        if not self._models:
            raise ValueError(f"no model of {url} takes audio; start one by: listen serve --model MODEL")
        self.adapters = [*self._models]
        self.title = self.adapters[0]
        first = self._models[self.title]
        self.instructions = first.get("tasks", TASK_INSTRUCTIONS)
        self.num_prompts = first.get("num_prompts", 0)
        self.examples: list[Example] = []
        self.reports_prompts = False
        self.at_once = 16  # the server batches them

    def most_prompts(self, adapter: str) -> int:
        """The largest k of a model; 0 where the server does not say."""
        return self._models[adapter].get("pool_size", 0)

    def stream(self, question: Question) -> Iterator[dict[str, Any]]:
        """See `Answers`.

        Raises:
            ServerError: the server refuses the question or fails on it, before or within its answer.
        """
        text, is_answered = "", False
        with self._asked("POST", "/chat/completions", self._body(question)) as response:
            for event in _events(response):
                if event.get("error"):
                    raise ServerError(_reason(event))
                for choice in event.get("choices") or []:
                    is_answered = True
                    text += (choice.get("delta") or {}).get("content") or ""
                    yield {"generated_text": text}
        if not is_answered:
            raise ServerError(f"{self._url} sent no answer; check that it is an OpenAI API that streams")

    def _served_models(self) -> list[dict[str, Any]]:
        with self._asked("GET", "/models") as response:
            try:
                models = json.loads(response.read())["data"]
                # null is as if the server said nothing
                return [{"id": one["id"], **{k: v for k, v in one.items() if v is not None}} for one in models]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ServerError(f"{self._url} is not an OpenAI API; its address often ends in /v1") from error

    def _body(self, question: Question) -> dict[str, Any]:
        """The request. A task goes by its name where the server knows names, else by its wording."""
        model = self._models[question.adapter]
        ours = "tasks" in model
        clips = [{"type": "input_audio", "input_audio": _encoded(clip)} for clip in question.clips]
        body = {"model": question.adapter, "stream": True, "max_tokens": question.max_new_tokens}
        if self.most_prompts(question.adapter):
            body["num_prompts"] = question.num_prompts
        if ours and question.task is not None:
            body["task"] = question.task
        wording = "{question}" if ours or question.task is None else self.instructions[question.task]
        before, _, after = wording.replace("{question}", question.text or "").rpartition(INPUT_FIELD)
        content = [_text(before), *clips, _text(after)]
        return {**body, "messages": [{"role": "user", "content": [part for part in content if part != _text("")]}]}

    @contextmanager
    def _asked(self, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[httpx.Response]:
        """A response whose status says success, still unread."""
        try:
            with httpx.stream(
                method, f"{self._url}{path}", headers=self._headers, json=body, timeout=_TIMEOUT
            ) as response:
                if not response.is_success:
                    response.read()
                    raise ServerError(_refusal(response))
                yield response
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise ServerError(f"The server at {self._url} does not answer ({reason}). Check that it runs.") from error


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _encoded(clip: str) -> dict[str, str]:
    """The file in base64, with its format."""
    path = Path(clip)
    return {"data": base64.b64encode(path.read_bytes()).decode(), "format": path.suffix.lower().lstrip(".") or "wav"}


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The server-sent events of a stream."""
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            event = json.loads(data)
            if isinstance(event, dict):
                yield event


def _refusal(response: httpx.Response) -> str:
    """What a response without success says, for the user of the page."""
    if response.status_code == 401:
        return "The server refuses the API key. Start the page with the server's key: listen demo --url URL --key KEY"
    try:
        reason = _reason(response.json())
    except ValueError:
        reason = response.text[:200] or response.reason_phrase
    return f"The server refused the request (status {response.status_code}): {reason}"


def _reason(body: Any) -> str:
    """The message in an error of the OpenAI API; some servers give it without the object around."""
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


__all__ = ["ServedAnswers", "ServerError"]
