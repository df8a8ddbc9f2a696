"""Compute the frozen encoders' features of all recordings of a data set once and write a `FeatureStore`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import SoftFileLease, Timeout
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import logging

from ..audio_listen import read_clips
from .audio import clip_seconds, recordings_of
from .content import audio_content
from .features import (
    EncodedRecording,
    FeatureStore,
    FeatureStoreError,
    keys_digest,
    recording_keys,
    store_info,
    write_shard,
    write_store_info,
)
from .files import lease, write_json_once
from .processes import launched_processes
from .text_files import read_json

logger = logging.get_logger(__name__)
_Recording = tuple[str, list[dict[str, Any]]]
_Shard = dict[str, list[dict[str, Any]]]
_LEASES = ".locks"


@dataclass(frozen=True)
class _Work:
    """How recordings are encoded, see `precompute_features`."""

    model: Any
    processor: Any
    batch_size: int
    num_workers: int
    silence: float


def precompute_features(
    model: Any,
    processor: Any,
    dataset: Dataset,
    folder: str | Path,
    batch_size: int = 16,
    shard_size: int = 512,
    num_workers: int = 0,
    join_silence_seconds: float = 0.0,
    progress: bool = True,
) -> FeatureStore:
    """Encode all recordings of a data set that are not in the store yet.

    Each recording is encoded once, even if several rows use it, and again once its audio file is replaced. An
    interrupted run resumes after the last complete shard. Any number of runs, on any machines that share the folder,
    may write at the same time: each claims one shard after another (see `listen.data.files.lease`), so that runs over
    the same data share the work, and each returns when all of it is stored. The shard of a run that died is encoded by
    another one.

    Args:
        model: a `ListenModel` whose encoders are frozen; runs on its device.
        processor: its processor.
        dataset: rows of the manifest schema.
        folder: folder of the store; created if absent, else extended.
        batch_size: recordings in one batch, of similar length.
        shard_size: recordings per file; of several runs in one folder that of the first, so that they share the work.
        num_workers: worker processes that load audio.
        join_silence_seconds: silence between the clips of joined recordings; training must use the same.
        progress: whether to show a progress bar; of the processes of a launcher the main one does.

    Returns:
        The store with all recordings of the data set.

    Raises:
        FeatureStoreError: the folder holds features of other encoders or a damaged file, or an encoder is trainable.
        ValueError: audio that cannot be read, or a `shard_size` below 1.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size} must be at least 1 recording")
    folder = Path(folder)
    write_store_info(folder, store_info(model, processor.feature_extractor, join_silence_seconds))
    _remove_partial_shards(folder)
    work = _Work(model, processor, batch_size, num_workers, join_silence_seconds)
    shown = progress and launched_processes().is_main_process
    shards = _shards(dataset, folder, _common_shard_size(folder, shard_size))
    while True:
        written = set(folder.glob("shard-*.arrow"))
        pending = _pending(shards, folder)
        left = sum(map(len, pending))
        with tqdm(total=left, desc="encoding", unit="clip", disable=not (shown and left)) as bar:
            postponed = [shard for shard in pending if not _write_once(work, folder, shard, written, bar)]
        if not postponed:
            _remove_partial_shards(folder)  # of runs that died meanwhile
            return FeatureStore(folder)
        logger.warning(f"{folder}: other runs encode {sum(map(len, postponed))} of these recordings; waiting for them")
        for shard in postponed:  # until its run has written it, or has died
            with _lease_of(folder, keys_digest(shard)):
                pass


def _common_shard_size(folder: Path, asked: int) -> int:
    """The shard size of the first run in a folder: runs claim shards, so all must divide the recordings alike."""
    path = folder / _LEASES / "shard_size.json"
    path.parent.mkdir(exist_ok=True)
    write_json_once(path, asked, lock=folder / ".shard_size.lock")
    size = read_json(path)
    if type(size) is not int or size < 1:
        raise FeatureStoreError(f"{path} holds {size!r}, not the recordings of a shard; delete it")
    if size != asked:
        logger.warning(f"{folder}: files of {size} recordings, as in its first run, not shard_size={asked}")
    return size


def _shards(dataset: Dataset, folder: Path, size: int) -> list[_Shard]:
    """All recordings, each once, in shards that are the same in all runs over the same rows in any order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in dataset.select_columns(["audio", "join"]):
        found.update(zip(recording_keys(row, folder), recordings_of(row), strict=True))
    keys = sorted(found)
    return [{key: found[key] for key in keys[start : start + size]} for start in range(0, len(keys), size)]


def _pending(shards: Sequence[_Shard], folder: Path) -> list[_Shard]:
    """The shards without what is stored already."""
    known = FeatureStore(folder) if any(folder.glob("shard-*.arrow")) else ()
    left = ({key: clips for key, clips in shard.items() if key not in known} for shard in shards)
    return [shard for shard in left if shard]


def _write_once(work: _Work, folder: Path, shard: _Shard, written: set[Path], bar: tqdm) -> bool:
    """Encode and write a shard unless another run has done so since `written` was listed.

    Returns:
        Whether that is done; not if another run is at it, or has taken it over.
    """
    digest = keys_digest(shard)
    try:
        with _lease_of(folder, digest).acquire(timeout=0):
            if not set(folder.glob(f"shard-*-{digest}.arrow")) - written:
                encoded = _encode_all(work, shard, bar)
                return write_shard(folder / f"shard-{_next_number(folder):05d}-{digest}.arrow", encoded)
    except Timeout:
        return False
    return True


def _lease_of(folder: Path, digest: str) -> SoftFileLease:
    return lease(folder / _LEASES / f"{digest}.lock")


def _next_number(folder: Path) -> int:
    """Number of the next shard, so that newer features of a recording follow older ones."""
    numbers = [path.stem.split("-")[1] for path in folder.glob("shard-*.arrow")]
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


def _remove_partial_shards(folder: Path) -> None:
    """Remove what killed runs left: partial shards that no run has claimed."""
    for partial in folder.glob("shard-*.tmp"):
        digest = partial.stem.rpartition("-")[2].partition(".")[0]
        with suppress(Timeout), _lease_of(folder, digest).acquire(timeout=0):
            partial.unlink(missing_ok=True)


def _encode_all(work: _Work, shard: _Shard, bar: tqdm) -> Iterator[tuple[str, EncodedRecording]]:
    extractor = work.processor.feature_extractor
    recordings = sorted(shard.items(), key=lambda item: sum(clip_seconds(clip) or 0.0 for clip in item[1]))
    collate = functools.partial(_collate, extractor, work.silence)
    loader = DataLoader(recordings, batch_size=work.batch_size, collate_fn=collate, num_workers=work.num_workers)
    for sources, lengths, features in loader:
        encoded = _encode_batch(work.model, extractor, lengths, features)
        for (key, content), recording in zip(sources, encoded, strict=True):
            yield key, replace(recording, content=content)
        bar.update(len(sources))


def _collate(
    extractor: Any, silence: float, batch: list[_Recording]
) -> tuple[list[tuple[str, str | None]], list[int], dict[str, torch.Tensor]]:
    """A function of the module, which workers that are spawned, not forked, can unpickle."""
    sources = [(key, audio_content(clips)) for key, clips in batch]  # before the audio, which may be replaced
    waves = [read_clips(clips, extractor.sampling_rate, True, silence)[0] for _, clips in batch]
    return sources, [*map(len, waves)], extractor.extract(waves)


@torch.no_grad()
def _encode_batch(
    model: Any, extractor: Any, lengths: Sequence[int], features: dict[str, torch.Tensor]
) -> list[EncodedRecording]:
    encoded = model.encode_audio(**{name: value.to(model.device) for name, value in features.items()})
    mask = encoded.speech_hidden_states_mask
    if model.config.connector_config.salmonn_compat:
        mask = torch.ones_like(mask)  # padding is encoded too
    speech, speech_frames = _by_chunk(encoded.speech_hidden_states, mask)
    audio, audio_frames = [], []
    if encoded.audio_hidden_states is not None:
        audio, audio_frames = _by_chunk(encoded.audio_hidden_states, encoded.audio_hidden_states_mask)
    recordings, end = [], 0
    for num_samples in lengths:
        start, end = end, end + extractor.num_chunks(num_samples)
        recordings.append(
            EncodedRecording(
                num_samples=num_samples,
                speech=torch.cat(speech[start:end]),
                speech_frames=tuple(speech_frames[start:end]),
                audio=torch.cat(audio[start:end]) if audio else None,
                audio_frames=tuple(audio_frames[start:end]),
            )
        )
    return recordings


def _by_chunk(frames: torch.Tensor, mask: torch.Tensor) -> tuple[list[torch.Tensor], list[int]]:
    """Real frames of each chunk `(frames, width)`, and their number."""
    counts = mask.sum(-1).tolist()
    return [chunk[:count].cpu() for chunk, count in zip(frames, counts, strict=True)], counts
