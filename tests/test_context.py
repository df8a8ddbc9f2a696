"""Long audio and many clips: what fits, what is cut, what is refused, and where each clip lands."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import clip, make_inputs, tiny_config, tiny_model
from fixtures_tokenizers import build_tokenizer
from transformers import AutoConfig

from listen import ListenForConditionalGeneration, ListenPipeline, ListenProcessor
from listen.feature_extraction_listen import ListenFeatureExtractor
from listen.language_models_listen import check_context, context_limit

RATE = 16000
CONTEXT = 512


def wave(seconds: float, seed: int = 0) -> np.ndarray:
    return clip(seconds, seed).numpy()


def text_config(model_type: str, **fields: object) -> AutoConfig:
    return AutoConfig.for_model(model_type, **fields)


@pytest.fixture(scope="module")
def processor() -> ListenProcessor:
    return ListenProcessor.from_backbones(tiny_config(audio_token_id=None, prompt_token_id=None), build_tokenizer())


@pytest.fixture(scope="module")
def fitting(processor: ListenProcessor) -> ListenForConditionalGeneration:
    """A model for the ids of that processor."""
    text = {**tiny_config().text_config.to_dict(), "vocab_size": len(processor.tokenizer)}
    ids = {"audio_token_id": processor.audio_token_id, "prompt_token_id": processor.prompt_token_id}
    return tiny_model(text_config=text, **ids)


# ------------------------------------------------------------------ encoders in pieces


@pytest.mark.parametrize("pad_to_30s", [False, True])
def test_encoding_in_pieces_equals_encoding_at_once(pad_to_30s: bool) -> None:
    model = tiny_model(pad_to_30s=pad_to_30s)
    extractor = ListenFeatureExtractor(pad_to_30s=pad_to_30s, chunk_seconds=30.0 if pad_to_30s else 1.0)
    features = extractor([wave(4.3), wave(0.4, 1)], sampling_rate=RATE)
    at_once = model.encode_audio(**features)
    batches = []
    model.speech_encoder.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    model.audio_encoder.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    model.config.chunks_at_once = 1 if pad_to_30s else 4
    in_pieces = model.encode_audio(**features)
    assert batches == ([1, 1] if pad_to_30s else [4, 2]) * 2
    for name, states in at_once.items():
        mask = at_once["speech_hidden_states_mask" if "speech" in name else "audio_hidden_states_mask"].bool()
        torch.testing.assert_close(in_pieces[name][mask], states[mask], rtol=0, atol=1e-5)


def test_an_encoder_that_learns_takes_all_chunks_together() -> None:
    model = tiny_model(trainable=["adapter", "speech_encoder"], chunks_at_once=1)
    features = ListenFeatureExtractor(chunk_seconds=1.0)(wave(2.5), sampling_rate=RATE)
    batches = []
    model.speech_encoder.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    states = model.encode_audio(**features).speech_hidden_states
    assert states.requires_grad and batches == [3]
    with torch.no_grad():  # nothing learns here, so its memory is bounded again
        model.encode_audio(**features)
    assert batches == [3, 1, 1, 1]


def test_chunks_at_once_must_hold_a_chunk() -> None:
    with pytest.raises(ValueError, match="chunks_at_once=0"):
        tiny_config(chunks_at_once=0)


def test_long_audio_is_heard_chunk_by_chunk(
    processor: ListenProcessor, fitting: ListenForConditionalGeneration
) -> None:
    """More than a chunk gives the embeddings of its chunks, one after the other."""
    recording = wave(33.0)
    heard = fitting.get_audio_features(**processor(None, recording, sampling_rate=RATE))
    pieces = [processor(None, part, sampling_rate=RATE) for part in (recording[: 30 * RATE], recording[30 * RATE :])]
    alone = torch.cat([fitting.get_audio_features(**piece).pooler_output for piece in pieces])
    assert len(heard.lengths) == 2 and int(heard.lengths.sum()) == processor.num_audio_embeddings(len(recording))
    torch.testing.assert_close(heard.pooler_output, alone, rtol=0, atol=2e-5)


# ------------------------------------------------------------------ the context of the LLM


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (text_config("llama", max_position_embeddings=8192), 8192),
        (text_config("gpt2", n_positions=1024), 1024),
        (text_config("mistral", max_position_embeddings=32768, sliding_window=4096), 32768),
        (text_config("mamba"), None),
        (text_config("bloom"), None),
        (text_config("falcon", alibi=True), None),
        (text_config("mpt", max_seq_len=2048), 2048),
        (
            text_config(
                "llama",
                max_position_embeddings=131072,
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 500000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            ),
            131072,
        ),
        (
            text_config(
                "qwen2",
                max_position_embeddings=32768,
                rope_parameters={
                    "rope_type": "yarn",
                    "rope_theta": 1e6,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            ),
            131072,
        ),
    ],
    ids=[
        "llama",
        "learned",
        "sliding window",
        "recurrent",
        "alibi",
        "alibi of falcon",
        "alibi of a table",
        "llama3 rope",
        "yarn",
    ],
)
def test_context_is_what_the_config_says(config: AutoConfig, limit: int | None) -> None:
    assert context_limit(config) == limit


def test_only_audio_and_prompts_are_refused() -> None:
    check_context(10, 10, num_prompts=4, num_audio=3)
    check_context(10, 11, num_prompts=0, num_audio=0)
    check_context(None, 10**6, num_prompts=4, num_audio=3)
    with pytest.raises(ValueError, match=r"11 positions \(4 prompts, 3 audio embeddings, 4 of text\).* context of 10"):
        check_context(10, 11, num_prompts=4, num_audio=3)


def test_processor_refuses_before_it_makes_features(
    processor: ListenProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert processor.context_length == CONTEXT
    monkeypatch.setattr(processor.feature_extractor, "extract", lambda waveforms: pytest.fail("features were made"))
    with pytest.raises(ValueError, match=f"context of {CONTEXT}; cut the clips with max_audio_seconds="):
        processor("<|audio|>hello", wave(200.0), sampling_rate=RATE)


def test_model_refuses_before_any_encoder_runs() -> None:
    model = tiny_model()
    inputs = make_inputs(model, [[clip(0.5)], [clip(1.0, 1)]], text=[[5], [7] * CONTEXT])
    longest = int(inputs["attention_mask"].sum(-1).max())
    model.speech_encoder.register_forward_pre_hook(lambda *_: pytest.fail("the encoder ran"))
    for run in (model, model.generate, lambda **given: model.generate(**given, num_beams=2, max_new_tokens=2)):
        with pytest.raises(ValueError, match=rf"{longest} positions \(3 prompts, 3 audio embeddings"):
            run(**inputs)


def test_long_text_alone_is_left_to_the_llm() -> None:
    ids = torch.full((1, CONTEXT + 1), 7)
    for fields in ({}, {"audio_token_id": None, "prompt_token_id": None}):
        model = tiny_model(**fields)
        assert torch.equal(model(ids).logits, model.language_model(ids).logits)


def test_padding_needs_no_context(shared_model: ListenForConditionalGeneration) -> None:
    inputs = make_inputs(shared_model, [[clip(0.5)]], text=[[7] * 20])
    wide = dict(inputs)
    for name, padding in (("input_ids", 0), ("attention_mask", 0)):
        wide[name] = torch.nn.functional.pad(inputs[name], (CONTEXT, 0), value=padding)
    with torch.no_grad():
        logits, expected = shared_model(**wide).logits[:, CONTEXT:], shared_model(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_an_answer_that_may_not_fit_is_warned_of(shared_model: ListenForConditionalGeneration) -> None:
    inputs = make_inputs(shared_model, [[clip(0.5)]])
    length = inputs["input_ids"].shape[1]
    with pytest.warns(UserWarning, match=f"context of {CONTEXT}: .* after {CONTEXT - length} new tokens"):
        shared_model.generate(**inputs, max_new_tokens=CONTEXT, max_time=0.0)


# ------------------------------------------------------------------ cutting on purpose


def test_clips_are_cut_with_a_warning(processor: ListenProcessor, caplog: pytest.LogCaptureFixture) -> None:
    clips = [wave(1.5), wave(0.5, 1)]
    expected = processor("<|audio|><|audio|>hi", [clips[0][:RATE], clips[1]], sampling_rate=RATE)
    assert not caplog.messages
    cut = processor("<|audio|><|audio|>hi", clips, sampling_rate=RATE, max_audio_seconds=1)
    assert caplog.messages == ["1 of 2 clips cut to max_audio_seconds=1: 1.5 s"]
    for name, value in expected.items():
        assert torch.equal(cut[name], value), name


def test_the_limit_travels_with_the_processor(processor: ListenProcessor, tmp_path: object) -> None:
    own = copy.copy(processor)
    own.max_audio_seconds = 1.0
    own.save_pretrained(tmp_path)
    loaded = ListenProcessor.from_pretrained(tmp_path)
    assert (loaded.max_audio_seconds, loaded.context_length) == (1.0, CONTEXT)
    short, long = processor(None, wave(1.0), RATE), wave(2.0)
    long[:RATE] = wave(1.0)
    assert torch.equal(loaded(None, long, RATE)["input_features"], short["input_features"])
    assert loaded(None, long, RATE, max_audio_seconds=float("inf"))["input_features"].shape[-1] == 200


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), True])
def test_a_limit_that_holds_nothing_is_refused(processor: ListenProcessor, seconds: float) -> None:
    with pytest.raises(ValueError, match="max_audio_seconds="):
        processor(None, wave(0.5), sampling_rate=RATE, max_audio_seconds=seconds)


# ------------------------------------------------------------------ many clips


def test_each_of_nine_clips_lands_in_its_own_place(
    processor: ListenProcessor, fitting: ListenForConditionalGeneration
) -> None:
    clips = [wave(0.3 + 0.35 * (i % 3), seed=i) for i in range(9)]
    content = [
        item
        for i in range(9)
        for item in (
            {"type": "text", "text": f"clip {i} "},
            {"type": "audio", "array": clips[i], "sampling_rate": RATE},
        )
    ]
    chat = [{"role": "user", "content": [*content, {"type": "text", "text": "what is the second"}]}]
    inputs = processor.apply_chat_template([chat, chat[:1]], tokenize=True, num_prompts=2)
    placed, _ = fitting.embed(inputs["input_ids"], inputs["attention_mask"], fitting._encoded(**_audio(inputs)))
    runs = _runs(inputs["input_ids"][0] == processor.audio_token_id)
    assert len(runs) == 9
    for (start, end), waveform in zip(runs, clips, strict=True):
        alone = fitting.get_audio_features(**processor(None, waveform, sampling_rate=RATE)).pooler_output
        for row in placed:
            torch.testing.assert_close(row[start:end], alone, rtol=0, atol=2e-5)


def test_swapping_two_of_nine_clips_moves_the_logits(
    processor: ListenProcessor, fitting: ListenForConditionalGeneration
) -> None:
    """In each row of a batch, and in no other row."""
    seconds = np.arange(int(0.4 * RATE)) / RATE
    clips = [np.sin(2 * np.pi * 300 * (i + 1) * seconds).astype(np.float32) for i in range(9)]
    swapped = [clips[i] for i in (0, 7, 2, 3, 4, 5, 6, 1, 8)]
    text = "<|audio|>" * 9 + "which is loud"
    with torch.no_grad():
        first, second, third = (
            fitting(**processor([text, text], rows, sampling_rate=RATE, num_prompts=0)).logits[:, -1]
            for rows in ([clips, clips], [clips, swapped], [swapped, clips])
        )
    assert (first[1] - second[1]).abs().max() > 1e-3 and (first[0] - third[0]).abs().max() > 1e-3
    torch.testing.assert_close(first[0], second[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(first[1], third[1], rtol=0, atol=2e-5)


def test_clips_are_numbered_through_a_conversation(processor: ListenProcessor) -> None:
    clips = [{"type": "audio", "array": wave(0.3, i), "sampling_rate": RATE} for i in range(3)]
    ask = {"type": "text", "text": "what is the second clip"}
    chat = [
        {"role": "user", "content": [*clips[:2], ask]},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": [clips[2], ask]},
    ]
    text = processor.apply_chat_template(chat, number_clips=True)
    assert "Clip 1: <|audio|>\nClip 2: <|audio|>\nwhat is" in text and "Clip 3: <|audio|>\nwhat is" in text
    assert "Clip" not in processor.apply_chat_template(chat)
    plain = processor.apply_chat_template(chat, tokenize=True)
    numbered = processor.apply_chat_template(chat, tokenize=True, number_clips=True)
    assert torch.equal(numbered["input_features"], plain["input_features"])
    assert numbered["input_ids"].shape[1] > plain["input_ids"].shape[1]


def test_pipeline_cuts_and_numbers(
    processor: ListenProcessor, fitting: ListenForConditionalGeneration, caplog: pytest.LogCaptureFixture
) -> None:
    listen = ListenPipeline(model=fitting, processor=processor)
    sample = {"audio": [wave(0.5), wave(1.5, 1)], "sampling_rate": RATE, "text": "which is loud"}
    seen = []
    fitting_generate, fitting.generate = (
        fitting.generate,
        lambda **given: seen.append(given) or fitting_generate(**given),
    )
    try:
        listen(sample, max_new_tokens=2, max_audio_seconds=1.0, number_clips=True)
    finally:
        del fitting.generate
    text = processor.batch_decode(seen[0]["input_ids"])[0]
    assert "lip 2: <|audio|>" in text and seen[0]["input_features"].shape[-1] == 100
    assert any("1 of 2 clips cut" in message for message in caplog.messages)


def _audio(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if name.startswith(("input_features", "input_values"))}


def _runs(mask: torch.Tensor) -> list[tuple[int, int]]:
    """First and last place, exclusive, of each run of true values."""
    edges = torch.diff(mask.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    return list(zip(edges.eq(1).nonzero()[:, 0].tolist(), edges.eq(-1).nonzero()[:, 0].tolist(), strict=True))
