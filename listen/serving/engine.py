"""What the HTTP server asks of an engine: one request in, its answer out, piece by piece."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol


class QueueFullError(RuntimeError):
    """The engine has as many waiting requests as it takes. The server answers 429."""


class EngineUnavailableError(RuntimeError):
    """The engine cannot answer any request now, for the reason in the message. The server answers 503."""


@dataclass(frozen=True)
class Sampling:
    """How the answer is generated.

    Attributes:
        max_tokens: New tokens at most; the engine's default if `None`.
        temperature: 0 is greedy. `None` means the defaults of the model's generation config, as in the pipeline.
        top_p: Nucleus of sampling; the model's default if `None`.
        seed: Makes sampling repeatable; no effect on greedy answers.
        stop: Strings at which the answer ends; they are not part of it.
        top_logprobs: Alternatives reported for each token; 0 reports the chosen token alone, `None` nothing.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Request:
    """One request, validated by the server.

    Attributes:
        messages: Chat messages. Content is a string, or a list of `{"type": "text", "text": str}` and
            `{"type": "audio", "array": (samples,) float32, "sampling_rate": the processor's}`.
        adapter: Name of an adapter; `None` for the base LLM without any, whose messages hold no audio.
        task: Name of the task, for pools that are divided among tasks.
        num_prompts: k; the processor's if `None`.
        sampling: See there.
    """

    messages: list[dict[str, Any]]
    adapter: str | None = "default"
    task: str | None = None
    num_prompts: int | None = None
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its natural log probability, and the most likely tokens at its position."""

    token: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Delta:
    """A piece of an answer. The last one, and only that, has a `finish_reason`.

    Attributes:
        text: Text that is new; may be empty.
        finish_reason: `"stop"` at an end token or a stop string, `"length"` at `max_tokens`.
        prompt_tokens: Positions of the input, soft prompts and audio embeddings included; known in the last piece.
        completion_tokens: Tokens generated so far, the end token included.
        logprobs: Of the tokens since the last piece, where they were asked for.
    """

    text: str = ""
    finish_reason: Literal["stop", "length"] | None = None
    prompt_tokens: int | None = None
    completion_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


class Engine(Protocol):
    """Answers requests. Every method runs on the server's event loop and must not block it.

    Attributes:
        models: Model ids that clients may name, with the adapter behind each; `None` for the base LLM. The first one
            is used where a request names none.
        sampling_rate: Rate in Hz at which the server decodes audio.
        task_instructions: Wording of the tasks by name, see `ListenProcessor.instruction`.
        on_batch: Called with the number of requests of each batch that runs.
        under_way: Requests that the server reads, prepares or answers. The server counts them.
        details: What `/v1/models` says about each model beside its id, see `model_details`.
    """

    models: Mapping[str, str | None]
    details: Mapping[str, Mapping[str, Any]]
    sampling_rate: int
    task_instructions: Mapping[str, str]
    on_batch: Callable[[int], None]
    under_way: int

    @property
    def waiting(self) -> int:
        """Requests that wait for the next batch."""

    def stream(self, request: Request) -> AsyncIterator[Delta]:
        """The answer. Closing the iterator early, or cancelling its task, drops the request.

        Raises:
            ValueError: the request cannot be answered, for a reason that its sender can mend.
            QueueFullError: too many requests wait already.
            EngineUnavailableError: no request can be answered now.
        """

    async def check_health(self) -> None:
        """Return if requests can be answered.

        Raises:
            EngineUnavailableError: they cannot.
        """

    async def close(self) -> None:
        """Finish the requests that are under way, then free what the engine holds. New requests are refused."""


def model_names(model: str, language_model: str | None, adapters: Iterable[str]) -> dict[str, str | None]:
    """Model ids of a served model: its folder's name for its own adapter, the others' names, the LLM's name.

    Args:
        model: Folder or Hub id.
        language_model: Folder or Hub id of its LLM; `None` where the checkpoint holds it.
        adapters: Names of further adapters.

    Returns:
        Model id to adapter name, `None` for the base LLM.

    Raises:
        ValueError: two models have one name.
    """
    own = _last_part(os.path.abspath(model))
    inside = language_model is None or os.path.abspath(language_model).startswith(os.path.abspath(model))
    base = f"{own}-base" if inside or _last_part(language_model) == own else _last_part(language_model)
    names = {own: "default", base: None}
    for name in adapters:
        if name in (*names, "default"):
            raise ValueError(f"adapter name {name!r} is taken; choose another name than {', '.join(names)} and default")
        names[name] = name
    return names


def model_details(models: Mapping[str, str | None], model: Any, processor: Any) -> dict[str, dict[str, Any]]:
    """What a client can ask of each model.

    Args:
        models: Model id to adapter name, see `model_names`.
        model: Holds the adapters.
        processor: Its processor.

    Returns:
        Model id to `{"tasks": wording of each task, "num_prompts": k by default, "pool_size": the largest k}`. For the
        base LLM, which takes no audio, there are no tasks and both numbers are 0.
    """
    details = {}
    for name, adapter in models.items():
        pool = None if adapter is None else model.adapters.named(adapter).prompt_pool
        details[name] = {
            "tasks": {} if adapter is None else dict(processor.task_instructions),
            "num_prompts": 0 if pool is None else processor.num_prompts,
            "pool_size": 0 if pool is None else pool.config.pool_size,
        }
    return details


def _last_part(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


__all__ = [
    "Delta",
    "Engine",
    "EngineUnavailableError",
    "QueueFullError",
    "Request",
    "Sampling",
    "TokenLogprob",
    "model_details",
    "model_names",
]
