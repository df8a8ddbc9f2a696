"""The built-in corpus: the same for a seed, disjoint splits, valid manifests, balanced answers."""

from __future__ import annotations

import builtins
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from listen.data.corpus import CorpusSizes, SplitSizes, build_corpus
from listen.data.corpus.espeak import EspeakSynthesizer, EspeakVoice, find_espeak_library
from listen.data.corpus.grammar import QUESTIONS, draw_question, draw_sentence, split_of_sentence, spoken_words
from listen.data.corpus.prosody import EMOTIONS
from listen.data.corpus.render import plan_speech, render_scenes, render_speech
from listen.data.corpus.scenes import draw_scene
from listen.data.corpus.sounds import EVENTS, PHRASES, SOUNDS
from listen.data.corpus.speakers import SPLIT_SIZES, make_speakers
from listen.data.corpus.speech import SAMPLING_RATE, speak
from listen.data.tasks import list_tasks

pytest.importorskip("espeakng_loader", reason="the extra `corpus` is not installed")
soundfile = pytest.importorskip("soundfile")

SPLITS = ("train", "dev", "test")
SIZES = CorpusSizes(
    train=SplitSizes(utterances=290, scenes=8, pairs=6),
    dev=SplitSizes(utterances=110, scenes=4, pairs=4, rows_per_task=10),
    test=SplitSizes(utterances=150, scenes=12, pairs=10, rows_per_task=10),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_corpus(tmp_path_factory.mktemp("corpus"), SIZES, seed=3, progress=False)


@pytest.fixture(scope="module")
def rows(corpus: Path) -> dict[str, list[dict]]:
    return {
        split: [json.loads(line) for line in (corpus / f"{split}.jsonl").read_text().splitlines()] for split in SPLITS
    }


def _clips(row: dict) -> list[str]:
    return row["audio"] if isinstance(row["audio"], list) else [row["audio"]]


def _digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_same_seed_gives_the_same_files_for_any_number_of_processes(tmp_path: Path) -> None:
    sizes = CorpusSizes(SplitSizes(130, 3, 0), SplitSizes(60, 2, 2, 4), SplitSizes(80, 2, 2, 4))
    one = build_corpus(tmp_path / "one", sizes, seed=5, num_workers=1, progress=False)
    two = build_corpus(tmp_path / "two", sizes, seed=5, num_workers=2, progress=False)
    assert _digest(one) == _digest(two)


def test_another_seed_gives_other_clips() -> None:
    plans = plan_speech(3, make_speakers("train"), "train", np.random.default_rng(0))
    first, second = (next(render_speech(plans, seed)).samples for seed in (1, 2))
    assert len(first) != len(second) or not np.array_equal(first, second)


def test_espeak_does_not_remember_earlier_instances() -> None:
    voice = EspeakVoice("en-us+f3", pitch=40, pitch_range=50, rate=150)
    clips = [EspeakSynthesizer(seed=9).speak("the young doctor", voice).samples for _ in range(2)]
    assert np.array_equal(*clips)


def test_built_folder_is_left_alone_and_another_recipe_refused(corpus: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    assert build_corpus(corpus, SIZES, seed=3) == corpus
    assert before == {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    with pytest.raises(FileExistsError, match="has a corpus of"):
        build_corpus(corpus, SIZES, seed=4)


def test_splits_share_no_sentence_and_no_speaker(rows: dict[str, list[dict]]) -> None:
    sentences = {split: {row["response"] for row in rows[split] if row["task"] == "asr"} for split in SPLITS}
    speakers = {split: {row["speaker"] for row in rows[split] if "speaker" in row} for split in SPLITS}
    for first, second in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert sentences[first] and not sentences[first] & sentences[second]
        assert speakers[first] and not speakers[first] & speakers[second]


def test_a_checksum_keeps_sentences_apart_for_every_seed() -> None:
    for split in SPLITS:
        drawn = [draw_sentence(np.random.default_rng(seed), split).text for seed in range(40)]
        assert {split_of_sentence(text) for text in drawn} == {split}
    with pytest.raises(ValueError, match="'valid'"):
        draw_sentence(np.random.default_rng(0), "valid")


def test_speakers_are_many_distinct_combinations() -> None:
    attributes = {split: [speaker.attributes for speaker in make_speakers(split)] for split in SPLITS}
    everybody = sum(attributes.values(), [])
    assert len(set(everybody)) == len(everybody) == sum(SPLIT_SIZES.values())
    assert SPLIT_SIZES["train"] >= 80 and SPLIT_SIZES["test"] >= 20
    assert attributes["test"] == [speaker.attributes for speaker in make_speakers("test", seed=7)]
    with pytest.raises(ValueError, match="'valid'"):
        make_speakers("valid")


def test_manifests_name_existing_audio_known_tasks_and_answers(corpus: Path, rows: dict[str, list[dict]]) -> None:
    for split in SPLITS:
        assert len({row["id"] for row in rows[split]}) == len(rows[split])
        for row in rows[split]:
            assert row["task"] in list_tasks() and row["response"]
            assert all((corpus / clip).is_file() for clip in _clips(row))
            assert (row["task"] == "sqa") == ("question" in row)
            assert len(_clips(row)) == (2 if row["task"] == "sv" else 1)
    assert {row["task"] for row in rows["test"]} == {"asr", "er", "sv", "sqa", "en2zh", "acap"}
    assert {row["task"] for row in rows["train"]} == {"asr", "er", "sv", "sqa", "en2zh", "acap", "voice", "first_sound"}


def test_answers_are_balanced(rows: dict[str, list[dict]]) -> None:
    tasks = Counter(row["task"] for row in rows["test"])
    assert set(tasks.values()) == {10}
    assert Counter(row["response"] for row in rows["test"] if row["task"] == "sv") == {"yes": 5, "no": 5}
    assert Counter(row["response"] for row in rows["test"] if row["task"] == "er") == dict.fromkeys(EMOTIONS, 2)
    train = Counter(row["response"] for row in rows["train"] if row["task"] == "er")
    assert set(train) == set(EMOTIONS) and len(set(train.values())) == 1


def test_verification_pairs_are_labelled_by_their_speakers(rows: dict[str, list[dict]]) -> None:
    pairs = [row for split in SPLITS for row in rows[split] if row["task"] == "sv"]
    for row in pairs:
        assert (row["speakers"][0] == row["speakers"][1]) == (row["response"] == "yes")
        assert row["audio"][0] != row["audio"][1]


def test_too_few_clips_for_the_pairs_is_an_error(tmp_path: Path) -> None:
    sizes = CorpusSizes(train=SplitSizes(utterances=5, scenes=0, pairs=4))
    with pytest.raises(ValueError, match="pairs=4"):
        build_corpus(tmp_path, sizes, progress=False)


def test_audio_is_16_khz_mono_of_sensible_length(corpus: Path) -> None:
    for path in (corpus / "audio").iterdir():
        info = soundfile.info(path)
        assert (info.samplerate, info.channels) == (SAMPLING_RATE, 1)
        assert 0.5 < info.duration < 10.0


def test_word_times_follow_the_speech() -> None:
    plans = plan_speech(10, make_speakers("train"), "train", np.random.default_rng(1))
    for plan, utterance in zip(plans, render_speech(plans, seed=1), strict=True):
        starts, ends = np.array(utterance.word_times).T
        assert len(starts) == len(plan.sentence.words)
        assert (np.diff(starts) >= 0).all() and (ends >= starts).all()
        assert 0 <= starts[0] < 0.35 and ends[-1] <= len(utterance.samples) / SAMPLING_RATE
        inside = np.abs(utterance.samples[int(starts[0] * SAMPLING_RATE) : int(ends[-1] * SAMPLING_RATE)]).mean()
        outside = np.abs(utterance.samples[: max(1, int(starts[0] * SAMPLING_RATE) - 200)]).mean()
        assert inside > 3 * outside


def test_emotions_change_the_sound_and_unknown_ones_are_refused() -> None:
    speaker = make_speakers("train")[0]
    lengths = {}
    for emotion in EMOTIONS:
        clip = speak(EspeakSynthesizer(seed=1), "the king sold a red piano", speaker, emotion, np.random.default_rng(0))
        lengths[emotion] = len(clip.samples)
    assert lengths["sad"] > lengths["neutral"] > lengths["angry"]
    with pytest.raises(ValueError, match="'bored'"):
        speak(EspeakSynthesizer(), "the king", speaker, "bored", np.random.default_rng(0))


def test_scenes_hold_the_events_that_their_caption_names() -> None:
    for seed in range(20):
        scene = draw_scene(np.random.default_rng(seed))
        assert 1 <= len(scene.events) == len(set(scene.events)) <= 3
        assert all(PHRASES[event] in scene.caption for event in scene.events)
        assert {event for event in EVENTS if event in scene.caption.split()} == set(scene.events)
        duration = len(scene.samples) / SAMPLING_RATE
        assert all(0 <= start < end <= duration + 1e-6 for _, start, end in scene.spans)


def test_scenes_repeat_with_their_seed() -> None:
    first, second = (list(render_scenes(3, seed=4)) for _ in range(2))
    assert all(np.array_equal(one.samples, two.samples) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("event", EVENTS)
def test_every_sound_event_is_audible_and_short(event: str) -> None:
    sound = SOUNDS[event](np.random.default_rng(0))
    assert np.isfinite(sound).all() and np.abs(sound).max() > 0.01
    assert 0.3 < len(sound) / SAMPLING_RATE < 3.0


def test_questions_are_answered_by_the_sentence() -> None:
    rng, asked = np.random.default_rng(0), set()
    for _ in range(300):
        sentence = draw_sentence(rng, "train")
        question, answer = draw_question(sentence, rng)
        assert answer in sentence.text and "{" not in question
        assert set(sentence.words) <= set(spoken_words())
        asked.add(next(fact for fact, value in sentence.facts.items() if value == answer))
    assert asked == set(QUESTIONS)


def test_missing_espeak_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name == "espeakng_loader":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="pip install espeakng-loader"):
        find_espeak_library()


def test_unknown_voice_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no-such-voice"):
        EspeakSynthesizer().speak("the king", EspeakVoice("no-such-voice", 50, 50, 150))
