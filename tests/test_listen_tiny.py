"""The miniature model that the repository carries: small, self-contained, and it hears its own samples."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from listen import ListenForConditionalGeneration, ListenPipeline, ListenProcessor

FOLDER = Path(__file__).parents[1] / "model_cards" / "listen-tiny"
SAMPLES = FOLDER / "samples"


@pytest.fixture(scope="module")
def listen() -> ListenPipeline:
    model = ListenForConditionalGeneration.from_pretrained(FOLDER)
    return ListenPipeline(model=model, processor=ListenProcessor.from_pretrained(FOLDER))


def _answer(listen: ListenPipeline, clips: str | list[str], **kwargs: object) -> str:
    return listen({"audio": clips, **kwargs})[0]["generated_text"]


def test_weights_are_small_and_say_nothing_of_the_machine_they_were_made_on() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.safetensors")) < 20e6
    for path in FOLDER.rglob("*.json"):
        assert "/work" not in path.read_text() and "/home" not in path.read_text()
    config = json.loads((FOLDER / "config.json").read_text())
    assert all(base["base_model_name_or_path"].startswith("./") for base in config["base_models"].values())


def test_the_card_shows_the_measured_scores_with_and_without_prompts() -> None:
    card, scores = (FOLDER / "README.md").read_text(), json.loads((FOLDER / "metrics.json").read_text())
    rows = re.findall(r"^\| `(\w+)` \| ([\w ()]+) \| ([\d.]+) \| ([\d.]+) - ([\d.]+) \| ([\d.]+) \|$", card, flags=re.M)
    assert [row[0] for row in rows] == ["asr", "er", "sv", "sqa", "en2zh", "acap"]
    for task, title, *shown in rows:
        metric, digits = title.split(" (")[0].lower().replace(" ", "_"), len(shown[0].split(".")[1])
        details = scores["details"]
        values = [scores[task][metric], *details["confidence_95"][task][metric]]
        values.append(details["without_prompts"][task][metric])
        assert shown == [f"{value:.{digits}f}" for value in values], task


def test_it_hears_its_samples(listen: ListenPipeline) -> None:
    speech, scene = (str(SAMPLES / name) for name in ("speech.wav", "scene.wav"))
    assert _answer(listen, speech, text="What is being said?") == "the doctor found a yellow guitar yesterday"
    assert _answer(listen, speech, text="which colour is it?") == "yellow"
    assert _answer(listen, speech, task="en2zh") == "昨天医生找到了一把黄色的吉他"
    assert _answer(listen, scene, task="acap") == "a dog barks while an engine hums"


def test_it_compares_two_clips(listen: ListenPipeline) -> None:
    speech = str(SAMPLES / "speech.wav")
    assert _answer(listen, [speech, speech], task="sv") == "yes"
    assert _answer(listen, [speech, str(SAMPLES / "other_voice.flac")], task="sv") == "no"


def test_another_sound_gets_another_answer(listen: ListenPipeline) -> None:
    samples, rate = soundfile.read(SAMPLES / "speech.wav", dtype="float32")
    noise = 0.1 * np.random.default_rng(0).standard_normal(len(samples)).astype(np.float32)
    answers = {_answer(listen, clip, sampling_rate=rate, text="What is being said?") for clip in (samples, noise)}
    assert len(answers) == 2
