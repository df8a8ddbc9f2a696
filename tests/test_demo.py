"""The page of `listen demo`, in a browser and by its parts."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import soundfile
from fixtures_serving import served
from huggingface_hub.utils import httpx
from playwright.sync_api import Browser, Page, expect, sync_playwright

from listen import ListenForConditionalGeneration, ListenPipeline, ListenProcessor
from listen.audio_listen import load_waveform
from listen.demo import LocalAnswers, ServedAnswers, build_page, launch
from listen.demo.answers import Example, Question, read_examples
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
    assert task_choices(INSTRUCTIONS, ["speaker", "mine"])[0] == ("Speaker verification", "sv")
    assert task_choices(INSTRUCTIONS, ["sv", "speaker"]) == task_choices(INSTRUCTIONS, ["sv"])
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


def test_examples_are_those_of_the_list_or_all_files(tmp_path: Path) -> None:
    pair = Example([SPEECH, OTHER], "sv")
    assert pair in read_examples(str(FOLDER))
    (tmp_path / "samples").mkdir()
    for name in ("b.wav", "a.flac", "notes.txt"):
        (tmp_path / "samples" / name).touch()
    assert [Path(clip).name for one in read_examples(str(tmp_path)) for clip in one.clips] == ["a.flac", "b.wav"]
    (tmp_path / "samples" / "examples.json").write_text('{"clips": []}')
    with pytest.raises(ValueError, match=r"examples.json must be a list such as \[{"):
        read_examples(str(tmp_path))


# ---------------------------------------------------------------------- answers of a server


def negate(adapter: Any) -> None:
    for parameter in adapter.connector.projection.parameters():
        parameter.data.mul_(-1.0)


@pytest.fixture(scope="module")
def listen() -> ListenPipeline:
    """The miniature with a second adapter, whose connector differs."""
    model = ListenForConditionalGeneration.from_pretrained(FOLDER)
    model.load_adapter(FOLDER, "second")
    negate(model.adapters["second"])
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


@contextmanager
def odd_server(models: str, answer: str = "", parties: int = 1) -> Iterator[str]:
    """A server that sends these texts as its list of models and as the stream of every answer.

    It answers once this many questions wait.
    """
    together = threading.Barrier(parties)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_text(models)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            together.wait(timeout=60)
            self.send_text(answer)

        def send_text(self, text: str) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: object) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


@pytest.mark.parametrize("models", ['{"data": null}', '{"data": ["a"]}', '{"data": [{}]}', "[]", "<html>"])
def test_what_is_no_openai_api_is_named(models: str) -> None:
    with odd_server(models) as address, pytest.raises(ServerError, match="is not an OpenAI API"):
        ServedAnswers(address)


def asked(*events: str) -> list[dict[str, Any]]:
    """The pieces of an answer that a server sends as these events."""
    models = '{"data": [{"id": "m", "tasks": null, "pool_size": null}]}'
    with odd_server(models, "".join(f"data: {event}\n\n" for event in events)) as address:
        answers = ServedAnswers(address)
        assert answers.most_prompts("m") == 0 and "asr" in answers.instructions
        return [*answers.stream(Question([SPEECH], None, "asr", "m", 0))]


def test_odd_events_of_a_server_are_no_errors() -> None:
    assert asked('{"error": null, "choices": [{"delta": {"content": "hi"}}]}') == [{"generated_text": "hi"}]
    assert asked('{"choices": null}', "null", "[]", '{"choices": [{"delta": null}]}') == [{"generated_text": ""}]


def test_an_answer_that_breaks_off_or_never_comes_is_an_error() -> None:
    with pytest.raises(ServerError, match="broken"):
        asked('{"choices": [{"delta": {"content": "hi"}}]}', '{"error": {"message": "broken"}}')
    with pytest.raises(ServerError, match="sent no answer"):
        asked()


# ---------------------------------------------------------------------- the page in a browser


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    answers = LocalAnswers(str(FOLDER), {"second": str(FOLDER)})
    negate(answers._model.adapters["second"])
    page = build_page(answers, ["asr", "er", "acap", "sv"])
    _, url, _ = launch(page, prevent_thread_lock=True, quiet=True)
    yield url
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, whose microphone plays a clip once."""
    if not os.path.exists(CHROMIUM):
        pytest.skip("no chromium")
    expect.set_options(timeout=60_000)  # the page loads slowly on a busy machine
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        flags.append(f"--use-file-for-fake-audio-capture={SPEECH}%noloop")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1300, "height": 900}, permissions=["microphone"])
    page.set_default_timeout(60_000)
    page.goto(address)
    expect(page.locator("#ask")).to_be_visible()
    yield page
    page.close()


def upload(page: Page, clip: str, field: str = "#clip") -> None:
    page.locator(f"{field} input[type=file]").set_input_files(clip)
    expect(page.locator(f"{field} input[type=file]")).to_have_count(0)


def choose(page: Page, field: str, entry: str) -> None:
    page.locator(f"{field} input").click()
    page.get_by_role("option", name=entry).click()


def slide(page: Page, field: str, value: str) -> None:
    """Set a slider, once it is there with a value, and wait until the page has taken the new one."""
    number, handle = (page.locator(f"{field} input[type={kind}]") for kind in ("number", "range"))
    expect(handle).to_be_visible()
    expect(number).to_have_value(handle.input_value())
    number.fill(value)
    number.blur()
    expect(handle).to_have_value(value)


def ask(page: Page, expected: str) -> None:
    """Wait for this answer and its end, before which the button takes no other click."""
    page.locator("#ask").click()
    expect(page.locator("#answer textarea")).to_have_value(expected)
    expect(page.locator("#ask")).to_be_enabled()


def picture(page: Page, name: str) -> None:
    """A screenshot into the folder LISTEN_SCREENSHOTS, where that is set."""
    if folder := os.environ.get("LISTEN_SCREENSHOTS"):
        page.wait_for_timeout(1500)  # charts and drawers move
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


@pytest.mark.slow
def test_the_page_answers_about_an_uploaded_file(page: Page) -> None:
    upload(page, SPEECH)
    ask(page, SAID)
    expect(page.locator("#prompts canvas, #prompts svg").first).to_be_visible()
    picture(page, "wide")
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function("document.documentElement.scrollWidth <= 390")
    picture(page, "phone")


@pytest.mark.slow
def test_the_page_answers_about_a_recording(page: Page, listen: ListenPipeline) -> None:
    page.locator("#clip").get_by_label("Record audio").click()
    page.locator("#clip .record-button").click()
    expect(page.locator("#clip .stop-button")).to_be_visible()
    expect(page.locator("#ask")).to_be_disabled()
    page.wait_for_timeout(1000 * soundfile.info(SPEECH).duration + 1000)
    page.locator("#clip .stop-button").click()
    page.locator("#ask").click()  # waits for the upload
    link = page.locator("#clip").get_by_test_id("download-link").get_attribute("href")
    recorded = httpx.get(link, trust_env=False).content
    assert abs(load_waveform(recorded)).max() > 0.05
    # a busy machine drops samples, which may change the words
    expect(page.locator("#answer textarea")).to_have_value(listen(recorded, task="asr")[0]["generated_text"])


@pytest.mark.slow
def test_recordings_are_not_filtered_as_calls_are(page: Page) -> None:
    settings = page.evaluate("""async () => {
        const [track] = (await navigator.mediaDevices.getUserMedia({audio: true})).getAudioTracks();
        const settings = track.getSettings();
        track.stop();
        return settings;
    }""")
    filters = ("echoCancellation", "noiseSuppression", "autoGainControl")
    assert {name: settings[name] for name in filters} == dict.fromkeys(filters, False)


@pytest.mark.slow
def test_a_recording_that_is_given_up_leaves_the_page_usable(page: Page) -> None:
    page.locator("#clip").get_by_label("Record audio").click()
    page.locator("#clip .record-button").click()
    expect(page.locator("#ask")).to_be_disabled()
    page.locator("#clip").get_by_label("Upload file").click()
    upload(page, SPEECH)
    ask(page, SAID)


@pytest.mark.slow
def test_a_recording_that_cannot_be_decoded_leaves_the_page_usable(page: Page) -> None:
    page.evaluate("""() => {
        OfflineAudioContext.prototype.decodeAudioData = () => Promise.reject(new DOMException('broken'));
    }""")
    page.locator("#clip").get_by_label("Record audio").click()
    page.locator("#clip .record-button").click()
    expect(page.locator("#ask")).to_be_disabled()
    page.locator("#clip .stop-button").click()
    page.locator("#ask").click()
    expect(page.get_by_text("There is no clip. Record one, or upload a file.")).to_be_visible()


@pytest.mark.slow
def test_the_page_compares_two_clips(page: Page) -> None:
    upload(page, SPEECH)
    choose(page, "#task", "Speaker verification")
    page.locator("#ask").click()
    expect(page.get_by_text("Speaker verification compares 2 clips. Add a second clip.")).to_be_visible()
    expect(page.locator("#ask")).to_be_enabled()
    upload(page, OTHER, "#second-clip")
    ask(page, "no")
    picture(page, "pair")
    page.get_by_text("Speech recognition: speech.wav").click()  # an example fills in clips and task
    expect(page.locator("#task input")).to_have_value("Speech recognition")
    expect(page.locator("#second-clip input[type=file]")).to_have_count(1)  # it is empty again
    ask(page, SAID)


@pytest.mark.slow
def test_adapter_and_k_change_the_answer(page: Page, listen: ListenPipeline) -> None:
    inputs = {"audio": SCENE, "task": "acap"}
    (without,) = listen(inputs, num_prompts=0, max_new_tokens=128)
    (second,) = listen(inputs, num_prompts=4, adapter_names=["second"], max_new_tokens=128)
    caption = "a dog barks while an engine hums"
    assert len({caption, without["generated_text"], second["generated_text"]}) == 3
    upload(page, SCENE)
    choose(page, "#task", "Audio captioning")
    ask(page, caption)
    page.get_by_text("Settings").click()
    slide(page, "#k", "0")
    ask(page, without["generated_text"])
    expect(page.locator("#prompts")).not_to_be_visible()
    slide(page, "#k", "4")
    choose(page, "#adapter", "second")
    ask(page, second["generated_text"])


@pytest.mark.slow
def test_the_page_answers_over_a_server(browser: Browser, server: str) -> None:
    demo = build_page(ServedAnswers(server, "right"), ["asr"])
    _, url, _ = launch(demo, prevent_thread_lock=True, quiet=True)
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.goto(url)
    expect(page.locator("#no-prompts")).to_be_visible()
    upload(page, SPEECH)
    ask(page, SAID)
    expect(page.locator("#prompts")).not_to_be_visible()
    broken = {"name": "mine.wav", "mimeType": "audio/wav", "buffer": b"no audio"}
    page.locator("#clip").get_by_label("Clear").click()
    page.locator("#clip input[type=file]").set_input_files(broken)
    page.locator("#ask").click()
    expect(page.get_by_text("The server refused the request (status 400): cannot decode")).to_be_visible()
    page.close()
    demo.close()


@pytest.mark.slow
def test_questions_to_a_server_do_not_wait_for_each_other(browser: Browser) -> None:
    event = 'data: {"choices": [{"delta": {"content": "hi"}}]}\n\n'
    with odd_server('{"data": [{"id": "m"}]}', event, parties=2) as address:
        demo = build_page(ServedAnswers(address))
        _, url, _ = launch(demo, prevent_thread_lock=True, quiet=True)
        visitors = [browser.new_page() for _ in range(2)]
        for visitor in visitors:
            visitor.set_default_timeout(60_000)
            visitor.goto(url)
            upload(visitor, SPEECH)
            visitor.locator("#ask").click()
        for visitor in visitors:
            expect(visitor.locator("#answer textarea")).to_have_value("hi")
            visitor.close()
        demo.close()
