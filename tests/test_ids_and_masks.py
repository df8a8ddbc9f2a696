"""Ids that the LLM has no embedding for, labels on placeholders, what selects the prompts, masks of a wrong shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import clip, make_inputs, tiny_config
from fixtures_tokenizers import GEMMA_TEMPLATE, LLAMA_3_TEMPLATE, QWEN_TEMPLATE, build_tokenizer
from fixtures_training import tiny_processor

from listen.modeling_listen import ListenForConditionalGeneration
from listen.processing_listen import ListenProcessor

RATE = 16000
WAVE = (0.1 * np.random.default_rng(0).standard_normal(RATE)).astype(np.float32)


def processor_of(**tokenizer_options: object) -> ListenProcessor:
    config = tiny_config(audio_token_id=None, prompt_token_id=None)
    return ListenProcessor.from_backbones(config, tokenizer=build_tokenizer(**tokenizer_options))


# ---------------------------------------------------------------------- ids


def test_an_added_padding_token_is_replaced_by_one_that_the_llm_has(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build_tokenizer(pad_token=None)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    config = tiny_config(audio_token_id=None, prompt_token_id=None)
    processor = ListenProcessor.from_backbones(config, tokenizer=tokenizer)
    assert "no embedding for the pad_token '[PAD]' (id 99 of 99); padding by '</s>'" in caplog.text
    ids = processor(["What?", "What is being said?"], num_prompts=0)["input_ids"]
    assert ids.max() < 99 and ids[0, 0] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match=r"99 embeddings, none for \['\[PAD\]'\]"):
        processor("What [PAD] is said?")


def test_text_of_added_tokens_is_refused_by_name() -> None:
    processor = processor_of()
    processor.tokenizer.add_tokens(["<emotion>"])
    with pytest.raises(ValueError, match=r"99 embeddings, none for \['<emotion>'\]; take them out"):
        processor("Say <emotion> <|audio|>", WAVE, RATE)
    assert processor("Say <|audio|>", WAVE, RATE)["input_ids"].shape[0] == 1


# ---------------------------------------------------------------------- labels and the query


def conversation(answer: str) -> list[dict]:
    user = {"role": "user", "content": [{"type": "audio", "array": WAVE, "sampling_rate": RATE}, "What is said?"]}
    return [user, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("template", [None, LLAMA_3_TEMPLATE, QWEN_TEMPLATE, GEMMA_TEMPLATE])
def test_the_processor_tells_what_picks_the_prompts(template: str | None) -> None:
    """The query of a conversation with its answer is that of generation: of all before the answer."""
    processor = processor_of(template=template)
    messages = conversation("the quick brown fox")
    whole = processor.apply_chat_template(messages, tokenize=True)
    prompt = processor.apply_chat_template(messages[:1], tokenize=True, add_generation_prompt=True)
    assert "query_mask" not in prompt and whole["query_mask"].shape == whole["input_ids"].shape
    kept = int(whole["query_mask"].sum())
    assert whole["query_mask"][0].tolist() == [1] * kept + [0] * (whole["input_ids"].shape[1] - kept)
    assert abs(kept - prompt["input_ids"].shape[1]) <= 1  # a token may join the prompt's end and the answer's start
    assert whole["input_ids"][0, : kept - 1].tolist() == prompt["input_ids"][0, : kept - 1].tolist()


def test_a_batch_marks_the_answer_of_each_row() -> None:
    processor = processor_of()
    rows = [conversation("the fox"), conversation("the quick brown fox jumps")[:1]]
    batch = processor.apply_chat_template(rows, tokenize=True)
    assert batch["query_mask"][1].all() and not batch["query_mask"][0].all()
    alone = processor.apply_chat_template(rows[0], tokenize=True)
    assert int((1 - batch["query_mask"][0]).sum()) == int((1 - alone["query_mask"][0]).sum())


def test_labels_that_are_the_ids_change_no_query_and_teach_no_placeholder(
    shared_model: ListenForConditionalGeneration,
) -> None:
    processor = tiny_processor(shared_model.config)
    inputs = processor.apply_chat_template(conversation("the quick brown fox"), tokenize=True)
    is_audio, is_prompt = shared_model.placeholder_masks(inputs["input_ids"])
    labels = inputs["input_ids"].clone()
    with torch.no_grad():
        output = shared_model(**inputs, labels=labels)
        masked = shared_model(**inputs, labels=labels.masked_fill(is_audio | is_prompt, -100))
        plain = shared_model(**inputs)
    assert output.query.abs().sum() > 0 and torch.isfinite(output.loss)
    torch.testing.assert_close(output.query, plain.query)
    torch.testing.assert_close(output.loss, masked.loss)


def test_a_query_of_nothing_is_refused(shared_model: ListenForConditionalGeneration) -> None:
    inputs = make_inputs(shared_model, [[clip(1.0)], [clip(0.5)]])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    first = inputs["attention_mask"].long().argmax(-1)
    labels[1, first[1] : first[1] + 6] = -100  # the second row has a part without labels
    with pytest.raises(ValueError, match="row 0 has nothing to select its prompts by: .*query_mask"):
        shared_model(**inputs, labels=labels)


# ---------------------------------------------------------------------- shapes


@pytest.mark.parametrize("name", ["attention_mask", "labels", "query_mask", "input_features_mask", "input_values_mask"])
@pytest.mark.parametrize("change", ["transposed", "longer", "fewer rows"])
def test_masks_of_a_wrong_shape_are_refused_by_name(
    shared_model: ListenForConditionalGeneration, name: str, change: str
) -> None:
    inputs = make_inputs(shared_model, [[clip(1.0)], [clip(0.5)]])
    inputs |= {key: torch.ones_like(inputs["input_ids"]) for key in ("labels", "query_mask")}
    inputs["labels"][:, :-2] = -100
    shared_model(**inputs)
    value, shape = inputs[name], tuple(inputs[name].shape)
    inputs[name] = {"transposed": value.T, "longer": torch.cat([value, value], 1), "fewer rows": value[:1]}[change]
    message = rf"{name} has the shape .*, but needs \({shape[0]}, {shape[1]}\)"
    if name == "query_mask" and change == "longer":
        message = "selects the prompts, but this pass reads"
    with pytest.raises(ValueError, match=message):
        shared_model(**inputs)


@pytest.mark.parametrize("name", ["speech_hidden_states_mask", "audio_hidden_states_mask"])
def test_masks_of_encoder_frames_are_refused_likewise(shared_model: ListenForConditionalGeneration, name: str) -> None:
    inputs = make_inputs(shared_model, [[clip(1.0)]])
    features = {key: inputs.pop(key) for key in (*inputs,) if key.startswith("input_") and key != "input_ids"}
    with torch.no_grad():
        encoded = dict(shared_model.encode_audio(**features))
        shared_model(**inputs, **encoded)
        encoded[name] = encoded[name][:, :-1]
        with pytest.raises(ValueError, match=f"{name} has the shape"):
            shared_model(**inputs, **encoded)
