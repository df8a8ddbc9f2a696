"""Everything that a clip may be given as, at every door, and files and servers that lie about their length."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import struct
import threading
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import soundfile
import torch

from listen import sources_listen
from listen.audio_listen import is_one_clip, load_waveform
from listen.chat_listen import conversation_clips, plain_message
from listen.data.audio import clip_seconds
from listen.data.manifest import ManifestError, from_datasets, to_row
from listen.sources_listen import Limits, Source, open_source

RATE = 16000


class Decoder:
    """The interface of torchcodec's AudioDecoder; torchcodec itself needs FFmpeg."""

    def __init__(self, wave: np.ndarray) -> None:
        self.samples = SimpleNamespace(data=torch.tensor(wave[None]), sample_rate=RATE)

    def get_all_samples(self) -> SimpleNamespace:
        return self.samples


@pytest.fixture(scope="module")
def wave() -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(RATE)).astype(np.float32)


@pytest.fixture(scope="module")
def content(wave: np.ndarray) -> bytes:
    return encoded(wave)


def encoded(wave: np.ndarray, kind: str = "WAV", subtype: str | None = "FLOAT", rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def sources(wave: np.ndarray, content: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("sources")
    path, archive = folder / "a clip.wav", folder / "clips.zip"
    path.write_bytes(content)
    with zipfile.ZipFile(archive, "w") as file:
        file.write(path, "clip.wav")
    text = base64.b64encode(content).decode()
    return {
        "path": path, "text": str(path), "file address": f"file://{path}".replace(" ", "%20"),
        "archive": f"zip://clip.wav::{archive}", "bytearray": bytearray(content), "memoryview": memoryview(content),
        "base64": text, "data URI": f"data:audio/wav;base64,{text}",
        "decoder": Decoder(wave), "decoder in a row": {"audio": Decoder(wave)},
        "ASR pipeline": {"raw": wave, "sampling_rate": RATE},
        "input_audio": {"type": "input_audio", "input_audio": {"data": text, "format": "wav"}},
        "audio_url": {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{text}"}},
        "audio_url path": {"type": "audio_url", "audio_url": {"url": str(path)}},
        "audio item": {"type": "audio", "audio": {"array": wave, "sampling_rate": RATE}},
        "gradio": (RATE, wave), "torchaudio": (torch.tensor(wave[None]), RATE), "librosa": (wave, float(RATE)),
        "lists": (RATE, wave.tolist()), "rate as tensor": {"array": wave, "sampling_rate": torch.tensor(RATE)},
    }  # fmt: skip


def test_every_source_is_the_same_waveform_at_every_door(sources: dict[str, object], wave: np.ndarray) -> None:
    for name, source in sources.items():
        np.testing.assert_array_equal(load_waveform(source), wave, err_msg=name)
        assert is_one_clip(source), name
        row = to_row("m.jsonl:1", {"audio": source, "task": "transcribe", "response": "hi"}, Path("/"))
        assert row["task"] == "asr" and row["audio"][0].keys() == {"path", "bytes"}
        np.testing.assert_array_equal(load_waveform(row["audio"][0]), wave, err_msg=name)
        item = source if isinstance(source, dict) and "type" in source else {"type": "audio", "audio": source}
        message = {"role": "user", "content": [item]}
        assert plain_message(message)["content"] == "<|audio|>"
        np.testing.assert_array_equal(load_waveform(conversation_clips([message])[0]), wave, err_msg=name)


def test_file_objects_are_read(content: bytes, wave: np.ndarray, tmp_path: Path) -> None:
    np.testing.assert_array_equal(load_waveform(io.BytesIO(content)), wave)
    (tmp_path / "clip.wav").write_bytes(content)
    with (tmp_path / "clip.wav").open("rb") as file:
        np.testing.assert_array_equal(load_waveform(file), wave)
    with (tmp_path / "clip.wav").open(encoding="latin1") as file, pytest.raises(TypeError, match=r"open\(path, 'rb'\)"):
        load_waveform(file)
    with open("/dev/zero", "rb") as file, pytest.raises(ValueError, match="'/dev/zero' has more than 3000000 bytes"):
        load_waveform(file, max_bytes=3_000_000)


def test_a_stream_that_hands_out_decoders_becomes_rows(wave: np.ndarray) -> None:
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"audio": Decoder(wave), "response": "hi"}]))
    row = next(iter(from_datasets(stream, task="asr")))
    np.testing.assert_array_equal(load_waveform(row["audio"][0]), wave)


def test_decoders_are_asked_for_no_more_than_is_wanted(wave: np.ndarray) -> None:
    class Bounded(Decoder):
        def get_samples_played_in_range(self, start_seconds: float, stop_seconds: float) -> SimpleNamespace:
            part = slice(int(start_seconds * RATE), int(stop_seconds * RATE))
            return SimpleNamespace(data=self.samples.data[:, part], sample_rate=RATE)

    assert len(load_waveform(Bounded(np.tile(wave, 4)), max_seconds=2)) == 3 * RATE


@pytest.mark.parametrize(
    "audio, rate, error, message",
    [
        ([0.1, [0.2], 3], RATE, ValueError, "cannot become samples"),
        (np.zeros(100), [RATE, 8000], ValueError, r"sampling_rate=\[16000, 8000\] must be one number"),
        (np.zeros(100), True, ValueError, "sampling_rate=True"),
        (np.zeros(100), 1, ValueError, "sampling_rate=1 must be a whole number .* from 1000 to 768000"),
        (np.zeros(100), 10**30, ValueError, "from 1000 to 768000"),
        (np.array(0.5), RATE, ValueError, r"shape \(\) has no clear channel axis"),
        ("", None, FileNotFoundError, "no audio file at ''"),
        ("a\0b.wav", None, FileNotFoundError, "no audio file"),
        ("\ud800.wav", None, FileNotFoundError, "no audio file"),
        ("/", None, ValueError, "'/' is a folder"),
        ("data:audio/wav", None, ValueError, "is no data URI; write data:audio/wav;base64,"),
        ("data:audio/wav;base64,????", None, ValueError, "is not base64"),
        ({"input_audio": {"data": "???"}}, None, ValueError, "is not base64"),
        ({"type": "input_audio"}, None, ValueError, "none of 'array', 'bytes' and 'path'"),
        (b"", None, ValueError, "empty audio: 0 bytes"),
        (io.BytesIO(), None, ValueError, "empty audio"),
        ("memory://a.wav", None, ValueError, "addresses of the kind 'memory' are not opened.*http"),
        ("local:///etc/hosts", None, ValueError, "addresses of the kind 'local' are not opened"),
        ("reference://x::/etc/hosts", None, ValueError, "addresses of the kind 'reference' are not opened"),
        ("zip://a.wav::memory://b.zip", None, ValueError, "addresses of the kind 'memory' are not opened"),
        ("a::b", None, ValueError, "addresses of the kind 'a' are not opened"),
        ("zip://a.wav::/no/such.zip", None, FileNotFoundError, "no audio file at 'zip://a.wav::/no/such.zip'"),
        ("http://127.0.0.1:1/a.wav", None, ConnectionError, "cannot fetch 'http://127.0.0.1:1/a.wav'.*refused"),
    ],
)  # fmt: skip
def test_what_cannot_be_opened_is_named(audio: object, rate: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        load_waveform(audio, rate)


@pytest.mark.parametrize(
    "audio, message",
    [
        ({"array": [0.1, 0.2]}, "m:1: an audio array needs its 'sampling_rate'"),
        ((1, np.zeros(9)), "m:1: an audio array needs its 'sampling_rate', from 1000"),
        ("data:audio/wav;base64,??", "m:1: .*is not base64"),
        (3.5, "m:1: a clip must be a path"),
        ("\ud800.wav", "m:1: there is no audio file"),
        ("x" * 300, "m:1: there is no audio file"),
        ("x" * 3000, "m:1: no audio file at"),
    ],
)
def test_a_manifest_names_the_row_of_a_bad_clip(audio: object, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        to_row("m:1", {"audio": audio, "task": "asr", "response": "hi"}, Path("/"))


# ---------------------------------------------------------------------- servers


class Handler(http.server.BaseHTTPRequestHandler):
    """A hostile server: the path says what it does."""

    protocol_version = "HTTP/1.1"

    def __init__(self, content: bytes, *args: object) -> None:
        self.content = content
        super().__init__(*args)

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        with warnings.catch_warnings():
            try:
                getattr(self, f"answer_{self.path[1:]}")()
            except OSError:  # the client has gone
                self.close_connection = True

    def start(self, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def answer_clip(self) -> None:
        self.start(Content_Length=str(len(self.content)))
        self.wfile.write(self.content)

    def answer_moved(self) -> None:
        self.start(302, Location="/clip", Content_Length="0")

    def answer_local(self) -> None:
        self.start(302, Location="file:///etc/hosts", Content_Length="0")

    def answer_missing(self) -> None:
        self.start(404, Content_Length="0")

    def answer_silent(self) -> None:
        time.sleep(30)

    def answer_headers(self) -> None:  # one byte at a time, for ever
        for _ in range(300):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: "[:1] if _ == 0 else b"x")
            self.wfile.flush()
            time.sleep(0.1)

    def answer_drip(self) -> None:
        self.start(Content_Length=str(len(self.content)))
        for byte in self.content[:300]:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            time.sleep(0.1)

    def answer_endless(self) -> None:
        self.start(Transfer_Encoding="chunked")
        while True:
            self.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")

    def answer_lying(self) -> None:
        self.start(Content_Length=str(10**12))
        self.wfile.write(self.content)


@pytest.fixture(scope="module")
def server(content: bytes) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, content)) as found:
        found.daemon_threads, found.block_on_close = True, False
        found.handle_error = lambda *_: None
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_address[1]}"
        found.shutdown()


@pytest.mark.parametrize("page", ["clip", "moved"])
def test_a_clip_is_fetched(server: str, wave: np.ndarray, page: str) -> None:
    np.testing.assert_array_equal(load_waveform(f"{server}/{page}"), wave)
    np.testing.assert_array_equal(load_waveform({"type": "audio_url", "audio_url": {"url": f"{server}/{page}"}}), wave)


@pytest.mark.parametrize("page", ["silent", "drip", "headers"])
def test_a_server_that_never_ends_is_left_at_the_deadline(server: str, page: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=f"cannot fetch '{server}/{page}'"):
        load_waveform(f"{server}/{page}", timeout=0.5)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("page", ["endless", "lying"])
def test_a_body_ends_at_the_byte_limit(server: str, page: str) -> None:
    with pytest.raises(ValueError, match=f"{server}/{page}' has more than 1000000 bytes.*max_bytes="):
        load_waveform(f"{server}/{page}", max_bytes=10**6)


@pytest.mark.parametrize("page, reason", [("local", "unsupported protocol"), ("missing", "404")])
def test_redirects_stay_on_the_web_and_errors_are_told(server: str, page: str, reason: str) -> None:
    with pytest.raises(ConnectionError, match=reason):
        load_waveform(f"{server}/{page}")


def test_the_module_sets_both_limits_for_every_door(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_listen, "URL_TIMEOUT", 0.2)
    monkeypatch.setattr(sources_listen, "MAX_BYTES", 1000)
    with pytest.raises(ConnectionError, match="URL_TIMEOUT|timed out"):
        load_waveform(f"{server}/silent")
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        load_waveform(f"{server}/clip")


# ---------------------------------------------------------------------- headers that lie


def with_rate(rate: int) -> bytes:
    return (
        b"RIFF"
        + struct.pack("<I", 68)
        + b"WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16)
        + (b"data" + struct.pack("<I", 32) + bytes(32))
    )


def with_frames(frames: int, samples: int = 4000) -> bytes:
    """FLAC whose header claims any number of frames; 0 means unknown."""
    data = bytearray(encoded(np.zeros(samples, np.int16), "FLAC", None))
    data[21] = (data[21] & 0xF0) | frames >> 32
    data[22:26] = struct.pack(">I", frames & 0xFFFFFFFF)
    return bytes(data)


@pytest.mark.parametrize("rate", [1, 999, 768_001, 2**31 - 1])
def test_files_of_implausible_rates_are_refused(rate: int) -> None:
    with pytest.raises(ValueError, match=f"sampling rate of {rate} Hz in 76 bytes is not plausible"):
        load_waveform(with_rate(rate))
    assert load_waveform(with_rate(8000)).shape == (32,)


@pytest.mark.parametrize("frames", [2**36 - 1, 2**31, 10**9])
def test_promised_lengths_are_refused_before_decoding(frames: int) -> None:
    with pytest.raises(ValueError, match=f"{frames} samples, .* hours, in .*max_audio_seconds="):
        load_waveform(with_frames(frames))
    assert clip_seconds({"path": None, "bytes": with_frames(frames)}) is None


def test_a_stream_of_unknown_length_is_read_to_its_end() -> None:
    assert load_waveform(with_frames(0)).shape == (4000,)


def test_a_stream_of_unknown_length_ends_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("listen.audio_listen.MAX_SAMPLES", 3000)
    with pytest.raises(ValueError, match="4000 samples"):
        load_waveform(with_frames(0))


@pytest.mark.parametrize("rate", [8000, RATE, 44100])
def test_decoding_ends_a_second_after_the_limit(rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("listen.audio_listen._BLOCK_SAMPLES", 7000)
    long = (0.1 * np.random.default_rng(1).standard_normal(5 * rate)).astype(np.float32)
    data = encoded(long, rate=rate)
    part, whole = load_waveform(data, max_seconds=1.5), load_waveform(data)
    assert len(part) == 2.5 * RATE and len(whole) == 5 * RATE
    np.testing.assert_array_equal(part[: int(1.5 * RATE)], whole[: int(1.5 * RATE)])
    np.testing.assert_array_equal(load_waveform(data, max_seconds=float("inf")), whole)


# ---------------------------------------------------------------------- files that were cut off, silence


@pytest.mark.parametrize(
    "kind, subtype",
    [("WAV", None), ("AIFF", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None), ("AU", None), ("W64", None),
     ("RF64", None), ("CAF", None)],
)  # fmt: skip
def test_files_that_were_cut_off_warn(kind: str, subtype: str | None, wave: np.ndarray, tmp_path: Path) -> None:
    data = encoded(wave, kind, subtype)
    path = tmp_path / f"clip.{kind.lower()}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert abs(len(load_waveform(data)) - RATE) < 2000
        for length in (len(data) - 10, len(data) // 2):
            path.write_bytes(data[:length])
            with pytest.raises((UserWarning, ValueError), match=rf"cut off.*{path.name}|{path.name}.*cut off"):
                load_waveform(path)


def test_the_warning_tells_seconds_found_and_promised(wave: np.ndarray) -> None:
    with pytest.warns(UserWarning, match=r"0.50 s are left of about 1.00 s that it promises"):
        load_waveform(encoded(wave)[: 44 + 2 * RATE])


def test_wav_of_open_size_and_odd_length_is_complete(wave: np.ndarray) -> None:
    data = bytearray(encoded(wave, subtype="PCM_16"))
    position = data.find(b"data") + 4
    for size in (b"\xff\xff\xff\xff", struct.pack("<I", 0x7FFFF000)):
        data[4:8] = data[position : position + 4] = size
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(load_waveform(bytes(data))) == RATE


def test_channels_that_cancel_each_other_warn(wave: np.ndarray) -> None:
    stereo = np.stack([wave, -wave])
    for audio in ({"array": stereo, "sampling_rate": RATE}, encoded(stereo.T)):
        with pytest.warns(UserWarning, match="cancel each other.*give one channel"):
            assert not load_waveform(audio).any()


# ---------------------------------------------------------------------- decoders beside soundfile


def test_a_broken_decoder_names_the_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchcodec").mkdir()
    (tmp_path / "torchcodec" / "__init__.py").write_text("raise OSError('Could not load this library')")
    monkeypatch.syspath_prepend(tmp_path)
    clip = tmp_path / "memo.m4a"
    clip.write_bytes(b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom" + bytes(1000))
    with pytest.raises(ValueError, match="memo.m4a.*torchcodec fails as well: Could not load.*convert it to wav"):
        load_waveform(clip)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("as_bytes", [False, True])
def test_audioread_decodes_up_to_the_limit(as_bytes: bool, wave: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("audioread")
    data = encoded(np.stack([wave, wave], 1), subtype="PCM_16")  # its own WAV reader needs no FFmpeg
    path = tmp_path / "clip.wav"
    path.write_bytes(data)
    source = open_source(data, limits=Limits()) if as_bytes else Source("a clip", str(path))
    samples, rate = sources_listen._by_audioread(source, 0.5)
    assert (len(samples), rate) == (RATE // 2, RATE)
    np.testing.assert_allclose(samples, wave[: RATE // 2], atol=1e-4)
