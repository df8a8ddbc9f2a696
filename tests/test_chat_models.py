"""LLMs that answer chats: in this process, and behind a real endpoint."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from fixtures_endpoint import serve_chat
from fixtures_training import CHAT_TEMPLATE, save_tiny_llm, tiny_processor

from listen.data import posting
from listen.data.chat_models import ChatModelError, EndpointChatModel, LocalChatModel

PROMPTS = ["hello", "how are you today, then?", "a"]


def chats(prompts: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def llm(folder: str) -> LocalChatModel:
    return LocalChatModel(folder, max_new_tokens=8)


# ------------------------------------------------------------------ in this process


def test_a_batch_answers_as_single_conversations_do(llm: LocalChatModel) -> None:
    answers = llm.answer(chats(PROMPTS))
    assert answers == [llm.answer(chats([prompt]))[0] for prompt in PROMPTS]
    assert len({answer.text for answer in answers}) == 3


LIST_TEMPLATE = CHAT_TEMPLATE.replace("message['content']", "message['content'][0]['text']")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, LIST_TEMPLATE, None])
def test_prompts_are_written_as_a_listen_processor_writes_them(tmp_path: Path, template: str | None) -> None:
    """With the template's BOS or the tokenizer's, but never both."""
    llm = LocalChatModel(save_tiny_llm(tmp_path, template))
    processor = tiny_processor(tiny_model().config, template)
    turn = [{"role": "user", "content": "hello"}]
    expected = processor.apply_chat_template(turn, tokenize=True, add_generation_prompt=True, num_prompts=0)
    seen = []
    hook = llm.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    llm.answer(chats(["hello"]))
    hook.remove()
    assert torch.equal(seen[0], expected["input_ids"])
    assert "hello" in llm.tokenizer.decode(seen[0][0])


def test_answers_stop_where_the_chat_template_ends_a_turn(folder: str) -> None:
    """A checkpoint whose generation config names no end at all, and a token that the model likes."""
    llm = LocalChatModel(folder, max_new_tokens=30)
    llm.model.generation_config.eos_token_id = None
    end = llm.tokenizer.convert_tokens_to_ids("</s>")
    assert llm._stop_ids() == [end]
    free = LocalChatModel(folder, max_new_tokens=6, min_new_tokens=6).answer(chats(["hello"]))[0]
    assert not free.finished and free.text
    steps = []

    def force_end(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        """The third token is the end of the turn."""
        steps.append(len(steps))
        if len(steps) == 3:
            output = output.clone()
            output[..., end] = 1e4
        return output

    llm.model.lm_head.register_forward_hook(force_end)
    answer = llm.answer(chats(["hello"]))[0]
    assert answer.finished and len(steps) == 3 and free.text.startswith(answer.text)


def test_sampling_follows_its_seed_and_leaves_the_global_one_alone(folder: str) -> None:
    llm = LocalChatModel(folder, max_new_tokens=12, do_sample=True, temperature=2.0)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = (llm.answer(chats(PROMPTS), seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)
    assert llm.describe()["decoding"] == {"do_sample": True, "max_new_tokens": 12, "temperature": 2.0}


def test_a_description_tells_models_apart(llm: LocalChatModel, tmp_path: Path) -> None:
    other = LocalChatModel(save_tiny_llm(tmp_path, seed=1), max_new_tokens=8).describe()
    assert other["fingerprint"] != llm.describe()["fingerprint"]
    assert other["decoding"] == llm.describe()["decoding"]


# ------------------------------------------------------------------ behind an endpoint


def test_an_endpoint_answers_in_order_with_several_requests_under_way() -> None:
    def reply(body: dict) -> tuple[int, str]:
        time.sleep(0.05 if body["messages"][-1]["content"] == "0" else 0.02)  # the first one comes last
        return 200, f" {body['messages'][-1]['content']} heard{'.' if body['seed'] % 2 else ''}"

    with serve_chat(reply) as server:
        model = EndpointChatModel(server.url + "/", "m", api_key="secret", concurrency=4, top_p=0.5)
        answers = model.answer(chats([str(i) for i in range(8)]), seed=10)
    assert [answer.text for answer in answers] == [f"{i} heard{'.' if i % 2 else ''}" for i in range(8)]
    assert [answer.finished for answer in answers] == [False, True] * 4  # the server cuts off what has no full stop
    assert 1 < server.most_at_once <= 4
    assert sorted(body["seed"] for body in server.requests) == list(range(10, 18))
    wanted = {"model": "m", "temperature": 0.0, "top_p": 0.5, "max_tokens": 256}
    assert all(wanted.items() <= body.items() for body in server.requests)
    assert all(headers["Authorization"] == "Bearer secret" for headers in server.headers)


def test_a_full_server_is_asked_again() -> None:
    seen: dict[str, int] = {}

    def reply(body: dict) -> tuple[int, str]:
        prompt = body["messages"][-1]["content"]
        seen[prompt] = seen.get(prompt, 0) + 1
        return (200, "Well.") if seen[prompt] > 2 else ((429, "full") if seen[prompt] == 1 else (503, "down"))

    with serve_chat(reply) as server:
        answers = EndpointChatModel(server.url, "m", backoff_seconds=0.01).answer(chats(PROMPTS))
    assert [(answer.text, answer.finished) for answer in answers] == [("Well.", True)] * 3
    assert set(seen.values()) == {3}


def test_a_request_that_fails_for_good_is_an_answer_without_a_text() -> None:
    def reply(body: dict) -> tuple[int, str]:
        prompt = body["messages"][-1]["content"]
        return {"a": (500, "broken"), "hello": (400, "too long")}.get(prompt, (200, "Fine."))

    with serve_chat(reply) as server:
        model = EndpointChatModel(server.url, "m", max_retries=2, backoff_seconds=0.01)
        hello, fine, broken = model.answer(chats(PROMPTS))
        contents = [body["messages"][-1]["content"] for body in server.requests]
    assert fine.text == "Fine." and hello.text is None and broken.text is None
    assert "400" in hello.error and "500" in broken.error
    assert (contents.count("a"), contents.count("hello")) == (3, 1)  # a bad request is not sent again


@pytest.mark.parametrize(("status", "path"), [(401, "/v1"), (200, "")])
def test_an_endpoint_that_cannot_be_used_ends_the_work(status: int, path: str) -> None:
    with serve_chat(lambda body: (status, "no key")) as server:
        model = EndpointChatModel(server.url.removesuffix("/v1") + path, "m")
        with pytest.raises(ChatModelError, match=f"{404 if not path else 401} .*'m'.*check the URL"):
            model.answer(chats(PROMPTS))


def test_nobody_listening_is_a_failed_request() -> None:
    with serve_chat(lambda body: (200, "gone")) as server:
        pass
    answer = EndpointChatModel(server.url, "m", max_retries=1, backoff_seconds=0.01).answer(chats(["a"]))[0]
    assert answer.text is None and "ConnectionError" in answer.error


def test_ctrl_c_does_not_wait_for_the_requests_under_way() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, and never answers
        llm = EndpointChatModel(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", "m", timeout=10, max_retries=0)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            llm.answer(chats(PROMPTS))
    assert time.monotonic() - start < 8


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="concurrency=0"):
        EndpointChatModel("http://localhost/v1", "m", concurrency=0)


def one_choice(content: object, reason: object = "stop") -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}, "finish_reason": reason}]}).encode()


ODD = {
    "surrogate": (one_choice("bad \ud800"), "not valid Unicode"),
    "deep": (b"[" * 100_000, "not a chat completion"),
    "garbage": (b"\xff\xfe<html>", "not a chat completion"),
    "empty": (b"", "not a chat completion"),
    "large number": (b'{"choices": ' + b"9" * 5000 + b"}", "not a chat completion"),
    "list": (b"[]", "not a chat completion"),
    "no choice": (b'{"choices": []}', "not a chat completion"),
    "null": (one_choice(None, "tool_calls"), "NoneType.*tool_calls"),
    "parts": (one_choice([{"type": "text"}]), "list, not text"),
    "filtered": (one_choice("I was goi", "content_filter"), "finish_reason='content_filter'"),
    "odd reason": (one_choice("yes", {"a": 1}), "finish_reason="),
    "oversized": (b" " * (posting.MAX_RESPONSE_BYTES + 1), "larger than"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_response_is_one_failed_answer(name: str) -> None:
    content, message = ODD[name]
    with serve_chat(lambda body: (200, content if body["messages"][-1]["content"] == "a" else "Fine.")) as server:
        *others, odd = EndpointChatModel(server.url, "m", max_retries=0).answer(chats(PROMPTS))
    assert [answer.text for answer in others] == ["Fine.", "Fine."]
    assert odd.text is None and re.search(message, odd.error) and len(odd.error) < 500


@pytest.mark.parametrize(("reason", "finished"), [("stop", True), ("eos_token", True), (None, True), ("length", False)])
def test_a_finish_reason_tells_complete_from_truncated_answers(reason: str | None, finished: bool) -> None:
    with serve_chat(lambda body: (200, one_choice("yes", reason))) as server:
        (answer,) = EndpointChatModel(server.url, "m").answer(chats(["a"]))
    assert (answer.text, answer.finished) == ("yes", finished)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_prompt_is_not_a_refused_model(status: int) -> None:
    """A content filter refuses one prompt of a batch, or the only one of a later batch."""
    with serve_chat(
        lambda body: (status, "no") if body["messages"][-1]["content"] == "a" else (200, "Fine.")
    ) as server:
        model = EndpointChatModel(server.url, "m")
        answers = [*model.answer(chats(PROMPTS)), *model.answer(chats(["a"]))]
        assert [answer.text for answer in answers] == ["Fine.", "Fine.", None, None]
        assert str(status) in answers[3].error and len(server.requests) == 4


def drip(headers: bool) -> Callable[[BaseHTTPRequestHandler], None]:
    """A byte every 50 ms, without an end: of the content, or of a header already."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: " + (b"" if headers else b"1\r\n\r\n"))
        with suppress(OSError):
            for _ in range(600):
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.05)

    return send


@pytest.mark.parametrize("headers", [True, False])
def test_the_timeout_bounds_the_whole_of_an_attempt(headers: bool) -> None:
    started = time.monotonic()
    with serve_chat(lambda body: (200, drip(headers))) as server:
        model = EndpointChatModel(server.url, "m", timeout=0.4, max_retries=1, backoff_seconds=0.0)
        (answer,) = model.answer(chats(["a"]))
        assert answer.text is None and "not complete after 0.4 s" in answer.error
        assert time.monotonic() - started < 20.0


def refusal(status: int, retry_after: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Retry-After", retry_after)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return send


@pytest.mark.parametrize("retry_after", ["100000", "soon", "9" * 5000, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_server_cannot_make_a_request_wait_for_long(monkeypatch: pytest.MonkeyPatch, retry_after: str) -> None:
    monkeypatch.setattr(posting, "MAX_WAIT_SECONDS", 0.1)
    started = time.monotonic()
    with serve_chat(lambda body: (0, refusal(503, retry_after))) as server:
        (answer,) = EndpointChatModel(server.url, "m", max_retries=2, backoff_seconds=0.01).answer(chats(["a"]))
        assert answer.text is None and len(server.requests) == 3
    assert time.monotonic() - started < 60.0


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 405, 410, 413, 422])
def test_a_request_that_cannot_succeed_is_sent_once(status: int) -> None:
    with serve_chat(
        lambda body: (0, refusal(status, "0")) if body["messages"][-1]["content"] == "a" else (200, "Fine.")
    ) as server:
        answers = EndpointChatModel(server.url, "m", backoff_seconds=0.01).answer(chats(PROMPTS))
        assert answers[2].text is None and str(status) in answers[2].error and len(server.requests) == 3


def test_a_timeout_out_of_range_is_refused() -> None:
    for timeout in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"timeout={timeout} must be"):
            EndpointChatModel("http://localhost/v1", "m", timeout=timeout)
