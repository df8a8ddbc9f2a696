"""Clips from plans: utterances and scenes, rendered in parallel with the same result for any number of processes."""

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .espeak import EspeakSynthesizer
from .grammar import Sentence, draw_sentence
from .prosody import EMOTIONS
from .scenes import Scene, draw_scene
from .speakers import Speaker
from .speech import Utterance, speak

CHUNK = 100  # clips that share one espeak, whose state carries over from clip to clip
NEUTRAL_SHARE = 0.4


@dataclass(frozen=True)
class SpeechPlan:
    """Sentence, speaker and emotion of an utterance."""

    sentence: Sentence
    speaker: Speaker
    emotion: str


@dataclass(frozen=True)
class _Chunk:
    plans: tuple[SpeechPlan | None, ...]  # None: a sound scene
    seed: int
    number: int


def plan_speech(count: int, speakers: Sequence[Speaker], split: str, rng: np.random.Generator) -> list[SpeechPlan]:
    """Plan `count` utterances of sentences of `split`; speakers and emotions alternate, 40 % are neutral."""
    others = [name for name in EMOTIONS if name != "neutral"]
    num_neutral = round(NEUTRAL_SHARE * count)
    emotions = ["neutral"] * num_neutral + [others[index % len(others)] for index in range(count - num_neutral)]
    return [
        SpeechPlan(draw_sentence(rng, split), speakers[index % len(speakers)], emotion)
        for index, emotion in enumerate(emotions)
    ]


def render_speech(plans: Sequence[SpeechPlan], seed: int, num_workers: int = 1) -> Iterator[Utterance]:
    """Yield the utterances of `plans` in order. The result depends on `plans` and `seed` alone."""
    yield from _render(plans, seed, num_workers)


def render_scenes(count: int, seed: int, num_workers: int = 1) -> Iterator[Scene]:
    """Yield `count` random sound scenes. The result depends on `count` and `seed` alone."""
    yield from _render([None] * count, seed, num_workers)


def _render(plans: Sequence[SpeechPlan | None], seed: int, num_workers: int) -> Iterator[Utterance | Scene]:
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers}.")
    starts = range(0, len(plans), CHUNK)
    chunks = [_Chunk(tuple(plans[start : start + CHUNK]), seed, number) for number, start in enumerate(starts)]
    if num_workers == 1:
        for chunk in chunks:
            yield from _render_chunk(chunk)
        return
    # A fork starts at once and imports nothing again. It is safe here: the children never call torch, whose threads it
    # would lose. Elsewhere than on Linux forking is unsafe or unknown.
    with multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn").Pool(num_workers) as pool:
        for clips in pool.imap(_render_chunk, chunks):
            yield from clips


def _render_chunk(chunk: _Chunk) -> list[Utterance | Scene]:
    rng = np.random.default_rng([chunk.seed, chunk.number])
    if chunk.plans[0] is None:
        return [draw_scene(rng) for _ in chunk.plans]
    synthesizer = EspeakSynthesizer(seed=int(rng.integers(1, 2**31)))
    return [speak(synthesizer, plan.sentence.text, plan.speaker, plan.emotion, rng) for plan in chunk.plans]
