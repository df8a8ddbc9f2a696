"""The processor: exact placeholders, any tokenizer, any chat template, and no input dropped in silence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import tiny_config, tiny_model
from fixtures_tokenizers import GEMMA_TEMPLATE, LLAMA_3_TEMPLATE, QWEN_TEMPLATE, VOCABULARY, build_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from listen.data.tasks import get_task
from listen.feature_extraction_listen import ListenFeatureExtractor
from listen.modeling_listen import ListenForConditionalGeneration
from listen.processing_listen import TASK_INSTRUCTIONS, ListenProcessor

RATE = 16000
RESERVED = tuple(f"<|reserved_special_token_{i}|>" for i in range(4))
TEMPLATES = {"none": None, "llama-3": LLAMA_3_TEMPLATE, "qwen": QWEN_TEMPLATE, "gemma": GEMMA_TEMPLATE}
EXTRAS = {"own": ("<|prompt|>", "<|audio|>"), "reserved": RESERVED, "added": ()}


def wave(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * RATE))).astype(np.float32)


def build_processor(kind: str = "added", template: str | None = None, **kwargs: object) -> ListenProcessor:
    return ListenProcessor(ListenFeatureExtractor(), build_tokenizer(extra=EXTRAS[kind], template=template), **kwargs)


@pytest.fixture(scope="module")
def processor() -> ListenProcessor:
    return build_processor(num_prompts=3, pool_size=8)


def user(*content: object) -> list[dict]:
    items = [{"type": "text", "text": item} if isinstance(item, str) else item for item in content]
    return [{"role": "user", "content": items}]


def audio(seconds: float, seed: int = 0) -> dict:
    return {"type": "audio", "array": wave(seconds, seed), "sampling_rate": RATE}


# ------------------------------------------------------------------ placeholders


@pytest.mark.parametrize("kind", EXTRAS)
def test_placeholders_are_own_tokens_else_reserved_ones_else_above_the_vocabulary(kind: str) -> None:
    processor = build_processor(kind)
    tokenizer, ids = processor.tokenizer, (processor.audio_token_id, processor.prompt_token_id)
    expected = {
        "own": tuple(tokenizer.convert_tokens_to_ids(["<|audio|>", "<|prompt|>"])),
        "reserved": tuple(
            tokenizer.convert_tokens_to_ids(["<|reserved_special_token_3|>", "<|reserved_special_token_2|>"])
        ),
        "added": (VOCABULARY, VOCABULARY + 1),
    }
    assert ids == expected[kind]
    assert len(tokenizer) == VOCABULARY + (2 if kind == "added" else 0)


@pytest.mark.parametrize(
    "pattern",
    ["<|reserved_special_token_{}|>", "<unused{}>", "[unused{}]", "<|extra_{}|>", "<SPECIAL_{}>", "[control_{}]",
     "<reserved_{}>", "<|extra_id_{}|>", "<|placeholder{}|>", "<｜place▁holder▁no▁{}｜>", "<|unused_{}|>",
     "[UNUSED_TOKEN_{}]", "<extra_id_{}>", "<|EXTRA_{}_TOKEN|>", "<|reserved_token_{}|>", ">>UNUSED_{}<<"],
)  # fmt: skip
def test_reserved_tokens_are_known_in_the_manners_of_many_llms(pattern: str) -> None:
    extra = tuple(pattern.format(i) for i in (5, 6, 7))
    processor = ListenProcessor(ListenFeatureExtractor(), build_tokenizer(extra=extra))
    assert {processor.audio_token_id, processor.prompt_token_id} == {5, 6}  # ids 4, 5, 6: the highest two
    assert (
        processor("<|audio|>", wave(1), RATE, num_prompts=2).input_ids[0, :2].tolist()
        == [processor.prompt_token_id] * 2
    )


def test_a_reserved_word_of_the_plain_vocabulary_becomes_a_token() -> None:
    words = {
        word: i for i, word in enumerate(["<unk>", "</s>", "the", "fox", "[", "unused1", "]", "[unused1]", "[unused2]"])
    }
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()  # tears [unused1] apart unless it is made a token
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    processor = ListenProcessor(ListenFeatureExtractor(), tokenizer)
    assert (processor.audio_token_id, processor.prompt_token_id, len(tokenizer)) == (8, 7, len(words))
    ids = processor("the <|audio|> fox", wave(0.6), RATE, num_prompts=1).input_ids[0].tolist()
    assert ids == [7, 2, 8, 8, 3]


def test_a_tokenizer_written_in_python_serves_too() -> None:
    processor = ListenProcessor(ListenFeatureExtractor(), ByT5Tokenizer())
    inputs = processor(["the <|audio|>", "é"], [wave(0.6)], RATE, num_prompts=2)
    assert processor.batch_decode(inputs.input_ids, skip_special_tokens=True) == ["the ", "é"]
    assert processor.decode([100, -100, 10**6]) == "a"
    with pytest.raises(ValueError, match="needs a fast tokenizer"):
        processor.apply_chat_template(user("a"), tokenize=True, return_assistant_tokens_mask=True)


def test_reserved_tokens_in_use_are_left_alone() -> None:
    template = "{{ '<|reserved_special_token_3|>' + messages[0]['content'] }}"
    tokenizer = build_tokenizer(extra=RESERVED, template=template)
    tokenizer.pad_token = RESERVED[2]
    processor = ListenProcessor(ListenFeatureExtractor(), tokenizer)
    chosen = tokenizer.convert_ids_to_tokens([processor.audio_token_id, processor.prompt_token_id])
    assert chosen == [RESERVED[1], RESERVED[0]]


def test_a_single_reserved_token_serves_one_placeholder() -> None:
    processor = ListenProcessor(ListenFeatureExtractor(), build_tokenizer(extra=RESERVED[:1]))
    assert (processor.audio_token_id, processor.prompt_token_id) == (4, VOCABULARY)


def test_an_id_that_is_an_ordinary_word_or_out_of_reach_is_refused() -> None:
    for wrong in (50, VOCABULARY + 7):
        with pytest.raises(ValueError, match=f"must have the id {wrong}"):
            build_processor(audio_token_id=wrong)


def test_a_tokenizer_without_padding_token_pads_with_its_end() -> None:
    tokenizer = build_tokenizer(pad_token=None)
    processor = ListenProcessor(ListenFeatureExtractor(), tokenizer)
    inputs = processor(["the", "the quick brown fox"])
    assert inputs.input_ids[0, 0] == tokenizer.eos_token_id and inputs.attention_mask[0, 0] == 0


# ------------------------------------------------------------------ model inputs


@pytest.mark.parametrize("kind", EXTRAS)
def test_prompts_stand_before_bos_and_audio_where_it_is_written(kind: str) -> None:
    processor = build_processor(kind)
    bos, n = processor.tokenizer.bos_token_id, processor.num_audio_embeddings(2 * RATE)
    words = [processor.tokenizer(text, add_special_tokens=False).input_ids for text in ("the fox ", " is")]
    ids = processor("the fox <|audio|> is", wave(2), RATE, num_prompts=4).input_ids[0].tolist()
    assert ids == [processor.prompt_token_id] * 4 + [bos, *words[0]] + [processor.audio_token_id] * n + words[1]


def test_rows_of_a_batch_are_the_single_rows_padded_on_the_left(processor: ListenProcessor) -> None:
    texts = ["<|audio|>the", "the quick brown fox", "<|audio|> and <|audio|>the"]
    clips = [[wave(1.3)], [], [wave(0.4, 1), wave(2.1, 2)]]
    batch = processor(texts, clips, RATE)
    for row, (text, own) in enumerate(zip(texts, clips, strict=True)):
        single = processor(text, own or None, RATE)
        real = batch.attention_mask[row].bool()
        assert torch.equal(batch.input_ids[row][real], single.input_ids[0])
        assert real.tolist() == sorted(real.tolist())  # padding on the left
    alone = processor(audio=[wave(1.3), wave(0.4, 1), wave(2.1, 2)], sampling_rate=RATE)
    assert torch.equal(batch.input_features, alone.input_features) and len(alone.input_features) == 3
    assert set(alone) == set(processor.feature_extractor.model_input_names)


@pytest.mark.parametrize("seconds", [0.01, 0.33, 0.34, 0.35, 1.0, 7.77, 29.99, 30.0, 30.01, 65.5])
@pytest.mark.parametrize("num_queries", [1, 2])
def test_the_model_gives_as_many_embeddings_as_the_processor_writes(seconds: float, num_queries: int) -> None:
    connector = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_queries": num_queries}
    model = tiny_model(connector_config=connector)
    config = tiny_config(connector_config=connector, audio_token_id=None, prompt_token_id=None)
    processor = ListenProcessor.from_backbones(config, build_tokenizer())
    inputs = processor("<|audio|>", wave(seconds), RATE, num_prompts=0)
    written = int((inputs.input_ids == processor.audio_token_id).sum())
    inputs = {name: value for name, value in inputs.items() if name.startswith("input_") and name != "input_ids"}
    with torch.no_grad():
        heard = model.get_audio_features(**inputs)
    assert written == len(heard.pooler_output) == processor.num_audio_embeddings(len(wave(seconds)))
    assert len(heard.lengths) == processor.feature_extractor.num_chunks(len(wave(seconds)))


def test_clips_encoded_before_are_placed_by_their_length(processor: ListenProcessor) -> None:
    texts, clips = ["<|audio|>the", "<|audio|><|audio|>"], [wave(1.3), wave(31), wave(0.2)]
    with_audio = processor(texts, clips, RATE)
    placed = processor(texts, num_samples=[len(clip) for clip in clips])
    assert set(placed) == {"input_ids", "attention_mask"}
    assert torch.equal(placed.input_ids, with_audio.input_ids)


def test_flat_nested_and_single_clips_are_the_same(processor: ListenProcessor) -> None:
    clip = wave(1)
    ids = [processor("<|audio|>", form, RATE).input_ids for form in (clip, [clip], [[clip]], clip.tolist())]
    assert all(torch.equal(ids[0], other) for other in ids)
    stereo = processor("<|audio|>", np.stack([clip, clip]), RATE)
    np.testing.assert_allclose(stereo.input_features, processor("<|audio|>", clip, RATE).input_features, atol=1e-5)


def test_text_alone_without_prompts_is_what_the_tokenizer_writes(processor: ListenProcessor) -> None:
    inputs = processor("the quick brown fox", num_prompts=0)
    assert inputs.input_ids[0].tolist() == processor.tokenizer("the quick brown fox").input_ids
    assert set(inputs) == {"input_ids", "attention_mask"}


def test_padding_options(processor: ListenProcessor) -> None:
    texts = ["the", "the quick brown fox"]
    longest = processor(texts).input_ids.shape[1]
    assert processor(texts, padding="max_length", max_length=64).input_ids.shape == (2, 64)
    assert processor(texts, text_kwargs={"pad_to_multiple_of": 16}).input_ids.shape[1] == -(-longest // 16) * 16
    ragged = processor(texts, padding=False, return_tensors=None)
    assert [len(row) for row in ragged["attention_mask"]] == [len(row) for row in ragged["input_ids"]]
    assert len(ragged["input_ids"][0]) < len(ragged["input_ids"][1]) == longest
    assert isinstance(processor(texts, return_tensors="np").input_ids, np.ndarray)


def test_truncation_keeps_the_prompts_and_never_cuts_audio(processor: ListenProcessor) -> None:
    assert processor("the quick brown fox " * 9, truncation=True, max_length=20).input_ids.shape == (1, 20)
    with pytest.raises(ValueError, match="truncation cut audio off"):
        processor("the fox <|audio|>", wave(20), RATE, truncation=True, max_length=20)


def test_audio_positions_are_told_when_asked(processor: ListenProcessor) -> None:
    inputs = processor(["<|audio|>the", "a"], [wave(1)], RATE, return_mm_token_type_ids=True)
    assert torch.equal(inputs["mm_token_type_ids"] == 3, inputs.input_ids == processor.audio_token_id)


def test_tasks_become_ids_where_the_pool_is_divided_among_them() -> None:
    divided = build_processor(tasks=["asr", "er"])
    assert divided(["the", "a"], task=["er", "asr"]).task_ids.tolist() == [1, 0]
    assert divided(["the", "a"], task=["emotion", "transcribe"]).task_ids.tolist() == [1, 0]
    assert divided(["the", "a"], task="er").task_ids.tolist() == [1, 1]
    assert "task_ids" not in build_processor()("the", task="asr")
    with pytest.raises(ValueError, match="task='sv' owns no part of the pool; tasks: asr, er"):
        divided("the", task="sv")
    with pytest.raises(ValueError, match="names 1 tasks for 2 texts"):
        divided(["the", "a"], task=["er"])


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"text": "a <|audio|>"}, ValueError, r"\[1\] <\|audio\|> but 0 clips"),
        ({"text": "a", "audio": wave(1)}, ValueError, r"\[0\] <\|audio\|> but 1 clips"),
        ({"text": "<|audio|><|audio|>", "audio": [wave(1)]}, ValueError, r"\[2\] <\|audio\|> but 1 clips"),
        (
            {"text": ["<|audio|>", "a"], "audio": [[], [wave(1)]]},
            ValueError,
            r"\[1, 0\] <\|audio\|> but \[0, 1\] clips",
        ),
        ({"text": "a", "num_samples": [5]}, ValueError, r"\[0\] <\|audio\|> but 1 clips"),
        ({"text": "a", "audio": wave(1), "num_samples": [5]}, ValueError, "not both"),
        ({"text": "<|audio|>", "audio": wave(1), "sampling_rate": None}, ValueError, "without sampling_rate"),
        ({"text": "<|audio|>", "audio": np.zeros(0)}, ValueError, "empty audio"),
        ({"text": "<|audio|>", "audio": np.full(9, np.nan)}, ValueError, "NaN"),
        ({"text": "a <|prompt|>"}, ValueError, "'<|prompt|>', which only the processor may write"),
        ({"text": "a", "num_prompts": -1}, ValueError, "num_prompts=-1"),
        ({"text": "a", "num_prompts": 9}, ValueError, "num_prompts=9, but the pool holds pool_size=8"),
        ({"text": "a", "num_prompts": 2.5}, ValueError, "num_prompts=2.5"),
        ({"text": "a", "audios": wave(1)}, TypeError, "'audios' is unknown; did you mean 'audio'"),
        ({"text": "a", "raw_speech": wave(1)}, TypeError, "'raw_speech' is unknown"),
        ({"text": "a", "sample_rate": 1}, TypeError, "'sample_rate' is unknown; did you mean 'sampling_rate'"),
        ({"text": "a", "text_kwargs": {"paddin": True}}, TypeError, "did you mean 'padding'"),
        ({"text": "a", "padding": True, "text_kwargs": {"padding": True}}, ValueError, "padding was given twice"),
        ({"text": "a", "padding": "left"}, ValueError, "padding='left' is unknown"),
        ({"text": "a", "padding": "max_length"}, ValueError, "needs max_length="),
        ({"text": "a", "truncation": True, "max_length": 2}, ValueError, "max_length=2 has no room for num_prompts=3"),
        ({"text": "<|audio|>", "audio": wave(1), "max_audio_seconds": "1"}, ValueError, "max_audio_seconds='1'"),
        ({"text": 5}, ValueError, "text must be a string"),
        ({"text": []}, ValueError, "text must be a string"),
        ({}, ValueError, "give text, audio or both"),
        ({"audio": wave(1), "num_prompts": 2}, ValueError, "need a text"),
        ({"text": ["<s>a", "b"]}, ValueError, "some texts of the batch begin with '<s>'"),
    ],
)
def test_wrong_input_raises(processor: ListenProcessor, kwargs: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        processor(**{"sampling_rate": RATE, **kwargs})


def test_prompts_and_task_may_be_in_a_group_of_keywords() -> None:
    processor = build_processor(num_prompts=3, pool_size=8, tasks=["asr", "er"])
    found = processor("a", text_kwargs={"num_prompts": 1, "task": "er"})
    assert found.input_ids[0].tolist() == processor("a", num_prompts=1).input_ids[0].tolist()
    assert found.task_ids.tolist() == [1]


def test_no_number_of_prompts_is_the_default_for_the_query_too(processor: ListenProcessor) -> None:
    chat = [*user("What?"), {"role": "assistant", "content": "this"}]
    expected, found = (processor.apply_chat_template(chat, tokenize=True, **k) for k in ({}, {"num_prompts": None}))
    assert torch.equal(found.query_mask, expected.query_mask)


def test_a_reserved_token_written_by_hand_is_refused() -> None:
    processor = build_processor("reserved")
    for symbol in RESERVED[2:]:
        with pytest.raises(ValueError, match="which only the processor may write"):
            processor(f"the {symbol}")
    assert processor(f"the {RESERVED[0]}").input_ids.shape[0] == 1  # not one of the two


@pytest.mark.parametrize("kwargs", [{"num_prompts": 9, "pool_size": 8}, {"num_prompts": -2}])
def test_a_processor_that_asks_for_impossible_prompts_is_not_built(kwargs: dict) -> None:
    with pytest.raises(ValueError, match=f"num_prompts={kwargs['num_prompts']}"):
        build_processor(**kwargs)


# ------------------------------------------------------------------ chat


@pytest.mark.parametrize("template", TEMPLATES)
def test_audio_content_is_plain_text_before_any_template(template: str) -> None:
    processor = build_processor(template=TEMPLATES[template], num_prompts=2)
    messages = user(audio(1), "First. ", audio(0.5, 1), "What?")
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    plain = [{"role": "user", "content": "<|audio|>First. <|audio|>What?"}]
    if TEMPLATES[template]:
        assert rendered == processor.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    else:
        assert rendered == "USER: <|audio|>First. <|audio|>What?\nASSISTANT:"
    inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    direct = processor(rendered, [wave(1), wave(0.5, 1)], RATE)
    assert set(inputs) == set(direct) and all(torch.equal(inputs[name], direct[name]) for name in inputs)
    assert (inputs.input_ids == processor.tokenizer.bos_token_id).sum() == 1  # never two


@pytest.mark.parametrize("system", ["{{ m.content }}", "{{ m.content[0].text }}"])
@pytest.mark.parametrize(
    "turn",
    [
        "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}",
        "{% for c in m.content | selectattr('type', 'equalto', 'text') %}"
        "{% generation %}{{ c.text }}{% endgeneration %}{% endfor %}",
        "{{ '' + m.content[0].text }}",  # fails on strings
    ],
)
def test_templates_that_read_lists_alone_get_them(system: str, turn: str) -> None:
    body = f"{{% if m.role == 'system' %}}{system}{{% else %}}{turn}{{% endif %}}"
    lists = "{% for m in messages %}{{ m.role + ':' }}" + body + "{{ '\n' }}{% endfor %}"
    strings = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
    chat = [{"role": "system", "content": "the fox"}, *user("What?"), {"role": "assistant", "content": "lazy dog"}]
    for messages in (chat, chat[1:], chat[:2], [*chat, *user("Which? ", audio(1), "is ", audio(0.5))]):
        for kwargs in ({}, {"number_clips": True}, {"continue_final_message": True}):
            expected = build_processor(template=strings).apply_chat_template(messages, **kwargs)
            assert build_processor(template=lists).apply_chat_template(messages, **kwargs) == expected


@pytest.mark.parametrize("change", ["upper", "capitalize", "trim", "title", "tojson", "replace('the', 'a')"])
def test_templates_that_rewrite_strings_get_strings(change: str) -> None:
    template = "{% for m in messages %}{% if not loop.first %}{{ m.content | " + change + " }}{% endif %}{% endfor %}"
    processor = build_processor(template=template)
    chat = [{"role": "system", "content": "unread"}, *user(" the quick brown fox ")]
    plain = [chat[0], {"role": "user", "content": " the quick brown fox "}]
    assert processor.apply_chat_template(chat) == processor.tokenizer.apply_chat_template(plain, tokenize=False)


def test_a_batch_of_conversations_is_rendered_row_by_row() -> None:
    processor = build_processor(template=LLAMA_3_TEMPLATE)
    chats = [user(audio(1), "What?"), user("the fox"), user(audio(0.5), audio(0.7), "Which?")]
    batch = processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True, num_prompts=2)
    for row, chat in enumerate(chats):
        single = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, num_prompts=2)
        assert torch.equal(batch.input_ids[row][batch.attention_mask[row].bool()], single.input_ids[0])
    assert len(batch.input_features) == 3
    assert processor.apply_chat_template(chats) == [processor.apply_chat_template(chat) for chat in chats]


def test_every_way_to_name_a_clip_in_a_message_is_the_same(tmp_path: Path) -> None:
    processor = build_processor()
    path = tmp_path / "clip.wav"
    soundfile.write(path, wave(1), RATE, subtype="FLOAT")
    forms = [
        {"audio": wave(1), "sampling_rate": RATE}, {"array": wave(1), "sampling_rate": RATE},
        {"audio": str(path)}, {"path": path}, {"url": str(path)}, {"bytes": path.read_bytes()},
        {"audio": {"array": wave(1), "sampling_rate": RATE}}, {"audio": None, "path": str(path), "text": None},
        {"bytes": path.read_bytes(), "path": "gone.wav"}, {"array": wave(1), "sampling_rate": RATE, "path": "gone.wav"},
    ]  # fmt: skip
    inputs = [processor.apply_chat_template(user({"type": "audio", **form}), tokenize=True) for form in forms]
    assert all(torch.equal(inputs[0].input_features, other.input_features) for other in inputs)


@pytest.mark.parametrize("template", ["none", "llama-3"])
@pytest.mark.parametrize("num_prompts", [0, 3])
def test_assistant_tokens_are_masked_behind_audio_prompts_and_padding(template: str, num_prompts: int) -> None:
    processor = build_processor(template=TEMPLATES[template])
    chats = [
        [*user(audio(2), "What?"), {"role": "assistant", "content": "the fox"}],
        [
            *user("a"),
            {"role": "assistant", "content": "brown"},
            *user(audio(1)),
            {"role": "assistant", "content": "dog"},
        ],
    ]
    inputs = processor.apply_chat_template(
        chats, tokenize=True, return_assistant_tokens_mask=True, num_prompts=num_prompts
    )
    end = "</s>" if template == "none" else "<|eot|>"
    found = [
        processor.decode(ids[mask.bool()]) for ids, mask in zip(inputs.input_ids, inputs.assistant_masks, strict=True)
    ]
    assert found == [f"the fox{end}", f"brown{end}dog{end}"]
    assert inputs.assistant_masks.shape == inputs.input_ids.shape


def test_a_final_message_can_be_continued(processor: ListenProcessor) -> None:
    chat = [*user("What?"), {"role": "assistant", "content": "the quick"}]
    assert processor.apply_chat_template(chat, continue_final_message=True) == "USER: What?\nASSISTANT: the quick"
    with pytest.raises(ValueError, match="excludes add_generation_prompt"):
        processor.apply_chat_template(chat, continue_final_message=True, add_generation_prompt=True)


def test_variables_reach_the_template_and_keywords_the_processor() -> None:
    processor = build_processor(template=QWEN_TEMPLATE)
    rendered = processor.apply_chat_template(user("a"), add_generation_prompt=True, enable_thinking=False)
    assert rendered.endswith("nothink\n")
    inputs = processor.apply_chat_template(
        user({"type": "audio", "audio": wave(1)}),
        tokenize=True,
        sampling_rate=RATE,
        processor_kwargs={"num_prompts": 5},
    )
    assert inputs.input_ids[0, :5].tolist() == [processor.prompt_token_id] * 5
    as_arrays = processor.apply_chat_template(user("a"), tokenize=True, processor_kwargs={"return_tensors": "np"})
    assert isinstance(as_arrays.input_ids, np.ndarray)


@pytest.mark.parametrize(
    "messages, kwargs, error, message",
    [
        (user("a"), {"enable_thinkin": False}, TypeError, "did you mean 'enable_thinking'"),
        (user("a"), {"num_prompts": 2}, ValueError, "num_prompts: these need tokenize=True"),
        (user({"type": "image", "url": "x"}), {}, ValueError, "cannot be read"),
        (user({"type": "audio"}), {"tokenize": True}, ValueError, r"keys \['type'\] holds no clip"),
        (user("a <|audio|>"), {"tokenize": True}, ValueError, r"\[1\] <\|audio\|> but 0 clips"),
        ([], {}, ValueError, "a list of messages"),
        ("hello", {}, ValueError, "a list of messages"),
        ([user("a"), ["b"]], {}, ValueError, "a message is a dict with 'role' and 'content', not 'b'"),
        (user(5), {}, ValueError, "content 5 cannot be read"),
        ([{"role": "user", "content": {"type": "audio", "path": "x"}}], {}, ValueError, "content .* cannot be read"),
    ],
)
def test_wrong_chat_raises(messages: object, kwargs: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        build_processor(template=QWEN_TEMPLATE).apply_chat_template(messages, **kwargs)


def test_messages_are_not_changed(processor: ListenProcessor) -> None:
    messages = user(audio(1), "What?")
    before = json.dumps(messages, default=repr)
    processor.apply_chat_template(messages, tokenize=True)
    assert json.dumps(messages, default=repr) == before


# ------------------------------------------------------------------ tasks and answers


def test_task_wordings_are_those_of_evaluation(processor: ListenProcessor) -> None:
    wordings = {name: get_task(name).instruction(question="{question}") for name in TASK_INSTRUCTIONS}
    assert wordings == TASK_INSTRUCTIONS
    assert processor.instruction("sqa", "Who jumps?") == processor.instruction("question", "Who jumps?") == "Who jumps?"
    assert processor.instruction("transcribe") == TASK_INSTRUCTIONS["asr"]
    with pytest.raises(ValueError, match="task 'sqa' needs a question"):
        processor.instruction("sqa")
    with pytest.raises(ValueError, match="task 'asr' has its own wording"):
        processor.instruction("asr", "Who jumps?")
    with pytest.raises(ValueError, match="task 'asrr' is unknown; did you mean 'asr'"):
        processor.instruction("asrr")
    with pytest.raises(ValueError, match=r"task \['asr'\] is unknown"):
        processor.instruction(["asr"])


@pytest.mark.parametrize("kind", EXTRAS)
def test_decoding_leaves_placeholders_and_unknown_ids_out(kind: str) -> None:
    processor = build_processor(kind)
    ids = processor("<|audio|>the quick fox", wave(1), RATE, num_prompts=2).input_ids[0].tolist()
    assert processor.decode(ids, skip_special_tokens=True) == "the quick fox"
    beyond = [-100, *ids, VOCABULARY + 30, 10**6]
    assert processor.decode(beyond) == processor.decode(ids)
    assert processor.batch_decode(torch.tensor([beyond, beyond]), skip_special_tokens=True) == ["the quick fox"] * 2
    assert processor.decode([ids, ids[:-1]], skip_special_tokens=True)[0] == "the quick fox"
    assert processor.decode([]) == ""


# ------------------------------------------------------------------ building, saving, loading


def test_a_config_is_enough_and_gets_its_placeholder_ids(tmp_path: Path) -> None:
    build_tokenizer(extra=RESERVED).save_pretrained(tmp_path / "llm")
    place = {"base_model_name_or_path": str(tmp_path / "llm"), "revision": "main"}
    bases = {"speech_encoder": place, "audio_encoder": place, "language_model": place}
    config = tiny_config(audio_token_id=None, prompt_token_id=None, base_models=bases, pad_to_30s=True)
    processor = ListenProcessor.from_backbones(config)
    assert (config.audio_token_id, config.prompt_token_id) == (processor.audio_token_id, processor.prompt_token_id)
    assert (processor.num_prompts, processor.pool_size, processor.tasks) == (4, 12, None)
    assert processor.feature_extractor.pad_to_30s and processor.feature_extractor.num_fbank_bins == 128
    again = ListenProcessor.from_backbones(config)  # ids are now given
    assert (again.audio_token_id, again.prompt_token_id) == (config.audio_token_id, config.prompt_token_id)


def test_a_config_without_audio_encoder_or_pool_gives_neither_features_nor_prompts() -> None:
    config = tiny_config(audio_config=None, prompt_pool_config=None, audio_token_id=None, prompt_token_id=None)
    processor = ListenProcessor.from_backbones(config, build_tokenizer())
    inputs = processor("<|audio|>the", wave(1), RATE)
    assert set(inputs) == {"input_ids", "attention_mask", "input_features", "input_features_mask"}
    assert processor.prompt_token_id not in inputs.input_ids
    with pytest.raises(ValueError, match="num_prompts=1, but the pool holds pool_size=0"):
        processor("the", num_prompts=1)


def test_a_pool_divided_among_tasks_gives_their_names() -> None:
    pool = {"pool_size": 12, "num_prompts": 2, "strategy": "task", "tasks": ["asr", "er"]}
    config = tiny_config(prompt_pool_config=pool, audio_token_id=None, prompt_token_id=None)
    assert ListenProcessor.from_backbones(config, build_tokenizer()).tasks == ["asr", "er"]


def test_a_config_without_base_models_asks_for_the_tokenizer() -> None:
    with pytest.raises(ValueError, match="pass tokenizer="):
        ListenProcessor.from_backbones(tiny_config())


@pytest.mark.parametrize("kind", EXTRAS)
@pytest.mark.parametrize("template", ["none", "llama-3"])
def test_saving_and_loading_keeps_every_attribute(kind: str, template: str, tmp_path: Path) -> None:
    saved = build_processor(
        kind, TEMPLATES[template], num_prompts=3, pool_size=8, tasks=["asr", "x"],
        connector={"window_seconds": 0.25, "num_queries": 2}, task_instructions={"x": "Do x."},
    )  # fmt: skip
    saved.save_pretrained(tmp_path)
    loaded = ListenProcessor.from_pretrained(tmp_path)

    def settings(processor: ListenProcessor) -> dict:
        whole = processor.to_dict()
        parts = (whole, whole["feature_extractor"])  # where the code lies is told by saved files alone
        return [
            {name: value for name, value in part.items() if name not in ("auto_map", "feature_extractor")}
            for part in parts
        ]

    assert settings(loaded) == settings(saved)
    assert loaded.chat_template == saved.chat_template
    chat = user(audio(1), "What?")
    before, after = (p.apply_chat_template(chat, tokenize=True, add_generation_prompt=True) for p in (saved, loaded))
    assert all(torch.equal(before[name], after[name]) for name in before) and set(before) == set(after)


# ------------------------------------------------------------------ with the model


@pytest.mark.parametrize("kind", EXTRAS)
def test_whatever_the_ids_the_model_hears_the_same(kind: str) -> None:
    def logits(which: str, clip: np.ndarray) -> torch.Tensor:
        config = tiny_config(audio_token_id=None, prompt_token_id=None)
        processor = ListenProcessor.from_backbones(config, build_tokenizer(extra=EXTRAS["reserved"][:4], template=None))
        if which == "added":
            config = tiny_config(audio_token_id=None, prompt_token_id=None)
            tokenizer = build_tokenizer(extra=tuple(f"<x{i}x>" for i in range(4)))  # no reserved token, the same words
            processor = ListenProcessor.from_backbones(config, tokenizer)
        if which == "own":
            config = tiny_config(audio_token_id=None, prompt_token_id=None)
            tokenizer = build_tokenizer(extra=("<|prompt|>", "<|audio|>", "<x0x>", "<x1x>"))
            processor = ListenProcessor.from_backbones(config, tokenizer)
        model: ListenForConditionalGeneration = tiny_model(
            audio_token_id=config.audio_token_id, prompt_token_id=config.prompt_token_id
        )
        with torch.no_grad():
            return model(**processor(["<|audio|>the fox", "the <|audio|>"], [clip, wave(0.7, 5)], RATE)).logits

    one, other = logits(kind, wave(1.2, 1)), logits(kind, wave(1.2, 2))
    assert (one[0, -1] - other[0, -1]).abs().max() > 1e-4  # it listens
    torch.testing.assert_close(one, logits("added", wave(1.2, 1)), atol=1e-6, rtol=0)
