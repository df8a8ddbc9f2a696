"""Any audio (path, URL, bytes, array, tensor, datasets row) as a mono float32 waveform at one sampling rate."""

import math
import os
import re
import struct
import warnings
from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import chain
from numbers import Real
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from transformers.utils import logging

from .sources_listen import (
    MAX_SAMPLES,
    RATES,
    ROW_KEYS,
    Limits,
    Source,
    decode_otherwise,
    is_rate_and_samples,
    mixed,
    open_source,
)

if TYPE_CHECKING:
    import soundfile

logger = logging.get_logger(__name__)

_LOUDEST = 128.0  # far above any float waveform, far below 16-bit samples stored as float
_BLOCK_SAMPLES = 2**20  # read at once, over all channels
_TOLERATED_SECONDS = 0.1  # by which the frames of lossy formats may be miscounted
_UNKNOWN_FRAMES = 2**62  # libsndfile's count for streams that do not know their length is above it


def load_waveform(
    audio: Any,
    sampling_rate: int | None = None,
    target_rate: int = 16000,
    max_seconds: float | None = None,
    timeout: float | None = None,
    max_bytes: int | None = None,
) -> np.ndarray:
    """Read, mix down and resample one clip.

    Args:
        audio: One of:

            - a file's path, or its address: `http(s)://`, `file://`, storage and archives that fsspec opens (`s3://`,
              `hf://`, `zip://a.wav::archive.zip`);
            - its content: bytes, a file object, a base64 string or data URI;
            - a mapping with `array` or `raw` and `sampling_rate`, or with `bytes`, `path`, `url`, `audio`,
              `input_audio` or `audio_url`: rows of `datasets`, inputs of the ASR pipeline, content of chat messages
              and of the OpenAI API. Of `bytes` and `path`, bytes are preferred;
            - a torchcodec decoder, also as `datasets` wraps it;
            - samples as array, tensor or list, `(samples,)` or with a channel axis of at most 8; `(rate, samples)` or
              `(samples, rate)` with their rate. Integer samples are scaled to [-1, 1] by their type.
        sampling_rate: Rate of raw samples; files, bytes and decoders state their own.
        target_rate: Rate of the result.
        max_seconds: Longer clips are decoded up to a second after it and no further; `cut_waveform` does the rest.
        timeout: Seconds that fetching an address may take; `sources_listen.URL_TIMEOUT` by default.
        max_bytes: Bytes of an address or file object; `sources_listen.MAX_BYTES` by default.

    Returns:
        `(samples,)` float32.

    Raises:
        FileNotFoundError: no file at the path.
        ConnectionError: an address that cannot be fetched, or not in time.
        TypeError: an unsupported type.
        ValueError: undecodable, empty, NaN or infinite samples, no or an implausible sampling rate, an unclear channel
            axis, more than `max_bytes` bytes or `sources_listen.MAX_SAMPLES` samples.
    """
    seconds = None
    if max_seconds is not None:
        check_seconds(max_seconds)
        seconds = max_seconds + 1.0 if max_seconds < math.inf else None
    if isinstance(audio, dict) and audio.keys() == {"path", "bytes"} and audio["bytes"] is None:
        audio = audio["path"]  # a row of data
    if isinstance(audio, str) and os.path.isfile(audio):
        source = Source(repr(audio), audio)
    else:
        source = open_source(audio, sampling_rate, Limits(seconds, timeout, max_bytes))
    if source.file is not None:
        waveform, rate = _decode(source, target_rate, seconds)
        waveform = _checked(waveform, source.name)
    else:
        waveform, rate = _checked(source.samples, source.name), source.rate
    if rate is None:
        raise ValueError(
            f"a raw array of {len(waveform)} samples came without sampling_rate, which is never guessed; "
            f"pass sampling_rate=..., {target_rate} if it is already at the model's rate"
        )
    return waveform if isinstance(rate, int) and rate == target_rate else resample(waveform, rate, target_rate)


def check_rate(sampling_rate: Any) -> int:
    """A sampling rate as a plain number.

    Raises:
        ValueError: not one whole number of plausible size.
    """
    sampling_rate = sampling_rate.item() if getattr(sampling_rate, "ndim", None) == 0 else sampling_rate
    if not isinstance(sampling_rate, Real) or isinstance(sampling_rate, bool):
        raise ValueError(
            f"sampling_rate={sampling_rate!r:.80} must be one number; give clips that differ in it as "
            "{'array': ..., 'sampling_rate': ...}"
        )
    if not RATES[0] <= sampling_rate <= RATES[1] or sampling_rate % 1:
        raise ValueError(
            f"sampling_rate={sampling_rate!r} must be a whole number of samples a second from {RATES[0]} to {RATES[1]}"
        )
    return sampling_rate


def resample(waveform: np.ndarray, sampling_rate: int, target_rate: int) -> np.ndarray:
    """Band-limited resampling by soxr, sample for sample as `transformers.audio_utils.load_audio` does it.

    Args:
        waveform: `(samples,)` float32.
        sampling_rate: Rate it has.
        target_rate: Rate it gets.

    Returns:
        `(ceil(samples * target_rate / sampling_rate),)` float32.

    Raises:
        ValueError: `sampling_rate` is not one whole number of plausible size, or the result is too long.
        ImportError: soxr is missing.
    """
    sampling_rate = check_rate(sampling_rate)
    if sampling_rate == target_rate:
        return waveform
    try:
        import soxr
    except ImportError as error:
        raise ImportError(f"audio at {sampling_rate} Hz has to be resampled: pip install soxr") from error
    length = math.ceil(len(waveform) * target_rate / sampling_rate)
    if length > MAX_SAMPLES:
        raise _too_long(length, target_rate, "the clip")
    resampled = soxr.resample(waveform, sampling_rate, target_rate, quality="soxr_hq")
    return np.pad(resampled, (0, max(0, length - len(resampled))))[:length].astype(np.float32)


def cut_waveform(waveform: np.ndarray, max_seconds: float | None, sampling_rate: int) -> np.ndarray:
    """The first `max_seconds` of a clip `(samples,)`; all of it with `None`.

    Raises:
        ValueError: `max_seconds` holds no sample.
    """
    if max_seconds is None:
        return waveform
    check_seconds(max_seconds)
    if max_seconds * sampling_rate < 1:
        raise ValueError(f"max_audio_seconds={max_seconds!r} holds no sample at {sampling_rate} Hz; raise it")
    return waveform[: int(min(max_seconds * sampling_rate, len(waveform)))]


def load_clips(
    audio: Any,
    sampling_rate: int | None = None,
    target_rate: int = 16000,
    max_seconds: float | None = None,
    timeout: float | None = None,
    max_bytes: int | None = None,
) -> tuple[list[np.ndarray], list[int] | None]:
    """The waveforms of all clips, cut to `max_seconds` with a warning, and the number of clips of each text.

    Args:
        audio: One clip, a list of them, or a list for each text, see `flat_clips`; for the others see `load_waveform`.
        sampling_rate: Rate of raw samples.
        target_rate: Rate of the result.
        max_seconds: Length of the result at most.
        timeout: Of addresses.
        max_bytes: Of addresses and file objects.

    Raises:
        OSError, TypeError, ValueError: see `load_waveform`.
    """
    if sampling_rate is not None:
        check_rate(sampling_rate)  # for files too, which do not need it
    clips, counts = flat_clips(audio)
    whole = [load_waveform(clip, sampling_rate, target_rate, max_seconds, timeout, max_bytes) for clip in clips]
    cut = [cut_waveform(waveform, max_seconds, target_rate) for waveform in whole]
    longer = [
        f"{len(w) / target_rate:.1f} s" + (" or more" if len(w) >= (max_seconds + 1) * target_rate else "")
        for w, kept in zip(whole, cut, strict=True)
        if len(kept) < len(w)
    ]
    if longer:
        logger.warning(
            f"{len(longer)} of {len(whole)} clips cut to max_audio_seconds={max_seconds:g}: {', '.join(longer)}"
        )
    return cut, counts


def read_clips(
    clips: Sequence[Any],
    sampling_rate: int = 16000,
    join: bool = False,
    silence_seconds: float = 0.0,
    max_seconds: float | None = None,
) -> list[np.ndarray]:
    """Load clips that go together, as several recordings or as one.

    Args:
        clips: What `load_waveform` reads.
        sampling_rate: Rate of the result in Hz.
        join: Whether the clips follow each other in one recording.
        silence_seconds: Silence between joined clips; SALMONN puts 0.1 s there.
        max_seconds: Decode no more than this and a second of each clip, see `load_waveform`.

    Returns:
        One array `(samples,)` a clip, or a single one when joined.

    Raises:
        OSError, TypeError, ValueError: see `load_waveform`.
    """
    waveforms = [load_waveform(clip, target_rate=sampling_rate, max_seconds=max_seconds) for clip in clips]
    if not join or len(waveforms) < 2:
        return waveforms
    gap = np.zeros(round(silence_seconds * sampling_rate), dtype=np.float32)
    parts = [part for waveform in waveforms for part in (gap, waveform)][1:]
    return [np.concatenate(parts)]


def is_one_clip(audio: Any) -> bool:
    """Whether `audio` is a single clip rather than a list of clips: a list of numbers is one, a 2-D array too."""
    if not isinstance(audio, (list, tuple)):
        return True
    return len(audio) > 0 and (isinstance(audio[0], Real) or is_rate_and_samples(audio))


def flat_clips(clips: Any, is_one: Callable[[Any], bool] = is_one_clip) -> tuple[list[Any], list[int] | None]:
    """All clips in order, and how many each text has where there is a list of clips for each text.

    Args:
        clips: One, a list of them, or a list for each text.
        is_one: Whether an object is one clip.

    Raises:
        TypeError: `clips` is neither a clip nor a list.
    """
    if is_one(clips):
        return [clips], None
    if not isinstance(clips, (list, tuple)):
        raise TypeError(f"expected one clip, a list of clips, or a list for each text, not {clips!r:.80}")
    groups = [[item] if is_one(item) else item for item in clips]
    counts = None if any(map(is_one, clips)) else [*map(len, groups)]
    return [*chain.from_iterable(groups)], counts


def check_seconds(max_seconds: Any) -> None:
    """Raise a `ValueError` for a maximum length that holds no sample at any rate, or is no number."""
    if isinstance(max_seconds, bool) or not isinstance(max_seconds, Real) or not max_seconds * RATES[1] >= 1:
        raise ValueError(
            f"max_audio_seconds={max_seconds!r:.80} must be a number of seconds above 0, or None for whole clips"
        )


def _decode(source: Source, target_rate: int, seconds: float | None) -> tuple[np.ndarray, int]:
    """Samples `(samples,)` and rate of a file, up to `seconds`; soundfile decodes it, others what soundfile cannot."""
    import soundfile

    try:
        with soundfile.SoundFile(source.file) as opened:
            waveform = _read_blocks(opened, source.name, target_rate, math.inf if seconds is None else seconds)
            rate, frames = opened.samplerate, opened.frames
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: a file without a header, named .raw
        return decode_otherwise(source, seconds, error)
    is_limited = seconds is not None and len(waveform) >= int(seconds * rate)
    _warn_if_cut_off(source, len(waveform), len(waveform) if is_limited or frames > _UNKNOWN_FRAMES else frames, rate)
    return waveform, rate


def _read_blocks(opened: "soundfile.SoundFile", name: str, target_rate: int, seconds: float) -> np.ndarray:
    """Mono samples of a file, block by block, as its header may promise any length.

    Raises:
        ValueError: an implausible rate, or more than `MAX_SAMPLES` samples.
    """
    rate, channels, frames = opened.samplerate, opened.channels, opened.frames
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f"the sampling rate of {rate} Hz in {name} is not plausible; repair the file")
    wanted = min(frames, seconds * rate) if seconds < math.inf else frames
    opened.seekable = bool  # False: soundfile seeks after each read, which streams of unknown length cannot
    blocks, count = [], 0
    promised = wanted * max(1.0, target_rate / rate)
    if MAX_SAMPLES < promised < _UNKNOWN_FRAMES:
        raise _too_long(promised, max(rate, target_rate), name)
    while count < wanted:
        size = int(min(max(1, _BLOCK_SAMPLES // channels), math.ceil(wanted - count)))
        block = opened.read(size, dtype="float32", always_2d=True)  # (frames, channels)
        if not len(block):
            break
        blocks.append(mixed(block, 1, name) if channels > 1 else block[:, 0])
        count += len(block)
        if count > MAX_SAMPLES:  # the header promised less, or nothing
            raise _too_long(count, rate, name)
    return blocks[0] if len(blocks) == 1 else np.concatenate([np.zeros(0, np.float32), *blocks])


def _too_long(samples: float, rate: int, name: str) -> ValueError:
    return ValueError(
        f"{samples:.0f} samples, {samples / rate / 3600:.1f} hours, in {name}, but a clip has at most "
        f"{MAX_SAMPLES}; cut it by max_audio_seconds=, or split it"
    )


def _checked(waveform: np.ndarray, name: str) -> np.ndarray:
    """The waveform `(samples,)` as float32.

    Raises:
        ValueError: empty, NaN or infinite samples, or floats far above full scale.
    """
    where = f" in {name}" if name else ""
    if not waveform.size:
        raise ValueError(f"empty audio{where}: a clip of 0 samples")
    bad = np.count_nonzero(~np.isfinite(waveform))
    if bad:
        raise ValueError(f"{bad} of {waveform.size} samples{where} are NaN or infinite; repair or drop the clip")
    loudest = float(np.abs(waveform).max())
    if loudest > _LOUDEST:
        raise ValueError(f"float samples reach {loudest:g}{where}, but full scale is 1; divide 16-bit samples by 32768")
    return np.ascontiguousarray(waveform, dtype=np.float32)


# ---------------------------------------------------------------------- files that were cut off


def _warn_if_cut_off(source: Source, found: int, frames: int, rate: int) -> None:
    """Warn of a file that ends before what it promises; decoders read what is there and say nothing.

    Args:
        source: Has a file.
        found: Samples that were decoded.
        frames: Samples that libsndfile counts, which trusts some headers and corrects others.
        rate: Sampling rate in Hz.
    """
    with open(source.file, "rb") if isinstance(source.file, str) else BytesIO(source.file.getbuffer()) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(64)
        if head[:4] == b"RIFF":  # a size of about 2 or 4 GiB, or 0, was left open by a writer to a pipe
            length = int.from_bytes(head[4:8], "little")
            promised = length + 8 if length < 0x7FFFF000 else size
        else:
            promised = _promised_bytes(file, head, size)
    if promised <= size + 1 and frames <= found + rate * _TOLERATED_SECONDS:  # some writers leave out the last byte
        return
    seconds = max(frames, found * promised / size) / rate
    of = f" of about {seconds:.2f} s that it promises" if seconds < math.inf else ""
    warnings.warn(
        f"audio cut off in {source.name}: {found / rate:.2f} s are left{of} ({size} bytes); replace the file",
        stacklevel=2,
    )


def _promised_bytes(file: BinaryIO, head: bytes, size: int) -> float:
    """The length that an audio file other than WAV promises; `size` where it is complete or promises nothing.

    Infinity for one that lacks its end and does not tell how much.
    """
    if head[:4] == b"OggS":
        return _ogg_promise(file, size)
    if head[:4] == b"caff":
        return _caf_promise(file, size)
    if head[:3] == b"ID3" or head[:1] == b"\xff":
        return _mp3_promise(file, head, size)
    order, start, end, added = {
        b"FORM": ("big", 4, 8, 8),
        b"RF64": ("little", 20, 28, 8),
        b"riff": ("little", 16, 24, 0),  # W64
        b".snd": ("big", 8, 12, int.from_bytes(head[4:8], "big")),
    }.get(head[:4], ("big", 0, 0, 0))
    length = int.from_bytes(head[start:end], order)
    is_stream = end - start == 4 and length >= 0x7FFFF000
    return size if is_stream or not length else length + added


def _ogg_promise(file: BinaryIO, size: int) -> float:
    """The last page is complete and marked as the last one, or something is missing."""
    file.seek(max(0, size - 2**17))  # a page has less than 64 KiB
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    header = 27 + page[26] if len(page) > 26 else 27
    is_whole = len(page) >= header + sum(page[27:header]) and page[5] & 4
    return size if is_whole else math.inf


def _caf_promise(file: BinaryIO, size: int) -> int:
    position = 8
    while position + 12 <= size:
        file.seek(position)
        kind, length = struct.unpack(">4sq", file.read(12))
        if length < 0:  # left open
            return size
        position += 12 + length
        if kind == b"data":
            return position
    return size


def _mp3_promise(file: BinaryIO, head: bytes, size: int) -> int:
    """The bytes in the Xing header, which encoders write into the first frame."""
    start = 0
    if head[:3] == b"ID3":
        start = 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    file.seek(start)
    frame = file.read(256)
    found = re.search(rb"Xing|Info", frame)
    if found is None or len(frame) < found.end() + 12:
        return size
    flags, *numbers = struct.unpack_from(">III", frame, found.end())
    return start + numbers[flags & 1] if flags & 2 else size


__all__ = [
    "ROW_KEYS",
    "check_rate",
    "check_seconds",
    "cut_waveform",
    "flat_clips",
    "is_one_clip",
    "load_clips",
    "load_waveform",
    "read_clips",
    "resample",
]
