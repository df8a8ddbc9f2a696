"""Compute the frozen encoders' features of all recordings of a data set once and write a `FeatureStore`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..audio_listen import read_clips
from .audio import clip_seconds, recordings_of
from .features import (
    EncodedRecording,
    FeatureStore,
    recording_keys,
    store_info,
    write_shard,
    write_store_info,
)
from .processes import launched_processes

_Recording = tuple[str, list[dict[str, Any]]]


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

    Each recording is encoded once, even if several rows use it. An interrupted run resumes after the last complete
    shard. Under `accelerate launch` each process encodes its share.

    Args:
        model: a `ListenModel` whose encoders are frozen; runs on its device.
        processor: its processor.
        dataset: rows of the manifest schema.
        folder: folder of the store; created if absent, else extended.
        batch_size: recordings in one batch, of similar length.
        shard_size: recordings per file.
        num_workers: worker processes that load audio.
        join_silence_seconds: silence between the clips of joined recordings; training must use the same.
        progress: whether the main process shows a progress bar.

    Returns:
        The store with all recordings of the data set.

    Raises:
        FeatureStoreError: the folder holds features of other encoders, or an encoder is trainable.
        ValueError: audio that cannot be read.
    """
    folder, state = Path(folder), launched_processes()
    info = store_info(model, processor.feature_extractor, join_silence_seconds)
    if state.is_main_process:
        write_store_info(folder, info)
    state.wait_for_everyone()
    pending = _pending(dataset, folder)
    first = len(list(folder.glob("shard-*.arrow")))
    state.wait_for_everyone()  # all processes count the shards before any of them writes
    mine = pending[state.process_index :: state.num_processes]
    bar = tqdm(total=len(mine), desc="encoding", unit="clip", disable=not (progress and state.is_main_process))
    with bar:
        for number, start in enumerate(range(0, len(mine), shard_size)):
            shard = mine[start : start + shard_size]
            encoded = _encode_all(model, processor, shard, batch_size, num_workers, join_silence_seconds, bar)
            write_shard(folder / f"shard-{first + number:05d}-{state.process_index:03d}.arrow", encoded)
    state.wait_for_everyone()
    return FeatureStore(folder)


def _pending(dataset: Dataset, folder: Path) -> list[_Recording]:
    """Recordings that are not stored, each once, sorted by length so that batches have little padding."""
    known = FeatureStore(folder) if any(folder.glob("shard-*.arrow")) else ()
    found: dict[str, list[dict[str, Any]]] = {}
    for row in dataset.select_columns(["audio", "join"]):
        for key, clips in zip(recording_keys(row, folder), recordings_of(row), strict=True):
            if key not in known:
                found.setdefault(key, clips)
    return sorted(found.items(), key=lambda item: sum(clip_seconds(clip) or 0.0 for clip in item[1]))


def _encode_all(
    model: Any,
    processor: Any,
    recordings: Sequence[_Recording],
    batch_size: int,
    num_workers: int,
    silence: float,
    bar: tqdm,
) -> Iterator[tuple[str, EncodedRecording]]:
    extractor = processor.feature_extractor

    def collate(batch: list[_Recording]) -> tuple[list[str], list[int], dict[str, torch.Tensor]]:
        waves = [read_clips(clips, extractor.sampling_rate, True, silence)[0] for _, clips in batch]
        return [key for key, _ in batch], [*map(len, waves)], extractor.extract(waves)

    loader = DataLoader(recordings, batch_size=batch_size, collate_fn=collate, num_workers=num_workers)
    for keys, lengths, features in loader:
        yield from zip(keys, _encode_batch(model, extractor, lengths, features), strict=True)
        bar.update(len(keys))


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
