"""A new model over real pretrained backbones: OpenAI's Whisper tiny.en and SmolLM2-135M-Instruct.

Runs where the environment variable LISTEN_REAL_MODELS names a folder with `whisper-tiny.en` and
`smollm2-135m-instruct`. The adapter is random, so answers are compared with each other, not with the truth. The last
tests are of a published adapter over Whisper base.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import clip
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BatchFeature

from listen import ListenConfig, ListenForConditionalGeneration, ListenProcessor
from listen.data import load_manifest
from listen.evaluation import evaluate_model

FOLDER = Path(os.environ.get("LISTEN_REAL_MODELS") or "missing")
SPEECH_ENCODER, LANGUAGE_MODEL = FOLDER / "whisper-tiny.en", FOLDER / "smollm2-135m-instruct"
QUESTION = "What is being said?"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all((folder / "config.json").is_file() for folder in (SPEECH_ENCODER, LANGUAGE_MODEL)),
        reason="LISTEN_REAL_MODELS names no folder of pretrained backbones",
    ),
]
Listen = tuple[ListenForConditionalGeneration, ListenProcessor]


@pytest.fixture(scope="module")
def listen() -> Listen:
    """A model with a fresh adapter, in eval mode, which no test may change, and its processor."""
    torch.manual_seed(0)
    pool = {"pool_size": 8, "num_prompts": 4}
    config = ListenConfig.from_backbones(str(SPEECH_ENCODER), str(LANGUAGE_MODEL), prompt_pool_config=pool)
    processor = ListenProcessor.from_backbones(config)
    return ListenForConditionalGeneration.from_backbones(config).eval(), processor


def chat(text: str, seconds: float | None = None) -> list[dict[str, object]]:
    """One turn of the user, with a clip of noise before the text where seconds are given."""
    audio = [] if seconds is None else [{"type": "audio", "array": clip(seconds).numpy(), "sampling_rate": 16000}]
    return [{"role": "user", "content": [*audio, {"type": "text", "text": text}]}]


CHATS = [chat(QUESTION, 1.3), chat("Name a colour."), chat("Describe the sound.", 0.6)]


def inputs_of(processor: ListenProcessor, chats: list, **kwargs: object) -> BatchFeature:
    return processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True, **kwargs)


def answer(model: ListenForConditionalGeneration, inputs: BatchFeature) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy ids `(batch, 3)` and the logits of the first, `(batch, vocabulary)`."""
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    output = model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
    return output.sequences[:, inputs["input_ids"].shape[1] :], output.logits[0]


def test_placeholders_are_new_ids_and_the_llm_keeps_its_size(listen: Listen) -> None:
    model, processor = listen
    assert model.get_input_embeddings().num_embeddings == 49152  # SmolLM2 reserves no tokens
    assert [processor.audio_token_id, processor.prompt_token_id] == [49152, 49153]


def test_the_loss_reaches_the_adapter_and_no_backbone(listen: Listen) -> None:
    model, processor = listen
    inputs = inputs_of(processor, CHATS[:1])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -1] = processor.tokenizer(" yellow")["input_ids"][0]
    try:
        loss = model.train()(**inputs, labels=labels).loss
        loss.backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    finally:
        model.eval().zero_grad()
    assert 0 < loss.item() < 100
    assert {name.split(".")[0] for name in reached} == {"adapters"}
    assert {name.split(".")[2] for name in reached} == {"connector", "prompt_pool"}


def test_batched_and_single_outputs_are_identical(listen: Listen) -> None:
    model, processor = listen
    ids, logits = answer(model, inputs_of(processor, CHATS))
    for row, one in enumerate(CHATS):
        single_ids, single_logits = answer(model, inputs_of(processor, [one]))
        torch.testing.assert_close(logits[row], single_logits[0], rtol=1e-3, atol=1e-3)
        assert ids[row].tolist() == single_ids[0].tolist()


def test_answers_depend_on_the_clip(listen: Listen) -> None:
    model, processor = listen
    mine, other = (inputs_of(processor, [chat(QUESTION, seconds)]) for seconds in (1.3, 0.6))
    with torch.no_grad():
        difference = model(**mine).logits[0, -1] - model(**other).logits[0, -1]
    assert difference.abs().max() > 1e-3


def test_text_without_audio_equals_the_base_llm_bit_for_bit(listen: Listen) -> None:
    model, processor = listen
    base = AutoModelForCausalLM.from_pretrained(LANGUAGE_MODEL).eval()
    inputs = dict(inputs_of(processor, [CHATS[1], chat(QUESTION)], num_prompts=0))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)


def test_a_checkpoint_holds_the_adapter_alone_and_loads(listen: Listen, tmp_path: Path) -> None:
    model, processor = listen
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    adapter = sum(parameter.numel() for parameter in model.adapters.parameters())
    (weights,) = tmp_path.rglob("*.safetensors")
    assert 4 * adapter <= weights.stat().st_size < 4 * adapter + 100_000
    loaded = ListenForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = inputs_of(ListenProcessor.from_pretrained(tmp_path), CHATS[:1])
    assert inputs["input_ids"].tolist() == inputs_of(processor, CHATS[:1])["input_ids"].tolist()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


# ------------------------------------------------------------------ the published adapter

CARD = Path(__file__).parents[1] / "model_cards" / "listen-smollm2-135m"
DATA = Path(os.environ.get("LISTEN_REAL_DATA") or "missing")


@pytest.fixture(scope="module")
def published() -> Listen:
    backbones = {"speech_encoder": str(FOLDER / "whisper-base"), "language_model": str(LANGUAGE_MODEL)}
    model = ListenForConditionalGeneration.from_pretrained(CARD, backbones=backbones, dtype=torch.float32)
    return model.eval(), ListenProcessor.from_pretrained(CARD)


def test_the_published_adapter_is_small_and_loads_over_public_backbones(published: Listen) -> None:
    named = json.loads((CARD / "config.json").read_text())["base_models"]
    assert {name: spec["base_model_name_or_path"] for name, spec in named.items()} == {
        "speech_encoder": "openai/whisper-base",
        "language_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    }
    assert all(key.startswith("adapters.default.") for key in load_file(CARD / "model.safetensors"))
    model, _ = published
    assert model.config.prompt_pool_config.form == "layers"


@pytest.mark.skipif(not (DATA / "asr_dev.jsonl").is_file(), reason="LISTEN_REAL_DATA names no folder of recordings")
def test_the_published_adapter_transcribes_held_out_speakers(published: Listen) -> None:
    """40 sentences; the card's .532 is of 500. Without its prompts the adapter does not transcribe."""
    rows = load_manifest(DATA / "asr_dev.jsonl").select(range(40))
    options = {"batch_size": 20, "max_new_tokens": 32, "num_resamples": 0, "progress": False}
    found = [evaluate_model(*published, rows, num_prompts=k, **options).metrics["asr"]["wer"] for k in (13, 0)]
    assert found[0] < 0.6 and found[1] > 0.9
