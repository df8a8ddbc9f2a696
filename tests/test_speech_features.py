"""Input of other speech encoders than Whisper: their own feature extractors', whatever the batch."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from fixtures_encoders import ENCODERS, MAIN, encoder_config, noise, random_encoder
from fixtures_training import tiny_processor
from transformers import ASTFeatureExtractor, SeamlessM4TFeatureExtractor, Wav2Vec2FeatureExtractor

from listen.feature_extraction_listen import ListenFeatureExtractor, speech_features
from listen.processing_listen import ListenProcessor

RATE = 16000
LENGTHS = [8000, 20001, 3100, 163840 + 4000]
KINDS = ("wav2vec2", "w2v-bert", "ast", "moonshine")


def extractor_for(kind: str, **overrides: object) -> ListenFeatureExtractor:
    return tiny_processor(tiny_config(speech_config=ENCODERS[kind], **overrides)).feature_extractor


def clips() -> list[np.ndarray]:
    return [noise(length, seed) for seed, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_equals_the_clip_alone(kind: str) -> None:
    extractor = extractor_for(kind)
    batch, row = extractor(clips(), sampling_rate=RATE), 0
    for clip in clips():
        alone = extractor(clip, sampling_rate=RATE)
        assert len(alone["input_features"]) == extractor.num_chunks(len(clip))
        for features, mask in zip(alone["input_features"], alone["input_features_mask"], strict=True):
            count = int(mask.sum())
            assert int(batch["input_features_mask"][row].sum()) == count
            torch.testing.assert_close(batch["input_features"][row][:count], features[:count], atol=1e-6, rtol=0)
            row += 1
    assert row == len(batch["input_features"]) == (5 if kind == "ast" else 4)


@pytest.mark.parametrize(
    ("kind", "stock", "name"),
    [
        ("wav2vec2", Wav2Vec2FeatureExtractor(do_normalize=True), "input_values"),
        ("moonshine", Wav2Vec2FeatureExtractor(do_normalize=False), "input_values"),
        ("w2v-bert", SeamlessM4TFeatureExtractor(), "input_features"),
        ("ast", ASTFeatureExtractor(), "input_values"),
    ],
)
def test_features_are_those_of_transformers(kind: str, stock: object, name: str) -> None:
    short = clips()[:3]
    theirs = stock(short, sampling_rate=RATE, padding=True, return_attention_mask=True, return_tensors="pt")
    ours = extractor_for(kind)(short, sampling_rate=RATE)
    assert torch.equal(ours["input_features"], theirs[name])
    if "attention_mask" in theirs:
        assert torch.equal(ours["input_features_mask"], theirs["attention_mask"].long())


@torch.no_grad()
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("audio_config", [None, {}])
def test_as_many_placeholders_as_frames_need(kind: str, audio_config: dict | None) -> None:
    overrides = {} if audio_config is not None else {"audio_config": None}
    config = tiny_config(speech_config=ENCODERS[kind], **overrides)
    processor, encoder = tiny_processor(config), random_encoder(kind)
    extractor = processor.feature_extractor
    for samples in (1, extractor.min_samples, 8000, 163840 + 4000):
        features = extractor(noise(samples), sampling_rate=RATE)
        frames = encoder.output_mask(features["input_features_mask"]).sum(-1).tolist()
        counted = extractor.num_encoder_frames(samples)
        assert len(counted) == len(frames) and min(frames) >= 1
        if audio_config is None:
            assert counted == frames
            embeddings = sum(config.connector_config.num_embeddings(n, encoder.frame_seconds) for n in frames)
            assert processor.num_audio_embeddings(samples) == embeddings
        assert all(mine <= longer for mine, longer in zip(frames, counted, strict=True))


@pytest.mark.parametrize("kind", MAIN)
def test_saved_with_the_processor_it_loads_again(kind: str, tmp_path: Path) -> None:
    saved = tiny_processor(tiny_config(speech_config=ENCODERS[kind]))
    saved.save_pretrained(tmp_path)
    loaded = ListenProcessor.from_pretrained(tmp_path)
    first, second = (p.feature_extractor(noise(9000), sampling_rate=RATE) for p in (saved, loaded))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for samples in (100, 9000, 200_000):
        assert loaded.num_audio_embeddings(samples) == saved.num_audio_embeddings(samples)


def named(kind: str, folder: Path) -> object:
    """A config whose speech encoder is named by that folder."""
    places = {name: {"base_model_name_or_path": str(folder)} for name in ("speech_encoder", "language_model")}
    return tiny_config(speech_config=ENCODERS[kind], audio_config=None, base_models=places)


def test_the_settings_of_the_checkpoint_are_kept(tmp_path: Path) -> None:
    random_encoder("hubert").save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path)
    extractor = tiny_processor(named("hubert", tmp_path)).feature_extractor
    assert extractor.speech_features["do_normalize"] is False
    assert torch.equal(extractor(noise(5000), sampling_rate=RATE)["input_features"][0], torch.tensor(noise(5000)))


def test_a_checkpoint_without_settings_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_encoder("hubert").save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    extractor = tiny_processor(named("hubert", tmp_path)).feature_extractor
    assert extractor.speech_features["do_normalize"] is True
    assert "has no preprocessor_config.json" in caplog.text


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        ("hubert", SeamlessM4TFeatureExtractor(), "hubert takes those of Wav2Vec2FeatureExtractor"),
        ("hubert", Wav2Vec2FeatureExtractor(sampling_rate=8000), "sampling_rate=8000, but this hubert takes"),
        ("w2v-bert", SeamlessM4TFeatureExtractor(num_mel_bins=40), "num_mel_bins=40, but this wav2vec2-bert takes"),
        ("ast", ASTFeatureExtractor(max_length=512), "max_length=512, but this audio-spectrogram-transformer takes"),
    ],
)
def test_an_extractor_of_another_encoder_is_refused(kind: str, wrong: object, message: str, tmp_path: Path) -> None:
    wrong.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        speech_features(encoder_config(kind), str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speech_features": {"feature_extractor_type": "Wav2Vec2FeatureExtractor"}}, "belong together"),
        (
            {"speech_features": {"feature_extractor_type": "ClapFeatureExtractor"}, "speech_geometry": {}},
            "Clap.*unknown",
        ),
        (
            {
                "speech_features": {"feature_extractor_type": "Wav2Vec2FeatureExtractor"},
                "speech_geometry": {"features": [], "encoder": [[400, 320, 0]]},
                "pad_to_30s": True,
            },
            "pad_to_30s=True",
        ),
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ListenFeatureExtractor(**settings)
