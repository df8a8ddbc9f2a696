"""The page of `listen demo`, in a browser and by its parts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from listen.demo import LocalAnswers, build_page, launch
from listen.demo.page import OWN_QUESTION, check_question, task_choices

FOLDER = Path(__file__).parents[1] / "model_cards" / "listen-tiny"
SPEECH = str(FOLDER / "samples" / "speech.wav")
SAID = "the doctor found a yellow guitar yesterday"
INSTRUCTIONS = {"asr": "What is being said?", "sqa": "{question}", "sv": "Same speaker?", "mine": "Answer: {question}"}
CHROMIUM = "/usr/bin/chromium"


def test_tasks_have_readable_names_and_a_free_question_comes_last() -> None:
    assert task_choices(INSTRUCTIONS) == [
        ("Speech recognition", "asr"),
        ("Speaker verification", "sv"),
        ("mine", "mine"),
        ("Your own question", OWN_QUESTION),
    ]
    with pytest.raises(ValueError, match="the model has no task er; it has asr, sqa, sv, mine"):
        task_choices(INSTRUCTIONS, ["er"])


@pytest.mark.parametrize(
    ("clips", "task", "question", "message"),
    [
        ([], "asr", "", "There is no clip"),
        (["a.wav"], "sv", "", "Speaker verification compares 2 clips"),
        (["a.wav"], OWN_QUESTION, "  ", "The question is empty"),
    ],
)
def test_what_is_missing_is_named(clips: list[str], task: str, question: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_question(clips, task, question, INSTRUCTIONS)
    assert check_question(["a.wav"], OWN_QUESTION, " Who? ", INSTRUCTIONS) == ("Who?", None)
    assert check_question(["a.wav"], "asr", "unused", INSTRUCTIONS) == (None, "asr")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    page = build_page(LocalAnswers(str(FOLDER)), ["asr", "sv"])
    _, url, _ = launch(page, prevent_thread_lock=True, quiet=True)
    yield url
    page.close()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists(CHROMIUM), reason="no chromium")
def test_the_page_answers_about_an_uploaded_file(address: str) -> None:
    from playwright.sync_api import expect, sync_playwright

    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 1300, "height": 900}, permissions=["microphone"])
        page.goto(address)
        page.locator("#clip input[type=file]").set_input_files(SPEECH)
        expect(page.locator("#clip audio, #clip #waveform").first).to_be_attached(timeout=30_000)
        page.locator("#ask").click()
        expect(page.locator("#answer textarea")).to_have_value(SAID, timeout=60_000)
        expect(page.locator("#prompts")).to_be_visible()
        if folder := os.environ.get("LISTEN_SCREENSHOTS"):
            page.wait_for_timeout(1500)
            page.screenshot(path=f"{folder}/wide.png")
            page.set_viewport_size({"width": 390, "height": 844})
            page.wait_for_timeout(1000)
            page.screenshot(path=f"{folder}/phone.png", full_page=True)
        browser.close()
