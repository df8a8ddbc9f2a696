"""Any causal LLM: what holds for one family holds for all, each with its own tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import clip
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
    for row, chat in enumerate(CHATS):
        assert torch.equal(together[row], answers(model, inputs_of(processor, [chat]), **settings)[0])


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
