"""Text LLMs that answer chats: in this process by transformers, or behind any OpenAI-compatible endpoint.

>>> from listen.data.chat_models import LocalChatModel
>>> llm = LocalChatModel("model_cards/speech-emotion-miniature/backbones/language_model")  # doctest: +SKIP
>>> llm.answer([[{"role": "user", "content": "Hello!"}]])[0].text  # doctest: +SKIP
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from typing import Any, Protocol

import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..chat_listen import DEFAULT_CHAT_TEMPLATE, fit_template
from ..fingerprint_listen import weights_hash
from ..placeholders_listen import prepare_padding
from .collator import end_of_turn
from .posting import post_json, posting_session

Conversation = Sequence[Mapping[str, str]]
_UNUSABLE = (401, 403, 404)  # of all requests: a wrong key or URL; of some: a content filter, say
_FINISHED = ("stop", "eos_token", "stop_sequence", None)  # the protocol's, those of TGI, and servers that say nothing


class ChatModelError(RuntimeError):
    """An endpoint that cannot be used at all, unlike a single failed request."""


@dataclass(frozen=True)
class Answer:
    """Answer of a model.

    Attributes:
        text: the answer without special tokens, stripped; `None` if the request failed after all retries.
        finished: whether it is complete, not truncated at the maximum length.
        error: why the request failed.
        status: HTTP status of a request that the server refused.
    """

    text: str | None
    finished: bool = True
    error: str | None = None
    status: int | None = None


class ChatModel(Protocol):
    """Answers chats."""

    def answer(self, conversations: Sequence[Conversation], seed: int = 0) -> list[Answer]:
        """One answer for each conversation, in order."""
        ...

    def describe(self) -> dict[str, Any]:
        """The model and its decoding: equal descriptions mean equal answers."""
        ...


class LocalChatModel:
    """An LLM in this process.

    Prompts are formatted as by the processor of a LiSTEN model over the same LLM: by the LLM's own chat template, or as
    `USER: ...`, `ASSISTANT: ...` for an LLM without one. No system prompt is added.

    Args:
        name: folder or Hub id of a causal LLM.
        revision: its commit or tag.
        dtype: dtype of its weights, such as `bfloat16`; `auto` keeps the checkpoint's.
        attn_implementation: as in transformers.
        device: device of the model; the CPU by default.
        max_new_tokens: max new tokens of an answer.
        **decoding: further arguments of `generate`; greedy by default, whatever the checkpoint's own settings are.

    Raises:
        OSError: there is no such model.
    """

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        device: torch.device | str | None = None,
        max_new_tokens: int = 256,
        **decoding: Any,
    ) -> None:
        options = {"attn_implementation": attn_implementation} if attn_implementation else {}
        self.name, self.revision = name, revision
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, revision=revision)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=dtype, **options
        ).eval()
        self.model.to(device or "cpu")
        self.tokenizer.chat_template = self.tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE
        prepare_padding(self.tokenizer)
        self.decoding = {"max_new_tokens": max_new_tokens, "do_sample": False, **decoding}
        if not self.decoding["do_sample"]:  # the checkpoint's sampling settings would only cause warnings
            self.decoding = {"temperature": None, "top_p": None, "top_k": None, **self.decoding}
        self._stops = self._stop_ids()

    def _render(self, messages: Conversation, **options: bool) -> str:
        render = partial(self.tokenizer.apply_chat_template, tokenize=False)
        fitted = fit_template(list(messages), lambda conversations: (render(conversations), None))
        return render(fitted, **options)

    def _stop_ids(self) -> list[int]:
        """The tokens that end an answer: those of the checkpoint and that of its chat template."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        written = self._render(turns)
        end = end_of_turn(self.tokenizer, written[written.rfind("!") + 1 :])
        known = self.model.generation_config.eos_token_id
        known = [] if known is None else [known] if isinstance(known, int) else list(known)
        return list(dict.fromkeys([*known, *self.tokenizer(end, add_special_tokens=False)["input_ids"][-1:]]))

    @torch.no_grad()
    def answer(self, conversations: Sequence[Conversation], seed: int = 0) -> list[Answer]:
        """Answer a batch.

        Args:
            conversations: messages of each; the last one is the user's.
            seed: seed of sampling for the batch.

        Returns:
            One answer per conversation, in order.
        """
        texts = [self._render(messages, add_generation_prompt=True) for messages in conversations]
        bos = self.tokenizer.bos_token
        having_bos = bool(bos) and texts[0].startswith(bos)
        inputs = self.tokenizer(
            texts, padding=True, return_tensors="pt", add_special_tokens=not having_bos, return_token_type_ids=False
        ).to(self.model.device)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            ids = self.model.generate(
                **inputs, eos_token_id=self._stops, pad_token_id=self.tokenizer.pad_token_id, **self.decoding
            )  # (batch, sequence)
        return [self._read(row) for row in ids[:, inputs["input_ids"].shape[1] :].tolist()]

    def _read(self, ids: list[int]) -> Answer:
        end = next((place for place, token in enumerate(ids) if token in self._stops), len(ids))
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
        return Answer(text, finished=end < len(ids))

    def describe(self) -> dict[str, Any]:
        """Name, revision and a digest of the weights, and how answers are decoded."""
        return {
            "model": self.name,
            "revision": getattr(self.model.config, "_commit_hash", None) or self.revision,
            "fingerprint": weights_hash(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "decoding": {name: value for name, value in self.decoding.items() if value is not None},
        }


class EndpointChatModel:
    """An LLM behind an OpenAI-compatible endpoint (`POST {base_url}/chat/completions`): vLLM, TGI, llama.cpp, ...

    Requests to a busy or failing server are retried, after waits that double or that the server sets, of a minute at
    most. Requests that fail after all retries, and responses that are no finished or truncated chat completion, become
    answers without a text, so that one bad request does not end a long run.

    Args:
        base_url: up to and including the version, such as `http://localhost:8000/v1`.
        model: the model's name there.
        api_key: sent as a bearer token.
        concurrency: max requests at a time.
        max_retries: max retries of a request.
        backoff_seconds: wait before the second retry; it doubles with each further one.
        timeout: seconds after which an attempt without a complete answer fails.
        max_new_tokens: max new tokens of an answer.
        **decoding: further fields of the request; temperature 0 by default.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        concurrency: int = 8,
        max_retries: int = 5,
        backoff_seconds: float = 1.0,
        timeout: float = 300.0,
        max_new_tokens: int = 256,
        **decoding: Any,
    ) -> None:
        if concurrency < 1 or max_retries < 0:
            raise ValueError(f"concurrency={concurrency} must be at least 1 and max_retries={max_retries} at least 0")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout={timeout} must be a number of seconds above 0")
        self.base_url, self.name = base_url.rstrip("/"), model
        self.concurrency, self.timeout = concurrency, timeout
        self.decoding = {"max_tokens": max_new_tokens, "temperature": 0.0, **decoding}
        self._has_answered = False
        self._session = posting_session(concurrency, max_retries, backoff_seconds)
        if api_key:
            self._session.headers["Authorization"] = f"Bearer {api_key}"

    def answer(self, conversations: Sequence[Conversation], seed: int = 0) -> list[Answer]:
        """Send the conversations, `concurrency` at a time.

        Args:
            conversations: messages of each.
            seed: seed of the first one; each further one has the next. Servers without seeds ignore it.

        Returns:
            One answer per conversation, in order; without a text where the request failed.

        Raises:
            ChatModelError: the endpoint, which has not answered yet, rejects all requests for the key, the model's name
                or the path.
        """
        seeds = range(seed, seed + len(conversations))
        with ThreadPool(self.concurrency) as pool:  # unlike an executor, it lets Ctrl-C pass at once
            answers = pool.starmap(self._ask, zip(conversations, seeds, strict=True), chunksize=1)
        self._has_answered |= any(answer.text is not None for answer in answers)
        if not self._has_answered and answers and all(answer.status in _UNUSABLE for answer in answers):
            raise ChatModelError(
                f"{self.base_url} answers {answers[0].status} for model {self.name!r}: {answers[0].error}; check the "
                "URL (up to /v1), the key and the model's name"
            )
        return answers

    def _ask(self, conversation: Conversation, seed: int) -> Answer:
        body = {"model": self.name, "messages": [dict(message) for message in conversation], "seed": seed}
        url = f"{self.base_url}/chat/completions"
        try:
            status, content = post_json(self._session, url, {**body, **self.decoding}, self.timeout)
            if not 200 <= status < 300:
                detail = content[:200].decode("utf-8", "replace")
                return Answer(None, error=f"HTTPError: {status} for url {url}: {detail}", status=status)
            return _read_completion(json.loads(content))
        except requests.RequestException as error:
            return Answer(None, error=f"{type(error).__name__}: {error}")
        except Exception as error:  # whatever one response holds, it must not cost the others
            return Answer(None, error=f"the response is not a chat completion ({type(error).__name__}: {error!s:.200})")

    def describe(self) -> dict[str, Any]:
        """Endpoint and name of the model, and how answers are decoded."""
        return {"model": self.name, "endpoint": self.base_url, "decoding": self.decoding}


def _read_completion(completion: Any) -> Answer:
    """The answer of a chat completion; without a text where it is neither finished nor truncated."""
    choice = completion["choices"][0]
    text, reason = choice["message"]["content"], choice.get("finish_reason")
    if not isinstance(text, str):
        return Answer(None, error=f"the answer is {type(text).__name__}, not text (finish_reason={reason!r:.80})")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return Answer(None, error=f"the answer is not valid Unicode ({error.reason})")
    if reason not in (*_FINISHED, "length"):
        return Answer(None, error=f"the answer ended with finish_reason={reason!r:.80}, not 'stop'")
    return Answer(text.strip(), finished=reason != "length")
