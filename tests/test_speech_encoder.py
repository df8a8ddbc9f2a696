"""Speech encoders: the numbers of transformers, no effect of batch mates, loaded without head or decoder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers
from fixtures_encoders import ENCODERS, MAIN, encoder_config, encoder_inputs, random_encoder, spread
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperModel, core_model_loading

from listen.modeling_speech_encoder import (
    ListenSpeechEncoder,
    ListenWhisperEncoder,
    MaskedGroupNorm,
    build_speech_encoder,
    load_speech_encoder,
)

LENGTHS = [8000, 5000, 8000, 3100]
WITH_A_HEAD = {
    "wav2vec2": ("Wav2Vec2ForCTC", "wav2vec2"),
    "hubert": ("HubertForSequenceClassification", "hubert"),
    "wavlm": ("WavLMForCTC", "wavlm"),
    "conformer": ("Wav2Vec2ConformerForPreTraining", "wav2vec2_conformer"),
    "w2v-bert": ("Wav2Vec2BertForCTC", "wav2vec2_bert"),
    "ast": ("ASTForAudioClassification", "audio_spectrogram_transformer"),
    "moonshine": ("MoonshineForConditionalGeneration", "model.encoder"),
}


def saved_whole(kind: str, folder: Path, **overrides: object) -> torch.nn.Module:
    """Save a model with a head, or decoder, and give its encoder."""
    name, part = WITH_A_HEAD[kind]
    torch.manual_seed(1)
    whole = spread(getattr(transformers, name)(encoder_config(kind, **overrides)).eval())
    whole.save_pretrained(folder)
    return whole.get_submodule(part)


@torch.no_grad()
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_row_equals_the_clip_alone(kind: str) -> None:
    encoder, config = random_encoder(kind), encoder_config(kind)
    features, mask = encoder_inputs(config, LENGTHS)
    if kind != "ast":  # which hears its padding, as it was trained to
        padding = ~mask.bool().reshape(*mask.shape, *[1] * (features.dim() - 2))
        features = features.masked_fill(padding, 9.0)  # whatever padding holds must not matter
    batch, real = encoder(features, mask).last_hidden_state, encoder.output_mask(mask)
    assert batch.shape[:2] == real.shape and batch.isfinite().all()
    for row, count in enumerate(mask.sum(-1).tolist()):
        length = features.shape[1] if kind == "ast" else count
        alone = encoder(features[row : row + 1, :length], mask[row : row + 1, :length]).last_hidden_state
        torch.testing.assert_close(batch[row][real[row]], alone[0, : int(real[row].sum())], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in MAIN if kind != "ast"])
def test_a_clip_alone_gives_the_numbers_of_transformers(kind: str) -> None:
    encoder = random_encoder(kind)
    features, mask = encoder_inputs(encoder.config, [8000])
    stock = encoder.encoder(features).last_hidden_state
    torch.testing.assert_close(encoder(features).last_hidden_state, stock, atol=1e-6, rtol=0)
    torch.testing.assert_close(encoder(features, mask).last_hidden_state, stock, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ENCODERS)
def test_all_layers_are_aligned_with_the_output(kind: str) -> None:
    encoder = random_encoder(kind)
    features, mask = encoder_inputs(encoder.config, [8000, 5000])
    found, real = encoder(features, mask, output_hidden_states=True), encoder.output_mask(mask)
    assert torch.equal(found.last_hidden_state, encoder(features, mask).last_hidden_state)
    assert len(found.hidden_states) == 3 and all(s.shape[:2] == real.shape for s in found.hidden_states)
    stock = encoder.encoder(features[:1], output_hidden_states=True).hidden_states
    for ours, theirs in zip(found.hidden_states, stock, strict=True):
        if kind == "ast":
            theirs = theirs[:, 2:].unflatten(1, (12, -1)).transpose(1, 2).flatten(1, 2)
        elif kind.startswith("sew"):
            theirs = theirs.repeat_interleave(2, dim=1)
        elif kind == "wav2vec2-adapter":  # 24 frames become 3
            theirs = theirs.unflatten(1, (3, 8)).mean(2)
        elif kind == "w2v-bert-adapter":
            theirs = theirs.unflatten(1, (12, 2)).mean(2)
        torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-4)


def test_rows_too_short_for_a_frame_have_no_states() -> None:
    encoder = random_encoder("conformer")
    mask = torch.zeros(2, 800, dtype=torch.long)
    mask[:, :100] = 1
    found = encoder(torch.randn(2, 800), mask, output_hidden_states=True)
    assert all(not states.any() for states in (found.last_hidden_state, *found.hidden_states))
    assert [states.shape for states in found.hidden_states] == [(2, 2, 32)] * 3
    mask[0] = 1
    found = encoder(torch.randn(2, 800), mask, output_hidden_states=True)
    assert all(states[0].any() and not states[1].any() for states in found.hidden_states)


@torch.no_grad()
@pytest.mark.parametrize("groups", [8, 1])
def test_a_group_norm_sees_real_frames_alone(groups: int) -> None:
    stock = spread(torch.nn.GroupNorm(groups, 8))
    norm = MaskedGroupNorm.like(stock)
    frames = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(norm(frames), stock(frames))
    norm.lengths = torch.tensor([20, 13, 7])
    for row, length in enumerate(norm.lengths.tolist()):
        alone = stock(frames[row : row + 1, :, :length])[0]
        torch.testing.assert_close(norm(frames)[row, :, :length], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["wav2vec2", "wav2vec2-base", "wavlm-base", "w2v-bert"])
def test_rows_of_different_length_run_as_one_batch(kind: str) -> None:
    encoder, calls = random_encoder(kind), []
    encoder.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    encoder(*encoder_inputs(encoder.config, LENGTHS))
    assert len(calls) == 1


@torch.no_grad()
def test_the_bands_of_one_moment_follow_each_other() -> None:
    encoder = random_encoder("ast")
    features, mask = encoder_inputs(encoder.config, [20000])
    stock = encoder.encoder(features).last_hidden_state[0, 2:]  # band by band
    ours = encoder(features, mask).last_hidden_state[0]
    for moment, band in ((0, 0), (0, 5), (3, 2), (100, 11)):
        assert torch.equal(ours[moment * 12 + band], stock[band * 101 + moment])
    assert int(encoder.output_mask(mask).sum()) == 12 * ((123 - 16) // 10 + 1)


@torch.no_grad()
@pytest.mark.parametrize("kind", WITH_A_HEAD)
def test_the_encoder_is_read_from_a_checkpoint_with_a_head(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = saved_whole(kind, tmp_path)
    read, original = [], core_model_loading._materialize_copy

    def record(tensor: object, *args: object) -> torch.Tensor:
        read.append(original(tensor, *args))
        return read[-1]

    monkeypatch.setattr(core_model_loading, "_materialize_copy", record)
    ours = load_speech_encoder(tmp_path).eval()
    assert sum(tensor.numel() for tensor in read) == sum(weight.numel() for weight in ours.state_dict().values())
    features, _ = encoder_inputs(ours.config, [6000])
    assert torch.equal(ours.encoder(features).last_hidden_state, theirs(features).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("kind", MAIN)
def test_saved_alone_it_loads_again(kind: str, tmp_path: Path) -> None:
    encoder = random_encoder(kind)
    encoder.save_pretrained(tmp_path / "first")
    again = load_speech_encoder(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    loaded = load_speech_encoder(tmp_path / "second").eval()
    features, mask = encoder_inputs(encoder.config, [6000, 5000])
    assert torch.equal(loaded(features, mask).last_hidden_state, encoder(features, mask).last_hidden_state)


def test_whisper_keeps_its_own_class(tmp_path: Path) -> None:
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=20, pad_token_id=0,
    )  # fmt: skip
    transformers.WhisperModel(config).save_pretrained(tmp_path)
    assert isinstance(load_speech_encoder(tmp_path), ListenWhisperEncoder)
    assert isinstance(build_speech_encoder(config), ListenWhisperEncoder)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    saved_whole("wav2vec2", tmp_path, num_hidden_layers=1)
    encoder_config("wav2vec2", num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks .*encoder.layers.1"):
        load_speech_encoder(tmp_path)


@pytest.mark.parametrize("kind", ["wav2vec2", "moonshine"])
def test_a_checkpoint_with_more_layers_than_its_config_is_refused(kind: str, tmp_path: Path) -> None:
    saved_whole(kind, tmp_path)
    layers = "encoder_num_hidden_layers" if kind == "moonshine" else "num_hidden_layers"
    encoder_config(kind, **{layers: 1}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1.*give the config"):
        load_speech_encoder(tmp_path)


def test_a_text_model_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type='bert'.*choose one of whisper"):
        load_speech_encoder(tmp_path)


def test_what_a_checkpoint_lacks_of_spec_augment_is_no_chance(tmp_path: Path) -> None:
    saved_whole("wav2vec2", tmp_path, mask_time_prob=0.0)
    encoder_config("wav2vec2", mask_time_prob=0.05).save_pretrained(tmp_path)
    first, second = (load_speech_encoder(tmp_path).encoder.masked_spec_embed for _ in range(2))
    assert torch.equal(first, second)


def test_learning_it_gets_gradients_and_drops_layers() -> None:
    encoder = random_encoder("w2v-bert", layerdrop=0.5, mask_time_prob=0.0)
    features, mask = encoder_inputs(encoder.config, [16000, 12000])
    encoder.train()
    torch.manual_seed(0)
    outputs = [encoder(features, mask).last_hidden_state for _ in range(6)]
    assert any(not torch.equal(outputs[0], other) for other in outputs[1:])
    encoder.encoder.config.layerdrop = 0.0
    encoder(features, mask).last_hidden_state.square().mean().backward()
    idle = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
    assert all("masked_spec_embed" in name for name in idle)


def test_gradients_pass_rows_of_different_length() -> None:
    for kind in ("wav2vec2-base", "conformer"):  # one masked batch; each length apart
        encoder = random_encoder(kind, mask_time_prob=0.0, layerdrop=0.0).train()
        features, mask = encoder_inputs(encoder.config, [8000, 5000])
        encoder(features, mask).last_hidden_state[1].square().mean().backward()
        assert encoder.encoder.feature_extractor.conv_layers[0].conv.weight.grad.abs().sum() > 0


def test_activation_checkpointing_changes_no_gradient() -> None:
    still = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0)
    gradients = []
    for checkpointed in (False, True):
        encoder = random_encoder("wav2vec2-base", mask_time_prob=0.0, layerdrop=0.0, **still)
        if checkpointed:
            encoder.encoder.activation_checkpointing_enable()
        features, mask = encoder_inputs(encoder.config, LENGTHS)
        real = encoder.output_mask(mask)
        encoder.train()(features, mask).last_hidden_state[real].square().mean().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters() if parameter.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_a_row_of_padding_alone_gives_nothing() -> None:
    for kind in ("wav2vec2", "wav2vec2-base"):
        encoder = random_encoder(kind)
        features, mask = encoder_inputs(encoder.config, [8000, 5000])
        mask[1] = 0
        hidden = encoder(features, mask).last_hidden_state
        assert hidden.isfinite().all() and not encoder.output_mask(mask)[1].any()


def test_a_kernel_that_it_lacks_is_not_asked_for(tmp_path: Path) -> None:
    random_encoder("wavlm").save_pretrained(tmp_path)
    for asked in ("sdpa", "flash_attention_2"):
        assert load_speech_encoder(tmp_path, attn_implementation=asked).config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("hubert", (1, 80, 100), r"hubert needs input_features \(batch, samples\), got \(1, 80, 100\)"),
        ("w2v-bert", (1, 100, 80), r"needs input_features \(batch, frames, 160\)"),
        ("ast", (1, 100, 128), "reads 1024 frames, got 100"),
    ],
)
def test_input_of_another_encoder_is_refused(kind: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_encoder(kind)(torch.zeros(shape))


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask .*\(1, 4000\).*\(1, 12\)"):
        random_encoder("hubert")(torch.zeros(1, 4000), torch.ones(1, 12))


def test_it_names_its_class_of_transformers() -> None:
    assert isinstance(random_encoder("moonshine"), ListenSpeechEncoder)
    names = {kind: type(random_encoder(kind).encoder).__name__ for kind in ("moonshine", "ast")}
    assert names == {"moonshine": "MoonshineEncoder", "ast": "ASTModel"}


# ---------------------------------------------------------------------- Whisper


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


def whisper_encoder(attention: str = "sdpa", **overrides: object) -> ListenWhisperEncoder:
    torch.manual_seed(0)
    model = ListenWhisperEncoder._from_config(whisper_config(**overrides), attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def log_mel(*shape: int, seed: int = 1) -> torch.Tensor:
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
    mel = log_mel(1, mel_bins, 3000)
    assert torch.equal(ours.eval()(mel).last_hidden_state, stock(mel).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_row_equals_the_clip_alone_in_whisper(attention):
    model = whisper_encoder(attention)
    lengths = [301, 300, 77, 1]
    mel, mask = log_mel(4, 80, 301), (torch.arange(301) < torch.tensor(lengths)[:, None]).long()
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
    mel, mask = log_mel(2, 80, 120), torch.tensor([[1] * 120, [1] * 50 + [0] * 70])
    eager, sdpa = (whisper_encoder(kind)(mel, mask).last_hidden_state for kind in ("eager", "sdpa"))
    torch.testing.assert_close(eager[0], sdpa[0], atol=5e-6, rtol=0)
    torch.testing.assert_close(eager[1, :25], sdpa[1, :25], atol=5e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_row_of_padding_alone_is_finite_in_whisper(dtype, attention):
    mask = torch.tensor([[1] * 40, [0] * 40])
    output = whisper_encoder(attention).to(dtype)(log_mel(2, 80, 40).to(dtype), mask).last_hidden_state
    assert output.dtype == dtype and output.isfinite().all()


@torch.no_grad()
def test_a_true_mask_differs_from_attending_to_silence():
    model, mel = whisper_encoder(), log_mel(1, 80, 200)
    mel[..., 100:] = 0.0
    mask = (torch.arange(200) < 100).long()[None]
    assert (model(mel).last_hidden_state - model(mel, mask).last_hidden_state)[:, :50].abs().max() > 1e-3


@torch.no_grad()
def test_attention_and_hidden_states_are_returned_when_asked():
    mask = torch.tensor([[1] * 40, [1] * 20 + [0] * 20])
    output = whisper_encoder("eager")(log_mel(2, 80, 40), mask, output_attentions=True, output_hidden_states=True)
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2
    assert output.attentions[0].shape == (2, 4, 20, 20) and output.attentions[0][1, ..., 10:].abs().max() == 0


@torch.no_grad()
def test_whisper_saved_alone_loads_again(tmp_path):
    model = whisper_encoder()
    WhisperForConditionalGeneration(whisper_config()).save_pretrained(tmp_path / "whole")
    for source in (model, ListenWhisperEncoder.from_pretrained(tmp_path / "whole").eval()):
        source.save_pretrained(tmp_path / "alone")
        loaded, info = ListenWhisperEncoder.from_pretrained(tmp_path / "alone", output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        mel = log_mel(1, 80, 50)
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
        whisper_encoder()(mel, mask)


def test_layer_drop_acts_in_training_only():
    model = whisper_encoder(encoder_layerdrop=1.0)
    mel = log_mel(1, 80, 20)
    assert len(model.train()(mel, output_hidden_states=True).hidden_states) == 0
    assert len(model.eval()(mel, output_hidden_states=True).hidden_states) == 3
