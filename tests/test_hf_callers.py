"""What stock Hugging Face code expects of the model, its processor and its pipeline."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import clip, make_inputs, tiny_config, tiny_model
from fixtures_classification import features, noise, tiny_classifier
from fixtures_encoders import encoder_config
from fixtures_training import small_corpus, tiny_processor
from peft import LoraConfig, get_peft_model
from transformers import AnyToAnyPipeline, AutoModel, EvalPrediction, Trainer, TrainingArguments

from listen import ListenForAudioClassification, ListenForConditionalGeneration, ListenModel, ListenPipeline
from listen.data import ListenCollator, load_manifest
from listen.training.arguments import ListenTrainingArguments
from listen.training.trainer import ListenTrainer

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 98}
ROWS = [[clip(1.0)], [clip(0.6, 1)]]


def audio_of(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if name.startswith(("input_features", "input_values"))}


# ---------------------------------------------------------------------- outputs and config fields


@torch.no_grad()
@pytest.mark.parametrize("model_class", [ListenModel, ListenForConditionalGeneration])
def test_outputs_are_tuples_where_asked(
    shared_model: ListenForConditionalGeneration, model_class: type[ListenModel]
) -> None:
    inputs = make_inputs(shared_model, ROWS)
    config = tiny_config()
    model = model_class(config).eval()
    whole = model(**inputs)
    assert torch.equal(model(**inputs, return_dict=False)[0], whole[0])
    config.return_dict = False
    found = model(**inputs)
    assert isinstance(found, tuple) and torch.equal(found[0], whole[0])
    assert not isinstance(model(**inputs, return_dict=True), tuple)


def test_the_classifier_gives_a_tuple_where_asked() -> None:
    model = tiny_classifier()
    inputs = features(noise(0.5))
    whole = model(**inputs)
    assert torch.equal(model(**inputs, return_dict=False)[0], whole.logits)
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)


def test_fields_of_the_config_are_arguments_of_from_pretrained(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    for loader in (ListenForConditionalGeneration, AutoModel):
        loaded = loader.from_pretrained(tmp_path, chunks_at_once=4, prompt_pool_config={"num_prompts": 2})
        assert loaded.config.chunks_at_once == 4
        assert (loaded.config.prompt_pool_config.num_prompts, loaded.config.prompt_pool_config.pool_size) == (2, 12)
        with pytest.raises(ValueError, match="chunks_at_once=0 must be at least 1"):
            loader.from_pretrained(tmp_path, chunks_at_once=0)
    with pytest.raises(TypeError, match="chunk_at_once"):
        ListenForConditionalGeneration.from_pretrained(tmp_path, chunk_at_once=4)
    loaded = ListenForConditionalGeneration.from_pretrained(tmp_path, output_hidden_states=True)
    assert len(loaded(**make_inputs(loaded, ROWS)).hidden_states) == 3


def test_a_classifier_gets_another_number_of_labels(tmp_path: Path) -> None:
    model = tiny_classifier()
    model.save_pretrained(tmp_path)
    options = {"num_labels": 5, "ignore_mismatched_sizes": True}
    loaded = ListenForAudioClassification.from_pretrained(tmp_path, **options)
    assert loaded.config.num_labels == 5
    assert loaded(**features(noise(0.5))).logits.shape == (1, 5)


@torch.no_grad()
def test_audio_features_come_with_the_layers_of_the_speech_encoder() -> None:
    config = tiny_config()
    config._attn_implementation = "eager"
    model = ListenForConditionalGeneration(config).eval()
    audio = audio_of(make_inputs(model, ROWS))
    found = model.get_audio_features(**audio, output_hidden_states=True, output_attentions=True)
    assert found.last_hidden_state.shape == (2, 50, 32)
    assert torch.equal(found.last_hidden_state, model.encode_audio(**audio).speech_hidden_states)
    assert [states.shape for states in found.hidden_states] == [(2, 50, 32)] * 3
    assert [weights.shape for weights in found.attentions] == [(2, 2, 50, 50)] * 2
    assert found.pooler_output.shape == (int(found.lengths.sum()), 48)
    states, embeddings, lengths = model.get_audio_features(**audio, return_dict=False)
    assert torch.equal(embeddings, found.pooler_output) and torch.equal(states, found.last_hidden_state)
    assert torch.equal(lengths, found.lengths)
    with pytest.raises(ValueError, match="need input_features"):
        model.get_audio_features(encoded=model.encode_audio(**audio), output_hidden_states=True)


# ---------------------------------------------------------------------- generation


def test_whether_the_llm_can_take_back_a_token_is_a_plain_attribute(
    shared_model: ListenForConditionalGeneration,
) -> None:
    assert ListenForConditionalGeneration._is_stateful is False
    assert shared_model._is_stateful is False


@pytest.mark.parametrize(
    "mode", [{}, {"num_beams": 2, "num_return_sequences": 2}, {"cache_implementation": "static"}], ids=str
)
def test_embeddings_made_by_the_model_generate_what_their_inputs_do(
    shared_model: ListenForConditionalGeneration, mode: dict
) -> None:
    inputs = make_inputs(shared_model, ROWS, text=[[10, 7], [11, 7, 8, 9]])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    embeds, _ = shared_model.embed(ids, mask, shared_model.encode_audio(**audio_of(inputs)))
    expected = shared_model.generate(**inputs, **GREEDY, **mode)[:, ids.shape[1] :]
    assert torch.equal(shared_model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY, **mode), expected)


@pytest.mark.parametrize("in_vocabulary", [False, True])
def test_processors_run_on_answers_to_embeddings(in_vocabulary: bool) -> None:
    ids = {"audio_token_id": 90, "prompt_token_id": 91} if in_vocabulary else {}
    model = tiny_model(**ids)
    embeds = model.get_input_embeddings()(torch.tensor([[0, 1, 5, 6], [1, 7, 8, 9]]))
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "repetition_penalty": 1.5}
    expected = model.language_model.generate(inputs_embeds=embeds, **settings)
    assert torch.equal(model.generate(inputs_embeds=embeds, **settings), expected)


@pytest.mark.parametrize("layers", [1, 2])
def test_an_early_exit_drafts_by_the_first_layers(shared_model: ListenForConditionalGeneration, layers: int) -> None:
    inputs = make_inputs(shared_model, [[clip(1.0)]])
    expected = shared_model.generate(**inputs, **GREEDY)
    runs = [0, 0]
    hooks = [
        layer.register_forward_pre_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
        for index, layer in enumerate(shared_model.language_model.model.layers)
    ]
    found = shared_model.generate(**inputs, **GREEDY, assistant_early_exit=layers)
    for hook in hooks:
        hook.remove()
    assert torch.equal(found, expected)
    assert (runs[1] < runs[0]) == (layers == 1)
    assert shared_model.language_model.config.num_hidden_layers == 2


def test_continuous_batching_is_refused(shared_model: ListenForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match=r"generate_batch.*call generate with a batch of the processor"):
        shared_model.generate_batch(inputs=[[5, 6, 7]])
    with pytest.raises(ValueError, match="continuous batching"):
        shared_model.init_continuous_batching()


# ---------------------------------------------------------------------- packed rows


@torch.no_grad()
def test_packed_rows_with_prompts_are_refused(shared_model: ListenForConditionalGeneration) -> None:
    inputs = make_inputs(shared_model, ROWS, text=[[10, 7, 8, 9], [11]])
    ids = torch.cat([row[mask.bool()] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)])
    lengths = inputs["attention_mask"].sum(-1).tolist()
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = {"input_ids": ids[None], **audio_of(inputs), "use_cache": False}
    for mask in ({}, {"attention_mask": torch.ones_like(places)}):
        with pytest.raises(ValueError, match=r"position_ids restart.*give each sequence a row of its own"):
            shared_model(**packed, **mask, position_ids=places)
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q.*give each sequence a row of its own"):
        shared_model(**packed, cu_seq_lens_q=bounds)


@torch.no_grad()
def test_positions_of_padding_and_of_rows_without_prompts_may_restart(
    shared_model: ListenForConditionalGeneration,
) -> None:
    inputs = make_inputs(shared_model, ROWS)
    mask = inputs["attention_mask"]
    assert not mask.all()
    expected = shared_model(**inputs).logits[mask.bool()]
    places = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 5)  # 5, 5, 0, 1, 2 ...
    torch.testing.assert_close(shared_model(**inputs, position_ids=places).logits[mask.bool()], expected)
    plain = make_inputs(shared_model, [[], []], num_prompts=0)
    ids, places = plain["input_ids"].reshape(1, -1), torch.arange(plain["input_ids"].shape[1]).repeat(2)[None]
    llm = shared_model.language_model(ids, position_ids=places, use_cache=False).logits
    assert torch.equal(shared_model(ids, position_ids=places, use_cache=False).logits, llm)


# ---------------------------------------------------------------------- the stock Trainer


def token_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    assert prediction.predictions.shape[:2] == prediction.label_ids.shape
    guesses, labels = prediction.predictions.argmax(-1)[:, :-1], prediction.label_ids[:, 1:]
    return {"accuracy": float((guesses == labels)[labels != -100].mean()), "tokens": int((labels != -100).sum())}


@pytest.mark.parametrize("trainer_class", [Trainer, ListenTrainer])
def test_metrics_of_the_trainer_get_logits_as_long_as_labels(tmp_path: Path, trainer_class: type[Trainer]) -> None:
    model = tiny_model()
    rows = list(load_manifest(small_corpus(tmp_path, num_rows=4)))
    collator = ListenCollator(tiny_processor(model.config), pad_to_multiple_of=1)
    kind = ListenTrainingArguments if trainer_class is ListenTrainer else TrainingArguments
    options = {"report_to": "none", "use_cpu": True, "remove_unused_columns": False, "per_device_eval_batch_size": 1}
    trainer = trainer_class(
        model=model,
        args=kind(output_dir=str(tmp_path / "run"), **options),
        eval_dataset=rows,
        data_collator=collator,
        compute_metrics=token_accuracy,
    )
    found = trainer.evaluate()
    hits, tokens = 0, 0
    for row in rows:
        batch = collator([row])
        guesses, labels = model(**{**batch, "logits_to_keep": 0}).logits.argmax(-1)[:, :-1], batch["labels"][:, 1:]
        hits += int((guesses == labels)[labels != -100].sum())
        tokens += int((labels != -100).sum())
    assert found["eval_tokens"] == tokens
    assert found["eval_accuracy"] == pytest.approx(hits / tokens)


@pytest.mark.parametrize("own", [{"label_smoothing_factor": 0.1}, {}])
def test_a_trainer_that_takes_the_labels_is_refused(tmp_path: Path, own: dict) -> None:
    model = tiny_model()
    rows = list(load_manifest(small_corpus(tmp_path, num_rows=2)))
    settings = {"report_to": "none", "use_cpu": True, "remove_unused_columns": False, "max_steps": 1, **own}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path / "run"), **settings),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=ListenCollator(tiny_processor(model.config), train=True),
        compute_loss_func=None if own else lambda outputs, labels, **_: outputs.logits.sum(),
    )
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match=r"label_smoothing_factor or compute_loss_func.*leave label_smoothing_fac"):
            run()


def lora(model: torch.nn.Module) -> torch.nn.Module:
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"])).train()


@pytest.mark.parametrize("speech", ["whisper", "wav2vec2-base"])
def test_a_lora_that_reaches_the_encoders_is_trained(speech: str) -> None:
    other = {} if speech == "whisper" else {"speech_config": encoder_config(speech), "audio_config": None}
    model = lora(tiny_model(**other))
    processor = tiny_processor(model.base_model.model.config)
    inputs = processor("<|audio|>Say it: yes", clip(1.0).numpy(), sampling_rate=16000, num_prompts=3)
    labels = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < 25, -100)
    model(**inputs, labels=labels).loss.backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert {"speech_encoder", "language_model"} <= {name.split(".")[2] for name in trained}
    assert [name for name, weight in trained.items() if weight.grad is None] == []


def test_parameters_that_cannot_get_gradients_are_an_error() -> None:
    model = tiny_model()
    inputs = make_inputs(model, ROWS)
    encoded = model.encode_audio(**audio_of(inputs))
    stored = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], **encoded}
    lora(model)
    with pytest.raises(ValueError, match=r"the speech_encoder require gradients but get none.*train on features"):
        model(**stored)
    model.eval()(**stored)
    classifier = tiny_classifier()
    inputs = features(noise(0.5))
    lora(classifier)
    with pytest.raises(ValueError, match=r"parameters of the frozen encoder require gradients but get none.*lora_"):
        classifier(**inputs)


# ---------------------------------------------------------------------- keywords


def test_keywords_that_ask_for_nothing_are_harmless() -> None:
    processor = tiny_processor(tiny_config())
    plain = processor(["a", "b c"], padding=True)
    idle: dict[str, Any] = {"images": None, "videos": None, "padding_side": "left", "return_attention_mask": True}
    for keywords in (idle, {"padding_side": None}, {"images": False}, {"text_kwargs": {"padding_side": "left"}}):
        found = processor(["a", "b c"], padding=True, **keywords)
        assert torch.equal(found["input_ids"], plain["input_ids"]) and found.keys() == plain.keys()
    chat = [{"role": "user", "content": "Hello"}]
    assert processor.apply_chat_template(chat, images=None) == processor.apply_chat_template(chat)
    for call in (lambda **k: processor("a", **k), lambda **k: processor.apply_chat_template(chat, tokenize=True, **k)):
        with pytest.raises(ValueError, match=r"padding_side='right': inputs are padded on the left; leave it out"):
            call(padding_side="right")
        with pytest.raises(TypeError, match="images"):
            call(images=["cat.png"])


def test_the_any_to_any_pipeline_answers(tmp_path: Path) -> None:
    model = tiny_model()
    processor = tiny_processor(model.config)
    manifest = load_manifest(small_corpus(tmp_path, num_rows=1))
    path = manifest[0]["audio"][0]["path"]
    text = "<|audio|>What is said?"
    found = AnyToAnyPipeline(model=model, processor=processor)(text=text, audio=path, generate_kwargs=GREEDY)
    inputs = processor(text, path)
    answer = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    assert found[0]["generated_text"].removeprefix(text) == processor.decode(answer, skip_special_tokens=True)


def test_names_of_model_inputs_are_those_that_are_made() -> None:
    for config in (tiny_config(), tiny_config(audio_config=None)):
        processor = tiny_processor(config)
        made = processor("<|audio|>a", clip(0.5).numpy(), sampling_rate=16000)
        assert set(processor.model_input_names) == set(made)
        assert set(processor.feature_extractor.model_input_names) == set(made) - {"input_ids", "attention_mask"}
        assert set(made) <= set(inspect.signature(ListenForConditionalGeneration.forward).parameters)
        again = type(processor.feature_extractor).from_dict(processor.feature_extractor.to_dict())
        assert again.model_input_names == processor.feature_extractor.model_input_names


@pytest.fixture(scope="module")
def listen() -> ListenPipeline:
    model = tiny_model()
    return ListenPipeline(model=model, processor=tiny_processor(model.config))


SOUND = {"array": clip(0.5).numpy(), "sampling_rate": 16000}


@pytest.mark.parametrize(
    ("keywords", "advice"),
    [
        ({"return_timestamps": True}, "without timestamps; leave it out"),
        ({"generate_kwargs": {"return_timestamps": True}}, "without timestamps; leave it out"),
        ({"chunk_length_s": 30}, "max_audio_seconds="),
        ({"stride_length_s": (4, 2)}, "max_audio_seconds="),
        ({"generate_kwargs": {"language": "german"}}, "name the language in the instruction"),
        ({"generate_kwargs": {"task": "transcribe", "language": "german"}}, "give task='asr'"),
        ({"generate_kwargs": {"task": "translate"}}, "write the instruction as text="),
        ({"generate_kwargs": {"condition_on_prev_tokens": True}}, "option of Whisper's decoder"),
    ],
    ids=str,
)
def test_keywords_of_speech_recognition_get_advice(listen: ListenPipeline, keywords: dict, advice: str) -> None:
    task = {} if "task" in keywords.get("generate_kwargs", {}) else {"task": "asr"}
    with pytest.raises(TypeError, match=advice) as error:
        listen(SOUND, **task, **keywords)
    assert "did you mean" not in str(error.value)


def test_keywords_of_speech_recognition_that_are_off_are_harmless(listen: ListenPipeline) -> None:
    off = {"return_timestamps": False, "chunk_length_s": 0, "stride_length_s": None, "generate_kwargs": None}
    assert listen(SOUND, task="asr", max_new_tokens=3, **off) == listen(SOUND, task="asr", max_new_tokens=3)
    with pytest.raises(TypeError, match="did you mean 'max_new_tokens'"):
        listen(SOUND, task="asr", max_new_token=3)
