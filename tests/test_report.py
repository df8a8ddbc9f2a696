"""The HTML report: safe, complete, and usable in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import pytest
from fixtures_training import write_clip, write_manifest

from listen.analysis import query_clusters
from listen.analysis.pool import PoolAnalysis
from listen.analysis.usage import PromptUsage
from listen.data.manifest import load_manifest
from listen.data.tasks import get_task
from listen.evaluation import EvaluationResult
from listen.evaluation.clips import MAX_CLIP_SECONDS, embed_clips
from listen.evaluation.confusions import count_confusions

CHROMIUM = which("chromium") or which("chromium-browser") or which("google-chrome")
ATTACKS = (
    "<script>document.title='taken'</script>",
    "</script><img src=x onerror=alert(1)>",
    "\" onmouseover='alert(1)' x=\"",
    "{{ settings }} ${1} \u202egnp",
)


class Elements(HTMLParser):
    """All start tags of a page with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def record(task: str, index: int, reference: str, answer: str, score: float, **more: Any) -> dict[str, Any]:
    metric = get_task(task).metrics[0]
    fields = {"index": index, "id": f"{task}-{index}", "task": task, "instruction": "Which one?", **more}
    return {**fields, "references": [reference], "prediction": answer, "scores": {metric: score}}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> EvaluationResult:
    """Two tasks: emotions with every kind of answer, and questions whose texts attack the page."""
    folder = tmp_path_factory.mktemp("clips")
    names = [f"clip '{n}' & <b>.wav" for n in range(8)]
    for place, name in enumerate(names):
        write_clip(folder / name, 0.5, seed=place)
    emotions = [("happy", "happy", 1.0), ("happy", "It is sad.", 0.0), ("sad", "sad", 1.0), ("sad", "hm", 0.0)]
    predictions = [record("er", i, *emotion) for i, emotion in enumerate(emotions)]
    predictions += [record("sqa", 4 + i, a, a, 0.25 * i, question=a, id=a) for i, a in enumerate(ATTACKS)]
    rows = [
        {"audio": name, "response": p["references"], "task": p["task"], "id": p["id"], "question": p.get("question")}
        for name, p in zip(names, predictions, strict=True)
    ]
    metrics = {"er": {"accuracy": 0.5, "n": 4}, "sqa": {"exact_match": 0.4, "n": 4}}
    intervals = {"er": {"accuracy": (0.1, 0.9)}, "sqa": {}}
    settings = {"model": "models/<i>tiny", "data": ATTACKS[0], "date": "2026-01-02", "code": "1a2b3c4"}
    dataset = load_manifest(write_manifest(folder / "test.jsonl", rows))
    return EvaluationResult(metrics, intervals, predictions, settings, rows=dataset)


@pytest.fixture(scope="module")
def page(result: EvaluationResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return result.save(tmp_path_factory.mktemp("report")) / "report.html"


def test_text_from_data_never_becomes_markup(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    elements = Elements(text).found
    tags = [tag for tag, _ in elements]
    assert tags.count("script") == 1 and "img" not in tags and "b" not in tags and "i" not in tags
    names = {name for _, attributes in elements for name in attributes}
    assert not {name for name in names if name.startswith("on")}
    assert text.count("</script>") == 1
    assert "&lt;script&gt;document.title" in text and "\\u202egnp" in text and "{{ settings }}" in text


def test_the_page_loads_nothing_from_elsewhere(page: Path) -> None:
    elements = Elements(page.read_text(encoding="utf-8")).found
    links = [attributes[name] for _, attributes in elements for name in ("src", "href") if name in attributes]
    assert links and all(link.startswith("data:") for link in links)
    (policy,) = [a["content"] for tag, a in elements if tag == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'") and "unsafe-inline'; script-src 'sha256-" in policy


def test_the_title_names_model_data_date_and_code(page: Path) -> None:
    title = re.search("<h1>(.*?)</h1>", page.read_text(encoding="utf-8"))[1]
    assert title.startswith("Evaluation of models/&lt;i&gt;tiny on &lt;script&gt;")
    assert title.endswith("2026-01-02, code 1a2b3c4")
    named = EvaluationResult().name_data(["corpus/clips/test.jsonl", Path("more.csv")])
    assert named.settings["data"] == "clips/test.jsonl, more.csv"


def test_the_legend_is_true_of_error_rates(page: Path) -> None:
    for name in ("report.html", "report.md"):
        text = page.with_name(name).read_text(encoding="utf-8")
        assert "all others from 0 to 1; WER and CER exceed 1 where" in text


def test_the_worst_examples_come_first_with_players(page: Path, result: EvaluationResult) -> None:
    text = page.read_text(encoding="utf-8")
    ids = re.findall(r'<span class="id">(er-\d)</span>', text)
    assert ids == ["er-1", "er-3", "er-0", "er-2"]
    assert [tag for tag, _ in Elements(text).found].count("audio") == len(result.predictions)


def test_question_and_answer_are_apart_and_scores_have_names(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("<th>question") == 1 and text.count('data-name="question"') == len(ATTACKS)
    assert "exact match ↑" in text and "accuracy ↑" in text


def test_confusions_by_hand(result: EvaluationResult) -> None:
    found = count_confusions(get_task("er"), result.predictions[:4])
    assert found.labels == ["happy", "sad"] and found.counts.tolist() == [[1, 1, 0], [0, 1, 1]]
    assert found.frequent(5) == [("happy", "sad", 1), ("sad", None, 1)]
    assert count_confusions(get_task("sqa"), result.predictions[4:]) is None


def test_players_are_short_and_capped(tmp_path: Path) -> None:
    write_clip(tmp_path / "long.wav", MAX_CLIP_SECONDS + 5)
    rows = [{"audio": "long.wav", "task": "asr", "response": "a", "id": str(i)} for i in range(3)]
    dataset = load_manifest(write_manifest(tmp_path / "test.jsonl", rows))
    (uri,) = embed_clips(dataset, [2])[2]
    assert uri.startswith("data:audio/mpeg;base64,") and len(uri) < MAX_CLIP_SECONDS * 8000
    assert list(embed_clips(dataset, [2, 0, 1], share=0.05)) == [2, 0]


def test_a_row_that_cannot_be_read_has_no_player(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    rows = [{"audio": "broken.wav", "task": "asr", "response": "a", "id": "bad"}]
    dataset = load_manifest(write_manifest(tmp_path / "test.jsonl", rows))
    assert embed_clips(dataset, [0]) == {0: []}
    assert "row bad has no player" in caplog.text


def test_plots_of_prompts_share_one_order_and_a_single_task_has_no_comparison() -> None:
    usage = PromptUsage(["asr", "er"], np.array([[0, 1, 0.5, 0], [1, 0, 0.5, 0]]))
    queries = np.random.default_rng(0).normal(size=(6, 4))
    tasks = ["asr", "er"] * 3
    figures = PoolAnalysis(usage, tasks, queries, np.eye(4), query_clusters(queries, tasks)).figures()
    axes = [figures[name].axes[0] for name in ("prompt_usage", "query_keys")]
    orders = [[label.get_text() for label in one.get_xticklabels()] for one in axes]
    assert orders[0] == orders[1] == [str(prompt) for prompt in usage.by_owner()]
    one = PromptUsage(["asr"], np.array([[0, 1, 0.5, 0]]))
    alone = PoolAnalysis(one, ["asr"] * 6, queries, np.eye(4), query_clusters(queries, ["asr"] * 6)).figures()
    assert set(alone) == {"prompt_usage", "query_keys"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("chromium is absent")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1300])
def test_the_page_works_in_a_browser(browser: Any, page: Path, width: int, scheme: str) -> None:
    tab, problems = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("dialog", lambda dialog: problems.append(dialog.message))
    tab.goto(page.as_uri())
    tab.wait_for_function("[...document.querySelectorAll('audio')].every(clip => clip.duration > 0.4)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.fill("#search", "HAPPY sad")
    shown = [row.inner_text() for row in tab.query_selector_all("tr.example") if row.is_visible()]
    assert len(shown) == 1 and "It is sad." in shown[0]
    assert tab.inner_text("#found") == "1 of 8 examples"
    assert [task.is_visible() for task in tab.query_selector_all("section.task")] == [True, False]
    tab.fill("#search", "")
    assert all(row.is_visible() for row in tab.query_selector_all("tr.example"))
    assert tab.title().startswith("Evaluation of") and problems == []
    tab.close()
