"""Any causal LLM: what holds for one family holds for all, each with its own tokenizer and chat template."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import clip, make_inputs, tiny_config, tiny_model
from fixtures_language_models import FAMILIES, family_model, family_tokenizer
from transformers import AutoModel, BatchFeature, LogitsProcessor

from listen.configuration_listen import ListenConfig
from listen.language_models_listen import mean_embedding
from listen.modeling_listen import ListenForConditionalGeneration
from listen.processing_listen import ListenProcessor

NEW = 6
SOUNDS = [clip(1.3, 1), clip(0.5, 2), clip(0.9, 3)]


def said(*content: object, role: str = "user") -> dict[str, object]:
    items = [
        {"type": "text", "text": item}
        if isinstance(item, str)
        else {"type": "audio", "array": item.numpy(), "sampling_rate": 16000}
        for item in content
    ]
    return {"role": role, "content": items}


CHATS = [
    [said(SOUNDS[0], "What is being said?")],
    [said("Describe the quick brown fox.")],
    [said(SOUNDS[1], "the"), said("speech", role="assistant"), said("Same speaker as in ", SOUNDS[2], "?")],
]

pytestmark = pytest.mark.filterwarnings("ignore:You have set `compile_config`")
every_family = pytest.mark.parametrize("family", FAMILIES)


def inputs_of(processor: ListenProcessor, chats: list, num_prompts: int = 3) -> BatchFeature:
    return processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True, num_prompts=num_prompts)


def logits(model: ListenForConditionalGeneration, inputs: BatchFeature) -> torch.Tensor:
    """`(batch, 3, vocabulary)` of the last positions, which are real in every row."""
    with torch.no_grad():
        return model(**inputs).logits[:, -3:]


def answers(model: ListenForConditionalGeneration, inputs: BatchFeature, **kwargs: object) -> torch.Tensor:
    kwargs = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **kwargs}
    return model.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :]


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()) + 1e-6)


# ---------------------------------------------------------------------- tokens


@every_family
def test_placeholders_are_reserved_tokens_and_the_llm_is_never_resized(family: str) -> None:
    model, processor = family_model(family)
    ids = [processor.audio_token_id, processor.prompt_token_id]
    pristine = family_tokenizer(family)
    assert model.get_input_embeddings().num_embeddings == len(pristine) + FAMILIES[family].spare_rows
    reserved = FAMILIES[family].reserved
    assert ids == (pristine.convert_tokens_to_ids(list(reserved)) if reserved else [len(pristine), len(pristine) + 1])
    assert len(processor.tokenizer) == len(pristine) + (0 if reserved else 2)


@every_family
def test_chats_are_written_as_the_llms_own_tokenizer_writes_them(family: str) -> None:
    _, processor = family_model(family)
    pristine = family_tokenizer(family)
    chat = [{"role": "user", "content": "What is being said?"}]
    mine = inputs_of(processor, chat, num_prompts=0)["input_ids"][0].tolist()
    if FAMILIES[family].template is None:
        assert processor.tokenizer.decode(mine) == "USER: What is being said?\nASSISTANT:"
    else:
        theirs = pristine.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
        assert mine == theirs["input_ids"]
    assert [mine[0] == pristine.bos_token_id, mine[1] == pristine.bos_token_id] == [FAMILIES[family].writes_bos, False]


# ---------------------------------------------------------------------- the invariants


@every_family
def test_batched_rows_equal_single_rows(family: str) -> None:
    """0, 1 and 2 clips, one turn and three: logits, greedy ids and text."""
    model, processor = family_model(family)
    batch = inputs_of(processor, CHATS)
    together, texts = logits(model, batch), answers(model, batch)
    for row, chat in enumerate(CHATS):
        single = inputs_of(processor, [chat])
        assert_near(together[row], logits(model, single)[0])
        alone = answers(model, single)[0]
        assert texts[row].tolist() == alone.tolist()
        assert processor.decode(texts[row]) == processor.decode(alone)


@every_family
def test_logits_move_when_the_audio_moves(family: str) -> None:
    model, processor = family_model(family)
    moved = [[said(clip(1.3, 7), "What is being said?")]]
    mine, other = inputs_of(processor, CHATS[:1]), inputs_of(processor, moved)
    assert torch.equal(mine["input_ids"], other["input_ids"])
    before, after = logits(model, mine), logits(model, other)
    assert (before - after).abs().max() > 1e-4 * before.abs().max()


@every_family
def test_text_alone_equals_the_base_llm_bit_for_bit(family: str) -> None:
    model, processor = family_model(family)
    inputs = dict(inputs_of(processor, [CHATS[1], [said("speech")]], num_prompts=0))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model.language_model(**inputs).logits)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    placeholders = [processor.audio_token_id, processor.prompt_token_id]
    unsaid = [token_id for token_id in placeholders if token_id < model.config.get_text_config().vocab_size]
    # transformers' own balancing loss fails beside a cache
    silent = {"output_router_logits": False} if "output_router_logits" in FAMILIES[family].config else {}
    base = model.language_model.generate(**inputs, suppress_tokens=unsaid or None, **settings, **silent)
    assert torch.equal(model.generate(**inputs, **settings), base)


@every_family
def test_text_beside_audio_enters_as_the_llm_would_read_it(family: str) -> None:
    """The first hidden states at the places of text are those of the LLM reading ids, to the bit."""
    model, processor = family_model(family)
    inputs = inputs_of(processor, CHATS[:1])
    ids = inputs["input_ids"]
    is_text = ~torch.isin(ids, torch.tensor([processor.audio_token_id, processor.prompt_token_id]))
    with torch.no_grad():
        mine = model(**inputs, output_hidden_states=True).hidden_states[0]
        theirs = model.language_model(ids.masked_fill(~is_text, 0), output_hidden_states=True).hidden_states[0]
    if mine.dim() == 4:  # Gemma 3n carries several streams, the first of which is the embedding
        mine, theirs = mine[0], theirs[0]
    assert torch.equal(mine[is_text], theirs[is_text])
    assert not torch.equal(mine[~is_text], theirs[~is_text])


@every_family
def test_several_return_sequences_keep_their_clips(family: str) -> None:
    model, processor = family_model(family)
    settings = {"num_beams": 2, "num_return_sequences": 2}
    together = answers(model, inputs_of(processor, CHATS), **settings)
    for row in (0, 2):
        alone = answers(model, inputs_of(processor, CHATS[row : row + 1]), **settings)
        assert torch.equal(together[2 * row : 2 * row + 2], alone)


@every_family
@pytest.mark.parametrize("mode", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["none", "static"])
def test_the_cache_changes_no_answer(family: str, mode: dict[str, object]) -> None:
    """Sliding windows, shorter than the input, included."""
    model, processor = family_model(family)
    inputs = inputs_of(processor, CHATS)
    assert torch.equal(answers(model, inputs), answers(model, inputs, **mode))


@every_family
def test_an_adapter_learns_and_returns_while_the_llm_stays_frozen(family: str, tmp_path: Path) -> None:
    template, processor = family_model(family)
    names = ("speech_encoder", "audio_encoder", "language_model")
    for name in names:
        getattr(template, name).save_pretrained(tmp_path / name)
    ids = {"audio_token_id": processor.audio_token_id, "prompt_token_id": processor.prompt_token_id}
    parts = {part: getattr(template.config, part).to_diff_dict() for part in ("connector_config", "prompt_pool_config")}
    config = ListenConfig.from_backbones(**{name: str(tmp_path / name) for name in names}, **parts, **ids)
    model = ListenForConditionalGeneration.from_backbones(config)
    _check_start(model)
    inputs = inputs_of(processor, CHATS)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    model.train()
    output = model(**inputs, labels=labels)
    output.loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.eval()
    for name, weight in template.language_model.state_dict().items():
        assert torch.equal(model.language_model.get_parameter(name) if "." in name else weight, weight), name
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "adapter"), inputs), logits(model, inputs))
    assert not torch.equal(logits(template, inputs), logits(model, inputs))


def _check_start(model: ListenForConditionalGeneration) -> None:
    """Fresh prompts lie around the mean of what the LLM's embedding layer gives, its scale included."""
    layer = model.get_input_embeddings()
    mean = layer(torch.arange(layer.num_embeddings)).mean(0)
    torch.testing.assert_close(mean_embedding(model.language_model), mean, rtol=1e-4, atol=1e-5)
    prompts = model.adapters["default"].prompt_pool.values
    assert (prompts - mean).abs().max() < 6 * 0.02  # the initial spread is 0.02


# ---------------------------------------------------------------------- generation under constraints


class Forced(LogitsProcessor):
    """Makes every answer begin with given ids. It looks at the ids that it is shown, as such processors do."""

    def __init__(self, length: int, ids: list[int]) -> None:
        self.length, self.ids = length, ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.length
        assert int(input_ids.max()) < scores.shape[1]  # no id is above the vocabulary
        if step >= len(self.ids):
            return scores
        return torch.full_like(scores, -torch.inf).index_fill(-1, torch.tensor([self.ids[step]]), 0.0)


def words(processor: ListenProcessor, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


@every_family
def test_processors_are_blind_to_placeholders(family: str) -> None:
    """Repetition penalty and bad words act, and on each row as on the row alone."""
    model, processor = family_model(family)
    batch = inputs_of(processor, CHATS)
    plain = answers(model, batch)
    settings = {"repetition_penalty": 1.6, "bad_words_ids": [[int(plain[0, 0])], plain[2, :2].tolist()]}
    together = answers(model, batch, **settings)
    assert together[0, 0] != plain[0, 0] and together[2, :2].tolist() != plain[2, :2].tolist()
    about = {"encoder_repetition_penalty": 1.3, "encoder_no_repeat_ngram_size": 2}  # what is said of the input itself
    told = answers(model, batch, **about)
    for row, chat in enumerate(CHATS):
        assert torch.equal(together[row], answers(model, inputs_of(processor, [chat]), **settings)[0])
        assert torch.equal(told[row], answers(model, inputs_of(processor, [chat]), **about)[0])


@every_family
def test_answers_can_be_constrained(family: str) -> None:
    model, processor = family_model(family)
    batch = inputs_of(processor, CHATS)
    length, choices = batch["input_ids"].shape[1], [words(processor, "yes speech"), words(processor, "no fox")]
    end = processor.tokenizer.eos_token_id

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        said_ids = ids.tolist()[length:]
        going = [c for c in choices if c[: len(said_ids)] == said_ids]
        return sorted({c[len(said_ids)] if len(c) > len(said_ids) else end for c in going}) or [end]

    free = {"max_new_tokens": 30, "min_new_tokens": 0}
    chosen = answers(model, batch, prefix_allowed_tokens_fn=allowed, **free)
    assert set(processor.batch_decode(chosen, skip_special_tokens=True)) <= {"yes speech", "no fox"}
    forced = answers(model, batch, logits_processor=[Forced(length, choices[0])], **free)
    assert all(text.startswith("yes speech") for text in processor.batch_decode(forced, skip_special_tokens=True))


@every_family
def test_no_answer_holds_a_placeholder(family: str) -> None:
    """Not even where the LLM has a score for it, and would love to say it."""
    model, processor = family_model(family)
    ids = [processor.audio_token_id, processor.prompt_token_id]
    inside = [token_id for token_id in ids if token_id < model.config.get_text_config().vocab_size]
    bias = {"sequence_bias": {(token_id,): 1e4 for token_id in inside}} if inside else {}
    assert not torch.isin(answers(model, inputs_of(processor, CHATS), **bias), torch.tensor(ids)).any()


@every_family
def test_prompt_lookup_copies_text_and_never_audio(family: str) -> None:
    """The answer is forced to repeat what stands before the clip, so that look-up proposes the clip itself."""
    model, processor = family_model(family)
    inputs = inputs_of(processor, [[said("the fox", SOUNDS[0], "the fox")]])
    force = {"logits_processor": [Forced(inputs["input_ids"].shape[1], words(processor, "the fox"))]}
    expected = answers(model, inputs, max_new_tokens=12, **force)
    assert torch.equal(answers(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=4, **force), expected)


def test_stop_strings_work_with_ids_above_the_vocabulary() -> None:
    model, processor = family_model("granite")
    inputs = inputs_of(processor, CHATS[:1])
    assert processor.audio_token_id >= model.config.get_text_config().vocab_size
    force = {"logits_processor": [Forced(inputs["input_ids"].shape[1], words(processor, "the fox jumps"))]}
    ended = answers(
        model, inputs, max_new_tokens=30, min_new_tokens=0, stop_strings=["fox"], tokenizer=processor.tokenizer, **force
    )
    assert processor.decode(ended[0]) == "the fox"


# ---------------------------------------------------------------------- experts


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_frozen_routers_add_no_loss(family: str) -> None:
    """The balance of frozen experts cannot be learned: the loss is that of the next token alone."""
    model, processor = family_model(family)
    inputs = inputs_of(processor, CHATS[:1])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    quiet, asked = model(**inputs, labels=labels), model(**inputs, labels=labels, output_router_logits=True)
    assert model.config.text_config.output_router_logits  # the LLM alone would add its balancing loss
    assert quiet.router_logits is None and len(asked.router_logits) == 2
    kept = F.cross_entropy(quiet.logits[0, -3:-1], labels[0, -2:])
    torch.testing.assert_close(quiet.lm_loss, kept)
    assert torch.equal(asked.loss, quiet.loss)


# ---------------------------------------------------------------------- LLMs with ways of their own


def settings(**values: object) -> dict[str, object]:
    return values


LINEAR_AND_FULL = ["linear_attention", "full_attention"]
LINEAR = settings(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, head_dim=12
)
INDEXER = settings(
    indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=12, indexer_budget=64, indexer_compress_ratio=4
)
RUNS = settings(ple_layer_ids=[1], ple_embed_dim=8, ngram_vocab_size_base=101, heads_per_ngram=2, split_ngram_parts=1)
SPARSE = settings(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16, hc_lowrank=8
)
OTHERS = {
    "bloom": {},  # counts positions by a flat mask, with a static cache too
    "falcon_h1": settings(  # layers scale by what the module above them sets
        **settings(mamba_n_heads=12, mamba_d_head=8, mamba_d_state=8, mamba_d_ssm=96, mamba_chunk_size=8, head_dim=12),
        ssm_multipliers=[0.5, 2.0, 0.7, 1.5, 0.9],
    ),
    "gpt2": {},  # learned positions; layers take the cache by position
    "minimax": settings(  # makes a cache of its own
        head_dim=12, num_local_experts=4, block_size=8, layer_types=LINEAR_AND_FULL[::-1]
    ),
    "opt": settings(word_embed_proj_dim=16, ffn_dim=64, dropout=0.5),  # narrow embeddings; layers that drop out
    "qwen4_exp_text": settings(layer_types=LINEAR_AND_FULL, **LINEAR, **INDEXER, **RUNS, **SPARSE),
}
LONG_ROPE = settings(
    original_max_position_embeddings=20,
    rope_parameters=settings(
        rope_type="longrope",
        rope_theta=1e4,
        short_factor=[1.0] * 6,
        long_factor=[8.0] * 6,
        original_max_position_embeddings=20,
    ),
)
every_other = pytest.mark.parametrize("model_type", OTHERS)
ROWS = [[clip(1.3, 1), clip(0.6, 5)], [], [clip(0.9, 2)]]


@lru_cache
def other_model(model_type: str) -> ListenForConditionalGeneration:
    own = {"phi3": LONG_ROPE, **OTHERS}.get(model_type, {})
    return tiny_model(text_config={**tiny_config().text_config.to_diff_dict(), **own, "model_type": model_type})


def rows_of(model: ListenForConditionalGeneration, rows: range = range(3)) -> BatchFeature:
    return BatchFeature(make_inputs(model, [ROWS[i] for i in rows], text=[[10 + i, 7, 8, 9] for i in rows]))


@every_other
def test_others_hear_in_batches_and_with_any_cache(model_type: str) -> None:
    model = other_model(model_type)
    batch = rows_of(model)
    together, expected = logits(model, batch), answers(model, batch)
    for row in range(3):
        assert_near(together[row], logits(model, rows_of(model, range(row, row + 1)))[0])
    for mode in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(answers(model, batch, **mode), expected)


@every_other
def test_others_return_from_a_checkpoint_with_everything(model_type: str, tmp_path: Path) -> None:
    model = other_model(model_type)
    model.save_pretrained(tmp_path)
    again = ListenForConditionalGeneration.from_pretrained(tmp_path)
    saved, weights = model.state_dict(), again.state_dict()
    assert saved.keys() == weights.keys() and all(torch.equal(weights[name], saved[name]) for name in saved)
    for weight in [*again.parameters(), *again.buffers()]:  # kernels round by the alignment, which a file changes
        weight.data = weight.data.clone()
    assert torch.equal(logits(again, rows_of(model)), logits(model, rows_of(model)))


@every_other
def test_others_give_the_same_gradient_under_checkpointing(model_type: str) -> None:
    model = copy.deepcopy(other_model(model_type))
    inputs = rows_of(model)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    grads = []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        model.zero_grad()
        model.train().adapters.eval()  # the adapter's dropout would differ
        output = model(**inputs, labels=labels)
        assert output.past_key_values is None  # training reads none
        output.loss.backward()
        grads.append(model.adapters["default"].connector.projection.weight.grad)
    assert_near(grads[1], grads[0])


def test_a_cache_that_the_input_outgrows_is_made_anew() -> None:
    """As by Phi 3 itself, which turns all positions by other angles behind a limit. The audio is heard again."""
    model = other_model("phi3")
    text = make_inputs(model, [[]], num_prompts=0, text=[[7, 8, 9, 11, 12, 13]])
    longer = {"max_new_tokens": 16, "min_new_tokens": 16}
    expected = model.language_model.generate(**text, do_sample=False, **longer)[:, 7:]
    assert torch.equal(answers(model, text, **longer), expected)
    heard = rows_of(model, range(2, 3))
    assert heard["input_ids"].shape[1] < 20
    assert torch.equal(answers(model, heard, **longer), answers(model, heard, use_cache=False, **longer))


def test_prompts_are_not_selected_by_a_part_of_the_input() -> None:
    model = other_model("gpt2")
    with pytest.raises(ValueError, match="8 positions.* 4 .*prefill_chunk_size"):
        answers(model, rows_of(model, range(1, 2)), prefill_chunk_size=4)


def test_an_llm_that_cannot_take_back_a_token_is_not_assisted() -> None:
    model = other_model("falcon_h1")
    with pytest.raises(ValueError, match="not supported with stateful models"):
        answers(model, rows_of(model, range(1)), prompt_lookup_num_tokens=2)


def test_an_llm_without_an_attention_cache_says_how_to_generate() -> None:
    model = other_model("mamba")
    batch = rows_of(model)
    with pytest.raises(ValueError, match="'mamba'.*use_cache=False"):
        answers(model, batch)
    together = answers(model, batch, use_cache=False)
    for row in range(3):
        assert torch.equal(together[row], answers(model, rows_of(model, range(row, row + 1)), use_cache=False)[0])


def test_an_llm_that_is_blind_to_masks_takes_no_padding() -> None:
    model = other_model("rwkv")
    with pytest.raises(ValueError, match="'rwkv'.*padding.*one row at a time"):
        model(**rows_of(model))
    assert logits(model, rows_of(model, range(1))).isfinite().all()


def test_an_llm_that_reads_ids_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="'cpmant'.*embeddings.*choose another"):
        other_model("cpmant")
