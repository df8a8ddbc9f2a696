"""Any audio encoder of transformers: its own numbers, independent of batch mates, read without head or decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from fixtures_encoders import ENCODERS, MAIN, encoder_config, encoder_inputs, random_encoder, spread
from transformers import core_model_loading

from listen.encoder_listen import ListenSpeechEncoder, MaskedGroupNorm, build_speech_encoder, load_speech_encoder
from listen.modeling_speech_encoder import ListenWhisperEncoder

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
    with pytest.raises(ValueError, match=r"lacks weights of the speech encoder.*encoder.layers.1"):
        load_speech_encoder(tmp_path)


@pytest.mark.parametrize("kind", ["wav2vec2", "moonshine"])
def test_a_checkpoint_with_more_layers_than_its_config_is_refused(kind: str, tmp_path: Path) -> None:
    saved_whole(kind, tmp_path)
    layers = "encoder_num_hidden_layers" if kind == "moonshine" else "num_hidden_layers"
    encoder_config(kind, **{layers: 1}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its config does not tell of.*layers\.1"):
        load_speech_encoder(tmp_path)


def test_a_text_model_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type='bert' is no speech encoder known here; choose one of whisper"):
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
    with pytest.raises(ValueError, match=r"mask must have shape \(1, 4000\), got \(1, 12\)"):
        random_encoder("hubert")(torch.zeros(1, 4000), torch.ones(1, 12))


def test_it_names_its_class_of_transformers() -> None:
    assert isinstance(random_encoder("moonshine"), ListenSpeechEncoder)
    names = {kind: type(random_encoder(kind).encoder).__name__ for kind in ("moonshine", "ast")}
    assert names == {"moonshine": "MoonshineEncoder", "ast": "ASTModel"}
