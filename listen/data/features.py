"""Encoder features computed once and stored on disk, so that frozen encoders do not run in every epoch.

A store is a folder of Arrow files, one row for each recording, and `store.json`, which describes the encoders and
settings. Recordings are found by their path relative to the store (or by the hash of their bytes), so a store that
moves together with its audio stays valid.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from torch.nn.utils.rnn import pad_sequence

from .audio import recordings_of

STORE_FILE = "store.json"
_VALUES_OF_A_WEIGHT = 256
_FEATURES = Features(
    {
        "key": Value("string"),
        "num_samples": Value("int64"),
        "speech_frames": List(Value("int32")),
        "speech": Value("large_binary"),
        "audio_frames": List(Value("int32")),
        "audio": Value("large_binary"),
    }
)


class FeatureStoreError(ValueError):
    """A store that does not fit the model or lacks a recording; the message names the fix."""


@dataclass(frozen=True)
class StoreInfo:
    """Encoders and settings that a store was computed with.

    Attributes:
        speech_width: width of the speech encoder's frames.
        audio_width: width of the audio encoder's frames, 0 without one.
        encoders: digest of the weights of each encoder.
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


@dataclass(frozen=True)
class EncodedRecording:
    """Encoder frames of one recording, its 30 s chunks one after the other.

    Attributes:
        num_samples: length of the recording at the extractor's rate.
        speech: `(sum of speech_frames, speech_width)`, float16.
        speech_frames: frames of each chunk: the real ones, or all where the connector reads padding.
        audio: `(sum of audio_frames, audio_width)`, float16; `None` without an audio encoder.
        audio_frames: real frames of each chunk; empty without an audio encoder.
    """

    num_samples: int
    speech: torch.Tensor
    speech_frames: tuple[int, ...]
    audio: torch.Tensor | None = None
    audio_frames: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Samples, as of a waveform."""
        return self.num_samples


class FeatureStore:
    """Encoder features of recordings, read from disk as they are needed.

    Args:
        folder: folder of the store.

    Raises:
        FeatureStoreError: there is no store in that folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.info = read_store_info(self.folder)
        shards = sorted(self.folder.glob("shard-*.arrow"))
        if not shards:
            raise FeatureStoreError(f"{self.folder} holds no features yet; run examples/precompute_features.py")
        self._table = concatenate_datasets([Dataset.from_file(str(shard)) for shard in shards])
        self._rows = {key: row for row, key in enumerate(self._table["key"])}

    def __len__(self) -> int:
        """Number of recordings."""
        return len(self._rows)

    def __contains__(self, key: str) -> bool:
        """Whether the recording with that key is stored."""
        return key in self._rows

    def __getitem__(self, key: str) -> EncodedRecording:
        """Features of one recording, see `recording_keys`.

        Raises:
            FeatureStoreError: it is not stored.
        """
        if key not in self._rows:
            raise FeatureStoreError(
                f"{self.folder} has no features of {key!r}; run examples/precompute_features.py on this data again"
            )
        row = self._table[self._rows[key]]
        info = self.info
        return EncodedRecording(
            num_samples=row["num_samples"],
            speech=_tensor(row["speech"], info.speech_width),
            speech_frames=tuple(row["speech_frames"]),
            audio=_tensor(row["audio"], info.audio_width) if info.audio_width else None,
            audio_frames=tuple(row["audio_frames"]),
        )

    def recordings(self, row: Mapping[str, Any]) -> list[EncodedRecording]:
        """Features of the recordings of one data row, in order."""
        return [self[key] for key in recording_keys(row, self.folder)]

    def check(self, info: StoreInfo) -> None:
        """Compare with the encoders and settings of a model.

        Raises:
            FeatureStoreError: the store was computed with another encoder, revision, extractor setting or joining.
        """
        mine, wanted = asdict(self.info), asdict(info)
        for name, value in wanted.items():
            if mine[name] != value:
                raise FeatureStoreError(
                    f"the features in {self.folder} were computed with {name}={mine[name]!r}, but here "
                    f"{name}={value!r}; compute them again into another folder"
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
        FeatureStoreError: there is none.
    """
    path = folder / STORE_FILE
    if not path.is_file():
        raise FeatureStoreError(f"{folder} is not a feature store: it has no {STORE_FILE}")
    return StoreInfo(**json.loads(path.read_text(encoding="utf-8")))


def write_store_info(folder: Path, info: StoreInfo) -> None:
    """Write `store.json`, or check an existing one so that a store never mixes encoders.

    Raises:
        FeatureStoreError: the folder holds a store with other encoders or settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / STORE_FILE).is_file():
        known = read_store_info(folder)
        if known != info:
            raise FeatureStoreError(f"{folder} holds features of another setting ({known}); choose another folder")
        return
    partial = folder / f"{STORE_FILE}.{os.getpid()}.tmp"
    partial.write_text(json.dumps(asdict(info), indent=2, sort_keys=True), encoding="utf-8")
    partial.replace(folder / STORE_FILE)


def recording_keys(row: Mapping[str, Any], folder: Path) -> list[str]:
    """Key of each recording of a row in the store of that folder."""
    return ["+".join(_clip_key(clip, folder) for clip in clips) for clips in recordings_of(row)]


def write_shard(path: Path, recordings: Iterator[tuple[str, EncodedRecording]]) -> None:
    """Write one Arrow file, renamed to its final name once it is complete.

    Raises:
        FeatureStoreError: a value does not fit into 16 bits.
    """
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    with ArrowWriter(features=_FEATURES, path=str(partial), writer_batch_size=16) as writer:
        for key, recording in recordings:
            writer.write(
                {
                    "key": key,
                    "num_samples": recording.num_samples,
                    "speech_frames": list(recording.speech_frames),
                    "speech": _binary(key, recording.speech),
                    "audio_frames": list(recording.audio_frames),
                    "audio": None if recording.audio is None else _binary(key, recording.audio),
                }
            )
        writer.finalize()
    partial.replace(path)


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


def _digest(module: torch.nn.Module) -> str:
    """Digest of some values of each weight, rounded to bfloat16 so that the dtype of loading does not matter."""
    digest = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        flat = weight.detach().flatten()
        sample = flat[:: max(len(flat) // _VALUES_OF_A_WEIGHT, 1)].to("cpu", torch.bfloat16)
        digest.update(name.encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _pad_chunks(name: str, chunks: list[torch.Tensor], multiple: int) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([len(chunk) for chunk in chunks])  # (chunks,)
    frames = -(-int(lengths.max()) // multiple) * multiple
    padded = pad_sequence(chunks, batch_first=True)  # (chunks, longest, width)
    padded = torch.nn.functional.pad(padded, (0, 0, 0, frames - padded.shape[1])).float()  # (chunks, frames, width)
    mask = (torch.arange(frames) < lengths[:, None]).long()  # (chunks, frames)
    return {name: padded, f"{name}_mask": mask}


def _clip_key(clip: Mapping[str, Any], folder: Path) -> str:
    if clip.get("bytes") is not None:
        return "sha256:" + hashlib.sha256(clip["bytes"]).hexdigest()
    path = clip["path"]
    return path if "://" in path else os.path.relpath(os.path.realpath(path), os.path.realpath(folder))


def _binary(key: str, frames: torch.Tensor) -> bytes:
    half = frames.to(torch.float16)
    if not torch.isfinite(half).all():
        raise FeatureStoreError(f"the features of {key!r} do not fit into 16 bits or are not finite")
    return half.cpu().numpy().tobytes()


def _tensor(data: bytes, width: int) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.float16).reshape(-1, width).copy())
