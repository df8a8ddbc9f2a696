"""Features equal those of the libraries the encoders were trained with, whatever the batch."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, WhisperConfig, WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from listen.configuration_beats import BeatsConfig
from listen.feature_extraction_listen import ListenFeatureExtractor
from listen.modeling_beats import BeatsModel
from listen.modeling_speech_encoder import ListenWhisperEncoder

RATE = 16_000
LENGTHS = [16_000, 47_123, 2_800, 31_999, 80_001]


def noise(samples: int, seed: int = 0) -> np.ndarray:
    """Broadband: in near-empty bins two right float32 FFTs may differ by much."""
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def kaldi(clip: np.ndarray) -> np.ndarray:
    """The Kaldi setting of transformers' own spectrogram, frame by frame in float64."""
    with pytest.warns(UserWarning, match="all zero values"):
        filters = mel_filter_bank(
            num_frequency_bins=257,
            num_mel_filters=128,
            min_frequency=20,
            max_frequency=RATE // 2,
            sampling_rate=RATE,
            norm=None,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )
    return spectrogram(
        clip * 2**15,
        window_function(400, "povey", periodic=False),
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=filters,
        log_mel="log",
        mel_floor=1.192092955078125e-07,
        remove_dc_offset=True,
    ).T


@pytest.mark.parametrize("mel_bins", [80, 128])
def test_log_mel_equals_whisper_at_the_true_length(mel_bins):
    extractor, stock = ListenFeatureExtractor(feature_size=mel_bins), WhisperFeatureExtractor(feature_size=mel_bins)
    clips = [noise(length, seed) for seed, length in enumerate(LENGTHS)]
    batch = extractor(clips, sampling_rate=RATE)
    assert batch["input_features"].dtype == torch.float32 and batch["input_features_mask"].dtype == torch.int64
    for row, clip in enumerate(clips):
        expected = stock(clip, sampling_rate=RATE, padding="do_not_pad", return_tensors="pt")["input_features"][0]
        frames = int(batch["input_features_mask"][row].sum())
        assert expected.shape == (mel_bins, frames) and frames == len(clip) // 160
        torch.testing.assert_close(batch["input_features"][row, :, :frames], expected, atol=1e-6, rtol=0)
        assert not batch["input_features"][row, :, frames:].any()


@pytest.mark.parametrize("samples", [2_800, 47_123, 479_900, 480_000])
def test_log_mel_equals_whisper_padded_to_thirty_seconds(samples):
    clips = [noise(samples), noise(20_000, 1)]
    batch = ListenFeatureExtractor(pad_to_30s=True)(clips, sampling_rate=RATE)
    expected = WhisperFeatureExtractor()(clips, sampling_rate=RATE, return_tensors="pt")["input_features"]
    assert batch["input_features"].shape == (2, 80, 3000)
    torch.testing.assert_close(batch["input_features"], expected, atol=1e-6, rtol=0)
    assert batch["input_features_mask"].sum(1).tolist() == [samples // 160, 125]


def test_filter_bank_equals_kaldi():
    extractor = ListenFeatureExtractor()
    clips = [noise(length, seed) + 0.05 for seed, length in enumerate(LENGTHS)]  # an offset that must be removed
    batch = extractor(clips, sampling_rate=RATE)
    for row, clip in enumerate(clips):
        expected = torch.from_numpy((kaldi(clip) - 15.41663) / (2 * 6.55582)).float()
        frames = int(batch["input_values_mask"][row].sum())
        assert frames == len(expected) == 1 + (len(clip) - 400) // 160
        torch.testing.assert_close(batch["input_values"][row, :frames], expected, atol=5e-4, rtol=0)
        assert not batch["input_values"][row, frames:].any()


def kaldi_float32(clip: torch.Tensor) -> torch.Tensor:
    """Kaldi's steps one after the other in float32, as BEATs was trained: `(samples,)` -> `(frames, 128)`."""
    mels = 1127 * (1 + torch.arange(256) * 31.25 / 700).log()
    lowest, highest = (1127 * math.log(1 + hertz / 700) for hertz in (20, 8000))
    left, centre, right = (lowest + (torch.arange(128.0) + i) * ((highest - lowest) / 129) for i in range(3))
    slopes = [((mels - a) / (b - a), (c - mels) / (c - b)) for a, b, c in zip(left, centre, right, strict=True)]
    filters = torch.stack([torch.minimum(up, down).clamp(min=0) for up, down in slopes])  # (128, 256)
    rows = []
    for frame in (clip * 2**15).unfold(0, 400, 160):
        frame = frame - frame.mean()
        frame = frame - 0.97 * torch.cat([frame[:1], frame[:-1]])
        frame = frame * torch.hann_window(400, periodic=False).pow(0.85)
        power = torch.fft.rfft(frame, n=512).abs().square()[:256]
        rows.append((filters @ power).clamp(min=torch.finfo(torch.float32).eps).log())
    return torch.stack(rows)


@pytest.mark.parametrize("sweep", [0, 50])
def test_filter_bank_of_tones_rounds_as_in_training(sweep):
    seconds = torch.arange(5 * RATE) / RATE
    clip = 0.5 * torch.sin(2 * math.pi * (440 * seconds + sweep * seconds**2))
    expected = (kaldi_float32(clip) - 15.41663) / (2 * 6.55582)
    values = ListenFeatureExtractor()(clip, sampling_rate=RATE)["input_values"][0]
    torch.testing.assert_close(values, expected, atol=2e-6, rtol=0)


def test_filter_bank_of_digital_silence_is_the_floor():
    batch = ListenFeatureExtractor()(np.zeros(RATE, np.float32), sampling_rate=RATE)
    floor = (math.log(torch.finfo(torch.float32).eps) - 15.41663) / (2 * 6.55582)
    torch.testing.assert_close(batch["input_values"], torch.full((1, 98, 128), floor))
    assert batch["input_features"].unique().numel() == 1


def test_a_clip_does_not_depend_on_its_batch_mates():
    extractor = ListenFeatureExtractor()
    clips = [noise(length, seed) * 10.0**-seed for seed, length in enumerate([*LENGTHS, 500_000, 900])]
    batch = extractor(clips, sampling_rate=RATE)
    row = 0
    for clip in clips:
        alone = extractor(clip, sampling_rate=RATE)
        for name in ("input_features", "input_values"):
            values, mask = alone[name], alone[f"{name}_mask"]
            axis = 2 if name == "input_features" else 1
            together = batch[name][row : row + len(values)].narrow(axis, 0, values.shape[axis])
            torch.testing.assert_close(together, values, atol=1e-6, rtol=0)
            assert batch[f"{name}_mask"][row : row + len(mask)].sum() == mask.sum()
        row += len(alone["input_features"])
    assert row == len(batch["input_features"])


def test_long_audio_is_cut_into_chunks_in_order():
    extractor = ListenFeatureExtractor()
    long, short = noise(1_000_000), noise(RATE, 1)
    batch = extractor([short, long, short], sampling_rate=RATE)
    assert len(batch["input_features"]) == 5 == 2 + extractor.num_chunks(1_000_000)
    assert batch["input_features_mask"].sum(1).tolist() == [100, 3000, 3000, 250, 100]
    piece = extractor(long[480_000:960_000], sampling_rate=RATE)
    torch.testing.assert_close(batch["input_values"][2], piece["input_values"][0], atol=1e-6, rtol=0)
    assert torch.equal(batch["input_features"][0], batch["input_features"][4])


@pytest.mark.parametrize("samples", [1, 399, 2_799, 2_800, 2_801, 5_360, 16_000, 47_123, 479_999, 480_001, 1_000_000])
@pytest.mark.parametrize("bins", [128, 0])
def test_counts_of_frames_are_those_of_the_encoders(samples, bins):
    extractor = ListenFeatureExtractor(num_fbank_bins=bins)
    batch = extractor(noise(samples), sampling_rate=RATE)
    speech = ListenWhisperEncoder._from_config(
        WhisperConfig(d_model=4, encoder_layers=0, encoder_attention_heads=1, encoder_ffn_dim=4, pad_token_id=0)
    )
    counts = speech.output_mask(batch["input_features_mask"]).sum(1)
    if bins:
        audio = BeatsModel._from_config(
            BeatsConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
        )
        tokens = audio.output_mask(batch["input_values_mask"]).sum(1)
        assert tokens.min() >= 8
        counts = torch.maximum(counts, tokens)
    else:
        assert "input_values" not in batch
    assert counts.min() >= 1
    assert extractor.num_encoder_frames(samples) == counts.tolist()
    assert extractor.num_chunks(samples) == len(counts)


def test_a_short_clip_is_followed_by_silence():
    extractor, clip = ListenFeatureExtractor(), noise(700)
    short = extractor(clip, sampling_rate=RATE)
    longer = extractor(np.pad(clip, (0, 2_100)), sampling_rate=RATE)
    for name in extractor.model_input_names:
        assert torch.equal(short[name], longer[name])


@pytest.mark.parametrize(
    "clip",
    [
        noise(8_000).tolist(),
        torch.from_numpy(noise(8_000)),
        torch.from_numpy(noise(8_000)).requires_grad_(),
        torch.from_numpy(noise(8_000)).bfloat16(),
        noise(8_000).astype(np.float64),
        noise(16_000)[::2],
        [noise(8_000)],
        (noise(8_000).tolist(),),
    ],
    ids=["list", "tensor", "with gradient", "bfloat16", "float64", "strided", "list of arrays", "tuple of lists"],
)
def test_every_form_of_a_clip_is_taken(clip):
    batch = ListenFeatureExtractor()(clip, sampling_rate=RATE)
    assert batch["input_features"].shape == (1, 80, 50) and not batch["input_features"].requires_grad


def test_autocast_around_it_changes_nothing():
    extractor, clips = ListenFeatureExtractor(), [noise(9000), noise(5000, 1)]
    expected = extractor(clips, sampling_rate=16000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = extractor(clips, sampling_rate=16000)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_arrays_for_numpy_users():
    batch = ListenFeatureExtractor()(noise(8_000), sampling_rate=RATE, return_tensors="np")
    assert all(isinstance(batch[name], np.ndarray) for name in ListenFeatureExtractor.model_input_names)


def test_the_input_is_left_alone():
    clip = noise(8_000)
    before = clip.copy()
    ListenFeatureExtractor()(clip, sampling_rate=RATE)
    assert np.array_equal(clip, before)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ([], "got no clip"),
        (np.zeros(0, np.float32), "Clip 0 is empty"),
        ([noise(100), []], "Clip 1"),
        (np.array([0.0, math.nan]), "Clip 0 has NaN or infinite"),
        ([noise(100), np.array([0.0, math.inf])], "Clip 1 has NaN or infinite"),
        (np.zeros((2, 100)), r"Clip 0 has shape \(2, 100\)"),
        ([np.zeros((1, 100))], r"Clip 0 has shape \(1, 100\)"),
        (np.zeros(100, np.int16), "type int16, floats in .-1, 1. are needed; divide 16-bit integers by 32768"),
        ("speech.wav", "Clip 0 has samples of type <U10"),
        ([{"array": noise(10)}], "Clip 0 has samples of type object"),
    ],
)
def test_wrong_audio_is_named(clip, message):
    with pytest.raises(ValueError, match=message):
        ListenFeatureExtractor()(clip, sampling_rate=RATE)


def test_another_sampling_rate_says_to_resample():
    with pytest.raises(ValueError, match="16000.*44100.*resample"):
        ListenFeatureExtractor()(noise(100), sampling_rate=44_100)


def test_a_missing_sampling_rate_warns(caplog):
    logger = logging.getLogger("transformers")
    logger.propagate, propagate = True, logger.propagate
    try:
        with caplog.at_level("WARNING"):
            ListenFeatureExtractor()(noise(100))
    finally:
        logger.propagate = propagate
    assert "without sampling_rate" in caplog.text


def test_unknown_arguments_raise():
    with pytest.raises(TypeError, match="num_mel_bins"):
        ListenFeatureExtractor(num_mel_bins=80)
    with pytest.raises(TypeError, match="padding"):
        ListenFeatureExtractor()(noise(100), sampling_rate=RATE, padding=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"feature_size": 0}, "feature_size=0"),
        ({"hop_length": 1.5}, "hop_length=1.5"),
        ({"sampling_rate": 8000}, "sampling_rate=8000 is too low"),
        ({"fbank_std": 0.0}, "fbank_std=0.0"),
        ({"num_fbank_bins": 100}, "num_fbank_bins=100 is not a multiple of patch_size=16"),
        ({"chunk_seconds": 0.1}, "chunk_seconds=0.1 is shorter than the 0.175 s"),
    ],
)
def test_values_that_cannot_work_raise(values, message):
    with pytest.raises(ValueError, match=message):
        ListenFeatureExtractor(**values)


@pytest.mark.parametrize("samples", [0, -5])
def test_a_clip_without_samples_has_no_chunks(samples):
    with pytest.raises(ValueError, match=f"num_samples={samples}"):
        ListenFeatureExtractor().num_chunks(samples)


def test_saved_and_loaded_is_the_same(tmp_path):
    extractor = ListenFeatureExtractor(feature_size=128, pad_to_30s=True, num_fbank_bins=None, chunk_seconds=12.5)
    extractor.save_pretrained(tmp_path)
    loaded = ListenFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == extractor.to_dict()
    shape = loaded(noise(RATE), sampling_rate=RATE)["input_features"].shape
    assert shape == (1, 128, 1250)


def test_a_saved_folder_carries_the_code(tmp_path):
    ListenFeatureExtractor().save_pretrained(tmp_path)
    assert (tmp_path / "feature_extraction_listen.py").is_file()
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == "ListenFeatureExtractor"
