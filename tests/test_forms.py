"""Forms of the pool: each makes a training step, in which all of its parameters get gradients, and answers."""

from __future__ import annotations

import pytest
import torch
from conftest import clip, make_inputs, tiny_model
from fixtures_training import tiny_processor

from listen.chat_listen import beginnings_of_answers
from listen.data.collator import ListenCollator
from listen.modeling_listen import ListenForConditionalGeneration

GATED = {"gate_temperature": 0.3}
FORMS = {
    "projected": {"query_head": "projected", **GATED},
    "attention": {"query_head": "attention", "query_source": "text", **GATED},
    "shared": {"shared_prompts": 2},
    "straight_through": {"straight_through": True, **GATED},
    "balanced": {"balance_weight": 0.01},
    "layers": {"form": "layers", "straight_through": True, **GATED},
}


def build(**pool: object) -> ListenForConditionalGeneration:
    """A tiny model with a pool of 12 prompts."""
    return tiny_model(prompt_pool_config={"pool_size": 12, "num_prompts": 4, **pool})


def batch_of(model: ListenForConditionalGeneration, num_prompts: int = 4) -> dict[str, torch.Tensor]:
    """Two rows of one clip."""
    batch = make_inputs(model, [[clip(0.7)], [clip(1.2, seed=1)]], num_prompts)
    if model.config.prompt_pool_config.form == "layers":
        batch["attention_mask"] = batch["attention_mask"] * (batch["input_ids"] != model.config.prompt_token_id)
    return batch


@pytest.mark.parametrize("form", FORMS)
def test_a_form_trains_and_answers(form: str) -> None:
    """Also with fewer prompts than those that are always there."""
    model = build(**FORMS[form]).train()
    batch = batch_of(model)
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # in the first step, prompts in the layers have no effect, hence no gradient of their reads
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    pool = model.adapters["default"].prompt_pool
    assert all(p.grad is not None and p.grad.any() and p.grad.isfinite().all() for p in pool.parameters())
    answers = [model.eval().generate(**batch_of(model, k), max_new_tokens=3, do_sample=False) for k in (4, 1)]
    assert all(answer.shape[1] > 0 for answer in answers)


def test_forms_start_as_the_plain_pool() -> None:
    """The start of a query head, and straight-through weights, leave logits as they are, bit for bit."""
    for source, plain, changed in (
        ("text", {}, {"straight_through": True, **GATED}),
        ("text", {}, {"balance_weight": 0.01}),
        ("text", GATED, {"query_head": "projected", **GATED}),
        ("all", GATED, {"query_head": "attention", **GATED}),
    ):
        models = [build(query_source=source, **fields) for fields in (plain, changed)]
        models[1].load_state_dict(models[0].state_dict(), strict=False)
        logits = [model(**batch_of(model)).logits for model in models]
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_shared_prompts_come_first() -> None:
    """Every row has them, and picks the rest among the others."""
    model = build(shared_prompts=2)
    indices = model(**batch_of(model)).prompt_indices  # (batch, k)
    assert indices[:, :2].tolist() == [[0, 1]] * 2 and indices[:, 2:].min() >= 2


def test_balance_loss_is_least_for_uniform_use() -> None:
    """Of equal keys, the loss is its weight, as softmax shares are 1/P; a query at a picked key raises it."""
    pool = build(balance_weight=1.0).adapters["default"].prompt_pool
    counts, query = torch.tensor([4, 4]), torch.ones(2, pool.width)
    with torch.no_grad():
        pool.keys.fill_(1.0)
        even = pool(query, counts)[1].balance_loss
        pool.keys[4:].fill_(-1.0)
        uneven = pool(query, counts)[1].balance_loss
    torch.testing.assert_close(even, torch.ones(2))
    assert (uneven > 2.0).all()


def test_prompts_near_the_response_stand_at_the_end_of_the_turn() -> None:
    """In training and in generation alike; the rest of the row is as before."""
    audio = [{"array": clip(0.5).numpy(), "sampling_rate": 16000}]
    rows = [{"id": "a", "task": "asr", "audio": audio, "response": ["y"]}]
    processors = [tiny_processor(build(prompt_place=place).config) for place in ("first", "last")]
    assert [processor.to_dict()["prompts_last"] for processor in processors] == [False, True]
    prompt = processors[0].prompt_token_id
    for options in ({"train": True}, {"for_generation": True}):
        first, last = (ListenCollator(processor, num_prompts=4, **options)(rows) for processor in processors)
        rest = [i for i in first["input_ids"][0].tolist() if i != prompt]
        answer = int((first["labels"] != -100).sum()) if "labels" in first else 0
        start = beginnings_of_answers(processors[1], [rest[: len(rest) - answer]])[0]
        assert last["input_ids"][0].tolist() == rest[:start] + [prompt] * 4 + rest[start:] and 0 < start < len(rest)
    batch = ListenCollator(processors[1], train=True)(rows)
    assert build(prompt_place="last").train()(**batch).loss.isfinite()
    with pytest.raises(ValueError, match="end with the beginning of an answer"):
        processors[1]("hello", num_prompts=2)
