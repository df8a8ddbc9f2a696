"""The page of `listen demo`, in a browser and by its parts."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures_serving import served

from listen import ListenForConditionalGeneration, ListenPipeline, ListenProcessor
from listen.demo import LocalAnswers, ServedAnswers, build_page, launch
from listen.demo.answers import Question
from listen.demo.page import OWN_QUESTION, check_question, task_choices
from listen.demo.served import ServerError
from listen.serving.app import Options
from listen.serving.in_process import TransformersEngine

FOLDER = Path(__file__).parents[1] / "model_cards" / "listen-tiny"
SPEECH, OTHER, SCENE = (str(FOLDER / "samples" / name) for name in ("speech.wav", "other_voice.flac", "scene.wav"))
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


# ---------------------------------------------------------------------- answers of a server


@pytest.fixture(scope="module")
def listen() -> ListenPipeline:
    """The miniature with a second adapter, whose connector differs."""
    model = ListenForConditionalGeneration.from_pretrained(FOLDER)
    model.load_adapter(FOLDER, "second")
    for parameter in model.adapters["second"].connector.projection.parameters():
        parameter.data.mul_(-1.0)
    return ListenPipeline(model=model, processor=ListenProcessor.from_pretrained(FOLDER))


@pytest.fixture(scope="module")
def server(listen: ListenPipeline) -> Iterator[str]:
    with served(TransformersEngine(listen, str(FOLDER)), Options(api_key="right")) as address:
        yield f"{address}/v1"


@pytest.mark.parametrize(
    ("clips", "text", "task", "adapter", "k"),
    [
        ([SPEECH], None, "asr", "listen-tiny", 3),
        ([SPEECH, OTHER], None, "sv", "listen-tiny", 3),
        ([SCENE], None, "acap", "listen-tiny", 0),
        ([SPEECH], "What is being said?", None, "second", 3),
        ([SPEECH], None, "ser", "listen-tiny", 3),
    ],
)
def test_answers_of_a_server_are_those_of_the_model(
    clips: list[str], text: str | None, task: str | None, adapter: str, k: int, server: str, listen: ListenPipeline
) -> None:
    answers = ServedAnswers(server, "right")
    pieces = [*answers.stream(Question(clips, text, task, adapter, k, 16))]
    names = ["default" if adapter == "listen-tiny" else adapter]
    inputs = {"audio": clips, "text": text, "task": task}
    (expected,) = listen(inputs, num_prompts=k, adapter_names=names, max_new_tokens=16)
    assert pieces[-1] == {"generated_text": expected["generated_text"]}
    texts = [piece["generated_text"] for piece in pieces]
    assert all(after.startswith(before) for before, after in zip(texts, texts[1:], strict=False))


def test_a_server_is_asked_for_its_models_tasks_and_prompts(server: str, listen: ListenPipeline) -> None:
    answers = ServedAnswers(server, "right")
    assert answers.adapters == ["listen-tiny", "second"]  # and not the base LLM, which takes no audio
    assert answers.instructions == listen.processor.task_instructions
    assert answers.num_prompts == listen.processor.num_prompts
    assert answers.most_prompts("second") == listen.model.adapters["second"].prompt_pool.config.pool_size


def test_a_server_that_knows_no_tasks_gets_their_wording(listen: ListenPipeline) -> None:
    engine = TransformersEngine(listen, str(FOLDER))
    engine.details = dict.fromkeys(engine.models, {})
    with served(engine) as address:
        answers = ServedAnswers(f"{address}/v1/")
        assert (answers.adapters, answers.most_prompts("second")) == ([*engine.models], 0)
        (*_, last) = answers.stream(Question([SPEECH], None, "asr", "listen-tiny", 3))
    assert last == {"generated_text": SAID}


def test_errors_of_a_server_are_plain(server: str, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="refuses the API key.*--key KEY"):
        ServedAnswers(server, "wrong")
    with pytest.raises(ServerError, match=r"status 404.*/models"):
        ServedAnswers(server.removesuffix("/v1"), "right")
    with pytest.raises(ValueError, match="'localhost:8000' is no address of a server"):
        ServedAnswers("localhost:8000")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ServerError, match="does not answer.*Check that it runs"):
            ServedAnswers(f"http://127.0.0.1:{closed.getsockname()[1]}/v1")
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no audio")
    with pytest.raises(ServerError, match="status 400.*cannot decode 8 bytes as audio"):
        next(ServedAnswers(server, "right").stream(Question([str(broken)], None, "asr", "listen-tiny", 3)))


# ---------------------------------------------------------------------- the page in a browser


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
