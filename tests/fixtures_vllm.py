"""A server that speaks the part of vLLM's API that is used here, over a bare LLM of transformers."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class LanguageModelServer(ThreadingHTTPServer):
    """Greedy answers of the LLM in `folder`; `seen` holds the bodies of all requests."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: str, **options: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.lock, self.seen, self.refusal = threading.Lock(), [], None

    def inputs(self, path: str, body: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What the LLM reads, from either endpoint's body."""
        if path == "/v1/chat/completions":
            options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
            return dict(self.tokenizer.apply_chat_template(body["messages"], **options))
        embeds = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
        if embeds.dim() != 2 or embeds.dtype != self.model.dtype:
            raise ValueError(f"prompt_embeds of shape {tuple(embeds.shape)} and type {embeds.dtype}")
        return {"inputs_embeds": embeds[None], "attention_mask": torch.ones(1, len(embeds))}

    def answer(self, inputs: dict[str, torch.Tensor], max_tokens: int) -> tuple[list[int], int]:
        """Ids of the answer, and the length of the input."""
        with self.lock, torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)[0]
        length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        return ids[length:].tolist(), inputs["attention_mask"].shape[1]


class Handler(BaseHTTPRequestHandler):
    """Routes of one request."""

    server: LanguageModelServer

    def log_message(self, *arguments: object) -> None:
        """Nothing is logged."""

    def do_GET(self) -> None:
        """`/health` and `/v1/models`."""
        self._send(200, {"data": [{"id": "llm", "max_model_len": 2048}]})

    def do_POST(self) -> None:
        """Both endpoints, streamed."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body))
        if self.server.refusal is not None:
            self._send(*self.server.refusal)
            return
        ids, length = self.server.answer(self.server.inputs(self.path, body), body.get("max_tokens", 32))
        self.send_response(200)
        self.end_headers()
        text = ""
        for end in range(1, len(ids) + 1):
            whole = self.server.tokenizer.decode(ids[:end], skip_special_tokens=True)
            self._event([self._choice(whole[len(text) :], None)])
            text = whole
        ended = ids[-1] == self.server.model.generation_config.eos_token_id
        self._event([self._choice("", "stop" if ended else "length")])
        self._event([], usage={"prompt_tokens": length, "completion_tokens": len(ids)})
        self.wfile.write(b"data: [DONE]\n\n")

    def _choice(self, text: str, reason: str | None) -> dict[str, Any]:
        piece = {"delta": {"content": text}} if "chat" in self.path else {"text": text}
        return {**piece, "finish_reason": reason}

    def _event(self, choices: list[dict[str, Any]], **fields: Any) -> None:
        self.wfile.write(f"data: {json.dumps({'choices': choices, **fields})}\n\n".encode())

    def _send(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def language_model_server(folder: str, **options: Any) -> Iterator[tuple[LanguageModelServer, str]]:
    """A running server and its address."""
    server = LanguageModelServer(folder, **options)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
