"""`pipeline("audio-llm")`: every way to ask, one by one or batched, gives the same answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import tiny_config, tiny_model
from fixtures_tokenizers import LLAMA_3_TEMPLATE, build_tokenizer
from transformers import TextIteratorStreamer, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from listen import ListenPipeline, ListenProcessor

RATE = 16000
QUESTION = "What is being said?"
NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def wave(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * RATE))).astype(np.float32)


def build_pipeline(**overrides: object) -> ListenPipeline:
    config = tiny_config(audio_token_id=None, prompt_token_id=None, **overrides)
    processor = ListenProcessor.from_backbones(config, build_tokenizer(template=LLAMA_3_TEMPLATE))
    model = tiny_model(audio_token_id=config.audio_token_id, prompt_token_id=config.prompt_token_id, **overrides)
    return pipeline("audio-llm", model=model, processor=processor, device="cpu")


@pytest.fixture(scope="module")
def listen() -> ListenPipeline:
    return build_pipeline()


@pytest.fixture(scope="module")
def wav_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("clips")
    paths = [str(folder / f"{seed}.wav") for seed in range(3)]
    for seed, path in enumerate(paths):
        soundfile.write(path, wave(0.5 + 0.6 * seed, seed), RATE, subtype="FLOAT")
    return paths


def by_hand(listen: ListenPipeline, text: str, clips: list[np.ndarray], **kwargs: object) -> str:
    """The answer without the pipeline."""
    content = [
        *({"type": "audio", "array": clip, "sampling_rate": RATE} for clip in clips),
        {"type": "text", "text": text},
    ]
    messages = [{"role": "user", "content": content}]
    inputs = listen.processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, **kwargs)
    ids = listen.model.generate(**inputs, **NEW)[:, inputs.input_ids.shape[1] :]
    return listen.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


def answer(result: list[dict]) -> str:
    assert [set(one) for one in result] == [{"generated_text"}]
    return result[0]["generated_text"]


def test_every_way_to_ask_about_a_clip_gives_the_answer_by_hand(listen: ListenPipeline, wav_files: list[str]) -> None:
    clip, path = wave(0.5, 0), wav_files[0]
    expected = by_hand(listen, QUESTION, [clip])
    content = [{"type": "audio", "path": path}, {"type": "text", "text": QUESTION}]
    answers = [
        listen(path, QUESTION, **NEW),
        listen(path, text=QUESTION, generate_kwargs=NEW),
        listen(path, task="asr", **NEW),
        listen(Path(path).read_bytes(), QUESTION, **NEW),
        listen(clip, QUESTION, sampling_rate=RATE, **NEW),
        listen(torch.tensor(clip), QUESTION, sampling_rate=RATE, **NEW),
        listen(clip.tolist(), QUESTION, sampling_rate=RATE, **NEW),
        listen({"array": clip, "sampling_rate": RATE}, QUESTION, **NEW),
        listen({"audio": clip, "sampling_rate": RATE, "text": QUESTION}, **NEW),
        listen({"audio": [path], "text": QUESTION}, **NEW),
        listen({"audio": {"array": clip, "sampling_rate": RATE}, "task": "asr"}, **NEW),
        listen({"audio": path, "text": f"<|audio|>{QUESTION}"}, **NEW),
        listen({"audio": path, "path": "gone.wav", "text": QUESTION}, **NEW),  # columns of many data sets
        listen({"path": path, "text": QUESTION}, **NEW),
        listen({"array": clip, "sampling_rate": RATE, "task": "asr"}, **NEW),
        listen([{"role": "user", "content": content}], **NEW),
    ]
    assert {answer(result) for result in answers} == {expected}
    assert by_hand(listen, QUESTION, [wave(1.5, 9)]) != expected  # a model that hears


def test_a_task_says_where_its_clip_stands(listen: ListenPipeline, wav_files: list[str]) -> None:
    repeat = listen.preprocess(wav_files[0], task="repeat")["text"]
    assert "Repeat after me in English: <|audio|><|eot|>" in repeat
    assert "<|end|>\n\n<|audio|><|eot|>" in listen.preprocess(wav_files[0], task="response")["text"]
    assert f"<|audio|>{QUESTION}" in listen.preprocess(wav_files[0], task="asr")["text"]


def test_several_clips_and_their_order_matter(listen: ListenPipeline, wav_files: list[str]) -> None:
    clips = [wave(0.5, 0), wave(1.1, 1)]
    result = listen({"audio": wav_files[:2], "text": QUESTION}, **NEW)
    assert answer(result) == by_hand(listen, QUESTION, clips)
    inputs = listen.collate([listen.preprocess({"audio": list(reversed(wav_files[:2])), "text": QUESTION})])
    with torch.no_grad():
        reversed_logits = listen.model(**inputs).logits[0, -1]
        logits = listen.model(**listen.collate([listen.preprocess({"audio": wav_files[:2], "text": QUESTION})])).logits
    assert (logits[0, -1] - reversed_logits).abs().max() > 1e-4


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_of_mixed_inputs_equal_single_ones(
    listen: ListenPipeline, wav_files: list[str], batch_size: int
) -> None:
    samples = [
        {"audio": wav_files[0], "text": QUESTION},
        {"audio": [wave(0.9, 3), wave(0.4, 4)], "sampling_rate": RATE, "text": "Which?"},
        {"audio": wav_files[2], "task": "acap"},
        {"audio": wave(2.0, 5), "sampling_rate": RATE, "text": "Who?"},
        {"audio": wav_files[1], "task": "sqa", "text": "Who jumps over the dog?"},
    ]
    singles = [listen(sample, **NEW) for sample in samples]
    assert listen(samples, batch_size=batch_size, **NEW) == singles
    assert listen(tuple(samples), batch_size=batch_size, **NEW) == singles
    assert list(listen((sample for sample in samples), batch_size=batch_size, **NEW)) == singles


def test_chats_are_batched_with_and_without_audio(listen: ListenPipeline, wav_files: list[str]) -> None:
    chats = [
        [{"role": "user", "content": [{"type": "audio", "path": wav_files[0]}, {"type": "text", "text": QUESTION}]}],
        [{"role": "user", "content": "the quick brown fox"}],
        [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "the fox"}],  # is continued
    ]
    row = {"audio": wav_files[1], "text": QUESTION}
    for mixed in (chats, [*chats, row], [row, *chats]):
        assert listen(mixed, batch_size=3, **NEW) == [listen(item, **NEW) for item in mixed]
    continued = listen.preprocess(listen_chat(chats[2]))["text"]
    assert continued.endswith("the fox")


def listen_chat(messages: list[dict]) -> object:
    from transformers.utils.chat_template_utils import Chat

    return Chat(messages)


def test_datasets_are_streamed_row_by_row(listen: ListenPipeline, wav_files: list[str]) -> None:
    expected = listen([{"audio": path, "text": QUESTION} for path in wav_files], **NEW)
    rows = datasets.Dataset.from_dict({"audio": wav_files, "text": [QUESTION] * 3, "speaker": ["a", "b", "c"]})
    files = rows.cast_column("audio", datasets.Audio(decode=False))
    for data in (rows, files, rows.to_iterable_dataset()):
        result = listen(data, batch_size=2, **NEW)
        assert isinstance(result, Iterator)
        assert list(result) == expected
    assert list(listen(KeyDataset(rows, "audio"), text=QUESTION, batch_size=2, **NEW)) == expected
    assert list(listen(KeyDataset(rows, "audio"), text=QUESTION, num_workers=1, **NEW)) == expected


def test_paths_in_a_list_are_separate_questions(listen: ListenPipeline, wav_files: list[str]) -> None:
    assert listen(wav_files, QUESTION, **NEW) == [listen(path, QUESTION, **NEW) for path in wav_files]
    assert listen([], QUESTION) == []


def test_an_answer_is_streamed_as_it_is_made(listen: ListenPipeline, wav_files: list[str]) -> None:
    streamer = TextIteratorStreamer(listen.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    result = listen(wav_files[0], QUESTION, streamer=streamer, **NEW)
    assert "".join(streamer).strip() == answer(result)


# ------------------------------------------------------------------ prompts


@pytest.mark.parametrize("strategy", ["similarity", "attention", "residual", "fixed", "random", "task"])
def test_prompts_are_told_and_are_those_of_the_forward_pass(strategy: str, wav_files: list[str]) -> None:
    pool = {
        "pool_size": 12,
        "num_prompts": 4,
        "strategy": strategy,
        "tasks": ["asr", "sqa"] if strategy == "task" else None,
    }
    listen = build_pipeline(prompt_pool_config=pool)
    torch.manual_seed(0)
    (result,) = listen(wav_files[0], task="asr", num_prompts=3, return_prompts=True, **NEW)
    inputs = listen.collate([listen.preprocess(wav_files[0], task="asr", num_prompts=3)])
    torch.manual_seed(0)
    with torch.no_grad():
        output = listen.model(**inputs)
    assert [one["index"] for one in result["prompts"]] == output.prompt_indices[0].tolist()
    np.testing.assert_allclose([one["score"] for one in result["prompts"]], output.prompt_scores[0], atol=1e-5)
    torch.manual_seed(0)
    assert listen(wav_files[0], task="asr", num_prompts=3, **NEW)[0]["generated_text"] == result["generated_text"]


def test_prompts_of_each_row_of_a_batch(listen: ListenPipeline, wav_files: list[str]) -> None:
    singles = [listen(path, QUESTION, return_prompts=True, **NEW) for path in wav_files]
    batch = listen(wav_files, QUESTION, return_prompts=True, batch_size=3, **NEW)
    for single, row in zip(singles, batch, strict=True):
        assert single[0]["generated_text"] == row[0]["generated_text"]
        assert [one["index"] for one in single[0]["prompts"]] == [one["index"] for one in row[0]["prompts"]]
    assert len(singles[0][0]["prompts"]) == listen.processor.num_prompts
    assert listen(wav_files[0], QUESTION, num_prompts=0, return_prompts=True, **NEW)[0]["prompts"] == []


def test_encoders_run_once_when_prompts_are_told(
    listen: ListenPipeline, wav_files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    encode = listen.model.encode_audio
    monkeypatch.setattr(listen.model, "encode_audio", lambda **inputs: calls.append(1) or encode(**inputs))
    listen(wav_files[0], QUESTION, return_prompts=True, num_beams=2, num_return_sequences=2, **NEW)
    assert len(calls) == 1


def test_several_sequences_of_one_input(listen: ListenPipeline, wav_files: list[str]) -> None:
    result = listen(wav_files, QUESTION, num_beams=3, num_return_sequences=2, batch_size=2, return_prompts=True, **NEW)
    assert [len(row) for row in result] == [2, 2, 2]
    single = listen(wav_files[2], QUESTION, num_beams=3, num_return_sequences=2, **NEW)
    assert [one["generated_text"] for one in result[2]] == [one["generated_text"] for one in single]
    assert result[0][0]["prompts"] == result[0][1]["prompts"]


# ------------------------------------------------------------------ defaults, errors


def test_arguments_of_the_pipeline_are_defaults_of_its_calls(listen: ListenPipeline, wav_files: list[str]) -> None:
    defaults = ListenPipeline(
        model=listen.model, processor=listen.processor, device="cpu", text=QUESTION, num_prompts=2, **NEW
    )
    assert defaults(wav_files[0]) == listen(wav_files[0], QUESTION, num_prompts=2, **NEW)
    assert defaults(wav_files[0], num_prompts=0) == listen(wav_files[0], QUESTION, num_prompts=0, **NEW)


@pytest.mark.parametrize(
    "inputs, kwargs, error, message",
    [
        (wave(1), {"text": "a"}, ValueError, "without sampling_rate"),
        (wave(1), {"sampling_rate": RATE}, ValueError, "no instruction for the audio; give text="),
        ("gone.wav", {"text": "a"}, FileNotFoundError, "gone.wav"),
        ({"text": "a"}, {}, ValueError, r"keys \['text'\] has no 'audio'"),
        ({"audio": [], "text": "a"}, {}, ValueError, "holds no clip"),
        ([wave(1), wave(1)], {"text": ["a", "b"], "sampling_rate": RATE}, ValueError, r"text=\['a', 'b'\] must be a"),
        (wave(1), {"task": ["asr"]}, ValueError, r"task \['asr'\] is unknown"),
        (wave(1), {"task": "asr", "num_beams": 0}, ValueError, "num_beams=0 must be a whole number above 0"),
        (wave(1), {"task": "asr", "max_new_tokens": "9"}, ValueError, "max_new_tokens='9' must be a whole number"),
        (wave(1), {"task": "asr", "batch_size": 0}, ValueError, "batch_size=0 must be a whole number above 0"),
        (wave(1), {"task": "asr", "number_clips": 3}, ValueError, "number_clips=3 must be True or False"),
        (wave(1), {"task": "asr", "skip_special_tokens": 3}, ValueError, "skip_special_tokens=3 must be True or False"),
        (wave(1), {"task": "asr", "generate_kwargs": 3}, TypeError, "generate_kwargs=3 must be a dict"),
        (
            wave(1),
            {"task": "asr", "sampling_rate": [8000, 16000]},
            ValueError,
            r"sampling_rate=\[8000, 16000\] must be one",
        ),
        ({"audios": wave(1), "text": "a"}, {}, ValueError, "'audios'; did you mean 'audio'"),
        ({"audio": wave(1), "txt": "a"}, {}, ValueError, "'txt'; did you mean 'text'"),
        ({"audio": wave(1), "text": "a"}, {"text": "b"}, ValueError, "text was given twice"),
        ({"path": "a.wav", "text": "a"}, {"text": "b"}, ValueError, "text was given twice"),
        (wave(1), {"task": "asr", "text": "a"}, ValueError, "has its own wording"),
        (wave(1), {"task": "sqa"}, ValueError, "needs a question"),
        (wave(1), {"task": "asrr"}, ValueError, "did you mean 'asr'"),
        ([{"role": "user", "content": "a"}], {"text": "b"}, ValueError, "bring their own text"),
        ([{"role": "user", "content": "a"}], {"task": "asr"}, ValueError, "write the wording of task='asr' into them"),
        (wave(1), {"text": "a", "sampling_rate": RATE, "num_prompts": 13}, ValueError, "num_prompts=13"),
        (wave(1), {"text": "a", "num_prompt": 1}, TypeError, "'num_prompt' is unknown; did you mean 'num_prompts'"),
        (wave(1), {"text": "a", "num_prompt": 0}, TypeError, "'num_prompt' is unknown; did you mean 'num_prompts'"),
        (wave(1), {"text": "a", "skip_special_token": False}, TypeError, "did you mean 'skip_special_tokens'"),
        (wave(1), {"text": "a", "raw": wave(1)}, TypeError, "'raw' is unknown"),
        (wave(1), {"text": "a", "max_new_token": 1}, TypeError, "did you mean 'max_new_tokens'"),
        (wave(1), {"text": "a", "quite_unknown": 1}, TypeError, "'quite_unknown' is unknown; known: text, task"),
        (
            wave(1),
            {"text": "a", "max_new_tokens": 1, "generate_kwargs": {"max_new_tokens": 2}},
            ValueError,
            "given twice",
        ),
        ({"audio": [wave(1)] * 2, "text": "<|audio|>", "sampling_rate": RATE}, {}, ValueError, "but .* clips"),
    ],
)
def test_wrong_input_raises(listen: ListenPipeline, inputs: object, kwargs: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        listen(inputs, **kwargs)


def test_a_pipeline_without_processor_is_not_built(listen: ListenPipeline) -> None:
    with pytest.raises(ValueError, match="needs the model's processor"):
        ListenPipeline(model=listen.model, device="cpu")


# ------------------------------------------------------------------ saving


def test_it_is_saved_with_its_processor_and_loaded(
    listen: ListenPipeline, wav_files: list[str], tmp_path: Path
) -> None:
    listen.save_pretrained(tmp_path / "one")
    expected = listen(wav_files, QUESTION, **NEW)
    loaded = pipeline("audio-llm", model=str(tmp_path / "one"), trust_remote_code=True, device="cpu")
    assert loaded(wav_files, QUESTION, **NEW) == expected
    loaded.save_pretrained(tmp_path / "two")  # what was loaded can be saved again
    again = pipeline(model=str(tmp_path / "two"), trust_remote_code=True, device="cpu")
    assert again(wav_files, QUESTION, **NEW) == expected
    names = [{path.name for path in (tmp_path / folder).iterdir()} for folder in ("one", "two")]
    assert names[0] == names[1]
    assert {"pipeline_listen.py", "processing_listen.py", "processor_config.json", "chat_template.jinja"} <= names[0]


def test_a_streamed_answer_grows_to_the_answer_of_a_call(listen: ListenPipeline, wav_files: list[str]) -> None:
    for question in ({"audio": wav_files[0], "text": QUESTION}, [{"role": "user", "content": QUESTION}]):
        options = {**NEW, "return_prompts": True}
        *growing, last = listen.stream(question, **options)
        assert [last] == listen(question, **options)
        assert growing and all(last["generated_text"].startswith(part["generated_text"]) for part in growing)


def test_a_stream_has_the_defaults_of_its_pipeline(listen: ListenPipeline, wav_files: list[str]) -> None:
    parts = {"model": listen.model, "processor": listen.processor, "device": "cpu"}
    whole = ListenPipeline(**parts, skip_special_tokens=False, forced_eos_token_id=2)
    *growing, last = whole.stream(wav_files[0], QUESTION, max_new_tokens=3, do_sample=False)
    assert growing[-1] == last and last["generated_text"].endswith(listen.processor.tokenizer.eos_token)


def test_errors_of_streaming_are_those_of_a_call(listen: ListenPipeline, wav_files: list[str]) -> None:
    with pytest.raises(FileNotFoundError, match="no audio file at 'none.wav'"):
        next(listen.stream("none.wav", QUESTION))
    with pytest.raises(ValueError, match="one input, got a list of 3"):
        next(listen.stream(wav_files, QUESTION))


def test_generation_ends_when_a_stream_is_closed(listen: ListenPipeline, wav_files: list[str]) -> None:
    steps = 0

    def count(*_: object, **__: object) -> bool:
        nonlocal steps
        steps += 1
        return False

    options = {"max_new_tokens": 200, "min_new_tokens": 200, "stopping_criteria": [count]}
    stream = listen.stream(wav_files[0], QUESTION, **options)
    next(stream)
    stream.close()
    for thread in threading.enumerate():
        if thread.name == "listen-stream":
            thread.join()
    assert 0 < steps < 200
