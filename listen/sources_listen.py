"""Everything that a clip may be given as, opened as samples or as an encoded file.

Local files are decoded by `audio_listen` directly; every other source, and every file that soundfile cannot decode, is
opened here. Nothing here trusts a length: addresses have a deadline and a byte limit, decoders a sample limit.
"""

import base64
import binascii
import math
import os
import queue
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from io import BytesIO
from numbers import Real
from typing import Any, NamedTuple
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
import torch
from huggingface_hub.utils import httpx
from transformers.audio_utils import get_audio_filetype

URL_TIMEOUT = 20.0
"""Seconds that fetching one address may take altogether; set it here, or by `timeout=`."""
MAX_BYTES = 2**29
"""Bytes of one clip that is fetched or read from a file object; set it here, or by `max_bytes=`."""
MAX_SAMPLES = 2**29
"""Samples of one clip after mixing, before and after resampling: 2 GiB, 9 hours at 16 kHz."""
RATES = (1000, 768_000)
"""Lowest and highest plausible sampling rate in Hz."""

ROW_KEYS = ("sampling_rate", "array", "raw", "bytes", "path", "url", "audio_url", "input_audio")
"""Keys of a mapping that is a clip itself; the first alone is none."""
AUDIO_TYPES = ("audio", "input_audio", "audio_url")
"""Types of content items with a clip: of transformers' chat messages, and of the OpenAI API."""
# the first one given counts: rows of datasets may add a path
_CLIP_KEYS = ("array", "raw", "bytes", "path", "url", "audio", "audio_url", "input_audio", "data")
_SCHEMES = {
    *("http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "hdfs", "webhdfs", "oci", "oss"),
    *("zip", "tar", "gzip", "simplecache"),
}
_IDLE_SECONDS = 10.0  # to connect, and between two packets
_BLOCK_BYTES = 2**20
_MOST_CHANNELS = 8
_INTEGER_SCALES = {"uint8": (128.0, 128.0), "int16": (0.0, 2.0**15), "int32": (0.0, 2.0**31)}
_CANCELLED = 1e-3  # of the loudest channel: what is left of a clip whose channels cancel each other


class TooLargeError(ValueError):
    """More bytes than the limit of an address or a file object."""


class Source(NamedTuple):
    """A clip that is opened, not yet decoded.

    Attributes:
        name: For messages; empty for raw samples.
        file: A local file's path, or its content.
        samples: `(samples,)` float32, in place of `file`.
        rate: Sampling rate of `samples`; `None` where it was not given.
    """

    name: str
    file: str | BytesIO | None = None
    samples: np.ndarray | None = None
    rate: Any = None


class Limits(NamedTuple):
    """What opening a source may take; see `load_waveform`."""

    seconds: float | None = None
    timeout: float | None = None
    bytes: int | None = None


def open_source(audio: Any, sampling_rate: Any = None, limits: Limits | None = None) -> Source:
    """Open one clip, see `audio_listen.load_waveform` for what it may be and for the errors."""
    limits = limits or Limits()
    if getattr(sampling_rate, "ndim", None) == 0:  # of rows in the format of numpy or torch
        sampling_rate = sampling_rate.item()
    if isinstance(audio, os.PathLike):
        audio = os.fsdecode(audio)
    if isinstance(audio, str):
        return _from_text(audio, limits)
    if isinstance(audio, (bytes, bytearray, memoryview)):
        return Source(f"{memoryview(audio).nbytes} bytes", BytesIO(audio))
    if isinstance(audio, Mapping):
        return _from_row(audio, sampling_rate, limits)
    if is_rate_and_samples(audio):
        rate, samples = audio if _is_number(audio[0]) else reversed(audio)
        return open_source(samples, rate, limits)
    if callable(getattr(audio, "get_all_samples", None)):  # of torchcodec, also as wrapped by datasets and torchaudio
        return _from_decoder(audio, limits)
    if callable(getattr(audio, "read", None)):
        return _from_file_object(audio, limits)
    return Source("", samples=_mix_down(_scaled(_as_array(audio))), rate=sampling_rate)


def is_rate_and_samples(audio: Any) -> bool:
    """Whether `audio` is `(rate, samples)` or `(samples, rate)`: what gradio, scipy, librosa and torchaudio return."""
    if not isinstance(audio, (list, tuple)) or len(audio) != 2 or _is_number(audio[0]) == _is_number(audio[1]):
        return False
    samples = audio[1] if _is_number(audio[0]) else audio[0]
    return isinstance(samples, (np.ndarray, torch.Tensor, list, tuple))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) or getattr(value, "ndim", None) == 0


# ---------------------------------------------------------------------- text: paths, addresses, base64


def _from_text(text: str, limits: Limits) -> Source:
    scheme = text.partition(":")[0].lower()
    if scheme == "data":
        return Source(f"a data URI of {len(text)} characters", BytesIO(_data_uri(text)))
    if scheme == "file":  # as much as the path itself
        text = unquote(text[len("file://") :].removeprefix("localhost"))
    if os.path.isfile(text):
        return Source(repr(text), text)
    if "://" in text or "::" in text:
        return Source(repr(text[:200]), BytesIO(_fetch(text, limits)))
    if os.path.isdir(text):
        raise ValueError(f"{text!r} is a folder; give the path of one audio file")
    content = _base64_audio(text)
    if content is None:
        raise FileNotFoundError(
            f"no audio file at {text[:200]!r}; give a path that exists, a URL, bytes, base64 or an array"
        )
    return Source(f"a base64 string of {len(text)} characters", BytesIO(content))


def _data_uri(text: str) -> bytes:
    header, comma, payload = text.partition(",")
    if not comma:
        raise ValueError(f"{text[:80]!r} is no data URI; write data:audio/wav;base64,...")
    return _base64(payload) if header.lower().endswith(";base64") else unquote_to_bytes(payload)


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(re.sub(r"\s", "", text), validate=True)
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"{text[:40]!r}... is not base64 ({error}); encode the file by base64.b64encode") from error


def _base64_audio(text: str) -> bytes | None:
    """The audio file in a base64 string; `None` where the text is anything else, a path for instance."""
    try:
        content = _base64(text)
        get_audio_filetype(content)
    except (ValueError, IndexError):
        return None
    return content


def _fetch(address: str, limits: Limits) -> bytes:
    """The bytes at an address, by httpx or by fsspec.

    Raises:
        ConnectionError: it cannot be fetched, or not within `timeout`.
        ValueError: another scheme than `_SCHEMES`, or more than `bytes`.
    """
    _check_schemes(address)
    is_web = address.lower().startswith(("http://", "https://"))
    timeout = URL_TIMEOUT if limits.timeout is None else limits.timeout
    limit = MAX_BYTES if limits.bytes is None else limits.bytes
    deadline = time.monotonic() + timeout
    stream = _web_stream(address, timeout, limit) if is_web else _fsspec_stream(address)
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def read() -> None:
        try:
            with stream as blocks:
                results.put(_limited(blocks, address, limit, deadline))
        except Exception as error:  # of any type: raised again by the caller's thread
            results.put(error)

    # a thread of its own, as name servers, slow headers and fsspec's file systems know no deadline
    threading.Thread(target=read, daemon=True).start()
    try:
        found = results.get(timeout=timeout)
    except queue.Empty:
        found = TimeoutError(f"not complete after {timeout:g} s; raise timeout= or sources_listen.URL_TIMEOUT")
    if isinstance(found, TooLargeError):
        raise found
    if isinstance(found, FileNotFoundError):
        raise FileNotFoundError(f"no audio file at {address[:200]!r}; check the address") from found
    if isinstance(found, Exception):
        reason = str(found) or type(found).__name__
        raise ConnectionError(f"cannot fetch {address[:200]!r}: {reason}; check the address, or give a file") from found
    return found


def _check_schemes(address: str) -> None:
    """Refuse schemes that open something else than remote storage, archives or local paths inside of archives."""
    *chain, last = address.split("::")
    schemes = [part.partition("://")[0].lower() for part in (*chain, *([last] if "://" in last else []))]
    unknown = [scheme for scheme in schemes if scheme not in _SCHEMES | ({"file"} if chain else set())]
    if unknown:
        raise ValueError(
            f"addresses of the kind {unknown[0]!r} are not opened: {address[:200]!r}; give a path, bytes, or one of "
            f"{', '.join(sorted(_SCHEMES))}"
        )


@contextmanager
def _web_stream(address: str, timeout: float, limit: int) -> Iterator[Iterator[bytes]]:
    patience = httpx.Timeout(min(timeout, _IDLE_SECONDS))
    with httpx.stream("GET", address, follow_redirects=True, timeout=patience) as response:  # to http(s) only
        response.raise_for_status()
        if int(response.headers.get("content-length", 0)) > limit:
            raise _too_large(address, limit)
        yield response.iter_bytes(_BLOCK_BYTES)


@contextmanager
def _fsspec_stream(address: str) -> Iterator[Iterator[bytes]]:
    import fsspec

    with fsspec.open(address, "rb") as file:
        yield iter(lambda: file.read(_BLOCK_BYTES), b"")


def _limited(blocks: Iterator[bytes], name: str, limit: int, deadline: float = math.inf) -> bytes:
    """All bytes of a stream, which ends with an error at the limit or the deadline."""
    content = bytearray()
    for block in blocks:
        content += block
        if len(content) > limit:
            raise _too_large(name, limit)
        if time.monotonic() > deadline:
            raise TimeoutError("not complete at the deadline")
    return bytes(content)


def _too_large(name: str, limit: int) -> TooLargeError:
    return TooLargeError(
        f"{name[:200]!r} has more than {limit} bytes; give a shorter clip, or raise max_bytes= or "
        "sources_listen.MAX_BYTES"
    )


# ---------------------------------------------------------------------- rows, decoders, file objects


def _from_row(row: Mapping[str, Any], sampling_rate: Any, limits: Limits) -> Source:
    """A row of `datasets`, of the ASR pipeline, or a content item of chat messages."""
    rate = row.get("sampling_rate")
    rate = sampling_rate if rate is None else rate
    for key in _CLIP_KEYS:
        value = row.get(key)
        if value is None:
            continue
        if key == "data" and isinstance(value, str) and not value.startswith("data:"):  # `input_audio` of OpenAI
            value = _base64(value)
        source = open_source(value, rate, limits)
        named = key == "bytes" and isinstance(row.get("path"), str)
        return source._replace(name=repr(row["path"])) if named else source
    raise ValueError(
        f"an audio row with the keys {sorted(map(str, row))} holds none of 'array', 'bytes' and 'path'; "
        f"the known keys are {', '.join(ROW_KEYS)}"
    )


def _from_decoder(decoder: Any, limits: Limits) -> Source:
    name = f"a {type(decoder).__name__}"
    is_bounded = hasattr(decoder, "get_samples_played_in_range") and (limits.seconds or math.inf) < math.inf
    try:
        if is_bounded:
            decoded = decoder.get_samples_played_in_range(0.0, limits.seconds)
        else:
            decoded = decoder.get_all_samples()
        samples = np.asarray(decoded.data, dtype=np.float32)  # (channels, samples)
    except Exception as error:  # of any type: decoders are packages of others
        raise ValueError(f"cannot decode the clip of {name} ({error}); give its path or bytes") from error
    return Source(name, samples=mixed(samples, 0, name), rate=decoded.sample_rate)


def _from_file_object(file: Any, limits: Limits) -> Source:
    name = str(getattr(file, "name", None) or f"a {type(file).__name__}")
    limit = MAX_BYTES if limits.bytes is None else limits.bytes
    try:
        content = _limited(iter(lambda: file.read(_BLOCK_BYTES), b""), name, limit)
    except TypeError as error:
        raise TypeError(f"{name} is not open for reading bytes; open it by open(path, 'rb')") from error
    return Source(repr(name), BytesIO(content))


# ---------------------------------------------------------------------- samples


def _as_array(audio: Any) -> np.ndarray:
    try:
        if isinstance(audio, torch.Tensor):
            audio = audio.detach().cpu()
            return (audio.float() if audio.is_floating_point() else audio).numpy()
        if isinstance(audio, (np.ndarray, list, tuple)):
            return np.asarray(audio)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"a {type(audio).__name__} cannot become samples ({error}); give one clip as (samples,) or (channels, "
            "samples), several clips as a list"
        ) from error
    raise TypeError(
        f"unsupported audio type {type(audio).__name__}; expected a path, URL, bytes, array, tensor or a datasets row"
    )


def _scaled(samples: np.ndarray) -> np.ndarray:
    """Float32 in [-1, 1]."""
    if samples.dtype.kind == "f":
        with np.errstate(over="ignore"):  # infinite samples are refused later
            return samples.astype(np.float32)
    if samples.size and samples.dtype.name not in _INTEGER_SCALES:
        raise ValueError(
            f"samples of type {samples.dtype} have no known scale; convert them to floats in [-1, 1] or to int16"
        )
    offset, scale = _INTEGER_SCALES.get(samples.dtype.name, (0.0, 1.0))
    return ((samples.astype(np.float64) - offset) / scale).astype(np.float32)


def _mix_down(samples: np.ndarray) -> np.ndarray:
    """`(samples,)`, `(channels, samples)` or `(samples, channels)` to `(samples,)`."""
    if samples.ndim == 1:
        return samples
    shape = samples.shape
    if samples.ndim != 2 or (min(shape) > _MOST_CHANNELS) == (max(shape) > _MOST_CHANNELS) or not samples.size:
        raise ValueError(
            f"audio of shape {shape} has no clear channel axis of at most {_MOST_CHANNELS} channels; give one clip as "
            "(samples,) or (channels, samples), several clips as a list"
        )
    return mixed(samples, int(np.argmin(shape)), "")


def mixed(samples: np.ndarray, axis: int, name: str) -> np.ndarray:
    """The mean over channels `(samples,)`; warns where channels of opposite phase cancel each other.

    Args:
        samples: Two axes, float32.
        axis: The one of the channels.
        name: For the warning.
    """
    mono = samples.mean(axis=axis)  # (samples,)
    if samples.shape[axis] > 1 and samples.size:
        with np.errstate(invalid="ignore"):
            loudest = np.abs(samples).max()
            if loudest > _CANCELLED and np.abs(mono).max() < _CANCELLED * loudest:
                warnings.warn(
                    f"the channels of {name or 'an array'} cancel each other: mixed to mono it is silent; give one "
                    "channel, samples[0] for instance",
                    stacklevel=2,
                )
    return mono


# ---------------------------------------------------------------------- decoders beside soundfile


def decode_otherwise(source: Source, seconds: float | None, error: Exception) -> tuple[np.ndarray, int]:
    """Samples `(samples,)` and rate of a file that soundfile cannot decode: by torchcodec, else by audioread.

    Args:
        source: Has a file.
        seconds: Decode no more than this.
        error: What soundfile raised.

    Raises:
        ValueError: none of them can decode it.
    """
    size = source.file.getbuffer().nbytes if isinstance(source.file, BytesIO) else os.path.getsize(source.file)
    if size == 0:
        raise ValueError(f"empty audio: {source.name} has 0 bytes") from error
    broken = ""
    for decode in (_by_torchcodec, _by_audioread):
        try:
            return decode(source, seconds)
        except ImportError:
            continue
        except Exception as reason:  # of any type: an optional package may be broken in any way
            broken += f"; {decode.__name__.removeprefix('_by_')} fails as well: {str(reason) or type(reason).__name__}"
    reason = getattr(error, "error_string", error)  # of libsndfile, without the address of a BytesIO
    raise ValueError(
        f"cannot decode {source.name} as audio ({reason}{broken}); it may be damaged or cut off. For a format that "
        "soundfile lacks, convert it to wav or flac, or install torchcodec and FFmpeg"
    ) from error


def _by_torchcodec(source: Source, seconds: float | None) -> tuple[np.ndarray, int]:
    # by name: an import would make transformers ask everybody for it who loads the model from the Hub
    make_decoder = import_module("torchcodec.decoders").AudioDecoder
    content = source.file.getvalue() if isinstance(source.file, BytesIO) else source.file
    decoder = make_decoder(content, num_channels=1)
    most = MAX_SAMPLES / decoder.metadata.sample_rate
    decoded = decoder.get_samples_played_in_range(0.0, most if seconds is None else min(seconds, most))
    return decoded.data[0].numpy(), int(decoded.sample_rate)


def _by_audioread(source: Source, seconds: float | None) -> tuple[np.ndarray, int]:
    """By FFmpeg's program or the system's decoder, which audioread finds; librosa depends on it."""
    audioread = import_module("audioread")
    with tempfile.TemporaryDirectory() as folder:
        path = source.file
        if isinstance(path, BytesIO):
            path = os.path.join(folder, "clip")
            with open(path, "wb") as file:
                file.write(source.file.getbuffer())
        try:
            reader = audioread.audio_open(path)
        except audioread.NoBackendError as error:
            raise ImportError("audioread found no FFmpeg") from error
        with reader as opened:
            rate, channels, content = opened.samplerate, opened.channels, bytearray()
            most = 2 * channels * int(min(MAX_SAMPLES, MAX_SAMPLES if seconds is None else seconds * rate))
            for block in opened:  # interleaved 16-bit samples
                content += block
                if len(content) >= most:
                    break
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f"a sampling rate of {rate} Hz is not plausible")
    samples = np.frombuffer(bytes(content[:most]), dtype="<i2").reshape(-1, channels)  # (samples, channels)
    return mixed(_scaled(samples.astype(np.int16)), 1, source.name), rate


__all__ = [
    "AUDIO_TYPES",
    "MAX_BYTES",
    "MAX_SAMPLES",
    "RATES",
    "ROW_KEYS",
    "URL_TIMEOUT",
    "Limits",
    "Source",
    "TooLargeError",
    "decode_otherwise",
    "is_rate_and_samples",
    "mixed",
    "open_source",
]
