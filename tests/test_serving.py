"""The HTTP server over the engine `transformers`: real HTTP, real model, several clients."""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile
import torch
from fixtures_serving import served
from huggingface_hub.utils import httpx

from listen import ListenForConditionalGeneration, ListenPipeline, ListenProcessor
from listen.audio_listen import load_waveform
from listen.commands.serve import load_engine
from listen.serving import clips, in_process
from listen.serving.answers import GrowingAnswer
from listen.serving.app import Options
from listen.serving.clips import ClipLimits, fetch
from listen.serving.engine import Sampling, model_names
from listen.serving.in_process import TransformersEngine

FOLDER = Path(__file__).parents[1] / "model_cards" / "listen-tiny"
SPEECH, OTHER, SCENE = (FOLDER / "samples" / name for name in ("speech.wav", "other_voice.flac", "scene.wav"))
QUESTION, ANSWER = "What is being said?", "the doctor found a yellow guitar yesterday"


@pytest.fixture(scope="module")
def listen() -> ListenPipeline:
    """The miniature with a second adapter, whose prompts and connector differ."""
    model = ListenForConditionalGeneration.from_pretrained(FOLDER)
    model.load_adapter(FOLDER, "second")
    for parameter in model.adapters["second"].connector.projection.parameters():
        parameter.data.mul_(-1.0)
    return ListenPipeline(model=model, processor=ListenProcessor.from_pretrained(FOLDER))


@pytest.fixture(scope="module")
def address(listen: ListenPipeline) -> Iterator[str]:
    with served(TransformersEngine(listen, str(FOLDER))) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)


def base64_of(content: bytes | Path) -> str:
    return base64.b64encode(content.read_bytes() if isinstance(content, Path) else content).decode()


def question(*clips: bytes | Path, text: str = QUESTION) -> list[dict[str, Any]]:
    audio = [{"type": "input_audio", "input_audio": {"data": base64_of(clip), "format": "wav"}} for clip in clips]
    return [{"role": "user", "content": [*audio, {"type": "text", "text": text}]}]


def post(address: str, path: str = "chat/completions", **kwargs: Any) -> httpx.Response:
    return httpx.post(f"{address}/v1/{path}", timeout=60, trust_env=False, **kwargs)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error in OpenAI's format, after a check of the status."""
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]


def wav(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def wav_of_silence(samples: int) -> bytes:
    return wav(np.zeros(samples, np.float32))


# ---------------------------------------------------------------------- answers


def test_chat_answers_as_the_pipeline_and_counts_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="listen-tiny", messages=question(SPEECH), max_completion_tokens=40)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(ANSWER.split()) + 1  # one token a word, and the end
    short = client.chat.completions.create(model="listen-tiny", messages=question(SPEECH), max_tokens=2)
    assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("the doctor", "length")


def test_pieces_of_a_stream_are_the_answer(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model="listen-tiny", messages=question(SPEECH), stream=True, stream_options=options
    )
    *chunks, last = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(pieces) == ANSWER and len(pieces) == len(ANSWER.split())
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert last.usage.completion_tokens == len(pieces) + 1


def test_two_clips_data_uris_and_tasks(client: openai.OpenAI) -> None:
    def ask(clips: list[dict], task: str, **kwargs: Any) -> str:
        messages = [{"role": "user", "content": clips}]
        options = {"model": "listen-tiny", "extra_body": {"task": task}, **kwargs}
        return client.chat.completions.create(messages=messages, **options).choices[0].message.content

    speech, other = (
        {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{base64_of(path)}"}}
        for path in (SPEECH, OTHER)
    )
    assert ask([speech, speech], "sv") == "yes"
    assert ask([speech, other], "sv") == "no"
    assert ask([speech, {"type": "text", "text": "which colour is it?"}], "sqa") == "yellow"


def test_stop_logprobs_and_seeds(client: openai.OpenAI) -> None:
    def ask(**kwargs: Any) -> Any:
        return client.chat.completions.create(model="listen-tiny", messages=question(SPEECH), **kwargs).choices[0]

    assert ask(stop="a yellow").message.content == "the doctor found"
    entries = ask(logprobs=True, top_logprobs=2).logprobs.content
    assert [entry.token for entry in entries[:2]] == ["the", "doctor"]
    assert all(entry.top_logprobs[0].logprob == entry.logprob <= 0 for entry in entries)
    assert ask(temperature=2.0, seed=1).message.content == ask(temperature=2.0, seed=1).message.content
    assert len({ask(temperature=2.0, seed=seed).message.content for seed in range(4)}) > 1


def test_the_base_llm_answers_text_without_adapter(client: openai.OpenAI, listen: ListenPipeline) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["listen-tiny", "listen-tiny-base", "second"]
    text = [{"role": "user", "content": "which colour is it?"}]
    answer = client.chat.completions.create(model="listen-tiny-base", messages=text).choices[0].message.content
    with listen.model.disable_adapter():
        assert answer == listen(text, num_prompts=0)[0]["generated_text"]
    with pytest.raises(openai.BadRequestError, match="is the base LLM"):
        client.chat.completions.create(model="listen-tiny-base", messages=question(SPEECH))


def test_uploads_are_transcribed_and_translated(client: openai.OpenAI, address: str) -> None:
    assert client.audio.transcriptions.create(model="listen-tiny", file=SPEECH).text == ANSWER
    text = client.audio.transcriptions.create(model="listen-tiny", file=OTHER, response_format="text")
    assert text.endswith("\n") and text.strip()
    verbose = post(
        address, "audio/transcriptions", files={"file": SPEECH.read_bytes()}, data={"response_format": "verbose_json"}
    ).json()
    assert verbose["duration"] == pytest.approx(soundfile.info(SPEECH).duration, abs=1e-3)
    chinese = client.audio.translations.create(
        model="listen-tiny", file=SPEECH, prompt="Translate the speech into Chinese."
    )
    assert chinese.text == "昨天医生找到了一把黄色的吉他"
    upload = {"files": {"file": SPEECH.read_bytes()}, "data": {"language": "en"}}
    assert error_of(post(address, "audio/transcriptions", **upload), 400)["param"] == "language"


def test_transcriptions_stream_the_events_of_openai(client: openai.OpenAI, address: str) -> None:
    *deltas, done = client.audio.transcriptions.create(model="listen-tiny", file=SPEECH, stream=True)
    assert {event.type for event in deltas} == {"transcript.text.delta"} and len(deltas) == len(ANSWER.split())
    assert (done.type, done.text, "".join(event.delta for event in deltas)) == ("transcript.text.done", ANSWER, ANSWER)
    assert done.usage.output_tokens == len(deltas) + 1
    upload = {"files": {"file": SPEECH.read_bytes()}, "data": {"stream": "true", "response_format": "text"}}
    assert error_of(post(address, "audio/transcriptions", **upload), 400)["param"] == "response_format"


def variants() -> list[bytes]:
    """Clips that differ, in what is said or how."""
    speech, other, scene = (load_waveform(str(path)) for path in (SPEECH, OTHER, SCENE))
    noise = 0.1 * np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    halves = [part for clip in (speech, other, scene) for part in np.array_split(clip, 2)]
    return [*map(wav, [speech, other, scene, noise, *halves])]


def test_of_200_requests_at_once_each_gets_its_own_answer(address: str, listen: ListenPipeline) -> None:
    """Clips, questions, adapters and limits differ within a batch; each answer is what the pipeline gives alone."""
    texts = (QUESTION, "Describe the sounds.", "which colour is it?", "Translate the speech into Chinese.")
    rows = [{"audio": clip, "text": text} for clip in variants() for text in texts]
    cases = []
    for name, adapter in (("listen-tiny", "default"), ("second", "second")):
        listen.model.set_adapter(adapter)
        alone, batched = (
            [a[0]["generated_text"] for a in listen(rows, batch_size=n, max_new_tokens=20)] for n in (1, 16)
        )
        # without ties of two tokens, which rounding decides: nothing is said in parts of the noise
        cases += [(name, *row.values(), a) for row, a, b in zip(rows, alone, batched, strict=True) if a == b]
    listen.model.set_adapter("default")
    assert len(cases) >= 76 and len({case[3] for case in cases}) > 20
    chosen = [cases[i % len(cases)] for i in range(200)]

    async def ask(session: httpx.AsyncClient, name: str, clip: bytes, text: str) -> str:
        body = {"model": name, "messages": question(clip, text=text), "max_tokens": 20}
        response = await session.post(f"{address}/v1/chat/completions", json=body)
        return response.json()["choices"][0]["message"]["content"]

    async def ask_all() -> list[str]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(timeout=120, limits=limits, trust_env=False) as session:
            return await asyncio.gather(*(ask(session, *case[:3]) for case in chosen))

    assert asyncio.run(ask_all()) == [case[3] for case in chosen]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_row_alone(
    listen: ListenPipeline, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Its row generates no further token; the other rows of its batch are answered as the pipeline answers alone."""
    step, steps = in_process._Rows.__call__, []

    def pausing_step(rows: Any, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = step(rows, input_ids, scores, **kwargs)
        if len(rows.batch) == 3:
            steps.append([len(row.answer.ids) for row in rows.batch])
            deadline = time.monotonic() + 60
            while not any(row.dropped for row in rows.batch) and time.monotonic() < deadline:
                time.sleep(0.005)
        return done

    monkeypatch.setattr(in_process._Rows, "__call__", pausing_step)
    engine, held = TransformersEngine(listen, str(FOLDER)), threading.Event()
    engine._thread.submit(held.wait)
    bodies = [{"messages": question(clip)} for clip in (SPEECH, OTHER, SCENE)]
    expected = [listen(body, QUESTION)[0]["generated_text"] for body in (str(SPEECH), str(SCENE))]
    with served(engine) as address, ThreadPoolExecutor(4) as clients:
        before = clients.submit(post, address, json={"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1})
        wait_until(lambda: engine._dispatcher is not None and not engine.waiting)  # the first batch has been taken
        answers = []
        for number, body in enumerate(bodies):
            ask = ask_and_leave if number == 1 else post
            answers.append(clients.submit(ask, address, json={**body, "stream": stream and number == 1}))
            wait_until(lambda number=number: engine.waiting == number + 1)
        held.set()
        assert before.result().status_code == 200
        texts = [answers[n].result().json()["choices"][0]["message"]["content"] for n in (0, 2)]
    assert texts == expected
    assert steps[0] == [1, 1, 1] and len(steps) > 3
    assert [row[1] for row in steps] == [1] * len(steps)


def ask_and_leave(address: str, json: dict[str, Any]) -> None:
    """Close the connection at the first text of a stream, or while the whole answer is awaited."""
    with httpx.Client(timeout=60, trust_env=False) as session:
        if json["stream"]:
            with session.stream("POST", f"{address}/v1/chat/completions", json=json) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                session.post(f"{address}/v1/chat/completions", json=json, timeout=3.0)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "status", "param", "message"),
    [
        ({"model": "other"}, 404, "model", "models: listen-tiny, listen-tiny-base, second"),
        ({"best_of": 3}, 400, "best_of", "unknown field"),
        ({"n": 2}, 400, "n", "Input should be 1"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 400, None, "give one of them"),
        ({"top_logprobs": 3}, 400, None, "needs logprobs"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"task": "no-such"}, 400, "task", "tasks: acap, asr"),
        ({"max_tokens": "5"}, 400, "max_tokens", "valid integer"),
        ({"max_tokens": True}, 400, "max_tokens", "valid integer"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"stream": "yes"}, 400, "stream", "valid boolean"),
        ({"stop": 3}, 400, "stop", "valid string"),
        ({"stop": [""]}, 400, None, "none of them empty"),
        ({"seed": -1}, 400, "seed", "greater than or equal to 0"),
        ({"model": 3}, 400, "model", "valid string"),
        ({"num_prompts": 10**6}, 400, "messages", "pool_size=96"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content", "valid string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages.0.content.0",
            "image_url",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            400,
            "messages.0.content.0.text.text",
            "required",
        ),
        ({"messages": [{"role": "user", "content": "what " * 9000}]}, 400, "messages", "context of 2048"),
        ({"messages": [{"role": "user", "content": "<|prompt|>"}]}, 400, "messages", "only the processor may write"),
    ],
)
def test_wrong_fields_are_named(address: str, change: dict, status: int, param: str | None, message: str) -> None:
    error = error_of(post(address, json={"messages": [{"role": "user", "content": "Hi"}], **change}), status)
    assert error["param"] == param and message in error["message"]


@pytest.mark.parametrize("content", ["a \ud800", [{"type": "text", "text": "\udfff"}]])
def test_half_a_surrogate_pair_is_no_text(address: str, content: Any) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": content}]})
    error = error_of(post(address, content=body, headers={"Content-Type": "application/json"}), 400)
    assert error["param"].startswith("messages.0.content") and "half of a surrogate pair" in error["message"]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "input_audio", "input_audio": {"data": "%%%"}}, "is not base64"),
        ({"type": "input_audio", "input_audio": {"data": base64_of(b"no audio")}}, "cannot decode"),
        ({"type": "audio_url", "audio_url": {"url": str(SPEECH)}}, "is not fetched"),
        ({"type": "audio_url", "audio_url": {"url": f"file://{SPEECH}"}}, "is not fetched"),
        ({"type": "audio_url", "audio_url": {"url": "http://127.0.0.1:1/a.wav"}}, "private address"),
        ({"type": "audio_url", "audio_url": {"url": "http://[::1]/a.wav"}}, "private address"),
        ({"type": "audio_url", "audio_url": {"url": "FILE:///etc/hostname"}}, "is not fetched"),
        ({"type": "audio_url", "audio_url": {"url": "http:///a.wav"}}, "no host"),
        ({"type": "audio_url", "audio_url": {"url": "http://127.0.0.1:99999/"}}, "Port out of range"),
        ({"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,"}}, "empty audio"),
        ({"type": "input_audio", "input_audio": {"data": ""}}, "empty audio"),
        ({"type": "input_audio", "input_audio": {"data": base64_of(b"RIFF")}}, "cannot decode"),
        ({"type": "input_audio", "input_audio": {"data": base64_of(wav_of_silence(0))}}, "a clip of 0 samples"),
    ],
)
def test_a_bad_clip_is_named_by_its_field(address: str, part: dict, message: str) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}, part]}]
    error = error_of(post(address, json={"messages": messages}), 400)
    assert error["param"].startswith(f"messages.0.content.1.{part['type']}.") and message in error["message"]


@pytest.mark.parametrize(
    "host", ["127.1", "2130706433", "0x7f000001", "0", "169.254.169.254", "10.0.0.1", "100.64.0.1"]
)
def test_private_addresses_are_found_in_every_notation(host: str) -> None:
    with pytest.raises(ValueError, match="private address"):
        asyncio.run(fetch(f"http://{host}/a.wav", ClipLimits()))


@pytest.mark.parametrize(
    "address", ["::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "224.0.0.1", "ff02::1", "fe80::1%lo"]
)
def test_addresses_that_lead_inside_are_not_public(address: str) -> None:
    assert not clips._is_public(address) and clips._is_public("8.8.8.8") and clips._is_public("2606:4700::1111")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"messages": [{"role": "user", "content": "\xff"}]}']
)
def test_bodies_that_are_no_request_are_refused(address: str, body: bytes) -> None:
    error = error_of(post(address, content=body, headers={"Content-Type": "application/json"}), 400)
    assert error["message"] and error["param"] is None


def test_settings_at_their_limits_are_answered(address: str) -> None:
    """A temperature near 0 is greedy; huge limits and stop strings, null fields and whole numbers change nothing."""
    body = {"messages": question(SPEECH), "temperature": 0}
    changes = [
        *({"temperature": 1e-300}, {"temperature": 1, "top_p": 1e-9}, {"max_tokens": 10**30}, {"stop": ["a" * 10**6]}),
        *({"tools": None, "max_tokens": None}, {"logprobs": True, "top_logprobs": 20}),
    ]
    for change in changes:
        choice = post(address, json={**body, **change}).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (ANSWER, "stop")


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"stop": "a yellow"},
            {"logprobs": True, "top_logprobs": 1},
            {"temperature": 1.5, "seed": 3},
            {"max_tokens": 3},
        ),
        {"messages": question(SPEECH, text="Translate the speech into Chinese.")},  # its characters span tokens
    ],
)
def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI, change: dict[str, Any]) -> None:
    options = {"model": "listen-tiny", "messages": question(SPEECH), **change}
    choice = client.chat.completions.create(**options).choices[0]
    parts = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)]
    assert "".join(part.delta.content or "" for part in parts) == choice.message.content
    assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
    entries = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
    assert entries == (choice.logprobs.content if choice.logprobs else [])
    assert bool(entries) == ("logprobs" in change)


def test_a_device_that_is_not_there_is_named_before_anything_loads() -> None:
    with pytest.raises(ValueError, match="--device=cuda:99 cannot be used: "):
        load_engine(argparse.Namespace(device="cuda:99"))


def test_the_clips_of_a_request_share_a_limit_of_length(listen: ListenPipeline) -> None:
    options = Options(clip=ClipLimits(seconds=2.0))
    with served(TransformersEngine(listen, str(FOLDER)), options) as address:
        clip = wav_of_silence(16000)
        assert post(address, json={"messages": question(clip, clip), "max_tokens": 1}).status_code == 200
        error = error_of(post(address, json={"messages": question(clip) + question(clip, clip)}), 400)
    assert error["param"] == "messages.1.content.1.input_audio.data" and "more than 2 s of audio" in error["message"]


def test_an_error_within_a_stream_is_its_last_event(listen: ListenPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    step = in_process._Rows.__call__

    def failing_step(rows: Any, *arguments: Any, **kwargs: Any) -> torch.Tensor:
        if rows.batch[0].answer.ids:
            raise RuntimeError("secret detail")
        return step(rows, *arguments, **kwargs)

    monkeypatch.setattr(in_process._Rows, "__call__", failing_step)
    with served(TransformersEngine(listen, str(FOLDER))) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        received = []
        with pytest.raises(openai.APIError, match="the engine failed on this request") as caught:
            for chunk in client.chat.completions.create(model="listen-tiny", messages=question(SPEECH), stream=True):
                received.append(chunk.choices[0].delta.content)
        assert received == ["", "the"] and "secret" not in str(caught.value)
        monkeypatch.setattr(in_process._Rows, "__call__", step)
        answer = client.chat.completions.create(model="listen-tiny", messages=question(SPEECH))
    assert answer.choices[0].message.content == ANSWER


def test_an_upload_gives_each_field_once(address: str) -> None:
    files = [("file", SPEECH.read_bytes()), ("file", OTHER.read_bytes())]
    assert error_of(post(address, "audio/transcriptions", files=files), 400)["param"] == "file"


def test_large_bodies_are_refused_with_and_without_a_length(address: str) -> None:
    upload = {"file": bytes(30 * 10**6)}
    assert error_of(post(address, "audio/transcriptions", files=upload), 413)["code"] == "request_too_large"

    def blocks() -> Iterator[bytes]:
        yield from [b" " * 10**6] * 30

    assert error_of(post(address, content=blocks()), 413)["code"] == "request_too_large"


def test_an_answer_over_the_deadline_a_full_queue_and_a_key(listen: ListenPipeline) -> None:
    options = Options(api_key="secret", clip=ClipLimits(seconds=1.0), timeout=1.0)
    engine = TransformersEngine(listen, str(FOLDER), max_batch=1, max_waiting=1)
    held = threading.Event()
    engine._thread.submit(held.wait)  # the model's thread is busy until then
    with served(engine, options) as address:
        body, headers = (
            {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
            {"Authorization": "Bearer secret"},
        )
        try:
            assert error_of(post(address, json=body), 401)["code"] == "invalid_api_key"
            assert httpx.get(f"{address}/health", trust_env=False).json() == {"status": "ok"}
            assert error_of(post(address, json={"messages": question(SPEECH)}, headers=headers), 400)["param"] == (
                "messages.0.content.0.input_audio.data"
            )
            assert error_of(post(address, json=body, headers=headers), 504)["code"] == "timeout"
            statuses: list[int] = []
            threads = [
                threading.Thread(target=lambda: statuses.append(post(address, json=body, headers=headers).status_code))
                for _ in range(3)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert 429 in statuses and set(statuses) <= {429, 504}
        finally:
            held.set()
        wait_until(lambda: post(address, json=body, headers=headers).status_code == 200)


def test_metrics_count_requests_and_tokens(address: str, client: openai.OpenAI) -> None:
    def value(pattern: str) -> float:
        text = httpx.get(f"{address}/metrics", trust_env=False).text
        found = re.search(rf"^{pattern} ([\d.e+]+)$", text, flags=re.MULTILINE)
        return float(found[1]) if found else 0.0

    requests = r'listen_requests_total\{path="/v1/chat/completions",status="200"\}'
    tokens = r'listen_tokens_total\{kind="completion",model="listen-tiny"\}'
    before = value(requests), value(tokens)
    client.chat.completions.create(model="listen-tiny", messages=question(SPEECH), max_tokens=3)
    assert (value(requests), value(tokens)) == (before[0] + 1, before[1] + 3)
    assert value("listen_requests_under_way") == 1  # this request itself
    assert value("listen_first_token_seconds_count") == value("listen_answer_seconds_count") > 0


def test_metrics_show_the_queue_and_the_sizes_of_batches(listen: ListenPipeline) -> None:
    engine, held = TransformersEngine(listen, str(FOLDER)), threading.Event()
    engine._thread.submit(held.wait)
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    with served(engine) as address, ThreadPoolExecutor(4) as clients:
        answers = [clients.submit(post, address, json=body)]
        wait_until(lambda: engine._dispatcher is not None and not engine.waiting)  # the first batch has been taken
        answers += [clients.submit(post, address, json=body) for _ in range(3)]
        wait_until(lambda: engine.waiting == 3)
        assert "listen_requests_waiting 3.0" in httpx.get(f"{address}/metrics", trust_env=False).text
        held.set()
        assert [answer.result().status_code for answer in answers] == [200] * 4
        text = httpx.get(f"{address}/metrics", trust_env=False).text
    assert "listen_requests_waiting 0.0" in text
    found = re.findall(r'^listen_batch_size_bucket\{le="(\d+).0"\} (\d+).0$', text, flags=re.MULTILINE)
    assert found[:3] == [("1", "1"), ("2", "1"), ("4", "2")]  # one alone, then three


def test_an_idle_engine_waits_for_requests_that_are_being_read(
    listen: ListenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share its first batch, but a client that sends slowly holds nobody up."""
    engine, sizes = TransformersEngine(listen, str(FOLDER)), []
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    rest = json.dumps(body).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with served(engine) as address, ThreadPoolExecutor(1) as clients:
        engine.on_batch = sizes.append
        with socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1]))) as slow:
            slow.sendall(head + b"Content-Length: %d\r\n\r\n" % len(rest) + rest[:5])
            wait_until(lambda: engine.under_way == 1)
            assert post(address, json=body).status_code == 200
            assert sizes == [1]
            monkeypatch.setattr(in_process, "GATHER_SECONDS", 30.0)
            answer = clients.submit(post, address, json=body)
            wait_until(lambda: engine.waiting == 1)
            slow.sendall(rest[5:])
            assert answer.result().status_code == 200
        assert sizes == [1, 2]
        wait_until(lambda: engine.under_way == 0)


def test_stopping_answers_what_is_under_way(listen: ListenPipeline) -> None:
    engine, held = TransformersEngine(listen, str(FOLDER)), threading.Event()
    engine._thread.submit(held.wait)
    with ThreadPoolExecutor(1) as clients:
        with served(engine) as address:
            answer = clients.submit(post, address, json={"messages": question(SPEECH)})
            wait_until(lambda: engine._dispatcher is not None)  # the request has arrived
            threading.Timer(0.5, held.set).start()  # it is answered after the server has begun to stop
        assert answer.result().json()["choices"][0]["message"]["content"] == ANSWER


# ---------------------------------------------------------------------- parts


@pytest.mark.parametrize("stop", ["", "c d", "é", "zz"])
def test_growing_text_is_the_whole_text_up_to_the_stop(stop: str) -> None:
    text = "  ab c é ü d c d ef\n"
    data = list(text.encode())
    answer = GrowingAnswer(
        lambda ids: bytes(ids).decode(errors="replace"), Sampling(99, stop=(stop,) if stop else ()), {10}, 5
    )
    pieces = []
    for token in data:
        pieces.append(answer.push(token))
        if pieces[-1].finish_reason:
            break
    expected = text.split(stop)[0] if stop else text
    assert "".join(piece.text for piece in pieces) == expected.strip()
    assert pieces[-1].finish_reason == "stop" and pieces[-1].prompt_tokens == 5


def test_names_of_models_are_distinct() -> None:
    assert model_names("me/mine", "org/llm", ["a"]) == {"mine": "default", "llm": None, "a": "a"}
    with pytest.raises(ValueError, match="'llm' is taken"):
        model_names("me/mine", "org/llm", ["llm"])


def test_redirects_are_not_followed_and_size_counts(listen: ListenPipeline) -> None:
    engine = TransformersEngine(listen, str(FOLDER))
    limits = ClipLimits(bytes=10, private_addresses=True)
    with served(engine) as address:
        with pytest.raises(ValueError, match="more than 10 bytes"):
            asyncio.run(fetch(f"{address}/metrics", limits))
        with pytest.raises(ValueError, match="404"):
            asyncio.run(fetch(f"{address}/none", limits))
        assert json.loads(asyncio.run(fetch(f"{address}/health", limits._replace(bytes=99)))) == {"status": "ok"}
