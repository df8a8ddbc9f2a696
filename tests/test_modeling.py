"""Invariants of the model: what a row answers depends on that row alone, and the LLM stays what it was."""

from __future__ import annotations

import copy
import inspect
import math
from fractions import Fraction

import pytest
import torch
from conftest import AUDIO_ID, PROMPT_ID, clip, make_inputs, tiny_config, tiny_model
from fixtures_encoders import ENCODERS
from fixtures_training import tiny_processor
from transformers import AutoModelForCausalLM

from listen import ListenModel
from listen.configuration_listen import ListenPromptPoolConfig
from listen.modeling_connector import resample_frames
from listen.modeling_listen import ListenForConditionalGeneration

ROWS = [[clip(1.3, 1)], [], [clip(0.9, 2), clip(2.1, 3)], [clip(0.35, 4)]]
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def last_logits(model: ListenForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits[:, -4:]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_batched_rows_equal_single_rows(attention: str) -> None:
    """Mixed lengths, no clip, one and two clips: logits of the batch are those of each row alone."""
    model = tiny_model()
    model.set_attn_implementation(attention)
    text = [[10 + i, 7, 8, 9] for i in range(len(ROWS))]
    batched = last_logits(model, make_inputs(model, ROWS, text=text))
    for i, row in enumerate(ROWS):
        single = last_logits(model, make_inputs(model, [row], text=[text[i]]))
        torch.testing.assert_close(batched[i : i + 1], single, **TOLERANCE)


def test_rows_may_ask_for_different_numbers_of_prompts(shared_model: ListenForConditionalGeneration) -> None:
    counts = [0, 5, 2, 1]
    output = shared_model(**make_inputs(shared_model, ROWS, num_prompts=counts))
    assert (output.prompt_indices >= 0).sum(-1).tolist() == counts
    for i, row in enumerate(ROWS):
        single = make_inputs(shared_model, [row], num_prompts=counts[i], text=[[10 + i, 7, 8, 9]])
        torch.testing.assert_close(output.logits[i : i + 1, -4:], last_logits(shared_model, single), **TOLERANCE)


def test_logits_move_when_the_audio_moves(shared_model: ListenForConditionalGeneration) -> None:
    inputs = make_inputs(shared_model, [[clip(1.0, 1)]])
    other = make_inputs(shared_model, [[clip(1.0, 2)]])
    assert torch.equal(inputs["input_ids"], other["input_ids"])
    assert (last_logits(shared_model, inputs) - last_logits(shared_model, other)).abs().max() > 1e-3


@pytest.mark.parametrize("stream", ["input_features", "input_values"])
def test_both_encoders_are_heard(shared_model: ListenForConditionalGeneration, stream: str) -> None:
    inputs = make_inputs(shared_model, [[clip(1.0, 1)]])
    moved = {**inputs, stream: inputs[stream] + torch.randn_like(inputs[stream])}
    assert (last_logits(shared_model, inputs) - last_logits(shared_model, moved)).abs().max() > 1e-3


def test_text_alone_equals_the_base_llm_bit_for_bit(shared_model: ListenForConditionalGeneration) -> None:
    base = copy.deepcopy(shared_model.language_model)
    ids = torch.tensor([[0, 0, 1, 5, 9, 33], [1, 7, 12, 50, 98, 3]])
    mask = (ids != 0).long()
    assert torch.equal(shared_model(ids, attention_mask=mask).logits, base(ids, attention_mask=mask).logits)
    mine = shared_model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(mine, base.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False))


def test_training_leaves_the_llm_bit_for_bit(model: ListenForConditionalGeneration) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    inputs = make_inputs(model, ROWS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(2):
        model(**inputs, labels=_labels(inputs["input_ids"])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(name.startswith("adapters.default.") for name in changed)


def test_only_the_adapter_learns_and_backbones_stay_in_eval_mode(model: ListenForConditionalGeneration) -> None:
    model.train()
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learned == {name for name, _ in model.named_parameters() if name.startswith("adapters.default.")}
    for backbone in (model.speech_encoder, model.audio_encoder, model.language_model):
        assert not any(module.training for module in backbone.modules())
    assert all(module.training for module in model.adapters.modules())
    assert not any(module.training for module in model.eval().modules())


def test_every_learned_parameter_gets_a_gradient(model: ListenForConditionalGeneration) -> None:
    inputs = make_inputs(model, ROWS, num_prompts=12)
    model(**inputs, labels=_labels(inputs["input_ids"])).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # a softmax over keys of attention does not move with a bias that all keys share
    assert all(name.endswith("key.bias") or "attention.attention" in name for name in without), without
    assert all(p.grad is None for p in model.language_model.parameters())


def test_trainable_names_what_learns() -> None:
    model = tiny_model(trainable=["prompt_pool"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "adapters.default.prompt_pool.keys",
        "adapters.default.prompt_pool.values",
    }
    model = tiny_model(trainable=["adapter", "speech_encoder"]).train()
    assert model.speech_encoder.training and not model.audio_encoder.training
    inputs = make_inputs(model, [[clip(1.0)]])
    model(**inputs, labels=_labels(inputs["input_ids"])).loss.backward()
    assert model.speech_encoder.conv1.weight.grad.abs().max() > 0


def _labels(ids: torch.Tensor, keep: int = 3) -> torch.Tensor:
    labels = torch.full_like(ids, -100)
    labels[:, -keep:] = ids[:, -keep:]
    return labels


def test_logits_to_keep_changes_no_loss(shared_model: ListenForConditionalGeneration) -> None:
    inputs = make_inputs(shared_model, ROWS)
    labels = _labels(inputs["input_ids"])
    full = shared_model(**inputs, labels=labels)
    kept = shared_model(**inputs, labels=labels, logits_to_keep=4)
    assert kept.logits.shape[1] == 4
    torch.testing.assert_close(kept.loss, full.loss)


@torch.no_grad()
@pytest.mark.parametrize("kept", [1, 4, 5000])
def test_the_head_gets_contiguous_states_of_the_last_positions(
    shared_model: ListenForConditionalGeneration, kept: int
) -> None:
    """Of a slice, torch would multiply each row by the frozen head on its own."""
    inputs, seen = make_inputs(shared_model, ROWS), []
    full = shared_model(**inputs).logits
    head = shared_model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0].is_contiguous() or kept == 1))
    logits = shared_model(**inputs, logits_to_keep=kept).logits
    hook.remove()
    torch.testing.assert_close(logits, full[:, -kept:])
    assert seen == [True]


@pytest.mark.parametrize("strategy", ["similarity", "residual", "attention"])
def test_loss_and_gradients_do_not_depend_on_accumulation(strategy: str) -> None:
    """Four micro-batches of one equal one batch of four, with unequal numbers of labels and the key loss."""
    pool = {"pool_size": 12, "num_prompts": 4, "strategy": strategy, "key_loss_weight": 0.7}
    model = tiny_model(prompt_pool_config=pool)
    whole = make_inputs(model, ROWS)
    labels = _labels(whole["input_ids"])
    labels[2, -3] = -100
    total = (labels[:, 1:] != -100).sum()
    model(**whole, labels=labels, num_items_in_batch=total).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for i, row in enumerate(ROWS):
        part = make_inputs(model, [row], text=[[10 + i, 7, 8, 9]])
        mine = labels[i : i + 1, -part["input_ids"].shape[1] :]
        model(**part, labels=mine, num_items_in_batch=total).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-3, msg=name)


def test_loss_is_the_sum_of_its_parts() -> None:
    model = tiny_model(prompt_pool_config={"pool_size": 12, "num_prompts": 4, "key_loss_weight": 0.25})
    inputs = make_inputs(model, ROWS)
    output = model(**inputs, labels=_labels(inputs["input_ids"]))
    torch.testing.assert_close(output.loss, output.lm_loss + 0.25 * output.key_loss)
    assert output.key_loss > 0


def test_the_query_sees_neither_answer_nor_padding_nor_prompts(shared_model: ListenForConditionalGeneration) -> None:
    question = make_inputs(shared_model, [[clip(1.0)]], text=[[10, 7]])
    answered = make_inputs(shared_model, [[clip(1.0)]], text=[[10, 7, 55, 56]])
    labels = _labels(answered["input_ids"], keep=2)
    with torch.no_grad():
        asked = shared_model(**question).query
        torch.testing.assert_close(shared_model(**answered, labels=labels).query, asked)
        more_prompts = make_inputs(shared_model, [[clip(1.0)]], num_prompts=7, text=[[10, 7]])
        torch.testing.assert_close(shared_model(**more_prompts).query, asked)


def test_the_query_is_the_mean_of_audio_and_text(shared_model: ListenForConditionalGeneration) -> None:
    inputs = make_inputs(shared_model, [[clip(1.0)]])
    audio = {k: v for k, v in inputs.items() if k.startswith("input_") and k != "input_ids"}
    heard = shared_model.get_audio_features(**audio).pooler_output
    text = shared_model.get_input_embeddings()(torch.tensor([1, 10, 7, 8, 9]))
    torch.testing.assert_close(shared_model(**inputs).query[0], torch.cat([heard, text]).mean(0))


def test_the_query_of_the_text_alone_does_not_depend_on_the_audio() -> None:
    pool = {"pool_size": 12, "num_prompts": 4, "query_source": "text"}
    model = tiny_model(prompt_pool_config=pool).eval()
    inputs, other = make_inputs(model, [[clip(1.0)]]), make_inputs(model, [[clip(2.0, seed=1)]])
    text = model.get_input_embeddings()(torch.tensor([1, 10, 7, 8, 9]))
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).query[0], text.mean(0))
        torch.testing.assert_close(model(**other).query[0], text.mean(0))


def test_each_row_of_a_batch_gets_the_query_of_its_own_adapter() -> None:
    model = tiny_model(prompt_pool_config={"pool_size": 12, "num_prompts": 4, "query_source": "text"})
    model.add_adapter(ListenPromptPoolConfig(pool_size=12, num_prompts=4), "all")
    inputs = make_inputs(model.eval(), ROWS)
    names = ["all", "default", "all", "default"][: len(ROWS)]
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=names).query
        of_all, of_text = (model(**inputs, adapter_names=[n] * len(ROWS)).query for n in ("all", "default"))
    assert not torch.allclose(of_all, of_text)
    expected = [of_all[i] if name == "all" else of_text[i] for i, name in enumerate(names)]
    torch.testing.assert_close(mixed, torch.stack(expected))


def test_values_of_a_fresh_model_start_at_embeddings_of_distinct_tokens() -> None:
    pool = ListenPromptPoolConfig(pool_size=12, num_prompts=4, value_start="vocabulary")
    model = tiny_model()
    model.add_adapter(pool, "fresh")
    table = model.get_input_embeddings().weight
    tokens = [int((table == value).all(-1).nonzero()) for value in model.adapters["fresh"].prompt_pool.values]
    assert len(set(tokens)) == 12


def test_encoder_frames_replace_features(shared_model: ListenForConditionalGeneration) -> None:
    inputs = make_inputs(shared_model, ROWS)
    audio = {k: inputs.pop(k) for k in list(inputs) if k.startswith("input_") and k != "input_ids"}
    encoded = shared_model.encode_audio(**audio)
    stored = shared_model(**inputs, **encoded).logits
    assert torch.equal(stored, shared_model(**inputs, **audio).logits)
    with pytest.raises(ValueError, match="not both"):
        shared_model(**inputs, **encoded, **audio)


def test_more_than_thirty_seconds_become_chunks_in_order(shared_model: ListenForConditionalGeneration) -> None:
    long = clip(61.0, 5)
    inputs = make_inputs(shared_model, [[long]])
    assert inputs["input_features"].shape[0] == 3
    pieces = make_inputs(shared_model, [[long[:480000], long[480000:960000], long[960000:]]])
    assert torch.equal(inputs["input_ids"], pieces["input_ids"])
    torch.testing.assert_close(last_logits(shared_model, inputs), last_logits(shared_model, pieces), **TOLERANCE)


def test_padding_to_30_s_keeps_the_number_of_embeddings() -> None:
    model, padded = tiny_model(), tiny_model(pad_to_30s=True)
    from listen.feature_extraction_listen import ListenFeatureExtractor

    sound = [clip(1.7).numpy()]
    short = ListenFeatureExtractor()(sound, sampling_rate=16000, return_tensors="pt")
    full = ListenFeatureExtractor(pad_to_30s=True)(sound, sampling_rate=16000, return_tensors="pt")
    assert full["input_features"].shape[-1] == 3000
    assert padded.get_audio_features(**full).lengths.tolist() == model.get_audio_features(**short).lengths.tolist()


def test_a_model_without_audio_encoder_or_pool() -> None:
    model = tiny_model(audio_config=None, prompt_pool_config=None)
    from listen.feature_extraction_listen import ListenFeatureExtractor

    audio = ListenFeatureExtractor(num_fbank_bins=None)([clip(1.0).numpy()], sampling_rate=16000, return_tensors="pt")
    n = int(model.get_audio_features(**audio).lengths)
    ids = torch.tensor([[1, *[AUDIO_ID] * n, 5]])
    assert model(input_ids=ids, **audio).prompt_indices is None
    with pytest.raises(ValueError, match="no prompt pool"):
        model(input_ids=torch.tensor([[PROMPT_ID, *ids[0].tolist()]]), **audio)


def test_gradient_checkpointing_changes_no_gradient(model: ListenForConditionalGeneration) -> None:
    inputs = make_inputs(model, ROWS)
    labels = _labels(inputs["input_ids"])
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model.adapters.eval()  # dropout would differ between the two runs
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    checkpointed = [m for m in model.language_model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert any(m.training for m in checkpointed)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_bf16_backbones_carry_an_fp32_adapter(tmp_path: object) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = ListenForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.adapters.parameters()} == {torch.float32}
    assert {p.dtype for p in loaded.language_model.parameters()} == {torch.bfloat16}
    inputs = make_inputs(loaded, ROWS)
    output = loaded(**inputs, labels=_labels(inputs["input_ids"]))
    output.loss.backward()
    assert loaded.adapters["default"].prompt_pool.values.grad.dtype == torch.float32
    expected = model(**inputs, labels=_labels(inputs["input_ids"])).loss
    torch.testing.assert_close(output.loss.float(), expected, atol=0.1, rtol=0.05)


def test_attention_kinds_reach_the_backbones_that_take_them(tmp_path: object) -> None:
    """The LLM may run attention that BEATs, with its additive position bias, cannot."""
    tiny_model().save_pretrained(tmp_path)
    model = ListenForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flex_attention")
    kinds = {name: getattr(model, name).config._attn_implementation for name in ("language_model", "audio_encoder")}
    assert kinds == {"language_model": "flex_attention", "audio_encoder": "sdpa"}


def test_the_model_without_a_head_gives_the_llms_hidden_states(shared_model: ListenForConditionalGeneration) -> None:
    bare = ListenModel(tiny_config()).eval()
    bare.load_state_dict(shared_model.state_dict())
    inputs = make_inputs(shared_model, ROWS)
    hidden = bare(**inputs).last_hidden_state
    torch.testing.assert_close(bare.language_model.lm_head(hidden), shared_model(**inputs).logits, **TOLERANCE)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda i: i.pop("input_features"), ValueError, "no audio was given"),
        (lambda i: i.pop("input_values"), ValueError, "input_values is missing"),
        (lambda i: i.update(audios=1), TypeError, "audios"),
        (lambda i: i["input_ids"].__setitem__((0, -1), AUDIO_ID), ValueError, "audio placeholders"),
        (lambda i: i.update(adapter_names=["default"]), ValueError, "adapter_names"),
        (lambda i: i.update(adapter_names=["default", "nobody"]), ValueError, "nobody"),
        (lambda i: i.update(inputs_embeds=torch.zeros(2, 3, 48)), ValueError, "one of them"),
    ],
)
def test_bad_input_is_named(
    shared_model: ListenForConditionalGeneration, change: object, error: type, message: str
) -> None:
    inputs = make_inputs(shared_model, [[clip(1.0)], [clip(0.5)]])
    change(inputs)
    with pytest.raises(error, match=message):
        shared_model(**inputs)


def test_audio_is_never_ignored_beside_embeddings(shared_model: ListenForConditionalGeneration) -> None:
    inputs = make_inputs(shared_model, [[clip(1.0)]])
    embeds = shared_model.get_input_embeddings()(torch.tensor([[1, 2, 3]]))
    audio = {k: v for k, v in inputs.items() if k.startswith("input_") and k != "input_ids"}
    with pytest.raises(ValueError, match="inputs_embeds"):
        shared_model(inputs_embeds=embeds, **audio)


def test_the_llm_is_never_resized(shared_model: ListenForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="never resized"):
        shared_model.resize_token_embeddings(200)
    assert shared_model.get_input_embeddings().num_embeddings < AUDIO_ID


def test_every_parameter_is_initialised() -> None:
    """A model built on the meta device and then initialised has no weight left to chance."""
    with torch.device("meta"):
        model = ListenForConditionalGeneration(tiny_config())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    assert [name for name, p in model.named_parameters() if not p.isfinite().all()] == []


def test_a_self_contained_checkpoint_round_trips(tmp_path: object) -> None:
    model = tiny_model(prompt_pool_config={"pool_size": 9, "num_prompts": 3, "center_query": True})
    model.adapters["default"].prompt_pool.query_mean.normal_()
    model.save_pretrained(tmp_path)
    inputs = make_inputs(model, ROWS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_frames_of_one_encoder_at_the_rate_of_another_keep_their_mean() -> None:
    states = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])
    same, same_mask = resample_frames(states, mask, Fraction(1))
    assert same is states and same_mask is mask
    slower, slower_mask = resample_frames(states, mask, Fraction(3))
    assert slower_mask.sum(-1).tolist() == [4, 3]
    torch.testing.assert_close(slower[0], states[0].unflatten(0, (4, 3)).mean(1))
    torch.testing.assert_close(slower[1, 2], states[1, 6])  # the last one has a single real frame under it
    faster, faster_mask = resample_frames(states, mask, Fraction(1, 2))
    assert faster_mask.sum(-1).tolist() == [24, 14]
    torch.testing.assert_close(faster[0], states[0].repeat_interleave(2, 0))


@pytest.mark.parametrize("step", [Fraction(6, 5), Fraction(5, 12), Fraction(7, 3)])
def test_resampled_frames_do_not_depend_on_batch_mates(step: Fraction) -> None:
    states = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 50, [1] * 23 + [0] * 27])
    batch, batch_mask = resample_frames(states, mask, step)
    alone, alone_mask = resample_frames(states[1:, :23], mask[1:, :23], step)
    assert alone_mask.all() and alone.shape[1] == int(batch_mask[1].sum()) == math.ceil(23 / step)
    torch.testing.assert_close(batch[1][batch_mask[1]], alone[0], atol=1e-6, rtol=0)
    assert alone.min() >= states[1, :23].min() and alone.max() <= states[1, :23].max()


@pytest.mark.parametrize("kind", ["wav2vec2-base", "w2v-bert", "ast", "moonshine"])
def test_a_model_with_another_speech_encoder_hears(kind: str, tmp_path: object) -> None:
    model = tiny_model(speech_config=ENCODERS[kind])
    processor = tiny_processor(model.config)
    texts, clips = ["<|audio|>one", "<|audio|><|audio|>two"], [clip(1.3), clip(11.0, 1), clip(0.1, 2)]
    inputs = processor(texts, [c.numpy() for c in clips], 16000)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
        alone = model(**processor(texts[:1], clips[0].numpy(), 16000)).logits[0, -1]
        other = model(**processor(texts[:1], clip(1.3, 7).numpy(), 16000)).logits[0, -1]
    torch.testing.assert_close(logits, alone, atol=2e-4, rtol=1e-4)
    assert (alone - other).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    loaded = ListenForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits[0, -1], logits, atol=1e-5, rtol=0)


def test_another_speech_encoder_is_frozen_or_learns_as_a_whole() -> None:
    inputs = None
    for trainable in (["adapter"], ["adapter", "speech_encoder"]):
        model = tiny_model(speech_config={**ENCODERS["w2v-bert"], "layerdrop": 0.5}, trainable=trainable).train()
        processor = tiny_processor(model.config)
        inputs = processor("<|audio|>one", clip(2.0).numpy(), 16000)
        torch.manual_seed(0)
        heard = [model.encode_audio(inputs["input_features"], None, inputs["input_values"]) for _ in range(5)]
        first, *others = [frames.speech_hidden_states for frames in heard]
        learns = "speech_encoder" in trainable
        assert any(not torch.equal(first, other) for other in others) == learns  # layers dropped, positions masked
        assert first.requires_grad == learns == model.speech_encoder.training
    model(**inputs, labels=_labels(inputs["input_ids"])).loss.backward()
    assert any(parameter.grad is not None for parameter in model.speech_encoder.parameters())


def test_the_model_without_head_takes_the_same_inputs() -> None:
    headless, whole = (
        list(inspect.signature(cls.forward).parameters) for cls in (ListenModel, ListenForConditionalGeneration)
    )
    assert headless[:2] == ["self", "input_ids"]
    assert headless == [name for name in whole if name not in {"labels", "logits_to_keep", "num_items_in_batch"}]


def test_only_the_model_with_a_head_generates() -> None:
    assert ListenForConditionalGeneration.can_generate() and not ListenModel.can_generate()
