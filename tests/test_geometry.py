"""Frames counted from the config are those that the encoders make."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
import torch
from conftest import tiny_config
from fixtures_encoders import ENCODERS, MAIN, encoder_config, encoder_inputs, random_encoder
from transformers import AutoConfig, BertConfig

from listen.geometry_listen import EncoderGeometry, audio_step, num_resampled, speech_geometry, speech_width

RATES = {
    "wav2vec2": 0.02,
    "wav2vec2-base": 0.02,
    "wav2vec2-adapter": 0.16,
    "hubert": 0.02,
    "wavlm": 0.02,
    "conformer": 0.02,
    "w2v-bert": 0.02,
    "w2v-bert-adapter": 0.04,
    "ast": 0.1 / 12,  # twelve bands every tenth of a second
    "moonshine": 0.024,
}


@pytest.mark.parametrize("kind", RATES)
def test_the_frame_rate_is_that_of_the_model(kind: str) -> None:
    geometry = speech_geometry(encoder_config(kind))
    assert geometry.frame_seconds == pytest.approx(RATES[kind])
    assert tiny_config(speech_config=ENCODERS[kind]).frame_seconds == geometry.frame_seconds
    seconds = 8
    assert geometry.num_frames(16000 * seconds) == pytest.approx(seconds / RATES[kind], abs=13)


def test_whisper_has_fifty_frames_a_second() -> None:
    geometry = speech_geometry(tiny_config().speech_config)
    assert geometry.frame_seconds == 0.02
    assert [geometry.num_frames(n) for n in (160, 320, 16000, 480000)] == [1, 1, 50, 1500]


@torch.no_grad()
@pytest.mark.parametrize("kind", ENCODERS)
def test_counted_frames_are_those_that_come_out(kind: str) -> None:
    encoder, config = random_encoder(kind), encoder_config(kind)
    geometry = speech_geometry(config)
    for samples in (geometry.min_samples, 8000, 12345):
        features, mask = encoder_inputs(config, [samples])
        hidden = encoder(features, mask).last_hidden_state
        real = encoder.output_mask(mask)
        assert int(real.sum()) == geometry.num_frames(samples)
        assert hidden.shape == (1, real.shape[1], speech_width(config))
        if hasattr(encoder.encoder, "_get_feat_extract_output_lengths"):
            own = int(encoder.encoder._get_feat_extract_output_lengths(mask.sum(-1)))
            assert own - own % geometry.frames_per_step == int(real.sum())  # SEW fills up the last step with zeros


@pytest.mark.parametrize("kind", ENCODERS)
def test_no_shorter_clip_gives_a_frame(kind: str) -> None:
    geometry = speech_geometry(encoder_config(kind))
    assert geometry.num_frames(geometry.min_samples) == geometry.frames_per_step
    assert geometry.num_frames(geometry.min_samples - 1) == geometry.num_frames(0) == 0


@pytest.mark.parametrize("kind", MAIN)
def test_json_keeps_it(kind: str) -> None:
    geometry = speech_geometry(encoder_config(kind))
    assert EncoderGeometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


def test_a_spectrogram_transformer_hears_ten_seconds_at_once() -> None:
    geometry = speech_geometry(encoder_config("ast"))
    assert geometry.chunk_seconds == 10.24
    assert geometry.num_inputs(163840) <= 1024
    assert geometry.num_frames(163840) == 12 * 101  # all patches of the model but its two classification tokens


def test_frames_at_another_rate_are_counted_exactly() -> None:
    moonshine, ast = (speech_geometry(encoder_config(kind)) for kind in ("moonshine", "ast"))
    assert audio_step(moonshine, 16, 128) == Fraction(6, 5)  # 24 ms in place of 20 ms
    assert audio_step(ast, 16, 128) == Fraction(5, 12)
    assert [num_resampled(n, Fraction(6, 5)) for n in (0, 1, 6, 7, 12)] == [0, 1, 5, 6, 10]
    assert [num_resampled(n, Fraction(5, 12)) for n in (1, 5, 10)] == [3, 12, 24]


@pytest.mark.parametrize("config", [BertConfig(), AutoConfig.for_model("clap")])
def test_what_is_no_speech_encoder_is_refused_by_name(config: object) -> None:
    with pytest.raises(ValueError, match=f"model_type='{config.model_type}'.*wav2vec2-bert"):
        speech_geometry(config)
