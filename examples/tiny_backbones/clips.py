"""Clips that the encoders learn from: training speakers and sentences, but other renderings than any built corpus."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from listen.data.corpus.prosody import EMOTIONS
from listen.data.corpus.render import SpeechPlan, plan_speech, render_scenes, render_speech
from listen.data.corpus.scenes import Scene
from listen.data.corpus.speakers import make_speakers
from listen.data.corpus.speech import SAMPLING_RATE, Utterance
from listen.feature_extraction_listen import ListenFeatureExtractor

FRAME_SECONDS = 0.02
SPEAKER_VARIANTS = 4  # small personal differences drawn anew for each combination of attributes


@dataclass
class SpeechClips:
    """Plans, word times, log-mel features (frames, 80) and filter banks (frames, 128), float16, of many utterances."""

    plans: list[SpeechPlan]
    word_times: list[list[tuple[float, float]]]
    features: list[torch.Tensor]
    fbanks: list[torch.Tensor]


@dataclass
class SceneClips:
    """Event spans and filter banks (frames, 128) in float16 of many sound scenes."""

    spans: list[list[tuple[str, float, float]]]
    fbanks: list[torch.Tensor]


def make_speech_clips(split: str, count: int, seed: int, num_workers: int) -> SpeechClips:
    """Render `count` utterances of speakers and sentences of `split`."""
    rng = np.random.default_rng([seed, 7])
    speakers = make_speakers(split, variants=SPEAKER_VARIANTS, seed=seed)
    plans = plan_speech(count, speakers, split, rng)
    plans = [plans[index] for index in rng.permutation(count)]
    clips, extractor = SpeechClips(plans, [], [], []), ListenFeatureExtractor()
    utterances = tqdm(render_speech(plans, seed, num_workers), total=count, desc=f"utterances ({split})")
    for group in _groups(utterances, 32):
        clips.word_times += [utterance.word_times for utterance in group]
        features = extractor([utterance.samples for utterance in group], sampling_rate=SAMPLING_RATE)
        clips.features += _rows(features["input_features"].transpose(1, 2), features["input_features_mask"])
        clips.fbanks += _rows(features["input_values"], features["input_values_mask"])
    return clips


def make_scene_clips(count: int, seed: int, num_workers: int) -> SceneClips:
    """Render `count` scenes."""
    clips, extractor = SceneClips([], []), ListenFeatureExtractor()
    scenes = tqdm(render_scenes(count, seed, num_workers), total=count, desc="scenes")
    for group in _groups(scenes, 32):
        clips.spans += [scene.spans for scene in group]
        features = extractor([scene.samples for scene in group], sampling_rate=SAMPLING_RATE)
        clips.fbanks += _rows(features["input_values"], features["input_values_mask"])
    return clips


def length_batches(lengths: list[int], batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless batches of indices of clips of like length, in random order."""
    lengths_array = np.asarray(lengths)
    while True:
        order = rng.permutation(len(lengths))
        pools = [order[start : start + batch_size * 16] for start in range(0, len(order), batch_size * 16)]
        batches = []
        for pool in pools:
            by_length = pool[np.argsort(lengths_array[pool], kind="stable")]
            batches += [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
        for index in rng.permutation(len(batches)):
            if len(batches[index]) == batch_size:
                yield batches[index]


def pad_features(rows: list[torch.Tensor], multiple: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack (frames, bins) rows to (batch, frames, bins) float32 and a mask (batch, frames); few distinct lengths."""
    length = -(-max(len(row) for row in rows) // multiple) * multiple
    stacked = torch.zeros(len(rows), length, rows[0].shape[1])
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        stacked[index, : len(row)] = row.float()
        mask[index, : len(row)] = 1
    return stacked, mask


def emotion_index(plan: SpeechPlan) -> int:
    """Index of the plan's emotion."""
    return list(EMOTIONS).index(plan.emotion)


def _rows(features: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    return [row[: int(length)].half() for row, length in zip(features, mask.sum(1), strict=True)]


def _groups(clips: Iterator[Utterance | Scene], size: int) -> Iterator[list[Utterance | Scene]]:
    group = []
    for clip in clips:
        group.append(clip)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
