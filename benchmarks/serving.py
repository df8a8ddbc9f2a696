"""The HTTP server: requests at once against one after the other, and the first token against the pipeline's."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub.utils import httpx

from listen import ListenForConditionalGeneration, ListenPipeline, ListenProcessor

from .harness import Figure, compare, time_figure
from .models import MINIATURE, Setting

CLIP = MINIATURE / "samples" / "speech.wav"
AT_ONCE = 16
SHORT_ROUNDS = 5  # a first token is short, and waits for the processor weigh more in it
QUESTION = "What is being said?"


def serving(setting: Setting) -> list[Figure]:
    """A model behind HTTP: 16 requests at once against 16 in turn, and the first token against the pipeline's."""
    body = _body(setting.options.new_tokens)
    with TemporaryDirectory() as scratch:
        folder = _saved(setting, Path(scratch))
        model = ListenForConditionalGeneration.from_pretrained(folder)
        listen = ListenPipeline(model=model, processor=ListenProcessor.from_pretrained(folder), device=setting.device)
        with _served(folder, setting) as url, httpx.Client(timeout=600, trust_env=False) as client:

            def answer(_: int) -> None:
                client.post(url, json=body).raise_for_status()

            def first_token() -> None:
                with client.stream("POST", url, json={**body, "stream": True, "max_tokens": 1}) as response:
                    next(line for line in response.iter_lines() if _has_token(line))

            with ThreadPoolExecutor(AT_ONCE) as pool:
                variants = {
                    "at once": lambda: list(pool.map(answer, range(AT_ONCE))),
                    "in turn": lambda: [answer(i) for i in range(AT_ONCE)],
                }
                at_once, in_turn = compare(variants, "cpu", setting.options.repeats)
            variants = {"server": first_token, "pipeline": lambda: listen(str(CLIP), QUESTION, max_new_tokens=1)}
            server, pipeline = compare(variants, "cpu", SHORT_ROUNDS * setting.options.repeats)
    return [
        time_figure("serving.at_once", at_once, in_turn, 1 / 3),
        time_figure("serving.first_token", server, pipeline, 1.15),
    ]


def _saved(setting: Setting, scratch: Path) -> Path:
    """The miniature's folder, or one that holds the model of the options."""
    if not setting.options.llm:
        return MINIATURE
    setting.model.save_pretrained(scratch)
    ListenProcessor.from_backbones(setting.model.config).save_pretrained(scratch)
    return scratch


def _body(max_tokens: int) -> dict[str, object]:
    data = base64.b64encode(CLIP.read_bytes()).decode()
    audio = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    return {
        "messages": [{"role": "user", "content": [audio, {"type": "text", "text": QUESTION}]}],
        "max_tokens": max_tokens,
    }


def _has_token(line: str) -> bool:
    if not line.startswith("data: {"):
        return False
    choice = json.loads(line[6:])["choices"][0]
    return bool(choice["delta"].get("content") or choice["finish_reason"])


@contextmanager
def _served(folder: Path, setting: Setting) -> Iterator[str]:
    """`listen serve` as a process of its own, so that client and server do not share Python's lock."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "listen", "serve", "--model", str(folder), "--port", str(port)]
    command += ["--device", setting.device]
    environment = {**os.environ, "OMP_NUM_THREADS": str(setting.options.threads)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        while not _is_healthy(port):
            if process.poll() is not None:
                raise RuntimeError(f"listen serve ended with status {process.returncode}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        process.terminate()
        process.wait()


def _is_healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).is_success
    except httpx.ConnectError:
        return False
