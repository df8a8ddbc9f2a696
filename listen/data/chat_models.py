"""Text LLMs that answer chats: in this process by transformers, or behind any OpenAI-compatible endpoint.

>>> from listen.data.chat_models import LocalChatModel
>>> llm = LocalChatModel("model_cards/listen-tiny/backbones/language_model")  # doctest: +SKIP
>>> llm.answer([[{"role": "user", "content": "Hello!"}]])[0].text  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import requests
import torch
from requests.adapters import HTTPAdapter, Retry
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..chat_listen import DEFAULT_CHAT_TEMPLATE, fit_template
from ..checkpoint_listen import fingerprint
from ..placeholders_listen import prepare_padding
from .collator import end_of_turn

Conversation = Sequence[Mapping[str, str]]
_RETRIED = (408, 409, 429, 500, 502, 503, 504)


class ChatModelError(RuntimeError):
    """An endpoint that cannot be used at all, unlike a single failed request."""


@dataclass(frozen=True)
class Answer:
    """Answer of a model.

    Attributes:
        text: the answer without special tokens, stripped; `None` if the request failed after all retries.
        finished: whether it is complete, not truncated at the maximum length.
        error: why the request failed.
    """

    text: str | None
    finished: bool = True
    error: str | None = None


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
        return render(fit_template(list(messages), render), **options)

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
            "fingerprint": fingerprint(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "decoding": {name: value for name, value in self.decoding.items() if value is not None},
        }


class EndpointChatModel:
    """An LLM behind an OpenAI-compatible endpoint (`POST {base_url}/chat/completions`): vLLM, TGI, llama.cpp, ...

    Requests to a busy or failing server are retried, after waits that double or that the server sets. Requests that
    fail after all retries become answers without a text, so that one bad request does not end a long run.

    Args:
        base_url: up to and including the version, such as `http://localhost:8000/v1`.
        model: the model's name there.
        api_key: sent as a bearer token.
        concurrency: max requests at a time.
        max_retries: max retries of a request.
        backoff_seconds: wait before the second retry; it doubles with each further one.
        timeout: seconds without an answer after which an attempt fails.
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
        self.base_url, self.name = base_url.rstrip("/"), model
        self.concurrency, self.timeout = concurrency, timeout
        self.decoding = {"max_tokens": max_new_tokens, "temperature": 0.0, **decoding}
        retry = Retry(
            total=max_retries, backoff_factor=backoff_seconds, status_forcelist=_RETRIED, allowed_methods={"POST"}
        )
        adapter = HTTPAdapter(pool_maxsize=concurrency, max_retries=retry)
        self._session = requests.Session()
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
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
            ChatModelError: the endpoint rejects the key, or has no such model or path.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self._ask, conversations, range(seed, seed + len(conversations))))

    def _ask(self, conversation: Conversation, seed: int) -> Answer:
        body = {"model": self.name, "messages": [dict(message) for message in conversation], "seed": seed}
        try:
            response = self._session.post(
                f"{self.base_url}/chat/completions", json={**body, **self.decoding}, timeout=self.timeout
            )
            if response.status_code in (401, 403, 404):
                raise ChatModelError(
                    f"{self.base_url} answers {response.status_code} for model {self.name!r}: {response.text:.200}; "
                    "check the URL (up to /v1), the key and the model's name"
                )
            response.raise_for_status()
            choice = response.json()["choices"][0]
            return Answer(choice["message"]["content"].strip(), finished=choice.get("finish_reason") != "length")
        except requests.RequestException as error:
            return Answer(None, error=f"{type(error).__name__}: {error}")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            return Answer(None, error=f"the response is not a chat completion ({type(error).__name__}: {error})")

    def describe(self) -> dict[str, Any]:
        """Endpoint and name of the model, and how answers are decoded."""
        return {"model": self.name, "endpoint": self.base_url, "decoding": self.decoding}
