"""A real, small HTTP server that speaks the chat completions protocol."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class ChatServer:
    """What the server was asked, and how it answers.

    Attributes:
        reply: from the request's body to `(status, text of the answer)`; other statuses than 200 send it as an error.
            Bytes are sent as the whole content, and a function gets the handler and sends everything itself.
        requests: bodies in order of arrival.
        headers: their headers.
        most_at_once: requests that were under way together.
    """

    reply: Callable[[dict], tuple[int, Any]]
    url: str = ""
    requests: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    most_at_once: int = 0
    under_way: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def completion(body: dict, text: str) -> dict:
    """The body of a successful response."""
    message = {"role": "assistant", "content": text}
    return {"object": "chat.completion", "model": body["model"], "choices": [
        {"index": 0, "message": message, "finish_reason": "stop" if text.endswith((".", "!")) else "length"}
    ]}  # fmt: skip


@contextmanager
def serve_chat(reply: Callable[[dict], tuple[int, Any]]) -> Iterator[ChatServer]:
    """Serve on a free port until the block ends."""
    state = ChatServer(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.requests.append(body)
                state.headers.append(dict(self.headers))
                state.under_way += 1
                state.most_at_once = max(state.most_at_once, state.under_way)
            known = self.path == "/v1/chat/completions"
            status, text = state.reply(body) if known else (404, "no such path")
            with state.lock:
                state.under_way -= 1
            if callable(text):
                return text(self)
            content = completion(body, text) if status == 200 and isinstance(text, str) else {"error": text}
            content = text if isinstance(text, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


__all__ = ["ChatServer", "serve_chat"]
