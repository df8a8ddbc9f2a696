"""Any audio (path, URL, bytes, array, tensor, datasets row) as a mono float32 waveform at one sampling rate."""

import base64
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import httpx
from transformers.audio_utils import load_audio

_MOST_CHANNELS = 8
_LOUDEST = 128.0  # far above any float waveform, far below 16-bit samples stored as float
_INTEGER_SCALES = {"uint8": (128.0, 128.0), "int16": (0.0, 2.0**15), "int32": (0.0, 2.0**31)}
ROW_KEYS = ("array", "sampling_rate", "bytes", "path")


def load_waveform(audio: Any, sampling_rate: int | None = None, target_rate: int = 16000) -> np.ndarray:
    """Read, mix down and resample one clip.

    Args:
        audio: A file's path, its bytes, its URL (`http(s)://` or any that fsspec opens); a row of `datasets.Audio`
            (`{"array", "sampling_rate"}`, `{"bytes", "path"}`, of which bytes are preferred, or a torchcodec decoder);
            or samples as array, tensor or list, `(samples,)` or with a channel axis of at most 8. Integer samples are
            scaled to [-1, 1] by their type.
        sampling_rate: Rate of raw samples; files, bytes and decoders state their own.
        target_rate: Rate of the result.

    Returns:
        `(samples,)` float32.

    Raises:
        FileNotFoundError: no file at the path.
        ConnectionError: a URL that cannot be fetched.
        TypeError: an unsupported type.
        ValueError: undecodable, empty, NaN or infinite samples, no sampling rate, or an unclear channel axis.
    """
    if isinstance(audio, (str, os.PathLike, bytes, bytearray)):
        return _checked(_decode(audio, target_rate), audio)
    if hasattr(audio, "get_all_samples"):  # torchcodec's AudioDecoder, also as wrapped by datasets
        decoded = audio.get_all_samples()
        mono = _scaled(np.asarray(decoded.data)).mean(axis=0)  # (channels, samples) -> (samples,)
        return resample(_checked(mono), int(decoded.sample_rate), target_rate)
    if isinstance(audio, dict):
        rate = audio.get("sampling_rate")
        for key in ("array", "bytes", "path"):
            if audio.get(key) is not None:
                return load_waveform(audio[key], sampling_rate if rate is None else rate, target_rate)
        raise ValueError(
            f"an audio row with the keys {sorted(audio)} holds none of 'array', 'bytes' and 'path'; "
            f"the known keys are {', '.join(ROW_KEYS)}"
        )
    mono = _checked(_mix_down(_scaled(_as_array(audio))))
    if sampling_rate is None:
        raise ValueError(
            f"a raw array of {len(mono)} samples came without sampling_rate, which is never guessed; "
            f"pass sampling_rate=..., {target_rate} if it is already at the model's rate"
        )
    return resample(mono, sampling_rate, target_rate)


def resample(waveform: np.ndarray, sampling_rate: int, target_rate: int) -> np.ndarray:
    """Band-limited resampling by soxr, sample for sample as `transformers.audio_utils.load_audio` does it.

    Args:
        waveform: `(samples,)` float32.
        sampling_rate: Rate it has.
        target_rate: Rate it gets.

    Returns:
        `(ceil(samples * target_rate / sampling_rate),)` float32.

    Raises:
        ValueError: `sampling_rate` is not a positive whole number.
        ImportError: soxr is missing.
    """
    if isinstance(sampling_rate, (bool, str)) or not sampling_rate >= 1 or sampling_rate % 1:
        raise ValueError(f"sampling_rate={sampling_rate!r} must be a positive whole number of samples a second")
    if sampling_rate == target_rate:
        return waveform
    try:
        import soxr
    except ImportError as error:
        raise ImportError(f"audio at {sampling_rate} Hz has to be resampled: pip install soxr") from error
    length = math.ceil(len(waveform) * target_rate / sampling_rate)
    resampled = soxr.resample(waveform, sampling_rate, target_rate, quality="soxr_hq")
    return np.pad(resampled, (0, max(0, length - len(resampled))))[:length].astype(np.float32)


def cut_waveform(waveform: np.ndarray, max_seconds: float | None, sampling_rate: int) -> np.ndarray:
    """The first `max_seconds` of a clip `(samples,)`; all of it with `None`.

    Raises:
        ValueError: `max_seconds` holds no sample.
    """
    if max_seconds is None:
        return waveform
    if isinstance(max_seconds, (bool, str)) or not max_seconds * sampling_rate >= 1:
        raise ValueError(
            f"max_audio_seconds={max_seconds!r} must be a number of seconds above 0, or None for whole clips"
        )
    return waveform[: int(min(max_seconds * sampling_rate, len(waveform)))]


def read_clips(
    clips: Sequence[Any], sampling_rate: int = 16000, join: bool = False, silence_seconds: float = 0.0
) -> list[np.ndarray]:
    """Load clips that go together, as several recordings or as one.

    Args:
        clips: What `load_waveform` reads.
        sampling_rate: Rate of the result in Hz.
        join: Whether the clips follow each other in one recording.
        silence_seconds: Silence between joined clips; SALMONN puts 0.1 s there.

    Returns:
        One array `(samples,)` a clip, or a single one when joined.

    Raises:
        OSError, TypeError, ValueError: see `load_waveform`.
    """
    waveforms = [load_waveform(clip, target_rate=sampling_rate) for clip in clips]
    if not join or len(waveforms) < 2:
        return waveforms
    gap = np.zeros(round(silence_seconds * sampling_rate), dtype=np.float32)
    parts = [part for waveform in waveforms for part in (gap, waveform)][1:]
    return [np.concatenate(parts)]


def is_one_clip(audio: Any) -> bool:
    """Whether `audio` is a single clip rather than a list of clips: a list of numbers is one, a 2-D array too."""
    if not isinstance(audio, (list, tuple)):
        return True
    return len(audio) > 0 and isinstance(audio[0], (int, float, np.number))


def _decode(source: str | os.PathLike | bytes, target_rate: int) -> np.ndarray:
    """Samples of a file, URL or encoded bytes; soundfile decodes them, torchcodec what soundfile cannot."""
    if isinstance(source, (bytes, bytearray)):
        name, encoded = f"{len(source)} bytes", source
    else:
        name = os.fspath(source)
        encoded = _fetch(name)
    address = name if encoded is None else f"data:;base64,{base64.b64encode(encoded).decode()}"
    try:
        return load_audio(address, target_rate, backend="soundfile")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConnectionError(f"cannot fetch {name!r}: {error}; check the address, or give a file") from error
    except RuntimeError as error:  # soundfile raises a subclass
        try:
            return load_audio(address, target_rate, backend="torchcodec")
        except (ImportError, RuntimeError):
            raise ValueError(
                f"cannot decode {name} as audio ({error}); convert it to wav or flac, or install torchcodec"
            ) from error


def _fetch(address: str) -> bytes | None:
    """Bytes at a URL that fsspec opens (`s3://`, `zip://...::...`); `None` for what `load_audio` opens itself."""
    if os.path.isfile(address) or address.startswith(("http://", "https://", "data:")):
        return None
    if "://" not in address and "::" not in address:
        raise FileNotFoundError(f"no audio file at {address!r}; give a path that exists, a URL, bytes or an array")
    import fsspec

    with fsspec.open(address, "rb") as file:
        return file.read()


def _as_array(audio: Any) -> np.ndarray:
    if isinstance(audio, torch.Tensor):
        audio = audio.detach().cpu()
        return (audio.float() if audio.is_floating_point() else audio).numpy()
    if isinstance(audio, (np.ndarray, list, tuple)):
        return np.asarray(audio)
    raise TypeError(
        f"unsupported audio type {type(audio).__name__}; expected a path, URL, bytes, array, tensor or a datasets row"
    )


def _scaled(samples: np.ndarray) -> np.ndarray:
    """Float32 in [-1, 1]."""
    if samples.dtype.kind == "f":
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
    return samples.mean(axis=int(np.argmin(shape)))


def _checked(waveform: np.ndarray, source: Any = None) -> np.ndarray:
    """The waveform `(samples,)` as float32.

    Raises:
        ValueError: empty, NaN or infinite samples, or floats far above full scale.
    """
    where = f" in {os.fspath(source)!r}" if isinstance(source, (str, os.PathLike)) else ""
    if not waveform.size:
        raise ValueError(f"empty audio{where}: a clip of 0 samples")
    bad = np.count_nonzero(~np.isfinite(waveform))
    if bad:
        raise ValueError(f"{bad} of {waveform.size} samples{where} are NaN or infinite; repair or drop the clip")
    loudest = float(np.abs(waveform).max())
    if loudest > _LOUDEST:
        raise ValueError(f"float samples reach {loudest:g}{where}, but full scale is 1; divide 16-bit samples by 32768")
    return np.ascontiguousarray(waveform, dtype=np.float32)


__all__ = ["ROW_KEYS", "cut_waveform", "is_one_clip", "load_waveform", "read_clips", "resample"]
