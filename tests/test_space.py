"""The folder `examples/space` is a Space of the Hugging Face Hub."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import gradio
import pytest
from huggingface_hub import SpaceCard
from huggingface_hub.utils import validate_repo_id
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "examples" / "space"
MODEL = ROOT / "model_cards" / "listen-tiny"
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}  # those that the Hub takes
FIELDS = {  # of the Hub's reference of Space configuration
    *("title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file", "license"),
    *("short_description", "models", "tags"),
}


def test_the_header_of_the_card_is_valid() -> None:
    data = SpaceCard.load(SPACE / "README.md").data
    assert set(data.to_dict()) == FIELDS
    assert (data.sdk, data.license, data.app_file) == ("gradio", "apache-2.0", "app.py")
    assert f"gradio=={data.sdk_version}\n" in (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert f"Python :: {data.python_version}" in (ROOT / "setup.py").read_text(encoding="utf-8")
    assert {data.colorFrom, data.colorTo} <= COLOURS
    assert len(data.emoji) == 1 and len(data.short_description) <= 60
    for model in data.models:
        validate_repo_id(model)


def test_its_requirements_are_the_package_with_the_page() -> None:
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (requirement,) = [Requirement(line) for line in lines if not re.match("#|--", line)]
    assert f'name="{requirement.name}"' in (ROOT / "setup.py").read_text(encoding="utf-8")
    assert requirement.extras == {"demo"}


def test_the_app_builds_the_page_over_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_MODEL", str(MODEL))
    demo = runpy.run_path(str(SPACE / "app.py"))["demo"]
    assert isinstance(demo, gradio.Blocks) and demo.title == "LiSTEN: listen-tiny"
    (ask,) = [function.fn for function in demo.fns.values() if function.api_name == "ask"]
    speech = str(MODEL / "samples" / "speech.wav")
    *_, (text, chart) = ask(speech, None, "asr", "", "default", 4, 16)
    assert (text, chart.visible) == ("the doctor found a yellow guitar yesterday", True)


def test_without_the_variable_it_takes_the_model_of_the_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LISTEN_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)
    (model,) = SpaceCard.load(SPACE / "README.md").data.models
    Path(model).parent.mkdir()
    Path(model).symlink_to(MODEL)
    assert runpy.run_path(str(SPACE / "app.py"))["demo"].title == f"LiSTEN: {Path(model).name}"
