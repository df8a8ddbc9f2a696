"""Build the corpus: a folder of FLAC files and one manifest a split, all six tasks mixed.

    >>> from listen.data.corpus import CorpusSizes, build_corpus
    >>> build_corpus("runs/corpus", CorpusSizes(), seed=0)  # doctest: +SKIP

Every sentence and every speaker belongs to one split. The training and dev manifests also contain two auxiliary tasks:
"voice" (describe the voice) trains an adapter on what speaker verification compares, and "first_sound" asks for
something else than the caption of a scene, so that the task does not follow from the clip alone.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..files import write_json, write_json_lines
from .grammar import draw_question
from .prosody import EMOTIONS
from .render import SpeechPlan, plan_speech, render_scenes, render_speech
from .scenes import Scene
from .speakers import make_speakers
from .speech import SAMPLING_RATE

logger = logging.getLogger(__name__)

VERSION = 2
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class SplitSizes:
    """Number of clips of a split and of rows per task (`rows_per_task=None`: all that the clips give)."""

    utterances: int
    scenes: int
    pairs: int
    rows_per_task: int | None = None


@dataclass(frozen=True)
class CorpusSizes:
    """Sizes of the three splits."""

    train: SplitSizes = field(default_factory=lambda: SplitSizes(utterances=6000, scenes=2000, pairs=4000))
    dev: SplitSizes = field(default_factory=lambda: SplitSizes(200, 100, 100, rows_per_task=100))
    test: SplitSizes = field(default_factory=lambda: SplitSizes(400, 200, 200, rows_per_task=200))


def build_corpus(
    folder: str | Path, sizes: CorpusSizes | None = None, seed: int = 0, num_workers: int = 1, progress: bool = True
) -> Path:
    """Synthesise the corpus into `folder` and return its path; a complete corpus is left as it is.

    Args:
        folder: gets ``audio/*.flac`` (16 kHz mono), ``train.jsonl``, ``dev.jsonl``, ``test.jsonl``, ``corpus.json``.
        sizes: numbers of clips and rows; the default is 8900 clips (about 8.3 hours, 0.6 GB).
        seed: the same seed and sizes give the same files, whatever `num_workers` is.
        num_workers: rendering processes.
        progress: show a progress bar.

    Raises:
        ImportError: espeak-ng is missing.
        FileExistsError: `folder` has a corpus of other sizes, another seed or version.
    """
    folder, sizes = Path(folder), sizes or CorpusSizes()
    recipe = {"version": VERSION, "seed": seed, "sizes": asdict(sizes)}
    if _is_built(folder, recipe):
        logger.info("The corpus in %s is complete.", folder)
        return folder
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    for number, split in enumerate(SPLITS):
        split_seed = seed * len(SPLITS) + number
        rows = _build_split(folder, split, getattr(sizes, split), split_seed, num_workers, progress)
        write_json_lines(folder / f"{split}.jsonl", rows)
    write_json(folder / "corpus.json", recipe)
    return folder


def _is_built(folder: Path, recipe: dict[str, Any]) -> bool:
    marker = folder / "corpus.json"
    if not marker.exists():
        return False
    found = json.loads(marker.read_text())
    if found != recipe:
        raise FileExistsError(
            f"{folder} has a corpus of {found}, requested {recipe}. Choose another folder or remove it."
        )
    return True


def _build_split(
    folder: Path, split: str, sizes: SplitSizes, seed: int, num_workers: int, progress: bool
) -> list[dict[str, Any]]:
    rng = np.random.default_rng([seed, 1])
    plans = plan_speech(sizes.utterances, make_speakers(split), split, rng)
    names = [f"audio/{split}-speech-{number:05d}.flac" for number in range(len(plans))]
    with tqdm(total=len(plans) + sizes.scenes, desc=f"corpus: {split}", unit="clip", disable=not progress) as bar:
        for name, utterance in zip(names, render_speech(plans, seed, num_workers), strict=True):
            _write_audio(folder / name, utterance.samples)
            bar.update()
        scenes = {}
        for number, scene in enumerate(render_scenes(sizes.scenes, seed, num_workers)):
            name = f"audio/{split}-scene-{number:05d}.flac"
            _write_audio(folder / name, scene.samples)
            scenes[name] = scene
            bar.update()
    clips = dict(zip(names, plans, strict=True))
    rows = _take(_speech_rows(clips, split, rng), sizes.rows_per_task, rng)
    rows += _take(_scene_rows(scenes, split), sizes.rows_per_task, rng) + list(_pair_rows(clips, sizes.pairs, rng))
    return [rows[index] for index in rng.permutation(len(rows))]


def _speech_rows(clips: dict[str, SpeechPlan], split: str, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Rows of asr, en2zh and sqa for each clip; er balanced over emotions; voice for neutral clips, not in test."""
    left = dict.fromkeys(EMOTIONS, min(_count_emotions(clips.values()).values()))
    for name, plan in clips.items():
        yield _row(name, "asr", plan.sentence.text, plan)
        yield _row(name, "en2zh", plan.sentence.translation, plan)
        question, answer = draw_question(plan.sentence, rng)
        yield _row(name, "sqa", answer, plan) | {"question": question}
        if left[plan.emotion] > 0:
            left[plan.emotion] -= 1
            yield _row(name, "er", plan.emotion, plan)
        if plan.emotion == "neutral" and split != "test":
            yield _row(name, "voice", plan.speaker.description, plan)


def _count_emotions(plans: Iterable[SpeechPlan]) -> dict[str, int]:
    emotions = [plan.emotion for plan in plans]
    return {emotion: emotions.count(emotion) for emotion in EMOTIONS}


def _row(name: str, task: str, response: str, plan: SpeechPlan) -> dict[str, Any]:
    return {
        "id": f"{Path(name).stem}-{task}",
        "audio": name,
        "task": task,
        "response": response,
        "speaker": plan.speaker.name,
        "emotion": plan.emotion,
    }


def _scene_rows(scenes: dict[str, Scene], split: str) -> Iterator[dict[str, Any]]:
    """A row of `acap` for each clip, and outside the test split one of `first_sound`."""
    for name, scene in scenes.items():
        row = {"audio": name, "events": scene.events}
        yield {**row, "id": f"{Path(name).stem}-acap", "task": "acap", "response": scene.caption}
        if split != "test":
            yield {**row, "id": f"{Path(name).stem}-first_sound", "task": "first_sound", "response": scene.events[0]}


def _pair_rows(clips: dict[str, SpeechPlan], count: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Speaker verification on neutral clips: same and different speakers alternate, no pair occurs twice."""
    by_speaker: dict[str, list[str]] = {}
    for name, plan in clips.items():
        if plan.emotion == "neutral":
            by_speaker.setdefault(plan.speaker.name, []).append(name)
    speakers, taken = [speaker for speaker, names in by_speaker.items() if len(names) > 1], set()
    possible = sum(len(by_speaker[speaker]) * (len(by_speaker[speaker]) - 1) // 2 for speaker in speakers)
    if (count + 1) // 2 > possible or (count and len(speakers) < 2):
        raise ValueError(f"{len(clips)} utterances give {possible} pairs of one speaker, too few for pairs={count}.")
    while len(taken) < count:
        same = len(taken) % 2 == 0
        first, second = rng.choice(speakers, size=2, replace=False)
        pair = rng.choice(by_speaker[first], 2, replace=False) if same else [
            rng.choice(by_speaker[speaker]) for speaker in (first, second)
        ]  # fmt: skip
        audio = [str(name) for name in pair]
        if frozenset(audio) in taken:
            continue
        identity = f"{Path(audio[0]).stem}-{Path(audio[1]).stem.rsplit('-', 1)[-1]}-sv"
        names = [clips[name].speaker.name for name in audio]
        taken.add(frozenset(audio))
        yield {"id": identity, "audio": audio, "task": "sv", "response": "yes" if same else "no", "speakers": names}


def _take(rows: Iterable[dict[str, Any]], limit: int | None, rng: np.random.Generator) -> list[dict[str, Any]]:
    """At most `limit` rows per task, drawn at random; emotion recognition keeps the same number of each emotion."""
    rows = list(rows)
    if limit is None:
        return rows
    quotas: dict[str, int] = {}
    kept = []
    for row in (rows[index] for index in rng.permutation(len(rows))):
        group, quota = row["task"], limit
        if row["task"] == "er":
            group, quota = f"er-{row['emotion']}", limit // len(EMOTIONS)
        if quotas.get(group, 0) < quota:
            quotas[group] = quotas.get(group, 0) + 1
            kept.append(row)
    return kept


def _write_audio(path: Path, samples: np.ndarray) -> None:
    import soundfile

    soundfile.write(path, samples, SAMPLING_RATE, subtype="PCM_16")
