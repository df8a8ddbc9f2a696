"""`generate` in all its modes, with clips of different number and length in one batch."""

from __future__ import annotations

import pytest
import torch
from conftest import AUDIO_ID, PROMPT_ID, VOCABULARY, clip, make_inputs, tiny_model
from transformers import GenerationConfig, TextIteratorStreamer
from transformers.utils import logging

from listen.modeling_listen import ListenForConditionalGeneration

ROWS = [[clip(1.3, 1), clip(0.6, 5)], [], [clip(0.9, 2)]]
NEW = 8


def text_of(row: int) -> list[list[int]]:
    return [[10 + row, 7, 8, 9]]


def answers(model: ListenForConditionalGeneration, inputs: dict, **kwargs: object) -> torch.Tensor:
    kwargs = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **kwargs}
    return model.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :]


MODES = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "repetition penalty": {"repetition_penalty": 1.7},
    "no repeated bigram": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[5], [6, 7]]},
}


@pytest.mark.parametrize("mode", MODES)
def test_batched_answers_equal_single_ones(shared_model: ListenForConditionalGeneration, mode: str) -> None:
    together = answers(shared_model, make_inputs(shared_model, ROWS), **MODES[mode])
    for i, row in enumerate(ROWS):
        alone = answers(shared_model, make_inputs(shared_model, [row], text=text_of(i)), **MODES[mode])
        assert together[i].tolist() == alone[0].tolist()


@pytest.mark.parametrize("mode", ["static cache", "no cache"])
def test_the_cache_changes_no_answer(shared_model: ListenForConditionalGeneration, mode: str) -> None:
    inputs = make_inputs(shared_model, ROWS)
    assert torch.equal(answers(shared_model, inputs), answers(shared_model, inputs, **MODES[mode]))


@pytest.mark.parametrize("hardware", [None, "avx512_bf16", "avx512_fp16"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_half_precision_in_software_is_said_once(
    dtype: str, hardware: str | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, hardware: True})
    logging.warning_once.cache_clear()
    model = tiny_model().to(getattr(torch, dtype))
    for _ in range(2):
        model.generate(**make_inputs(model, [[]]), max_new_tokens=1)
    name = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype)
    warned = name is not None and hardware != f"avx512_{name}"
    assert caplog.text.count(f"computes {name} in software") == warned and ("--dtype float32" in caplog.text) is warned


def test_several_return_sequences_keep_their_clips(shared_model: ListenForConditionalGeneration) -> None:
    """Beams of two samples with clips of different length: each group equals the sample alone."""
    settings = {"num_beams": 3, "num_return_sequences": 2}
    together = answers(shared_model, make_inputs(shared_model, ROWS), **settings)
    for i, row in enumerate(ROWS):
        alone = answers(shared_model, make_inputs(shared_model, [row], text=text_of(i)), **settings)
        assert torch.equal(together[2 * i : 2 * i + 2], alone)


def test_no_beam_at_all_is_refused(shared_model: ListenForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="num_beams=0 must be a whole number above 0"):
        answers(shared_model, make_inputs(shared_model, ROWS[:1]), num_beams=0)


def test_sampled_return_sequences_hear_the_right_clip(shared_model: ListenForConditionalGeneration) -> None:
    """With one candidate left to sample from, sampling is greedy: every copy must answer as its own row."""
    inputs = make_inputs(shared_model, ROWS)
    greedy = answers(shared_model, inputs)
    sampled = answers(shared_model, inputs, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(sampled, greedy.repeat_interleave(3, dim=0))


def test_encoders_run_once_whatever_the_beams(
    shared_model: ListenForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, seen = make_inputs(shared_model, ROWS), []
    original = shared_model.speech_encoder.forward
    monkeypatch.setattr(
        shared_model.speech_encoder, "forward", lambda x, *a, **k: seen.append(len(x)) or original(x, *a, **k)
    )
    answers(shared_model, inputs, num_beams=4)
    assert seen == [3]


def test_prompt_lookup_changes_no_answer(shared_model: ListenForConditionalGeneration) -> None:
    inputs = make_inputs(shared_model, ROWS[:1])
    assert torch.equal(answers(shared_model, inputs), answers(shared_model, inputs, prompt_lookup_num_tokens=3))


def test_an_assistant_changes_no_answer(shared_model: ListenForConditionalGeneration) -> None:
    """The query, hence the prompts, must not move with the candidates that an assistant proposes."""
    assistant = tiny_model(seed=1)
    inputs = make_inputs(shared_model, ROWS[:1])
    assert torch.equal(answers(shared_model, inputs), answers(shared_model, inputs, assistant_model=assistant))


@pytest.mark.parametrize(
    ("pool", "found"),
    [({"pool_size": 12, "num_prompts": 4, "form": "layers"}, "prompts of form='layers'"), (None, "no prompt pool")],
)
def test_an_assistant_with_another_form_of_prompts_is_named(
    shared_model: ListenForConditionalGeneration, pool: dict | None, found: str
) -> None:
    assistant = tiny_model(seed=1, prompt_pool_config=pool)
    with pytest.raises(ValueError, match=f"form='input', but the adapter of assistant_model has {found}"):
        answers(shared_model, make_inputs(shared_model, ROWS[:1]), assistant_model=assistant)
    plain = make_inputs(shared_model, ROWS[:1], num_prompts=0)
    assert torch.equal(answers(shared_model, plain, assistant_model=assistant), answers(shared_model, plain))


@pytest.mark.parametrize("length", ["max_new_tokens", "max_length"])
def test_a_generation_config_limits_transcriptions(shared_model: ListenForConditionalGeneration, length: str) -> None:
    inputs = make_inputs(shared_model, ROWS[:1])
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    most = NEW if length == "max_new_tokens" else ids.shape[1] + NEW
    config = GenerationConfig(**{length: most}, do_sample=False, eos_token_id=None)
    found = shared_model.generate(**inputs, instruction_ids=ids, instruction_mask=mask, generation_config=config)
    assert found.shape == (1, NEW)


def test_streaming_gives_the_same_text(shared_model: ListenForConditionalGeneration) -> None:
    class Ids:
        """A tokenizer that spells ids."""

        def decode(self, ids: list[int], **kwargs: object) -> str:
            return "".join(f"{int(i)} " for i in ids)

    inputs = make_inputs(shared_model, ROWS[:1])
    streamer = TextIteratorStreamer(Ids(), skip_prompt=True)
    expected = answers(shared_model, inputs)[0].tolist()
    answers(shared_model, inputs, streamer=streamer)
    assert "".join(streamer).split() == [str(i) for i in expected]


def test_stored_encoder_frames_generate_the_same(shared_model: ListenForConditionalGeneration) -> None:
    inputs = make_inputs(shared_model, ROWS)
    audio = {k: v for k, v in inputs.items() if k.startswith("input_") and k != "input_ids"}
    stored = {k: v for k, v in inputs.items() if k not in audio} | dict(shared_model.encode_audio(**audio))
    for mode in ("greedy", "beams", "no cache"):
        assert torch.equal(answers(shared_model, inputs, **MODES[mode]), answers(shared_model, stored, **MODES[mode]))


def test_placeholders_are_never_answered(shared_model: ListenForConditionalGeneration) -> None:
    assert min(AUDIO_ID, PROMPT_ID) >= VOCABULARY
    assert answers(shared_model, make_inputs(shared_model, ROWS)).max() < VOCABULARY


def test_fewer_prompts_at_inference_are_the_first_of_more(shared_model: ListenForConditionalGeneration) -> None:
    found = [shared_model.select_prompts(**make_inputs(shared_model, ROWS, num_prompts=k)).indices for k in (12, 5, 1)]
    assert torch.equal(found[0][:, :5], found[1])
    assert torch.equal(found[0][:, :1], found[2])
