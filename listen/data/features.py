"""Encoder features computed once and stored on disk, so that frozen encoders do not run in every epoch.

A store is a folder of Arrow files, one row for each recording, and `store.json`, which describes the encoders and
settings. Recordings are found by their path relative to the store (or by the hash of their bytes), so a store that
moves together with its audio stays valid. Each row also keeps size, modification time and digest of its audio files:
features of a file that was replaced are not used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from torch.nn.utils.rnn import pad_sequence

from ..fingerprint_listen import fingerprint as _digest
from ..fingerprint_listen import same_weights
from .audio import recordings_of
from .content import is_same_content
from .files import rename_complete, write_json_once

STORE_FILE = "store.json"
_FEATURES = Features(
    {
        "key": Value("string"),
        "num_samples": Value("int64"),
        "speech_frames": List(Value("int32")),
        "speech": Value("large_binary"),
        "audio_frames": List(Value("int32")),
        "audio": Value("large_binary"),
        "content": Value("string"),
        "checksum": Value("string"),
    }
)
_DIGEST_LENGTH = 16
_SCRIPT = "examples/precompute_features.py"


class FeatureStoreError(ValueError):
    """A store that does not fit the model or lacks a recording; the message names the fix."""


@dataclass(frozen=True)
class StoreInfo:
    """Encoders and settings that a store was computed with.

    Attributes:
        speech_width: width of the speech encoder's frames.
        audio_width: width of the audio encoder's frames, 0 without one.
        encoders: fingerprint of the weights of each encoder.
        feature_extractor: settings of the feature extractor.
        pad_to_30s: whether Whisper encoded clips padded to 30 s.
        keeps_padding: whether frames of the padding are stored, for a connector that reads them.
        join_silence_seconds: silence between the clips of a joined recording.
    """

    speech_width: int
    audio_width: int = 0
    encoders: dict[str, str] = field(default_factory=dict)
    feature_extractor: dict[str, Any] = field(default_factory=dict)
    pad_to_30s: bool = False
    keeps_padding: bool = False
    join_silence_seconds: float = 0.0

    def difference(self, other: StoreInfo) -> str:
        """The first setting that differs, in words; empty for the same encoders, in whatever dtype, and settings."""
        if self.encoders.keys() == other.encoders.keys():
            changed = [name for name, mark in self.encoders.items() if not same_weights(mark, other.encoders[name])]
            if changed:
                return f"encoders={changed[0]!r} of other weights"
            other = replace(other, encoders=self.encoders)
        for name, value in asdict(other).items():
            if getattr(self, name) != value:
                return f"{name}={getattr(self, name)!r}, but here {name}={value!r}"
        return ""


@dataclass(frozen=True)
class EncodedRecording:
    """Encoder frames of one recording, its 30 s chunks one after the other.

    Attributes:
        num_samples: length of the recording at the extractor's rate.
        speech: `(sum of speech_frames, speech_width)`, float16.
        speech_frames: frames of each chunk: the real ones, or all where the connector reads padding.
        audio: `(sum of audio_frames, audio_width)`, float16; `None` without an audio encoder.
        audio_frames: real frames of each chunk; empty without an audio encoder.
        content: what the audio files held when they were encoded, see `listen.data.content`; `None` if not known.
    """

    num_samples: int
    speech: torch.Tensor
    speech_frames: tuple[int, ...]
    audio: torch.Tensor | None = None
    audio_frames: tuple[int, ...] = ()
    content: str | None = None

    def __len__(self) -> int:
        """Samples, as of a waveform."""
        return self.num_samples


class FeatureStore:
    """Encoder features of recordings, read from disk as they are needed.

    Args:
        folder: folder of the store.

    Raises:
        FeatureStoreError: there is no store in that folder, or one of its files is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.info = read_store_info(self.folder)
        shards = _shard_files(self.folder)
        if not shards:
            raise FeatureStoreError(f"{self.folder} holds no features yet; run {_SCRIPT}")
        self._table = concatenate_datasets([_read_shard(shard) for shard in shards])
        self._contents = self._column("content")
        self._rows: dict[str, list[int]] = {}  # the newest last
        for row, key in enumerate(self._table["key"]):
            self._rows.setdefault(key, []).append(row)
        self._current: dict[str, int | None] = {}  # row that fits the audio; found once in a process

    def __len__(self) -> int:
        """Number of recordings."""
        return len(self._rows)

    def __contains__(self, key: str) -> bool:
        """Whether the recording with that key is stored, encoded from the audio that is there now."""
        return self._row(key) is not None

    def __getitem__(self, key: str) -> EncodedRecording:
        """Features of one recording, see `recording_keys`.

        Raises:
            FeatureStoreError: it is not stored, its audio was replaced since then, or its row is damaged.
        """
        place = self._row(key)
        if place is None:
            reason = "has no features of" if key not in self._rows else "has features of older audio for"
            raise FeatureStoreError(f"{self.folder} {reason} {key!r}; run {_SCRIPT} on this data again")
        return self._read(key, place)

    def recordings(self, row: Mapping[str, Any]) -> list[EncodedRecording]:
        """Features of the recordings of one data row, in order."""
        return [self[key] for key in recording_keys(row, self.folder)]

    def verify(self) -> list[str]:
        """Check rows and keys of all shards, all features by their checksums, and all audio files that are there.

        Returns:
            A message for each problem; older features of audio that was encoded again are none.
        """
        problems, checksums = self._incomplete_shards(), self._column("checksum")
        for key, places in self._rows.items():
            try:
                found = self._read(key, places[-1])
            except FeatureStoreError as error:
                problems.append(str(error))
                continue
            if checksums[places[-1]] not in (None, _checksum(_halves(key, found))):
                problems.append(self._damage(key, "another checksum"))
            if not is_same_content(found.content, key, self.folder, read=True):
                problems.append(f"the audio of {key!r} is not what its features were made of; run {_SCRIPT} again")
        return problems

    def _incomplete_shards(self) -> list[str]:
        """A message for each shard whose rows are not those that its name stands for."""
        problems = []
        for shard in _shard_files(self.folder):
            digest, keys = shard.stem.rpartition("-")[2], Dataset.from_file(str(shard))["key"]
            # names of earlier versions stand for the keys in their order
            if len(digest) == _DIGEST_LENGTH and digest not in (keys_digest(keys), _hash_lines(keys)):
                problems.append(
                    f"{shard} is damaged ({len(keys)} rows are not all of its rows); {_delete_advice(shard)}"
                )
        return problems

    def _row(self, key: str) -> int | None:
        if key not in self._current:
            fits = (p for p in reversed(self._rows.get(key, ())) if self._fits(key, p))
            self._current[key] = next(fits, None)
        return self._current[key]

    def _fits(self, key: str, place: int) -> bool:
        return is_same_content(self._contents[place], key, self.folder)

    def _column(self, name: str) -> Sequence[str | None]:
        """A column that stores of earlier versions lack."""
        return list(self._table[name]) if name in self._table.column_names else [None] * len(self._table)

    def _read(self, key: str, place: int) -> EncodedRecording:
        row, info = self._table[place], self.info
        streams = {"speech": info.speech_width, **({"audio": info.audio_width} if info.audio_width else {})}
        for name, width in streams.items():
            if len(row[name] or b"") != 2 * width * sum(row[f"{name}_frames"]):
                raise FeatureStoreError(self._damage(key, f"{len(row[name] or b'')} bytes of {name} features"))
        return EncodedRecording(
            num_samples=row["num_samples"],
            speech=_tensor(row["speech"], info.speech_width),
            speech_frames=tuple(row["speech_frames"]),
            audio=_tensor(row["audio"], info.audio_width) if info.audio_width else None,
            audio_frames=tuple(row["audio_frames"]),
            content=row.get("content"),
        )

    def _damage(self, key: str, reason: str) -> str:
        shards = [Path(file["filename"]) for file in self._table.cache_files]
        holding = [shard for shard in shards if key in Dataset.from_file(str(shard))["key"]]
        return f"the features of {key!r} are damaged ({reason}); {_delete_advice(holding[-1])}"

    def check(self, info: StoreInfo) -> None:
        """Compare with the encoders and settings of a model.

        Raises:
            FeatureStoreError: the store was computed with another encoder, revision, extractor setting or joining.
        """
        difference = self.info.difference(info)
        if difference:
            raise FeatureStoreError(
                f"the features in {self.folder} were computed with {difference}; compute them again into another folder"
            )


def store_info(model: Any, feature_extractor: Any, join_silence_seconds: float = 0.0) -> StoreInfo:
    """Description of the features that a model computes.

    Args:
        model: a `ListenModel`.
        feature_extractor: the `ListenFeatureExtractor` in front of it.
        join_silence_seconds: silence between the clips of a joined recording.

    Raises:
        FeatureStoreError: an encoder of the model is trainable, so that its features change.
    """
    config = model.config
    trainable = [name for name in ("speech_encoder", "audio_encoder") if name in config.trainable]
    if trainable:
        raise FeatureStoreError(f"the features of {trainable} cannot be stored: trainable={config.trainable}")
    encoders = {"speech_encoder": model.speech_encoder, "audio_encoder": model.audio_encoder}
    settings = feature_extractor.to_dict()
    settings |= {f"speech_{name}": value for name, value in (settings.get("speech_features") or {}).items()}
    settings = {name: value for name, value in settings.items() if isinstance(value, (bool, int, float))}
    return StoreInfo(
        speech_width=config.speech_width,
        audio_width=config.audio_config.hidden_size if config.audio_config is not None else 0,
        encoders={name: _digest(encoder) for name, encoder in encoders.items() if encoder is not None},
        feature_extractor=settings,
        pad_to_30s=config.pad_to_30s,
        keeps_padding=config.connector_config.salmonn_compat,
        join_silence_seconds=join_silence_seconds,
    )


def read_store_info(folder: Path) -> StoreInfo:
    """Read `store.json`.

    Raises:
        FeatureStoreError: there is none, or it is damaged.
    """
    path = folder / STORE_FILE
    if not path.is_file():
        raise FeatureStoreError(f"{folder} is not a feature store: it has no {STORE_FILE}")
    try:
        info = StoreInfo(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise FeatureStoreError(
            f"{path} is damaged or of another version ({error}); delete it and run {_SCRIPT} with the same encoders, "
            "which writes it again"
        ) from error
    for name in ("speech_width", "audio_width"):
        if type(getattr(info, name)) is not int or getattr(info, name) < 0:
            raise FeatureStoreError(f"{path}: {name}={getattr(info, name)!r} must be a whole number from 0")
    return info


def write_store_info(folder: Path, info: StoreInfo) -> None:
    """Write `store.json`, or check an existing one so that a store never mixes encoders.

    Raises:
        FeatureStoreError: the folder holds a store with other encoders or settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json_once(folder / STORE_FILE, asdict(info), lock=folder / f".{STORE_FILE}.lock")
    difference = read_store_info(folder).difference(info)
    if difference:
        raise FeatureStoreError(f"{folder} holds features of another setting, {difference}; choose another folder")


def recording_keys(row: Mapping[str, Any], folder: Path) -> list[str]:
    """Key of each recording of a row in the store of that folder."""
    return ["+".join(_clip_key(clip, folder) for clip in clips) for clips in recordings_of(row)]


def keys_digest(keys: Iterable[str]) -> str:
    """Digest of the keys of a shard in any order, which is part of the shard's name."""
    return _hash_lines(sorted(keys))


def write_shard(path: Path, recordings: Iterator[tuple[str, EncodedRecording]]) -> bool:
    """Write one Arrow file, renamed to its final name once it is complete.

    Returns:
        Whether it was written; not if another run has removed the partial file, because it took over this shard while
        this run was suspended.

    Raises:
        FeatureStoreError: a value does not fit into 16 bits.
    """
    partial = path.with_suffix(f".{uuid4().hex}.tmp")  # two runs may write one shard if the first was suspended
    try:
        with ArrowWriter(features=_FEATURES, path=str(partial), writer_batch_size=16) as writer:
            for key, recording in recordings:
                writer.write(_to_row(key, recording))
            writer.finalize()
        rename_complete(partial, path)
        return True
    except FileNotFoundError:
        if partial.exists() or not path.parent.is_dir():
            raise
        return False
    finally:
        partial.unlink(missing_ok=True)


def _to_row(key: str, recording: EncodedRecording) -> dict[str, Any]:
    halves = _halves(key, recording)
    return {
        "key": key,
        "num_samples": recording.num_samples,
        "speech_frames": list(recording.speech_frames),
        "audio_frames": list(recording.audio_frames),
        "content": recording.content,
        "checksum": _checksum(halves),
        **halves,
    }


def collate_features(recordings: Sequence[EncodedRecording], pad_to_multiple_of: int = 16) -> dict[str, torch.Tensor]:
    """Pad the chunks of all recordings into the inputs that `forward` takes in place of audio features.

    Args:
        recordings: in order of appearance.
        pad_to_multiple_of: frames are padded to a multiple of it; few shapes are faster.

    Returns:
        `speech_hidden_states` `(chunks, frames, speech_width)` with its mask and, with an audio encoder,
        `audio_hidden_states` `(chunks, frames, audio_width)` with its mask; empty without recordings.
    """
    batch: dict[str, torch.Tensor] = {}
    for stream in ("speech", "audio"):
        chunks = [
            chunk
            for recording in recordings
            if getattr(recording, stream) is not None
            for chunk in getattr(recording, stream).split(list(getattr(recording, f"{stream}_frames")))
        ]
        if chunks:
            batch |= _pad_chunks(f"{stream}_hidden_states", chunks, pad_to_multiple_of)
    return batch


def _pad_chunks(name: str, chunks: list[torch.Tensor], multiple: int) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([len(chunk) for chunk in chunks])  # (chunks,)
    frames = -(-int(lengths.max()) // multiple) * multiple
    padded = pad_sequence(chunks, batch_first=True)  # (chunks, longest, width)
    padded = torch.nn.functional.pad(padded, (0, 0, 0, frames - padded.shape[1])).float()  # (chunks, frames, width)
    mask = (torch.arange(frames) < lengths[:, None]).long()  # (chunks, frames)
    return {name: padded, f"{name}_mask": mask}


def _hash_lines(lines: Iterable[str]) -> str:
    text = "\n".join(lines)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:_DIGEST_LENGTH]


def _shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.arrow"))


def _clip_key(clip: Mapping[str, Any], folder: Path) -> str:
    if clip.get("bytes") is not None:
        return "sha256:" + hashlib.sha256(clip["bytes"]).hexdigest()
    path = clip["path"]
    return path if "://" in path else os.path.relpath(os.path.realpath(path), os.path.realpath(folder))


def _read_shard(path: Path) -> Dataset:
    try:
        return Dataset.from_file(str(path))
    except (OSError, ValueError, LookupError, TypeError, NotImplementedError) as error:  # Arrow's are among them
        raise FeatureStoreError(f"{path} is damaged ({error}); {_delete_advice(path)}") from error


def _delete_advice(shard: Path) -> str:
    return f"delete {shard} and run {_SCRIPT} again, which encodes its recordings alone"


def _halves(key: str, recording: EncodedRecording) -> dict[str, bytes | None]:
    """Both streams in 16 bits."""
    streams = {"speech": recording.speech, "audio": recording.audio}
    return {name: None if frames is None else _binary(key, frames) for name, frames in streams.items()}


def _checksum(halves: Mapping[str, bytes | None]) -> str:
    digest = hashlib.sha256(halves["speech"] or b"")
    digest.update(halves["audio"] or b"")
    return digest.hexdigest()[:16]


def _binary(key: str, frames: torch.Tensor) -> bytes:
    half = frames.to(torch.float16)
    if not torch.isfinite(half).all():
        raise FeatureStoreError(f"the features of {key!r} do not fit into 16 bits or are not finite")
    return half.cpu().numpy().tobytes()


def _tensor(data: bytes, width: int) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.float16).reshape(-1, width).copy())
