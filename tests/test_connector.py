"""The windowed Q-Former: every frame is read once, padding never; with `salmonn_compat` as SALMONN reads it."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import tiny_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerMultiHeadAttention

from listen.configuration_listen import ListenConnectorConfig
from listen.modeling_connector import FewQueriesAttention, WindowQFormer

SPEECH, AUDIO, TEXT, WINDOW = 12, 8, 20, 17
FRAME_SECONDS = 0.02


@pytest.fixture()
def connector() -> WindowQFormer:
    torch.manual_seed(0)
    module = WindowQFormer(tiny_config().connector_config, SPEECH, AUDIO, TEXT, FRAME_SECONDS).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def frames(length: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    states = torch.randn(1, length, width, generator=torch.Generator().manual_seed(seed))
    return states, torch.ones(1, length, dtype=torch.long)


def pad(states: torch.Tensor, mask: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    missing = length - states.shape[1]
    noise = 9.0 * torch.randn(1, missing, states.shape[2])  # what padding holds must not matter
    return torch.cat([states, noise], 1), torch.cat([mask, torch.zeros(1, missing, dtype=torch.long)], 1)


@pytest.mark.parametrize(("length", "expected"), [(1, 1), (16, 1), (17, 1), (18, 2), (34, 2), (1500, 89)])
def test_a_clip_gives_one_embedding_per_started_window(connector: WindowQFormer, length: int, expected: int) -> None:
    embeddings, lengths = connector(*frames(length, SPEECH), *frames(length, AUDIO))
    assert embeddings.shape == (expected, TEXT)
    assert lengths.tolist() == [expected]
    assert connector.lengths(torch.tensor([length])).tolist() == [expected]


@pytest.mark.parametrize(("frame_seconds", "window"), [(0.02, 17), (0.024, 14), (0.01, 33), (0.5, 1)])
def test_the_window_is_as_long_whatever_the_frame_rate(frame_seconds: float, window: int) -> None:
    config = tiny_config().connector_config
    module = WindowQFormer(config, SPEECH, 0, TEXT, frame_seconds)
    for length in (1, window, window + 1, 100):
        _, lengths = module(*frames(length, SPEECH))
        assert lengths.tolist() == [math.ceil(length / window)] == [config.num_embeddings(length, frame_seconds)]


def test_padded_frames_are_not_heard(connector: WindowQFormer) -> None:
    speech, audio = frames(40, SPEECH, 1), frames(37, AUDIO, 2)
    alone, _ = connector(*speech, *audio)
    padded, lengths = connector(*pad(*speech, 90), *pad(*audio, 80))
    assert lengths.tolist() == [3]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)


def test_the_partial_window_equals_its_frames_cut_out(connector: WindowQFormer) -> None:
    speech, audio = frames(20, SPEECH, 1), frames(20, AUDIO, 2)
    whole, _ = connector(*speech, *audio)
    tail, _ = connector(speech[0][:, WINDOW:], speech[1][:, WINDOW:], audio[0][:, WINDOW:], audio[1][:, WINDOW:])
    torch.testing.assert_close(whole[1:], tail, atol=1e-5, rtol=1e-4)


def test_windows_are_read_apart(connector: WindowQFormer) -> None:
    speech, audio = frames(51, SPEECH, 1), frames(51, AUDIO, 2)
    before, _ = connector(*speech, *audio)
    speech[0][:, 20] = torch.randn(SPEECH)
    after, _ = connector(*speech, *audio)
    moved = (after - before).abs().amax(-1) > 1e-4
    assert moved.tolist() == [False, True, False]


def test_streams_are_normalised_then_laid_side_by_side(connector: WindowQFormer) -> None:
    speech, audio = frames(20, SPEECH, 1), frames(18, AUDIO, 2)
    fused, mask = connector.fuse(*speech, *audio)
    torch.testing.assert_close(fused[..., :SPEECH], connector.speech_norm(speech[0]))
    torch.testing.assert_close(fused[:, :18, SPEECH:], connector.audio_norm(audio[0]))
    assert not fused[:, 18:, SPEECH:].any()
    assert mask.sum() == 20


def test_several_queries_give_several_embeddings() -> None:
    config = tiny_config(connector_config={"hidden_size": 32, "num_attention_heads": 2, "num_queries": 3})
    module = WindowQFormer(config.connector_config, SPEECH, 0, TEXT, FRAME_SECONDS)
    embeddings, lengths = module(*frames(35, SPEECH))
    assert embeddings.shape == (9, TEXT)
    assert lengths.tolist() == module.lengths(torch.tensor([35])).tolist() == [9]


def test_an_empty_chunk_gives_nothing_and_no_nan(connector: WindowQFormer) -> None:
    speech, audio = frames(20, SPEECH), frames(20, AUDIO)
    silent = torch.zeros_like(speech[1])
    both = (torch.cat([speech[0]] * 2), torch.cat([speech[1], silent]))
    embeddings, lengths = connector(*both, torch.cat([audio[0]] * 2), torch.cat([audio[1], silent]))
    assert lengths.tolist() == [2, 0]
    assert embeddings.isfinite().all()


# ---------------------------------------------------------------------- as SALMONN reads


def compat_connector(**overrides: object) -> WindowQFormer:
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "salmonn_compat": True}
    module = WindowQFormer(ListenConnectorConfig(**{**settings, **overrides}), SPEECH, AUDIO, TEXT, FRAME_SECONDS)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module.eval()


@pytest.mark.parametrize(("length", "expected"), [(17, 1), (33, 1), (34, 2), (1496, 88), (1500, 88)])
def test_salmonn_drops_the_partial_window(length: int, expected: int) -> None:
    module = compat_connector()
    speech, audio = frames(length, SPEECH, 1), frames(length - 10, AUDIO, 2)
    embeddings, lengths = module(*speech, *audio)
    assert embeddings.shape == (expected, TEXT)
    assert lengths.tolist() == module.lengths(torch.tensor([length])).tolist() == [expected]
    speech[0][:, 17 * expected :] = 5.0
    assert torch.equal(module(*speech, *audio)[0], embeddings)


def test_salmonn_hears_the_padding_of_speech_and_zeros_after_that_of_audio() -> None:
    module = compat_connector()
    speech, audio = frames(60, SPEECH, 1), frames(20, AUDIO, 2)
    masked = (speech[0], (torch.arange(60) < 20).long()[None])
    embeddings, lengths = module(*masked, *pad(*audio, 50))
    assert lengths.tolist() == [3]
    assert torch.equal(embeddings, module(*speech, *audio)[0])
    speech[0][:, 40] = 3.0
    moved = (module(*masked, *audio)[0] - embeddings).abs().amax(-1) > 1e-4
    assert moved.tolist() == [False, False, True]


def test_salmonn_clips_of_one_batch_do_not_touch() -> None:
    module = compat_connector()
    speech, audio = frames(60, SPEECH, 1), frames(20, AUDIO, 2)
    other = frames(60, SPEECH, 3), frames(55, AUDIO, 4)
    batch = [torch.cat(pair) for pair in zip((*speech, *pad(*audio, 55)), (*other[0], *other[1]), strict=True)]
    together, lengths = module(*batch)
    assert lengths.tolist() == [3, 3]
    alone = torch.cat([module(*speech, *audio)[0], module(*other[0], *other[1])[0]])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("window", "stride", "size", "step"), [(0.333333, 0.2, 17, 10), (0.25, 0.17, 12, 9)])
def test_salmonn_windows_may_overlap_and_halves_round_as_there(
    window: float, stride: float, size: int, step: int
) -> None:
    module = compat_connector(window_seconds=window, stride_seconds=stride)
    assert (module.config.window_frames(0.02), module.config.stride_frames(0.02)) == (size, step)
    speech, audio = frames(50, SPEECH, 1), frames(50, AUDIO, 2)
    whole, lengths = module(*speech, *audio)
    assert lengths.tolist() == module.lengths(torch.tensor([50])).tolist() == [(50 - size) // step + 1]
    second = [part[:, step : step + size] for part in (*speech, *audio)]
    torch.testing.assert_close(whole[1:2], module(*second)[0], atol=1e-5, rtol=1e-4)


def test_salmonn_needs_one_whole_window() -> None:
    with pytest.raises(ValueError, match="whole windows of 17 frames, but the chunks have 16"):
        compat_connector()(*frames(16, SPEECH), *frames(10, AUDIO))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride_seconds": 0.2}, "stride_seconds=0.2 needs salmonn_compat=True"),
        ({"stride_seconds": 0.0, "salmonn_compat": True}, "stride_seconds=0.0 must be above 0"),
    ],
)
def test_salmonn_settings_that_cannot_work_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ListenConnectorConfig(**settings)


def test_salmonn_needs_padded_clips() -> None:
    with pytest.raises(ValueError, match="salmonn_compat=True needs clips padded to 30 s, but pad_to_30s=False"):
        tiny_config(connector_config={"salmonn_compat": True})


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_attention_of_few_queries_equals_upstreams(kernel: str, num_queries: int) -> None:
    """Outputs and gradients, with masked frames; with eager attention also the weights and dropout."""
    torch.manual_seed(0)
    dropout = 0.3 if kernel == "eager" else 0.0
    config = Blip2QFormerConfig(
        hidden_size=32,
        num_attention_heads=2,
        encoder_hidden_size=48,
        attention_probs_dropout_prob=dropout,
        attn_implementation=kernel,
    )
    attention = Blip2QFormerMultiHeadAttention(config, is_cross_attention=True)
    queries, frames = torch.randn(4, num_queries, 32), torch.randn(4, 12, 48)
    mask = (torch.arange(12) < torch.tensor([12, 5, 1, 8])[:, None])[:, None, None].expand(-1, -1, num_queries, -1)
    if kernel == "eager":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)

    def run(kind: type) -> list[torch.Tensor]:
        attention.__class__ = kind
        attention.zero_grad()
        inputs = [queries.clone().requires_grad_(), frames.clone().requires_grad_()]
        torch.manual_seed(1)
        output, weights = attention(inputs[0], None, inputs[1], mask)
        output.square().sum().backward()
        gradients = [tensor.grad for tensor in (*inputs, *attention.parameters())]
        return [output, *gradients, *([weights] if weights is not None else [])]

    expected, found = run(Blip2QFormerMultiHeadAttention), run(FewQueriesAttention)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_attention_of_few_queries_computes_less(connector: WindowQFormer) -> None:
    """Floating-point operations of a pass and its backward, against upstream's attention."""
    frames = torch.randn(1, 170, SPEECH)
    counts = []
    for kind in (FewQueriesAttention, Blip2QFormerMultiHeadAttention):
        for layer in connector.qformer.encoder.layer:
            assert layer.crossattention.attention.__class__ is FewQueriesAttention or counts
            layer.crossattention.attention.__class__ = kind
        with FlopCounterMode(display=False) as counter:
            connector(frames, torch.ones(1, 170), torch.randn(1, 170, AUDIO), torch.ones(1, 170))[0].sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] < 0.8 * counts[1]
