"""Prompts in the LLM's layers: the formula, generation, rows with different k, several adapters, checkpoints."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from conftest import AUDIO_ID, PROMPT_ID, clip, make_inputs, tiny_model
from fixtures_training import check_compiled, tiny_processor
from test_training_layer_rates import trainer_of
from transformers import StaticCache

from listen import ListenForConditionalGeneration, ListenPromptPoolConfig
from listen.data import ListenCollator
from listen.layer_prompts_listen import LayerPrompts
from listen.modeling_listen import ListenModel
from listen.modeling_prompt_pool import STRATEGIES

ROWS = [[clip(1.3, 1), clip(0.6, 5)], [], [clip(0.9, 2)]]
COUNTS = [4, 0, 2]
POOL = {"pool_size": 12, "num_prompts": 4, "form": "layers", "gate_temperature": 0.3, "center_query": True}


def layer_model(dropout: float = 0.1, **pool: object) -> ListenForConditionalGeneration:
    """A model whose prompts have an effect, as after training; `dropout` is the connector's."""
    model = tiny_model(prompt_pool_config={**POOL, **pool}, connector_config={"dropout": dropout})
    with torch.no_grad():
        model.adapters["default"].prompt_pool.writes.normal_(std=0.08)
    return model


@pytest.fixture(scope="module")
def shared() -> ListenForConditionalGeneration:
    """A `layer_model` that no test may change."""
    return layer_model()


def inputs_of(
    model: ListenForConditionalGeneration, rows: list, counts: list[int], text: list[list[int]] | None = None
) -> dict[str, torch.Tensor]:
    """Inputs as the processor of such a model makes them: placeholders are masked."""
    inputs = make_inputs(model, rows, counts, text)
    inputs["attention_mask"][inputs["input_ids"] == PROMPT_ID] = 0
    return inputs


def alone(model: ListenForConditionalGeneration, row: int) -> dict[str, torch.Tensor]:
    """The inputs of one row of the batch."""
    return inputs_of(model, [ROWS[row]], [COUNTS[row]], text=[[10 + row, 7, 8, 9]])


def answers(model: ListenForConditionalGeneration, inputs: dict, **kwargs: object) -> torch.Tensor:
    kwargs = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **kwargs}
    return model.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :]


def labelled(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    return {**inputs, "labels": labels}


def test_prompts_add_what_the_formula_says(shared: ListenForConditionalGeneration) -> None:
    pool = shared.adapters["default"].prompt_pool
    generator = torch.Generator().manual_seed(3)
    x, output = (torch.randn(3, 3, 48, generator=generator) for _ in range(2))  # (batch, sequence, width)
    rows, indices, weights = [2, 0], torch.tensor([[4, 7], [1, 0]]), torch.tensor([[1.5, 0.5], [1.0, 0.0]])
    added = LayerPrompts(pool, torch.tensor(rows), indices, weights).add(1, x, output)
    assert torch.equal(added[1], output[1])
    for place, row in enumerate(rows):
        for position in range(3):
            state = x[row, position] / x[row, position].square().mean().sqrt()
            expected = output[row, position].clone()
            for i, w in zip(indices[place], weights[place], strict=True):
                z = state @ pool.reads[i, 1]
                expected += 4 * w * z * torch.sigmoid(z) * pool.writes[i, 1]
            torch.testing.assert_close(added[row, position], expected, rtol=1e-4, atol=1e-5)


def test_a_fresh_pool_leaves_the_llm_as_it_is() -> None:
    model = tiny_model(prompt_pool_config=POOL)
    with torch.no_grad():
        with_prompts, without = (model(**inputs_of(model, ROWS, [k, k, k])).logits[:, -1] for k in (4, 0))
    torch.testing.assert_close(with_prompts, without, rtol=0, atol=1e-5)  # placeholders are as padding


def test_prompts_change_the_logits_and_leave_nothing_behind(shared: ListenForConditionalGeneration) -> None:
    with_prompts, without = (inputs_of(shared, ROWS, [k, k, k]) for k in (4, 0))
    with torch.no_grad():
        before = shared(**without).logits
        moved = shared(**with_prompts).logits
        assert (moved[:, -1] - before[:, -1]).abs().max() > 1e-2
        assert torch.equal(shared(**without).logits, before)


def test_without_its_adapter_the_model_is_the_base_llm_bit_for_bit(shared: ListenForConditionalGeneration) -> None:
    text = {"input_ids": torch.tensor([[1, 5, 6, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    base = tiny_model(prompt_pool_config=None)
    with torch.no_grad():
        shared(**inputs_of(shared, ROWS, COUNTS))
        with shared.disable_adapter():
            assert torch.equal(shared(**text).logits, base.language_model(**text).logits)
        assert torch.equal(shared.language_model(**text).logits, base.language_model(**text).logits)


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "task"])
def test_any_strategy_picks_them(strategy: str) -> None:
    gate = 0.3 if strategy == "similarity" else None
    model = layer_model(strategy=strategy, gate_temperature=gate, center_query=False)
    with torch.no_grad():
        output = model(**inputs_of(model, ROWS, COUNTS))
        plain = model(**inputs_of(model, ROWS, [0, 0, 0]))
    assert (output.logits[[0, 2], -1] - plain.logits[[0, 2], -1]).abs().amax(-1).min() > 1e-3
    assert [int((row >= 0).sum()) for row in output.prompt_indices] == COUNTS


def test_rows_with_different_counts_equal_single_rows(shared: ListenForConditionalGeneration) -> None:
    with torch.no_grad():
        together = shared(**inputs_of(shared, ROWS, COUNTS))
        for i, count in enumerate(COUNTS):
            single = shared(**alone(shared, i))
            torch.testing.assert_close(together.logits[i, -1], single.logits[0, -1], rtol=0, atol=1e-5)
            if count:
                assert together.prompt_indices[i, :count].tolist() == single.prompt_indices[0].tolist()
            assert (together.prompt_indices[i, count:] == -1).all()


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "no": {"use_cache": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_batched_answers_equal_single_ones(mode: str, shared: ListenForConditionalGeneration) -> None:
    together = answers(shared, inputs_of(shared, ROWS, COUNTS), **MODES[mode])
    for i in range(len(ROWS)):
        assert together[i].tolist() == answers(shared, alone(shared, i), **MODES[mode])[0].tolist()
    greedy = answers(shared, inputs_of(shared, ROWS, COUNTS))
    if mode != "beams":
        assert torch.equal(together, greedy)
    if mode == "greedy":  # the tokens that follow have the prompts too
        first, later = (answers(shared, inputs_of(shared, ROWS, [k, 0, k])) for k in (4, 0))
        assert not torch.equal(first, later)


def test_look_up_decoding_gives_the_greedy_answer(shared: ListenForConditionalGeneration) -> None:
    inputs = alone(shared, 0)
    assert torch.equal(answers(shared, inputs, prompt_lookup_num_tokens=2), answers(shared, inputs))


def test_a_cache_keeps_the_prompts_until_it_is_emptied(shared: ListenForConditionalGeneration) -> None:
    inputs = alone(shared, 0)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    following = torch.tensor([[11]])
    longer = {**inputs, "input_ids": torch.cat([ids, following], 1)}
    longer["attention_mask"] = torch.cat([mask, torch.ones_like(following)], 1)
    query = {"query_mask": mask}
    with torch.no_grad():
        cache = shared(**inputs, **query, use_cache=True).past_key_values
        step = {"attention_mask": longer["attention_mask"], "position_ids": mask.sum(-1, keepdim=True)}
        stepped = shared(input_ids=following, past_key_values=cache, **step).logits
        torch.testing.assert_close(stepped[:, -1], shared(**longer, **query).logits[:, -1], rtol=0, atol=1e-5)


def test_an_emptied_cache_keeps_no_prompts(shared: ListenForConditionalGeneration) -> None:
    text = {"input_ids": torch.tensor([[1, 5, 6]])}
    caches = [StaticCache(config=shared.config.text_config, max_cache_len=64) for _ in range(2)]
    with torch.no_grad():
        shared(**alone(shared, 0), past_key_values=caches[0])
        caches[0].reset()
        emptied, fresh = (shared(**text, past_key_values=cache).logits for cache in caches)
    torch.testing.assert_close(emptied, fresh, rtol=0, atol=0)


def test_threads_do_not_mix_their_prompts(shared: ListenForConditionalGeneration) -> None:
    batches = [alone(shared, 0), inputs_of(shared, [ROWS[0]], [0]), alone(shared, 2), alone(shared, 1)]
    expected = [answers(shared, inputs) for inputs in batches]
    found: list = [None] * len(batches)

    def work(i: int) -> None:
        found[i] = [answers(shared, batches[i]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, answer in enumerate(expected):
        assert all(torch.equal(answer, other) for other in found[i])


def test_keys_learn_from_the_next_token_loss() -> None:
    model = layer_model(key_loss_weight=0.0).train()
    model(**labelled(inputs_of(model, ROWS, [3, 3, 3]))).loss.backward()
    pool = model.adapters["default"].prompt_pool
    for parameter in (pool.keys, pool.reads, pool.writes):
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    """Other passes come between a forward pass and its backward pass."""
    gate = {} if not reentrant else {"gate_temperature": None}  # reentrant checkpoints reach parameters alone
    plain = layer_model(**gate)
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = []
    for model in (plain, checkpointed):
        model.train()
        torch.manual_seed(0)
        first = model(**labelled(inputs_of(model, ROWS, [3, 2, 3]))).loss
        second = model(**labelled(inputs_of(model, ROWS, [1, 4, 0]))).loss
        with torch.no_grad():
            model(**inputs_of(model, ROWS, [0, 0, 0]))
        first.backward()
        second.backward()
        pool = model.adapters["default"].prompt_pool
        found.append([pool.writes.grad, pool.reads.grad, pool.keys.grad])
    torch.testing.assert_close(found[0], found[1])


def test_two_adapters_in_one_batch() -> None:
    model = layer_model()
    model.add_adapter(ListenPromptPoolConfig(**POOL), "other")
    with torch.no_grad():
        model.adapters["other"].prompt_pool.writes.normal_(std=0.08)
        names = ["other", "default", "other"]
        together = model(**inputs_of(model, ROWS, [4, 4, 1]), adapter_names=names).logits
        for i, row in enumerate(ROWS):
            inputs = inputs_of(model, [row], [[4, 4, 1][i]], text=[[10 + i, 7, 8, 9]])
            single = model(**inputs, adapter_names=names[i : i + 1]).logits
            torch.testing.assert_close(together[i, -1], single[0, -1], rtol=0, atol=1e-5)


def test_adapters_of_both_forms_in_one_batch() -> None:
    model = layer_model()
    model.add_adapter(ListenPromptPoolConfig(pool_size=12, num_prompts=4), "input")
    inputs = make_inputs(model, ROWS, [3, 2, 3])
    inputs["attention_mask"][::2][inputs["input_ids"][::2] == PROMPT_ID] = 0
    names = ["default", "input", "default"]
    with torch.no_grad():
        together = model(**inputs, adapter_names=names).logits
        plain = make_inputs(model, [ROWS[1]], [2], text=[[11, 7, 8, 9]])
        single = model(**plain, adapter_names=["input"]).logits
        torch.testing.assert_close(together[1, -1], single[0, -1], rtol=0, atol=1e-5)


def test_a_checkpoint_round_trips(shared: ListenForConditionalGeneration, tmp_path: Path) -> None:
    shared.save_pretrained(tmp_path)
    again = ListenForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = inputs_of(shared, ROWS, COUNTS)
    with torch.no_grad():
        assert torch.equal(shared(**inputs).logits, again(**inputs).logits)


def test_the_decoder_alone_has_them_too(shared: ListenForConditionalGeneration) -> None:
    inputs = inputs_of(shared, ROWS, COUNTS)
    with torch.no_grad():
        whole = shared(**inputs, output_hidden_states=True)
        decoder = ListenModel.forward(shared, **inputs)
    assert torch.equal(decoder.last_hidden_state, whole.hidden_states[-1])


def test_a_mask_of_the_other_form_is_refused(shared: ListenForConditionalGeneration) -> None:
    unmasked, plain = make_inputs(shared, ROWS, [2, 2, 2]), tiny_model()
    with pytest.raises(ValueError, match="attention_mask must be 0"):
        shared(**unmasked)
    with pytest.raises(ValueError, match="attention_mask must be 0"):
        shared(**{**unmasked, "attention_mask": None})
    with pytest.raises(ValueError, match="attention_mask must be 0"):
        answers(shared, unmasked, cache_implementation="static")
    with pytest.raises(ValueError, match="attention_mask must be 0"):
        plain(**inputs_of(plain, ROWS, [2, 2, 2]))


def test_a_run_trains_them(tmp_path: Path) -> None:
    model = tiny_model(prompt_pool_config=POOL)
    pool = model.adapters["default"].prompt_pool
    before = {name: parameter.detach().clone() for name, parameter in pool.named_parameters()}
    options = {"layerwise_lr_decay": 1.0, "decay_pool": False, "keys_from_rows": 4, "gradient_checkpointing": True}
    trainer = trainer_of(model, tmp_path, max_steps=3, **options)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "lm_loss" in entry]
    assert len(logs) == 3 and all(0 < entry["pool_used_share"] <= 1 for entry in logs)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in pool.named_parameters())


def test_embeddings_never_lose_prompts(shared: ListenForConditionalGeneration) -> None:
    inputs = inputs_of(shared, [ROWS[1]], [2])
    with pytest.raises(ValueError, match="embeddings do not hold prompts of form='layers'"):
        shared.embed(**inputs)
    assert shared.select_prompts(**inputs).indices.shape == (1, 2)
    assert shared.embed(**inputs_of(shared, [ROWS[1]], [0]))[1] is None


def test_processor_and_collator_mask_their_placeholders(shared: ListenForConditionalGeneration) -> None:
    processor = tiny_processor(shared.config)
    inputs = processor("Hello", num_prompts=3, return_tensors="pt")
    is_prompt = inputs["input_ids"] == processor.prompt_token_id
    assert is_prompt.sum() == 3 and torch.equal(inputs["attention_mask"] == 0, is_prompt)
    assert processor.to_dict()["prompts_in_layers"] is True
    row = {
        "id": "a",
        "task": "asr",
        "audio": [{"array": clip(0.5).numpy(), "sampling_rate": 16000}],
        "response": ["yes"],
    }
    assert tiny_processor(tiny_model().config).prompts_in_layers is False
    batch = ListenCollator(processor, train=True)([row])
    is_prompt = batch["input_ids"] == processor.prompt_token_id
    assert is_prompt.sum() == 4 and not batch["attention_mask"][is_prompt].any()
    with torch.no_grad():
        assert shared(**batch).loss.isfinite()


@pytest.mark.slow
def test_the_training_forward_compiles_without_graph_breaks() -> None:
    """One graph, whose loss and gradients are those of the pass without compilation; the layers are hooked before."""
    model = layer_model(dropout=0.0, center_query=False).train()  # a moving mean would change the next pass
    inputs = inputs_of(model, [[clip(0.5)], [clip(0.9)]], [3, 3])
    text = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
    batch = {**labelled(text), **model.encode_audio(**inputs)}
    batch |= {"num_audio": int((text["input_ids"] == AUDIO_ID).sum()), "num_prompts": 3}
    check_compiled(model, batch, "aot_eager")


def test_placeholders_that_the_llm_would_read_are_refused_with_known_counts() -> None:
    model = layer_model()
    inputs = make_inputs(model, [[clip(0.5)]], [3])
    count = int((inputs["input_ids"] == AUDIO_ID).sum())
    with pytest.raises(RuntimeError, match="attention_mask must be 0 at the placeholders"):
        model(**inputs, num_audio=count, num_prompts=3)


def test_replicas_that_share_hooks_take_prompts_once() -> None:
    """`nn.DataParallel` makes replicas of each layer in each pass, which share their hooks and no later attributes."""
    model = layer_model().eval()
    inputs, layer = inputs_of(model, ROWS, COUNTS), model.language_model.model.layers[0]
    first = model(**inputs).logits
    for each in model.language_model.model.layers:
        del each.takes_prompts  # as on a replica that was made before the first pass
    assert torch.equal(model(**inputs).logits, first) and len(layer._forward_hooks) == 1
