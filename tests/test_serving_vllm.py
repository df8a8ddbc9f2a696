"""The engine that sends embeddings to a vLLM server: against a small stand-in, and against vLLM itself where it is."""

from __future__ import annotations

import asyncio
import base64
import os
import shlex
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openai
import pytest
import requests
import soundfile
import torch
from conftest import tiny_model
from fixtures_repository import ROOT
from fixtures_servers import free_port, running
from fixtures_serving import served
from fixtures_training import tiny_processor
from fixtures_vllm import LanguageModelServer, language_model_server
from transformers import AutoConfig, AutoModelForCausalLM

from listen import ListenConfig, ListenForConditionalGeneration, ListenPipeline, ListenProcessor
from listen.serving.encoders import EncoderSide, drop_layers, embeddings_alone
from listen.serving.engine import Delta, EngineUnavailableError, QueueFullError, Request, Sampling
from listen.serving.vllm import VllmEngine, VllmServer, encoded_tensor

TINY = ROOT / "model_cards" / "listen-tiny"
CLIPS = sorted((TINY / "samples").glob("*.wav"))
REAL_MODELS = Path(os.environ.get("LISTEN_REAL_MODELS", ""))
QUESTIONS = ("What is being said?", "Who is speaking?")
GREEDY = Sampling(temperature=0.0, max_tokens=24)


def loaded(**options: Any) -> ListenPipeline:
    model = ListenForConditionalGeneration.from_pretrained(TINY, **options)
    return ListenPipeline(model=model, processor=ListenProcessor.from_pretrained(TINY))


@pytest.fixture(scope="module")
def two_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a second adapter, whose connector differs."""
    folder = tmp_path_factory.mktemp("other")
    model = loaded().model
    with torch.no_grad():
        model.adapters.default.connector.projection.weight.mul_(-1)
    model.save_adapter(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(two_adapters: Path) -> ListenPipeline:
    """The reference, with both adapters."""
    found = loaded()
    found.model.load_adapter(two_adapters, "other")
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[LanguageModelServer, str]]:
    with language_model_server(str(TINY / "backbones" / "language_model")) as started:
        yield started


@pytest.fixture(scope="module")
def engine_of(two_adapters: Path) -> Callable[..., VllmEngine]:
    def make(url: str, **options: Any) -> VllmEngine:
        model = EncoderSide.from_pretrained(TINY)
        model.load_adapter(two_adapters, "other")
        drop_layers(model)
        pipeline = ListenPipeline(model=model, processor=ListenProcessor.from_pretrained(TINY))
        return VllmEngine(pipeline, "my/listen-tiny", VllmServer(url), **options)

    return make


def messages(*paths: Path, question: str) -> list[dict[str, Any]]:
    clips = [soundfile.read(path, dtype="float32") for path in paths]
    audio = [{"type": "audio", "array": waveform, "sampling_rate": rate} for waveform, rate in clips]
    return [{"role": "user", "content": [*audio, {"type": "text", "text": question}]}]


def asked(adapter: str | None, path: Path, question: str) -> Request:
    return Request(messages(path, question=question), adapter=adapter, sampling=GREEDY)


class Case(NamedTuple):
    """A request over HTTP."""

    model: str
    paths: tuple[Path, ...]
    question: str

    def expected(self, pipeline: ListenPipeline) -> str:
        """What the pipeline answers to it alone; the second adapter is named as its model."""
        pipeline.model.set_adapter("other" if self.model == "other" else "default")
        chat = messages(*self.paths, question=self.question)
        return pipeline(chat, max_new_tokens=24, do_sample=False)[0]["generated_text"]

    def ask(self, client: openai.OpenAI, stream: bool) -> str:
        """Ask through OpenAI's client, in one piece or streamed."""
        audio = [{"data": base64.b64encode(path.read_bytes()).decode(), "format": "wav"} for path in self.paths]
        content = [*({"type": "input_audio", "input_audio": clip} for clip in audio)]
        content.append({"type": "text", "text": self.question})
        options = {"model": self.model, "temperature": 0, "max_tokens": 24}
        answer = client.chat.completions.create(
            messages=[{"role": "user", "content": content}], stream=stream, **options
        )
        if stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        return answer.choices[0].message.content


def cases(own: str) -> list[Case]:
    """Two adapters, one clip and two clips."""
    chosen = [(path,) for path in CLIPS[:3]] + [tuple(CLIPS[:2])]
    return [Case(model, paths, QUESTIONS[0]) for model in (own, "other") for paths in chosen]


def ask_all(engine: VllmEngine, asked: list[Case], most: int = 16) -> list[str]:
    """Answers through `listen serve` and OpenAI's client, all requests at once, every second one streamed."""
    with served(engine) as address, ThreadPoolExecutor(most) as clients:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=300)
        answers = clients.map(lambda i: asked[i].ask(client, stream=i % 2 == 1), range(len(asked)))
        return list(answers)


async def whole(stream: AsyncIterator[Delta]) -> tuple[str, Delta]:
    pieces = [piece async for piece in stream]
    assert [piece.finish_reason is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    return "".join(piece.text for piece in pieces), pieces[-1]


def run(engine: VllmEngine, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run on a loop of its own, and close the engine at its end."""

    async def closed() -> Any:
        try:
            return await work()
        finally:
            await engine.close()

    return asyncio.run(closed())


def test_greedy_answers_are_the_pipelines_for_two_adapters_at_once(
    server: tuple[LanguageModelServer, str], engine_of: Callable[..., VllmEngine], pipeline: ListenPipeline
) -> None:
    requests = [asked(name, path, q) for name in ("default", "other") for path in CLIPS for q in QUESTIONS]
    engine = engine_of(server[1])
    batches, embed = [], engine._embed
    engine._embed = lambda batch: (batches.append(len(batch)), embed(batch))[1]

    async def work() -> list[tuple[str, Delta]]:
        return await asyncio.gather(*(whole(engine.stream(request)) for request in requests))

    found = run(engine, work)
    expected = []
    for request in requests:
        pipeline.model.set_adapter(request.adapter)
        expected.append(pipeline(request.messages, max_new_tokens=24, do_sample=False)[0]["generated_text"])
    assert [text for text, _ in found] == expected
    assert len(set(expected)) > len(CLIPS)  # adapters and clips matter
    assert len(batches) < len(requests) == sum(batches)  # encoded together
    assert all(last.prompt_tokens > 10 for _, last in found)


def test_openai_client_gets_the_pipelines_answers_through_both_servers(
    server: tuple[LanguageModelServer, str], engine_of: Callable[..., VllmEngine], pipeline: ListenPipeline
) -> None:
    """Whole and streamed, one clip and two, with two adapters in flight at once."""
    asked = [*cases("listen-tiny"), *reversed(cases("listen-tiny"))]  # each case is asked whole and streamed
    expected = [case.expected(pipeline) for case in asked]
    assert len(set(expected)) > len(CLIPS[:3])
    assert ask_all(engine_of(server[1]), asked) == expected


def test_text_for_the_base_llm_goes_on_as_it_is(
    server: tuple[LanguageModelServer, str], engine_of: Callable[..., VllmEngine]
) -> None:
    chat = [{"role": "user", "content": "What is being said?"}]
    sampling = replace(GREEDY, stop=("xyz",), seed=4)
    engine = engine_of(server[1])
    text, last = run(engine, lambda: whole(engine.stream(Request(chat, adapter=None, sampling=sampling))))
    path, body = server[0].seen[-1]
    assert path == "/v1/chat/completions" and body["messages"] == chat
    assert (body["stop"], body["seed"], body["temperature"], body["max_tokens"]) == (["xyz"], 4, 0, 24)
    llm, tokenizer = server[0].model, server[0].tokenizer
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = llm.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert text == tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert last.prompt_tokens == ids["input_ids"].shape[1]


def test_text_for_an_adapter_is_answered_with_its_prompts(
    server: tuple[LanguageModelServer, str], engine_of: Callable[..., VllmEngine], pipeline: ListenPipeline
) -> None:
    pipeline.model.set_adapter("default")
    chat = [{"role": "user", "content": "What is being said?"}]
    engine = engine_of(server[1])
    text, _ = run(engine, lambda: whole(engine.stream(Request(chat, sampling=GREEDY))))
    assert text == pipeline(chat, max_new_tokens=24, do_sample=False)[0]["generated_text"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_embeddings_of_the_llm_are_loaded(dtype: torch.dtype) -> None:
    """The layers are never read; everything else is what a whole model holds, bit for bit."""
    whole, model = loaded(dtype=dtype).model, EncoderSide.from_pretrained(TINY, dtype=dtype)
    table = model.get_input_embeddings().weight
    read = [weight for weight in model.language_model.parameters() if weight.device.type != "meta"]
    assert [weight is table for weight in read] == [True]
    assert table.dtype == dtype and torch.equal(table, whole.get_input_embeddings().weight)
    kept = {name: weight for name, weight in model.state_dict().items() if weight.device.type != "meta"}
    others = whole.state_dict()
    assert all(torch.equal(weight, others.pop(name)) for name, weight in kept.items())
    assert others and all(name.startswith("language_model.") for name in others)
    assert model.generation_config.to_dict() == whole.generation_config.to_dict()
    drop_layers(model)
    assert model.device.type == "cpu" and len([*model.language_model.parameters()]) == 1


def test_an_adapter_of_another_llm_is_refused_by_its_embeddings(tmp_path: Path, two_adapters: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(TINY / "backbones" / "language_model")
    llm.get_input_embeddings().weight.data.mul_(-1)
    llm.save_pretrained(tmp_path)
    model = EncoderSide.from_pretrained(TINY, backbones={"language_model": str(tmp_path)})
    with pytest.raises(ValueError, match="another fingerprint"):
        model.load_adapter(two_adapters, "other")


def test_embeddings_that_are_more_than_a_table_are_read_with_their_llm(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 32}
    config = AutoConfig.for_model("gemma3_text", num_attention_heads=2, num_key_value_heads=1, head_dim=8, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert embeddings_alone(str(tmp_path), None, {}) is None


@pytest.mark.parametrize(
    ("refusal", "error", "message"),
    [
        ((400, {"error": {"message": "too long"}}), ValueError, "answered 400: too long"),
        ((429, {"error": {"message": "busy"}}), QueueFullError, "answered 429: busy"),
        ((500, {"detail": "broken"}), EngineUnavailableError, "answered 500: .*broken"),
        (
            (400, {"error": {"message": "You must set `--enable-prompt-embeds`"}}),
            EngineUnavailableError,
            "start it with --enable-prompt-embeds",
        ),
    ],
)
def test_errors_of_the_server_are_passed_on(
    server: tuple[LanguageModelServer, str],
    engine_of: Callable[..., VllmEngine],
    refusal: tuple[int, dict],
    error: type[Exception],
    message: str,
) -> None:
    engine = engine_of(server[1])
    server[0].refusal = refusal
    try:
        with pytest.raises(error, match=message):
            run(engine, lambda: whole(engine.stream(asked("default", CLIPS[0], QUESTIONS[0]))))
    finally:
        server[0].refusal = None


def test_a_server_that_is_not_there_is_named(engine_of: Callable[..., VllmEngine]) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    engine = engine_of(address)

    async def work() -> None:
        for asking in (engine.check_health(), whole(engine.stream(asked("default", CLIPS[0], QUESTIONS[0])))):
            with pytest.raises(EngineUnavailableError, match=f"{address} does not answer"):
                await asking

    run(engine, work)


def test_what_is_no_vllm_server_is_not_the_clients_fault(engine_of: Callable[..., VllmEngine], tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "models").write_text("<html>")
    pages = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    threading.Thread(target=pages.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{pages.server_port}"
    engine = engine_of(address)
    with pytest.raises(EngineUnavailableError, match=f"{address} is no vLLM server; check --engine-url"):
        run(engine, lambda: whole(engine.stream(asked("default", CLIPS[0], QUESTIONS[0]))))
    pages.shutdown()


def test_a_failure_that_clients_are_not_told_is_logged(
    engine_of: Callable[..., VllmEngine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(requests: list[Request]) -> None:
        raise RuntimeError("out of memory")

    engine = engine_of("http://127.0.0.1:1")
    monkeypatch.setattr(engine, "_embed", fail)
    monkeypatch.setattr(engine, "_served", ("llm", None))
    with pytest.raises(RuntimeError, match="out of memory"):
        run(engine, lambda: whole(engine.stream(asked("default", CLIPS[0], QUESTIONS[0]))))
    assert "RuntimeError: out of memory" in caplog.text


def test_a_faulty_request_fails_alone(
    server: tuple[LanguageModelServer, str], engine_of: Callable[..., VllmEngine], pipeline: ListenPipeline
) -> None:
    good = asked("default", CLIPS[0], QUESTIONS[0])
    wrong = [{"role": "user", "content": [{"type": "audio", "array": np.zeros(0, np.float32), "sampling_rate": 16000}]}]
    engine = engine_of(server[1])

    async def work() -> list[Any]:
        asking = [whole(engine.stream(r)) for r in (good, Request(wrong, sampling=GREEDY), good)]
        return await asyncio.gather(*asking, return_exceptions=True)

    first, failed, last = run(engine, work)
    pipeline.model.set_adapter("default")
    expected = pipeline(good.messages, max_new_tokens=24, do_sample=False)[0]["generated_text"]
    assert isinstance(failed, ValueError) and first[0] == last[0] == expected


def test_what_embeddings_do_not_carry_is_refused_by_name() -> None:
    pool = {"pool_size": 12, "num_prompts": 4, "form": "layers"}
    model = tiny_model(prompt_pool_config=pool)
    pipeline = ListenPipeline(model=model, processor=tiny_processor(model.config))
    with pytest.raises(ValueError, match="adapter 'default' has prompts in the LLM's layers"):
        VllmEngine(pipeline, "some/model", VllmServer("http://127.0.0.1:1"))


def test_embeddings_are_sent_without_the_rest_of_their_batch() -> None:
    batch = torch.zeros(50, 8, 16)
    assert len(encoded_tensor(batch[0])) < len(encoded_tensor(batch)) / 10


@pytest.mark.slow
def test_two_replicas_in_front_of_two_servers_lose_and_mix_nothing(tmp_path: Path, pipeline: ListenPipeline) -> None:
    """64 requests at once over HTTP, half to each replica; each answer is that of its own clip and question."""
    pipeline.model.set_adapter("default")
    questions = [(path, question) for path in CLIPS for question in QUESTIONS]
    expected = [
        pipeline(str(path), q, max_new_tokens=24, do_sample=False)[0]["generated_text"] for path, q in questions
    ]
    folder = str(TINY / "backbones" / "language_model")
    with ExitStack() as stack:
        servers = [stack.enter_context(language_model_server(folder)) for _ in range(2)]
        addresses = [stack.enter_context(replica(url, tmp_path / f"log{n}")) for n, (_, url) in enumerate(servers)]

        def ask(number: int) -> str:
            path, question = questions[number // 2 % len(questions)]
            data = base64.b64encode(path.read_bytes()).decode()
            content = [{"type": "input_audio", "input_audio": {"data": data}}, {"type": "text", "text": question}]
            body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 24}
            response = requests.post(f"{addresses[number % 2]}/v1/chat/completions", json=body, timeout=120)
            response.raise_for_status()
            return response.json()["choices"][0]["message"]["content"]

        with ThreadPoolExecutor(64) as clients:
            found = list(clients.map(ask, range(64)))
    assert found == [expected[number // 2 % len(questions)] for number in range(64)]
    assert [len(started.seen) for started, _ in servers] == [32, 32]


def replica(url: str, log: Path) -> AbstractContextManager[str]:
    """`listen serve` in front of a server that runs the LLM."""
    port = free_port()
    command = [sys.executable, "-m", "listen", "serve", "--model", str(TINY), "--engine", "vllm", "--engine-url", url]
    return running([*command, "--port", str(port)], port, log)


@pytest.mark.slow
@pytest.mark.skipif(
    "LISTEN_VLLM" not in os.environ or not (REAL_MODELS / "smollm2-135m-instruct").is_dir(),
    reason="needs LISTEN_VLLM, the command of vLLM, and LISTEN_REAL_MODELS, a folder with real backbones",
)
def test_a_real_vllm_answers_as_generate_does(tmp_path: Path) -> None:
    """Through OpenAI's client. In fp32 on both sides, token for token; in bf16, near ties fall otherwise."""
    places = {
        "speech_encoder": str(REAL_MODELS / "whisper-base"),
        "language_model": str(REAL_MODELS / "smollm2-135m-instruct"),
    }
    torch.manual_seed(0)
    config = ListenConfig.from_backbones(**places)
    model = ListenForConditionalGeneration.from_backbones(config, dtype=torch.float32)
    processor = ListenProcessor.from_backbones(model.config)
    model.add_adapter(None, "other")
    pipeline = ListenPipeline(model=model, processor=processor)
    asked = cases("smollm2")
    expected = [case.expected(pipeline) for case in asked]
    port = free_port()
    options = "--enable-prompt-embeds --dtype float32 --max-model-len 1024 --enforce-eager --host 127.0.0.1"
    command = [*shlex.split(os.environ["LISTEN_VLLM"]), "serve", places["language_model"], *options.split()]
    with running([*command, "--port", str(port)], port, tmp_path / "log", seconds=400) as address:
        found = ask_all(VllmEngine(pipeline, "smollm2", VllmServer(address)), asked)
    assert found == expected
