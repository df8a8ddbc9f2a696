"""Bodies of requests: the fields of the OpenAI API that are read, those that are ignored, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from ..data.extras import extra

with extra("serve"):
    from fastapi import UploadFile
    from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..chat_listen import INPUT_FIELD
from .engine import Sampling

IGNORED = ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key", "safety_identifier")
"""Fields without an effect on the answer. All other unknown fields are refused, unless they are null."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)  # "5" and true are no numbers


def _check_unicode(content: Any) -> Any:
    """JSON can write half of a surrogate pair, which tokenizers cannot read."""
    if isinstance(content, str) and any("\ud800" <= character <= "\udfff" for character in content):
        raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) is no text; leave it out")
    return content


class TextPart(_Strict):
    """Text in a message."""

    type: Literal["text"]
    text: str

    _check_text = field_validator("text")(_check_unicode)


class AudioData(_Strict):
    """A file in base64. The format is found from the content."""

    data: str
    format: str | None = None


class InputAudioPart(_Strict):
    """A clip in the message itself."""

    type: Literal["input_audio"]
    input_audio: AudioData


class AudioAddress(_Strict):
    """An `http(s)` address or a data URI."""

    url: str


class AudioUrlPart(_Strict):
    """A clip at an address."""

    type: Literal["audio_url"]
    audio_url: AudioAddress


Part = Annotated[TextPart | InputAudioPart | AudioUrlPart, Field(discriminator="type")]


class Message(_Strict):
    """A chat message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    _check_content = field_validator("content")(_check_unicode)


class StreamOptions(_Strict):
    """What a stream holds besides the answer."""

    include_usage: bool = False


class ResponseFormat(_Strict):
    """Text alone."""

    type: Literal["text"]


class ChatBody(_Strict):
    """`POST /v1/chat/completions`. `task` and `num_prompts` are ours."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    task: str | None = None
    num_prompts: int | None = Field(None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _without_ignored(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls.model_fields.keys() - IGNORED
        return {key: value for key, value in data.items() if key in known or not (key in IGNORED or value is None)}

    def sampling(self) -> Sampling:
        """The settings of generation.

        Raises:
            ValueError: fields that contradict each other.
        """
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > 16 or not all(stop):
            raise ValueError("stop takes up to 16 strings, none of them empty")
        return Sampling(
            max_tokens=self.max_completion_tokens or self.max_tokens,
            temperature=stable_temperature(self.temperature),
            top_p=self.top_p,
            seed=self.seed,
            stop=stop,
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class UploadBody(BaseModel):
    """The form of `POST /v1/audio/transcriptions` and `/translations`. `task` and `num_prompts` are ours."""

    model_config = ConfigDict(extra="forbid")

    file: UploadFile
    model: str | None = None
    prompt: str | None = None
    task: str | None = None
    response_format: Literal["json", "text", "verbose_json"] = "json"
    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=2)
    num_prompts: int | None = Field(None, ge=0)


def stable_temperature(temperature: float | None) -> float | None:
    """Temperatures below 1e-5 as 0, which is greedy: scores divided by them overflow. vLLM does the same."""
    return 0.0 if temperature is not None and temperature < 1e-5 else temperature


def add_task(messages: list[dict[str, Any]], task: str, instructions: Mapping[str, str]) -> list[dict[str, Any]]:
    """The messages with the wording of a task in the last one, around its audio; its text is the task's question.

    Raises:
        ValueError: an unknown task, a missing question, or one for a task that has none.
    """
    if task not in instructions:
        raise ValueError(f"task {task!r} is unknown; tasks: {', '.join(instructions)}")
    *before, last = messages
    content = last["content"] if isinstance(last["content"], list) else [{"type": "text", "text": last["content"]}]
    clips = [item for item in content if item["type"] != "text"]
    question = " ".join(item["text"] for item in content if item["type"] == "text" and item["text"])
    wording = instructions[task]
    if ("{question}" in wording) != bool(question):
        need = "takes no text, as it has its own wording" if question else "needs a question as text"
        raise ValueError(f"task {task!r} {need}")
    start, field, end = wording.replace("{question}", question).rpartition(INPUT_FIELD)
    texts = [{"type": "text", "text": start}] if field else []
    return [*before, {**last, "content": [*texts, *clips, {"type": "text", "text": end}]}]


__all__ = ["IGNORED", "ChatBody", "Message", "UploadBody", "add_task", "stable_temperature"]
