"""The collator: labels, prompts, randomness, and stored features in place of audio."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_model
from fixtures_training import CHAT_TEMPLATE, small_corpus, tiny_processor, write_clip, write_manifest

from listen.data import ListenCollator, load_manifest, precompute_features
from listen.data.collator import IGNORED
from listen.data.tasks import get_task

# the assistant's turn is written in another way than it is begun for generation
THINKING_TEMPLATE = CHAT_TEMPLATE.replace("{{ 'A:' + message", "{{ 'A:[]' + message").replace(
    "{{ 'A:' }}", "{{ 'A:[think' }}"
)
SILENT_END_TEMPLATE = CHAT_TEMPLATE.replace(" + '</s>' + '~'", "")


@pytest.fixture()
def rows(tmp_path: Path) -> list[dict]:
    return list(load_manifest(small_corpus(tmp_path, num_rows=4)))


def supervised(processor: object, batch: dict) -> list[str]:
    return [processor.tokenizer.decode(labels[labels != IGNORED]) for labels in batch["labels"]]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, THINKING_TEMPLATE, SILENT_END_TEMPLATE, None])
def test_labels_are_the_response_and_the_end_of_turn(rows: list[dict], template: str | None) -> None:
    processor = tiny_processor(tiny_config(), template)
    batch = ListenCollator(processor)(rows)
    space = " " if template is None else ""  # the default template ends its prompt with "ASSISTANT:"
    assert supervised(processor, batch) == [f"{space}{row['response'][0]}</s>" for row in rows]


def test_labels_stand_at_the_end_and_logits_to_keep_covers_them(rows: list[dict]) -> None:
    batch = ListenCollator(tiny_processor(tiny_config()))(rows)
    kept = batch["logits_to_keep"]
    is_label = batch["labels"] != IGNORED
    assert is_label[:, -1].all() and not is_label[:, : -kept + 1].any()  # the first kept position only predicts
    assert torch.equal(batch["labels"][is_label], batch["input_ids"][is_label])
    assert batch["attention_mask"].diff(dim=1).min() == 0  # padding on the left only
    assert batch["input_ids"].shape[1] % 8 == 0


def test_fewer_logits_give_the_same_loss(rows: list[dict]) -> None:
    model = tiny_model()
    batch = ListenCollator(tiny_processor(model.config))(rows)
    with torch.no_grad():
        short = model(**batch)
        full = model(**{**batch, "logits_to_keep": 0})
    assert short.logits.shape[1] == batch["logits_to_keep"] < full.logits.shape[1]
    torch.testing.assert_close(short.loss, full.loss)


def test_prompts_are_the_same_with_and_without_answers(rows: list[dict]) -> None:
    processor = tiny_processor(tiny_config())
    batch = ListenCollator(processor)(rows)
    prompts = ListenCollator(processor, for_generation=True)(rows)
    assert "labels" not in prompts
    for i in range(len(rows)):
        question = batch["input_ids"][i][(batch["labels"][i] == IGNORED) & batch["attention_mask"][i].bool()]
        assert torch.equal(question, prompts["input_ids"][i][prompts["attention_mask"][i].bool()])


def test_generation_batches_describe_their_rows(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.wav", 0.4)
    line = {"audio": "a.wav", "task": "acap", "response": ["Rain.", "It rains."], "events": ["rain"]}
    (row,) = load_manifest(write_manifest(tmp_path / "m.jsonl", [line]))
    (described,) = ListenCollator(tiny_processor(tiny_config()), for_generation=True)([row])["rows"]
    assert described["references"] == ["Rain.", "It rains."]
    assert described["instruction"] == get_task("acap").instruction_test
    assert described["extra"] == {"events": ["rain"]}


@pytest.mark.parametrize("seconds", [29.9, 30.0, 65.0])
def test_clips_about_as_long_as_a_chunk_fit_the_encoder(seconds: float, tmp_path: Path) -> None:
    write_clip(tmp_path / "a.wav", seconds)
    line = {"audio": "a.wav", "task": "asr", "response": "hi"}
    batch = ListenCollator(tiny_processor(tiny_config()))(
        [*load_manifest(write_manifest(tmp_path / "m.jsonl", [line]))]
    )
    assert batch["input_features"].shape[2] == 3000
    with torch.no_grad():
        assert tiny_model()(**batch).loss.isfinite()


def test_every_clip_is_heard_in_order(tmp_path: Path) -> None:
    for i in range(2):
        write_clip(tmp_path / f"{i}.wav", 0.5 + i, seed=i)
    pair = {"audio": ["0.wav", "1.wav"], "task": "sv", "response": "no"}
    lines = [pair, {**pair, "join": "concatenate"}]
    apart, joined = load_manifest(write_manifest(tmp_path / "m.jsonl", lines))
    processor = tiny_processor(tiny_config())
    collator = ListenCollator(processor)
    assert len(collator([apart])["input_features"]) == 2 and len(collator([joined])["input_features"]) == 1
    heard = [(collator([row])["input_ids"] == processor.audio_token_id).sum().item() for row in (apart, joined)]
    assert heard == [
        processor.num_audio_embeddings(8000) + processor.num_audio_embeddings(24000),
        processor.num_audio_embeddings(32000),
    ]


def count_prompts(batch: dict, processor: object) -> int:
    counts = (batch["input_ids"] == processor.prompt_token_id).sum(-1)
    assert len(counts.unique()) == 1
    return counts[0].item()


def test_k_is_drawn_per_batch_over_its_whole_range_in_training_only(rows: list[dict]) -> None:
    processor = tiny_processor(tiny_config())
    collator = ListenCollator(processor, train=True, min_prompts=1)
    drawn = []
    for epoch in range(40):
        collator.set_epoch(epoch)
        drawn.append(count_prompts(collator(rows[:2]), processor))
    assert set(drawn) == {1, 2, 3, 4}
    fixed = ListenCollator(processor, min_prompts=1)
    assert count_prompts(fixed(rows), processor) == 4
    assert count_prompts(ListenCollator(processor, num_prompts=2)(rows), processor) == 2
    wider = ListenCollator(processor, train=True, min_prompts=5, max_prompts=6)
    assert count_prompts(wider(rows[:2]), processor) in (5, 6)
    with pytest.raises(ValueError, match="min_prompts=5 must lie in 1..4, the largest k of training"):
        ListenCollator(processor, train=True, min_prompts=5)


def test_what_is_drawn_depends_on_seed_epoch_and_rows_alone(rows: list[dict]) -> None:
    processor = tiny_processor(tiny_config())

    def draws(seed: int, epoch: int, skip: int) -> list[tuple]:
        collator = ListenCollator(processor, train=True, min_prompts=1, seed=seed)
        collator.set_epoch(epoch)
        batches = [collator([row]) for row in rows[skip:]]
        return [tuple(batch["input_ids"][0].tolist()) for batch in batches]

    assert draws(0, 0, 0)[2:] == draws(0, 0, 2)  # batches that were skipped on resuming change nothing
    assert draws(0, 0, 0) == draws(0, 0, 0)
    assert draws(0, 0, 0) != draws(0, 1, 0) and draws(0, 0, 0) != draws(1, 0, 0)


def test_workers_draw_the_same_also_after_an_epoch_change(rows: list[dict]) -> None:
    collator = ListenCollator(tiny_processor(tiny_config()), train=True, min_prompts=1)
    loader = torch.utils.data.DataLoader(rows, 2, collate_fn=collator, num_workers=1, persistent_workers=True)
    for epoch in range(3):
        collator.set_epoch(epoch)
        for start, batch in zip((0, 2), loader, strict=True):
            assert torch.equal(batch["input_ids"], collator(rows[start : start + 2])["input_ids"])


def test_references_are_drawn_in_training_and_the_first_is_taken_otherwise(rows: list[dict]) -> None:
    processor = tiny_processor(tiny_config())
    row = {**rows[0], "response": ["one", "two"]}
    train = ListenCollator(processor, train=True)
    seen = set()
    for epoch in range(20):
        train.set_epoch(epoch)
        seen |= set(supervised(processor, train([row])))
    assert seen == {"one</s>", "two</s>"}
    assert supervised(processor, ListenCollator(processor)([row])) == ["one</s>"]


def test_an_instruction_of_the_row_wins(rows: list[dict]) -> None:
    processor = tiny_processor(tiny_config())
    batch = ListenCollator(processor, train=True)([{**rows[0], "instruction": "Say it twice."}])
    assert "Say it twice." in processor.decode(batch["input_ids"][0])


def test_task_ids_follow_the_pool(rows: list[dict]) -> None:
    pool = {"pool_size": 20, "num_prompts": 4, "strategy": "task", "tasks": ["acap", "asr", "er"]}
    batch = ListenCollator(tiny_processor(tiny_config(prompt_pool_config=pool)))(rows)
    assert batch["task_ids"].tolist() == [["acap", "asr", "er"].index(row["task"]) for row in rows]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response": ["  "]}, "row 'train.jsonl:1' has an empty response"),
        ({"response": ["a <|prompt|>"]}, r"row 'train.jsonl:1': the response holds '<\|prompt\|>', a placeholder"),
        ({"audio": [{"path": "none.wav", "bytes": None}]}, "row 'train.jsonl:1'"),
        ({"audio": [{"path": None, "bytes": b"no audio"}]}, "row 'train.jsonl:1'"),
        ({"task": "ser", "extra": '{"options": "a, b"}'}, "row 'train.jsonl:1': options='a, b' must be a list"),
    ],
)
def test_a_bad_row_is_named(rows: list[dict], change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ListenCollator(tiny_processor(tiny_config()))([{**rows[0], **change}])


def test_a_template_that_rewrites_the_response_is_refused(rows: list[dict]) -> None:
    template = CHAT_TEMPLATE.replace("message['content'] + '</s>'", "message['content'] | upper + '</s>'")
    with pytest.raises(ValueError, match="changes the response .* set another template"):
        ListenCollator(tiny_processor(tiny_config(), template))(rows)


def test_answers_and_generation_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="choose one"):
        ListenCollator(tiny_processor(tiny_config()), train=True, for_generation=True)


def test_stored_features_give_the_same_batch_and_loss(tmp_path: Path, rows: list[dict]) -> None:
    model = tiny_model()
    processor = tiny_processor(model.config)
    dataset = load_manifest(tmp_path / "train.jsonl")
    store = precompute_features(model, processor, dataset, tmp_path / "features", progress=False)
    online = ListenCollator(processor)(rows)
    stored = ListenCollator(processor, features=store)(rows)
    assert "input_features" not in stored
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(online[name], stored[name])
    with torch.no_grad():
        torch.testing.assert_close(model(**stored).loss, model(**online).loss, atol=2e-3, rtol=0)  # 16 bits


def test_the_clip_stands_where_the_wording_says(rows: list[dict]) -> None:
    """Behind the instruction for the tasks that mark its place, before it for the others."""
    collator = ListenCollator(tiny_processor(tiny_config()))
    rng = random.Random(0)
    prompts = {task: collator.word({**rows[0], "task": task}, rng).prompt for task in ("asr", "repeat", "response")}
    assert prompts == {
        "asr": "<s>U:<|audio|>What is being said?A:",
        "repeat": "<s>U:Repeat after me in English: <|audio|>A:",
        "response": "<s>U:<|audio|>A:",
    }
    own = {**rows[0], "task": "ser", "extra": '{"options": ["glad", "sad"]}'}
    assert "options: glad, sad: <|audio|>A:" in collator.word(own, rng).prompt
