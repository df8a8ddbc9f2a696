"""The start of the connector by CTC: its loss, what it trains, and how other runs take it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, product
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_backbones import save_backbones
from fixtures_training import CHAT_TEMPLATE, character_tokenizer, save_tiny_llm, write_clip, write_manifest
from test_training_run import run, sections
from transformers.utils import logging

from listen.feature_extraction_listen import ListenFeatureExtractor
from listen.training import ArgumentError, build_arguments, build_model, build_trainer
from listen.training.ctc import CtcTrainer, TokenDistances, ctc_loss, space_token, warn_of_short_rows

WITHOUT_POOL = {"prompt_pool": {"pool_size": 0}}
WORDS = ["hi", "oh no"]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(len(WORDS)):
        write_clip(folder / f"{i}.wav", 2.5, seed=i)
    rows = [{"audio": f"{i}.wav", "task": "asr", "response": text} for i, text in enumerate(WORDS)]
    return write_manifest(folder / "train.jsonl", rows)


def ctc_sections(backbones: dict, manifest: Path, folder: Path, model: dict = WITHOUT_POOL, **training: Any) -> dict:
    return sections(backbones, manifest, folder, model, alignment="ctc", **training)


def trainer_for(settings: dict) -> CtcTrainer:
    arguments = build_arguments(settings)
    return build_trainer(*build_model(arguments.model), arguments.data, arguments.training)


def audio_of(batch: dict) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ListenFeatureExtractor.model_input_names}


# ------------------------------------------------------------------ the loss


def paths(target: list[int], length: int, classes: int) -> Iterator[tuple[int, ...]]:
    """Sequences of that length that are the target once repeats, then blanks, are removed."""
    for path in product(range(classes), repeat=length):
        if [c for c, _ in groupby(path) if c] == target:
            yield path


def test_the_loss_is_the_sum_over_all_paths() -> None:
    torch.manual_seed(0)
    log_probabilities, lengths, targets = torch.randn(7, 3).log_softmax(-1), [4, 3], [[1, 2], [2, 2]]
    expected = 0.0
    for rows, target in zip(log_probabilities.split(lengths), targets, strict=True):
        probability = sum(rows[range(len(rows)), path].sum().exp() for path in paths(target, len(rows), 3))
        expected -= probability.log()
    torch.testing.assert_close(ctc_loss(log_probabilities, lengths, [*map(torch.tensor, targets)]), expected)


def test_a_row_that_is_too_short_for_its_words_adds_nothing() -> None:
    log_probabilities = torch.randn(3, 3).log_softmax(-1).requires_grad_()
    loss = ctc_loss(log_probabilities, [1, 2], [torch.tensor([1, 2]), torch.tensor([1])])
    torch.testing.assert_close(loss, ctc_loss(log_probabilities[1:], [2], [torch.tensor([1])]))
    loss.backward()
    assert log_probabilities.grad[0].abs().max() == 0 < log_probabilities.grad[1:].abs().max()


def test_rows_that_are_too_short_are_said_once_where_most_are(caplog: pytest.LogCaptureFixture) -> None:
    logging.warning_once.cache_clear()
    long, short = torch.tensor([1, 2, 1]), torch.tensor([1])
    warn_of_short_rows([2, 2], [long, short])
    assert not caplog.text
    for _ in range(2):
        warn_of_short_rows([2, 2, 2], [long, short, long])
    assert caplog.text.count("fewer audio embeddings than their words have tokens") == 1


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_each_embedding_is_its_own_token_at_any_size_of_the_embeddings(size: float) -> None:
    embeddings, ids = torch.nn.Embedding(50, 16), torch.tensor([3, 7, 41])
    torch.nn.init.normal_(embeddings.weight, std=size)
    distances = TokenDistances(embeddings, ids)
    log_probabilities = distances(torch.cat((embeddings(ids).mean(0, keepdim=True), embeddings(ids))))
    assert log_probabilities.argmax(-1).tolist() == [0, 1, 2, 3]
    assert log_probabilities.diagonal().exp().min() > 0.99
    torch.testing.assert_close(log_probabilities.exp().sum(-1), torch.ones(4))
    assert distances.classes[ids].tolist() == [1, 2, 3] and distances.classes.count_nonzero() == 3


def test_the_spread_is_the_expected_distance_and_pulls_embeddings_to_their_tokens() -> None:
    embeddings, ids = torch.nn.Embedding(50, 16), torch.tensor([3, 7, 41])
    distances = TokenDistances(embeddings, ids)
    given = torch.randn(5, 16, requires_grad=True)
    probabilities = torch.rand(5, 4).softmax(-1)
    squared = (given[:, None] - distances.centres).square().sum(-1)  # (embeddings, classes)
    typical = (embeddings(ids) - embeddings(ids).mean(0)).square().sum(-1).mean()
    spread = distances.spread(given, probabilities.log())
    torch.testing.assert_close(spread, (probabilities * squared).sum(-1).mean() / typical)
    far = (10 * embeddings(ids)).detach().requires_grad_()
    distances.spread(far, distances(far)).backward()
    assert torch.nn.functional.cosine_similarity(-far.grad, distances.centres[1:] - far).min() > 0.99


def test_the_blank_is_the_space_unless_answers_hold_it() -> None:
    tokenizer = character_tokenizer()
    space = tokenizer(" ", add_special_tokens=False)["input_ids"]
    letters = torch.tensor(tokenizer("hi", add_special_tokens=False)["input_ids"])
    assert space == [space_token(tokenizer, letters)]
    assert space_token(tokenizer, torch.cat((letters, torch.tensor(space)))) is None
    embeddings = torch.nn.Embedding(110, 16)
    log_probabilities = TokenDistances(embeddings, letters, blank=space[0])(embeddings(torch.tensor(space)))
    assert log_probabilities.argmax(-1).tolist() == [0]


# ------------------------------------------------------------------ training


def test_embeddings_spell_the_words_and_nothing_frozen_changes(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    settings = ctc_sections(backbones, manifest, tmp_path, max_steps=150, learning_rate=1e-2, warmup_steps=5)
    settings["training"] |= {"per_device_train_batch_size": 2, "weight_decay": 0.0}
    settings["model"]["connector"] = {**settings["model"].get("connector", {}), "dropout": 0.0}
    trainer, ran = trainer_for(settings), []
    trainer.model.language_model.register_forward_hook(lambda *_: ran.append(1))
    frozen = {k: p.clone() for k, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert not ran
    assert all(torch.equal(p, frozen[k]) for k, p in trainer.model.named_parameters() if k in frozen)
    assert all(
        entry["ctc_loss"] + entry["spread"] == pytest.approx(entry["loss"]) for entry in trainer.state.log_history[:-1]
    )
    assert "lm_loss" not in trainer.state.log_history[0]
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        found = trainer.model.eval().get_audio_features(**audio_of(batch))
    classes = trainer.distances(found.pooler_output).argmax(-1).split(found.lengths.tolist())
    tokens = {int(c): int(i) for i, c in enumerate(trainer.distances.classes) if c}
    decode = trainer.processing_class.tokenizer.decode
    assert [decode([tokens[c] for c, _ in groupby(row.tolist()) if c]) for row in classes] == WORDS


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None])  # the default one puts a space before the answer
def test_every_word_of_an_answer_is_a_target(
    template: str | None, backbones: dict, manifest: Path, tmp_path: Path
) -> None:
    settings = ctc_sections(backbones, manifest, tmp_path)
    settings["model"]["language_model"] = save_tiny_llm(tmp_path / "llm", template)
    trainer = trainer_for(settings)
    tokenizer = trainer.processing_class.tokenizer
    labels = trainer.data_collator(list(trainer.train_dataset))["labels"]
    tokens = {int(c): i for i, c in enumerate(trainer.distances.classes) if c}
    said = [tokenizer.decode([tokens[int(c)] for c in row]) for row in trainer._targets(labels)]
    assert [text.strip() for text in said] == WORDS
    assert all(len(row) == int((one >= 0).sum()) - 1 for row, one in zip(trainer._targets(labels), labels, strict=True))


def test_another_run_takes_the_connector(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    result = run(ctc_sections(backbones, manifest, tmp_path / "start", max_steps=1))
    further = sections(backbones, manifest, tmp_path / "run", {"connector_from": str(result.model_folder)})
    model, _ = build_model(build_arguments(further).model)
    assert model.adapters["default"].prompt_pool is not None
    trained = result.model.adapters["default"].connector.state_dict()
    assert all(torch.equal(value, trained[k]) for k, value in model.adapters["default"].connector.state_dict().items())
    missing = str(tmp_path / "nowhere")
    with pytest.raises(ArgumentError, match="nowhere' is no folder and no Hub id with model.safetensors"):
        build_model(build_arguments(sections(backbones, manifest, tmp_path, {"connector_from": missing})).model)


def test_stored_frames_give_the_same_loss(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    trainer = trainer_for(ctc_sections(backbones, manifest, tmp_path))
    trainer.model.train()
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = trainer.data_collator(list(trainer.train_dataset))
    features = audio_of(batch)
    stored = {name: value for name, value in batch.items() if name not in features}
    encoded = trainer.model.encode_audio(**features)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(trainer.compute_loss(trainer.model, {**stored, **encoded}), loss)
    torch.testing.assert_close(
        trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=1), loss * (batch["labels"] >= 0).sum()
    )


# ------------------------------------------------------------------ errors


def test_what_cannot_be_trained_so_is_refused(backbones: dict, manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"does not train .*prompt_pool.*; give model.prompt_pool.pool_size=0"):
        trainer_for(ctc_sections(backbones, manifest, tmp_path, {}))
    other = write_manifest(manifest.parent / "er.jsonl", [{"audio": "0.wav", "task": "er", "response": "sad"}])
    with pytest.raises(ArgumentError, match="data.train has the tasks er; give each source tasks="):
        trainer_for(ctc_sections(backbones, other, tmp_path))
    streamed = ctc_sections(backbones, manifest, tmp_path, max_steps=1)
    streamed["data"]["train"] = [{"path": str(manifest), "streaming": True}]
    with pytest.raises(ArgumentError, match="does not stream; give streaming=false"):
        trainer_for(streamed)
