"""The convolution with a rotary layer: every frame is heard, padding never, and the model takes it as any connector."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import clip, make_inputs, tiny_model
from fixtures_training import tiny_processor
from transformers import AutoModel

from listen import ListenConnectorConfig, ListenForConditionalGeneration
from listen.modeling_connector import ConvRotary

SPEECH, AUDIO, TEXT = 12, 8, 20
FRAME_SECONDS, STRIDE = 0.02, 4
SETTINGS = {"type": "conv_rotary", "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
ROWS = [[clip(1.3, 1)], [], [clip(0.9, 2), clip(2.1, 3)]]


def build(audio_width: int = 0, frame_seconds: float = FRAME_SECONDS, **settings: object) -> ConvRotary:
    torch.manual_seed(0)
    config = ListenConnectorConfig(**{**SETTINGS, **settings})
    module = ConvRotary(config, SPEECH, audio_width, TEXT, frame_seconds).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def frames(length: int, width: int = SPEECH, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    states = torch.randn(1, length, width, generator=torch.Generator().manual_seed(seed))
    return states, torch.ones(1, length, dtype=torch.long)


def pad(states: torch.Tensor, mask: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    missing = length - states.shape[1]
    noise = 9.0 * torch.randn(1, missing, states.shape[2])  # what padding holds must not matter
    return torch.cat([states, noise], 1), torch.cat([mask, torch.zeros(1, missing, dtype=torch.long)], 1)


@pytest.mark.parametrize("kernel_size", [None, 4, 5, 8])
@pytest.mark.parametrize(("length", "expected"), [(1, 1), (4, 1), (5, 2), (8, 2), (1500, 375)])
def test_a_clip_gives_one_embedding_for_each_begun_80_ms(length: int, expected: int, kernel_size: int | None) -> None:
    connector = build(kernel_size=kernel_size)
    embeddings, lengths = connector(*frames(length))
    assert embeddings.shape == (expected, TEXT)
    assert lengths.tolist() == connector.lengths(torch.tensor([length])).tolist() == [expected]


@pytest.mark.parametrize(("frame_seconds", "stride"), [(0.04, 2), (0.02, 4), (0.01, 8), (0.08, 1)])
def test_the_stride_follows_from_the_frame_rate(frame_seconds: float, stride: int) -> None:
    connector = build(frame_seconds=frame_seconds)
    assert connector.stride == stride
    assert connector(*frames(2 * stride + 1))[1].tolist() == [3]


@pytest.mark.parametrize("kernel_size", [None, 5, 8])
@pytest.mark.parametrize("length", [4, 37, 40])
def test_padded_frames_are_not_heard(kernel_size: int | None, length: int) -> None:
    connector = build(AUDIO, kernel_size=kernel_size)
    speech, audio = frames(length, SPEECH, 1), frames(length - 3, AUDIO, 2)
    alone, _ = connector(*speech, *audio)
    padded, lengths = connector(*pad(*speech, 90), *pad(*audio, 83))
    assert lengths.tolist() == [-(-length // STRIDE)]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)


def test_chunks_of_a_batch_are_read_apart() -> None:
    connector = build()
    long, short = frames(50, seed=1), frames(9, seed=2)
    both, lengths = connector(*(torch.cat(pair) for pair in zip(long, pad(*short, 50), strict=True)))
    apart = torch.cat([connector(*long)[0], connector(*short)[0]])
    assert lengths.tolist() == [13, 3]
    torch.testing.assert_close(both, apart, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("changed", [0, 20, 39])
def test_every_frame_reaches_every_embedding(changed: int) -> None:
    connector = build()
    states, mask = frames(40)
    before, _ = connector(states, mask)
    states[:, changed] = torch.randn(SPEECH)
    after, _ = connector(states, mask)
    assert ((after - before).abs().amax(-1) > 1e-5).all()  # both directions, no frame skipped


def test_the_order_of_frames_is_heard() -> None:
    """With a kernel as long as the stride only the rotary layer can tell the order."""
    connector = build(kernel_size=STRIDE)
    states, mask = frames(12)
    before, _ = connector(states, mask)
    swapped, _ = connector(torch.cat([states[:, 4:8], states[:, :4], states[:, 8:]], 1), mask)
    assert (swapped[[1, 0, 2]] - before).abs().max() > 1e-3


def test_an_empty_chunk_gives_nothing_and_no_nan() -> None:
    connector = build()
    states, mask = frames(20)
    states.requires_grad_()
    embeddings, lengths = connector(torch.cat([states] * 2), torch.cat([mask, torch.zeros_like(mask)]))
    embeddings.square().sum().backward()
    assert lengths.tolist() == [5, 0]
    assert all(value.grad.isfinite().all() for value in (states, *connector.parameters()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(embedding_seconds=0.05), r"embedding_seconds=0.05 is 2.500 frames .* every 0.02 s"),
        (lambda: build(embedding_seconds=0.01), "choose a multiple of that"),
        (lambda: build(embedding_seconds=-1.0), "embedding_seconds=-1.0 must be above 0"),
        (lambda: build(kernel_size=3), "kernel_size=3 is shorter than its stride of 4 frames"),
        (lambda: build(num_queries=2), "num_queries=2 is only used by type='window_qformer'"),
        (lambda: ListenConnectorConfig(kernel_size=3), "kernel_size=3 is only used by type='conv_rotary'"),
        (lambda: tiny_model(connector_config={**SETTINGS, "embedding_seconds": 0.05}), "choose a multiple"),
    ],
)
def test_values_that_cannot_work_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------- in the model


def model_with_it(seed: int = 0, **overrides: object) -> ListenForConditionalGeneration:
    return tiny_model(seed, connector_config=SETTINGS, **overrides)


@pytest.fixture(scope="module")
def model() -> ListenForConditionalGeneration:
    return model_with_it()


def logits(model: ListenForConditionalGeneration, rows: list = ROWS, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(**make_inputs(model, rows), **kwargs).logits[:, -4:]


def test_a_batch_gives_what_its_rows_give_alone(model: ListenForConditionalGeneration) -> None:
    batch = logits(model)
    alone = [model(**make_inputs(model, [row], text=[[10 + i, 7, 8, 9]])).logits[0, -4:] for i, row in enumerate(ROWS)]
    torch.testing.assert_close(batch, torch.stack(alone), atol=2e-5, rtol=1e-4)


def test_the_processor_counts_what_the_model_hears(model: ListenForConditionalGeneration) -> None:
    processor = tiny_processor(model.config)
    for seconds in (0.03, 0.5, 1.23, 31.0):
        audio = dict(processor.feature_extractor([clip(seconds).numpy()], sampling_rate=16000, return_tensors="pt"))
        with torch.no_grad():
            heard = int(model.get_audio_features(**audio).lengths.sum())
        assert heard == processor.num_audio_embeddings(int(16000 * seconds))


def test_stored_frames_give_the_same_answer(model: ListenForConditionalGeneration) -> None:
    inputs = make_inputs(model, ROWS)
    audio = {name: inputs.pop(name) for name in list(inputs) if name.startswith("input_") and name != "input_ids"}
    stored = model(**inputs, **model.encode_audio(**audio)).logits[:, -4:]
    torch.testing.assert_close(stored, logits(model))


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2, "num_return_sequences": 2}])
def test_it_generates_the_same_with_and_without_a_cache(model: ListenForConditionalGeneration, mode: dict) -> None:
    inputs, settings = make_inputs(model, ROWS), {"max_new_tokens": 4, "do_sample": False, **mode}
    cached = model.generate(**inputs, **settings)
    assert torch.equal(cached, model.generate(**inputs, **settings, use_cache=False))


def test_checkpoints_round_trip(model: ListenForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    connector = half.adapters["default"].connector
    assert {value.dtype for value in (*connector.parameters(), *connector.buffers())} == {torch.float32}
    assert logits(half).isfinite().all()


def test_a_connector_of_the_other_kind_joins_as_an_adapter(tmp_path: Path) -> None:
    """Each row of a batch is heard by its own connector where both give as many embeddings."""
    model, other = tiny_model(), model_with_it(1)
    other.language_model.load_state_dict(model.language_model.state_dict())
    for name in ("speech_encoder", "audio_encoder"):
        getattr(other, name).load_state_dict(getattr(model, name).state_dict())
    expected = logits(other)
    other.save_adapter(tmp_path)
    model.load_adapter(tmp_path, "conv")
    with pytest.raises(ValueError, match="default, conv"):
        logits(model, [[clip(1.0)], [clip(1.0)]], adapter_names=["default", "conv"])
    model.set_adapter("conv")
    torch.testing.assert_close(logits(model), expected)


def test_activation_checkpointing_changes_no_gradient() -> None:
    grads = []
    for checkpointed in (False, True):
        model = model_with_it().train()
        model.adapters["default"].connector.dropout.p = 0.0
        for layer in model.adapters["default"].connector.layers:
            layer.self_attn.attention_dropout = 0.0
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
            assert all(layer.gradient_checkpointing for layer in model.adapters["default"].connector.layers)
        inputs = make_inputs(model, ROWS, num_prompts=0)
        model(**inputs, labels=inputs["input_ids"].where(inputs["input_ids"] < 99, -100)).loss.backward()
        grads.append({name: p.grad for name, p in model.adapters.default.connector.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)
        assert grad.abs().sum() > 0, name
