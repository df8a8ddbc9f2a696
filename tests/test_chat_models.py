"""LLMs that answer chats: in this process, and behind a real endpoint."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from fixtures_endpoint import serve_chat
from fixtures_training import CHAT_TEMPLATE, save_tiny_llm, tiny_processor

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


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="concurrency=0"):
        EndpointChatModel("http://localhost/v1", "m", concurrency=0)
