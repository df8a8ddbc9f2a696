"""Whisper's encoder: bit for bit at 30 s, independent of batch mates below, loaded without the decoder."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperModel, core_model_loading

from listen.modeling_speech_encoder import ListenWhisperEncoder


def whisper_config(**overrides: object) -> WhisperConfig:
    fields = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "vocab_size": 60,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 3,
    }
    return WhisperConfig(**{**fields, **overrides})


def encoder(attention: str = "sdpa", **overrides: object) -> ListenWhisperEncoder:
    torch.manual_seed(0)
    model = ListenWhisperEncoder._from_config(whisper_config(**overrides), attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def features(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("whole", "mel_bins"), [(WhisperModel, 80), (WhisperForConditionalGeneration, 128)])
def test_thirty_seconds_equal_whisper_bit_for_bit(tmp_path, attention, whole, mel_bins):
    torch.manual_seed(0)
    whole(whisper_config(num_mel_bins=mel_bins)).save_pretrained(tmp_path)
    stock = whole.from_pretrained(tmp_path, attn_implementation=attention).eval().get_encoder()
    ours, info = ListenWhisperEncoder.from_pretrained(tmp_path, attn_implementation=attention, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    mel = features(1, mel_bins, 3000)
    assert torch.equal(ours.eval()(mel).last_hidden_state, stock(mel).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_row_equals_the_clip_alone(attention):
    model = encoder(attention)
    lengths = [301, 300, 77, 1]
    mel, mask = features(4, 80, 301), (torch.arange(301) < torch.tensor(lengths)[:, None]).long()
    mel.masked_fill_(mask[:, None] == 0, math.nan)  # whatever padding holds must not matter
    batch = model(mel, mask).last_hidden_state
    counts = model.output_mask(mask).sum(1).tolist()
    assert batch.shape == (4, 151, 32) and counts == [151, 150, 39, 1]
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        alone = model(mel[row : row + 1, :, :length]).last_hidden_state
        assert alone.shape[1] == count
        torch.testing.assert_close(batch[row : row + 1, :count], alone, atol=5e-6, rtol=0)


@torch.no_grad()
def test_attention_implementations_agree():
    mel, mask = features(2, 80, 120), torch.tensor([[1] * 120, [1] * 50 + [0] * 70])
    eager, sdpa = (encoder(kind)(mel, mask).last_hidden_state for kind in ("eager", "sdpa"))
    torch.testing.assert_close(eager[0], sdpa[0], atol=5e-6, rtol=0)
    torch.testing.assert_close(eager[1, :25], sdpa[1, :25], atol=5e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_row_of_padding_alone_is_finite(dtype, attention):
    mask = torch.tensor([[1] * 40, [0] * 40])
    output = encoder(attention).to(dtype)(features(2, 80, 40).to(dtype), mask).last_hidden_state
    assert output.dtype == dtype and output.isfinite().all()


@torch.no_grad()
def test_a_true_mask_differs_from_attending_to_silence():
    model, mel = encoder(), features(1, 80, 200)
    mel[..., 100:] = 0.0
    mask = (torch.arange(200) < 100).long()[None]
    assert (model(mel).last_hidden_state - model(mel, mask).last_hidden_state)[:, :50].abs().max() > 1e-3


@torch.no_grad()
def test_attention_and_hidden_states_are_returned_when_asked():
    mask = torch.tensor([[1] * 40, [1] * 20 + [0] * 20])
    output = encoder("eager")(features(2, 80, 40), mask, output_attentions=True, output_hidden_states=True)
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2
    assert output.attentions[0].shape == (2, 4, 20, 20) and output.attentions[0][1, ..., 10:].abs().max() == 0


@torch.no_grad()
def test_saved_alone_it_loads_again(tmp_path):
    model = encoder()
    WhisperForConditionalGeneration(whisper_config()).save_pretrained(tmp_path / "whole")
    for source in (model, ListenWhisperEncoder.from_pretrained(tmp_path / "whole").eval()):
        source.save_pretrained(tmp_path / "alone")
        loaded, info = ListenWhisperEncoder.from_pretrained(tmp_path / "alone", output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        mel = features(1, 80, 50)
        assert torch.equal(loaded.eval()(mel).last_hidden_state, source(mel).last_hidden_state)


def test_no_decoder_weight_is_read(tmp_path, monkeypatch):
    WhisperForConditionalGeneration(whisper_config()).save_pretrained(tmp_path)
    read, original = [], core_model_loading._materialize_copy

    def record(tensor: object, *args: object) -> torch.Tensor:
        read.append(original(tensor, *args))
        return read[-1]

    monkeypatch.setattr(core_model_loading, "_materialize_copy", record)
    model = ListenWhisperEncoder.from_pretrained(tmp_path)
    assert sum(tensor.numel() for tensor in read) == model.num_parameters()


@pytest.mark.parametrize(
    ("mel", "mask", "message"),
    [
        (torch.zeros(1, 128, 10), None, "feature_size to 80"),
        (torch.zeros(80, 10), None, "input_features"),
        (torch.zeros(1, 80, 3001), None, "1 to 3000 frames .30 s at 10 ms., got 3001; cut longer clips"),
        (torch.zeros(1, 80, 0), None, "got 0"),
        (torch.zeros(1, 80, 10), torch.ones(1, 5), r"\(1, 10\), got \(1, 5\)"),
    ],
)
def test_input_that_does_not_fit_raises(mel, mask, message):
    with pytest.raises(ValueError, match=message):
        encoder()(mel, mask)


def test_layer_drop_acts_in_training_only():
    model = encoder(encoder_layerdrop=1.0)
    mel = features(1, 80, 20)
    assert len(model.train()(mel, output_hidden_states=True).hidden_states) == 0
    assert len(model.eval()(mel, output_hidden_states=True).hidden_states) == 3
