"""`transformers serve`, as it is, answers for LiSTEN models; over HTTP to a process of its own."""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Iterator

import openai
import pytest
import soundfile
from fixtures_repository import ROOT
from fixtures_servers import free_port, running
from transformers import AutoModelForMultimodalLM, AutoProcessor, pipeline

from listen import ListenForConditionalGeneration, ListenPipeline, ListenProcessor

TINY = str(ROOT / "model_cards" / "listen-tiny")
CLIP = ROOT / "model_cards" / "listen-tiny" / "samples" / "speech.wav"
QUESTION = {"type": "text", "text": "What is being said?"}


@pytest.fixture(scope="module")
def listen() -> ListenPipeline:
    model = AutoModelForMultimodalLM.from_pretrained(TINY)
    return ListenPipeline(model=model, processor=AutoProcessor.from_pretrained(TINY))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    port = free_port()
    command = [sys.executable, "-m", "listen", "transformers", "serve", "--host", "127.0.0.1", "--device", "cpu"]
    with running([*command, "--port", str(port)], port, tmp_path_factory.mktemp("serve") / "log") as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


def chat() -> list[dict]:
    data = base64.b64encode(CLIP.read_bytes()).decode()
    audio = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    return [{"role": "user", "content": [audio, QUESTION]}]


def test_chat_with_audio_is_answered_as_by_the_pipeline(client: openai.OpenAI, listen: ListenPipeline) -> None:
    answer = client.chat.completions.create(model=TINY, messages=chat(), temperature=0)
    assert answer.choices[0].message.content == listen(str(CLIP), QUESTION["text"])[0]["generated_text"] != ""


def test_streamed_pieces_are_the_whole_answer(client: openai.OpenAI, listen: ListenPipeline) -> None:
    stream = client.chat.completions.create(model=TINY, messages=chat(), temperature=0, stream=True)
    pieces = [choice.delta.content or "" for chunk in stream for choice in chunk.choices]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == listen(str(CLIP), QUESTION["text"])[0]["generated_text"]


def test_stop_strings_end_the_answer(client: openai.OpenAI, listen: ListenPipeline) -> None:
    whole = listen(str(CLIP), QUESTION["text"])[0]["generated_text"]
    word = whole.split()[1]
    answer = client.chat.completions.create(model=TINY, messages=chat(), temperature=0, stop=word)
    assert answer.choices[0].message.content == whole[: whole.index(word) + len(word)]


def test_transcriptions_hold_the_answer_alone(client: openai.OpenAI, listen: ListenPipeline) -> None:
    expected = listen(str(CLIP), task="asr")[0]["generated_text"]
    with CLIP.open("rb") as file:
        assert client.audio.transcriptions.create(model=TINY, file=file).text.strip() == expected != ""


def test_a_streamed_transcription_is_the_same_text(client: openai.OpenAI, listen: ListenPipeline) -> None:
    url = f"{client.base_url}audio/transcriptions"
    response = client._client.post(url, data={"model": TINY, "stream": "true"}, files={"file": CLIP.read_bytes()})
    text = "".join(line.removeprefix("data: ") for line in response.text.split("\n\n"))
    assert text.strip() == listen(str(CLIP), task="asr")[0]["generated_text"]


def test_text_without_audio_is_answered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=TINY, messages=[{"role": "user", "content": "Hello"}], max_tokens=3)
    assert answer.usage.completion_tokens <= 3


def test_the_any_to_any_pipeline_answers_as_ours(listen: ListenPipeline, caplog: pytest.LogCaptureFixture) -> None:
    any_to_any = pipeline("any-to-any", model=listen.model, processor=listen.processor)
    messages = [{"role": "user", "content": [{"type": "audio", "path": str(CLIP)}, QUESTION]}]
    (found,) = any_to_any(text=messages, return_full_text=False)
    assert found["generated_text"].strip() == listen(str(CLIP), QUESTION["text"])[0]["generated_text"]
    assert "not supported" not in caplog.text


def test_a_waveform_alone_is_transcribed(listen: ListenPipeline) -> None:
    waveform, rate = soundfile.read(io.BytesIO(CLIP.read_bytes()), dtype="float32")
    processor, model = listen.processor, listen.model
    assert isinstance(processor, ListenProcessor) and isinstance(model, ListenForConditionalGeneration)
    inputs = processor(waveform, sampling_rate=rate)
    (found,) = processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)
    assert found.strip() == listen(str(CLIP), task="asr")[0]["generated_text"]
    output = model.generate(**inputs, return_dict_in_generate=True, max_new_tokens=3)
    assert output.sequences.shape == (1, 3)
