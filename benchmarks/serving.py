"""The HTTP server: requests at once against one after the other, and the first token against the pipeline."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from huggingface_hub.utils import httpx

from listen import ListenForConditionalGeneration, ListenPipeline, ListenProcessor
from listen.serving.app import create_app
from listen.serving.in_process import TransformersEngine

from .harness import Figure, compare, time_figure
from .models import Setting

MODEL = Path(__file__).resolve().parents[1] / "model_cards" / "listen-tiny"
AT_ONCE = 16
QUESTION = "What is being said?"


def serving(setting: Setting) -> list[Figure]:
    """The miniature behind HTTP: 16 requests at once against 16 in turn, and the first token."""
    model = ListenForConditionalGeneration.from_pretrained(MODEL)
    listen = ListenPipeline(model=model, processor=ListenProcessor.from_pretrained(MODEL))
    clip = MODEL / "samples" / "speech.wav"
    body = _body(clip)
    with _served(listen) as url, httpx.Client(timeout=60, trust_env=False) as client:

        def answer(_: int) -> None:
            client.post(url, json=body).raise_for_status()

        def first_token() -> None:
            with client.stream("POST", url, json={**body, "stream": True, "max_tokens": 1}) as response:
                next(line for line in response.iter_lines() if _has_text(line))

        with ThreadPoolExecutor(AT_ONCE) as pool:
            variants = {
                "at once": lambda: list(pool.map(answer, range(AT_ONCE))),
                "in turn": lambda: [answer(i) for i in range(AT_ONCE)],
            }
            at_once, in_turn = compare(variants, "cpu", setting.options.repeats)
        variants = {"server": first_token, "pipeline": lambda: listen(str(clip), QUESTION, max_new_tokens=1)}
        server, pipeline = compare(variants, "cpu", setting.options.repeats)
    return [
        time_figure("serving.at_once", at_once, in_turn, 1 / 3),
        time_figure("serving.first_token", server, pipeline, 1.15),
    ]


def _body(clip: Path) -> dict[str, object]:
    data = base64.b64encode(clip.read_bytes()).decode()
    audio = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    return {"messages": [{"role": "user", "content": [audio, {"type": "text", "text": QUESTION}]}]}


def _has_text(line: str) -> bool:
    if not line.startswith("data: {"):
        return False
    return bool(json.loads(line[6:])["choices"][0]["delta"].get("content"))


@contextmanager
def _served(listen: ListenPipeline) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(TransformersEngine(listen, str(MODEL))), log_level="error"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions"
        server.should_exit = True
        thread.join()
