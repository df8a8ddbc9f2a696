"""Any source of audio gives the same mono waveform, or an error that names the trouble."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch

from listen.audio_listen import load_waveform, resample

RATE = 16000


@pytest.fixture(scope="module")
def wave() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (0.1 * rng.standard_normal(RATE)).astype(np.float32)


@pytest.fixture(scope="module")
def wav_file(wave: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("audio") / "clip.wav"
    soundfile.write(path, wave, RATE, subtype="FLOAT")
    return str(path)


def test_every_source_of_one_clip_is_the_same_waveform(wave: np.ndarray, wav_file: str) -> None:
    data = Path(wav_file).read_bytes()
    row = {"array": wave, "sampling_rate": RATE}
    sources = [
        wav_file, data, row, {"bytes": data, "path": None}, {"bytes": None, "path": wav_file},
        {"array": torch.tensor(wave), "sampling_rate": RATE, "path": "gone.wav"},
    ]  # fmt: skip
    for source in sources:
        np.testing.assert_array_equal(load_waveform(source), wave)
    for source in (wave, torch.tensor(wave), wave.astype(np.float64), wave.tolist()):
        np.testing.assert_array_equal(load_waveform(source, RATE), wave)


def test_a_row_of_datasets_is_read_whether_decoded_or_not(wave: np.ndarray, wav_file: str) -> None:
    data = datasets.Dataset.from_dict({"audio": [wav_file]}).cast_column("audio", datasets.Audio(decode=False))
    np.testing.assert_array_equal(load_waveform(data[0]["audio"]), wave)


def test_a_torchcodec_decoder_is_read_by_its_interface(wave: np.ndarray) -> None:
    class Decoder:
        """What torchcodec's AudioDecoder offers; torchcodec itself needs FFmpeg."""

        def get_all_samples(self) -> object:
            return type("Samples", (), {"data": torch.tensor(np.stack([wave, 0 * wave])), "sample_rate": RATE})()

    np.testing.assert_allclose(load_waveform(Decoder()), wave / 2, atol=1e-7)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_files_and_arrays_of_any_rate_are_resampled_alike(rate: int, tmp_path: object) -> None:
    time = np.arange(rate) / rate
    tone = (0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    soundfile.write(tmp_path / "tone.wav", tone, rate, subtype="FLOAT")
    from_file, from_array = load_waveform(tmp_path / "tone.wav"), load_waveform(tone, rate)
    np.testing.assert_array_equal(from_file, from_array)
    assert len(from_array) == RATE
    expected = 0.3 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    assert np.abs(from_array - expected)[200:-200].max() < 2e-3


@pytest.mark.parametrize("kind, scale", [(np.int16, 2**15), (np.int32, 2**31)])
def test_integers_are_scaled_by_their_type(kind: type, scale: int) -> None:
    np.testing.assert_allclose(load_waveform(np.array([0, scale // 2, -scale], dtype=kind), RATE), [0, 0.5, -1])


def test_unsigned_bytes_are_centred() -> None:
    np.testing.assert_allclose(load_waveform(np.array([128, 192, 0], dtype=np.uint8), RATE), [0, 0.5, -1])


@pytest.mark.parametrize("channels_first", [True, False])
def test_stereo_is_mixed_down_whichever_axis_holds_the_channels(wave: np.ndarray, channels_first: bool) -> None:
    stereo = np.stack([wave, np.zeros_like(wave)])
    mixed = load_waveform(stereo if channels_first else stereo.T, RATE)
    np.testing.assert_allclose(mixed, wave / 2, atol=1e-7)


def test_a_stereo_file_is_mixed_down(wave: np.ndarray) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([wave, -wave], axis=1), RATE, format="FLAC")
    np.testing.assert_allclose(load_waveform(buffer.getvalue()), np.zeros(RATE), atol=1e-4)


def test_resampling_at_the_same_rate_changes_nothing(wave: np.ndarray) -> None:
    assert resample(wave, RATE, RATE) is wave


@pytest.mark.parametrize(
    "audio, rate, error, message",
    [
        (np.zeros(0, np.float32), RATE, ValueError, "empty audio"),
        (np.array([0.0, np.nan]), RATE, ValueError, "1 of 2 samples are NaN"),
        (np.array([0.0, -np.inf]), RATE, ValueError, "1 of 2 samples are NaN or infinite"),
        (np.zeros(100), None, ValueError, "came without sampling_rate"),
        (np.zeros(100), 0, ValueError, "sampling_rate=0"),
        (np.zeros(100), 16000.5, ValueError, "sampling_rate=16000.5"),
        (np.zeros(100), np.nan, ValueError, "sampling_rate=nan"),
        (np.zeros(100), "16000", ValueError, "sampling_rate='16000'"),
        (np.zeros((3, 4)), RATE, ValueError, r"shape \(3, 4\) has no clear channel axis"),
        (np.zeros((20, 400)), RATE, ValueError, r"shape \(20, 400\) has no clear channel axis"),
        (np.zeros((1, 2, 400)), RATE, ValueError, r"shape \(1, 2, 400\)"),
        (np.arange(100), RATE, ValueError, "int64 have no known scale"),
        (np.full(100, 3e4), RATE, ValueError, "reach 30000.*divide 16-bit"),
        ("http://host:port/a.wav", None, ConnectionError, "cannot fetch 'http://host:port/a.wav'"),
        ("no/such.wav", None, FileNotFoundError, "no audio file at 'no/such.wav'"),
        (b"this is no audio at all", None, ValueError, "cannot decode 23 bytes"),
        ({"text": "hm"}, None, ValueError, "none of 'array', 'bytes' and 'path'"),
        (object(), RATE, TypeError, "unsupported audio type object; expected a path, URL"),
    ],
)
def test_what_is_no_audio_raises(audio: object, rate: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        load_waveform(audio, rate)


def test_an_unreadable_file_is_named(tmp_path: object) -> None:
    (tmp_path / "notes.wav").write_text("not a wav")
    with pytest.raises(ValueError, match="notes.wav"):
        load_waveform(tmp_path / "notes.wav")


def test_a_url_is_fetched(wave: np.ndarray, wav_file: str) -> None:
    import functools
    import http.server
    import os
    import threading

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=os.path.dirname(wav_file))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        got = load_waveform(f"http://127.0.0.1:{server.server_address[1]}/clip.wav")
        server.shutdown()
    np.testing.assert_array_equal(got, wave)
