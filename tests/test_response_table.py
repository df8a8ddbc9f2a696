"""The table of systems and the paper's orderings, from figures that are known."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from listen.evaluation.orderings import PAPER_COLUMNS, PAPER_TABLE, count_orderings
from listen.evaluation.response_table import (
    SystemScores,
    load_scores,
    markdown_table,
    orderings_of,
    plot_table,
    read_scores,
    write_table,
)


def systems() -> list[SystemScores]:
    found = []
    for name, figures in PAPER_TABLE.items():
        named = zip(PAPER_COLUMNS, figures, strict=True)
        found.append(SystemScores(name, {key: value for key, value in named if value is not None}))
    return found


def test_all_orderings_agree_on_the_papers_own_figures() -> None:
    found = orderings_of(systems())
    counts = count_orderings(found)
    assert (counts["orderings"], counts["agree"], counts["reversed"]) == (154, 154, 0)
    assert all(ordering.overlap is None for ordering in found)
    assert orderings_of([]) == []


def test_turned_figures_reverse_every_ordering() -> None:
    turned = [SystemScores(s.name, {name: -value for name, value in s.values.items()}) for s in systems()]
    counts = count_orderings(orderings_of(turned))
    assert (counts["agree"], counts["equal"], counts["reversed"]) == (0, 0, 154)


def test_orderings_follow_the_figures() -> None:
    rows = {system.name: system for system in systems()}
    del rows["Baseline 2"].values["emotion"]  # 6 orderings are not measured
    rows["v3"].values["ser_accuracy"] = 0.8081  # equal to both cascades
    rows["v2"].values["probe_accuracy"] = 0.65  # below v1
    rows["v2"].intervals["probe_accuracy"], rows["v1"].intervals["probe_accuracy"] = (0.62, 0.68), (0.67, 0.70)
    found = orderings_of(list(rows.values()))
    counts = count_orderings(found)
    assert (counts["orderings"], counts["agree"], counts["equal"], counts["reversed"]) == (148, 145, 2, 1)
    (probe,) = [ordering for ordering in found if ordering.values[0] < ordering.values[1]]
    assert (probe.column, probe.higher, probe.lower, probe.overlap) == ("probe_accuracy", "v2", "v1", True)
    rows["v2"].intervals["probe_accuracy"] = (0.62, 0.66)
    assert count_orderings(orderings_of(list(rows.values())))["reversed_without_overlap"] == 1
    text = markdown_table(list(rows.values()))
    assert "Of 148 strict pairwise orderings of the paper's table, 145 agree" in text
    assert "| v2 over v1 | 6 of 7 | linear probe % (65.00 against 68.15, no overlap) |" in text


def test_names_are_matched_whatever_their_case_and_spaces() -> None:
    renamed = [SystemScores(s.name.upper().replace(" + ", "+"), s.values) for s in systems()]
    assert count_orderings(orderings_of(renamed))["agree"] == 154


def test_a_table_is_read_back_from_its_csv(tmp_path: Path) -> None:
    rows = [*systems(), SystemScores("pool", {"rouge_1": 0.5}, {"rouge_1": (0.4, 0.6)})]
    assert read_scores(write_table(rows, tmp_path) / "table.csv") == rows
    (tmp_path / "table.csv").write_text("system,wer\nv1,0.1\n")
    with pytest.raises(ValueError, match="its columns must be"):
        read_scores(tmp_path / "table.csv")


def test_the_table_has_the_papers_layout(tmp_path: Path) -> None:
    rows = [*systems(), SystemScores("pool", {"rouge_1": 0.5}, {"rouge_1": (0.4, 0.6)})]
    write_table(rows, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "table.csv", "table.png", "orderings.json"}
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "| system | R-1 | R-2 | R-L | BERTScore | quality | emotion | SER % | linear probe % |"
    assert lines[2] == "| Baseline 1 | 0.314 | 0.112 | 0.213 | 94.64 | 5.46 | 4.13 | 20.45 | 25.08 |"
    assert lines[3].endswith("| 80.81 | - |") and lines[9] == "| pool | 0.500 | - | - | - | - | - | - | - |"
    assert "| pool | 0.400 .. 0.600 | - | - | - | - | - | - | - |" in lines
    with (tmp_path / "table.csv").open(encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    assert [row["system"] for row in cells] == [*PAPER_TABLE, "pool"] and cells[1]["probe_accuracy"] == ""
    assert float(cells[0]["bertscore"]) == 0.9464 and cells[-1]["rouge_1_low"] == "0.4"
    assert json.loads((tmp_path / "orderings.json").read_text())["counts"]["agree"] == 154
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_of_a_column_stands_out_in_the_picture() -> None:
    (axes,) = plot_table(systems()).axes
    (table,) = axes.tables
    bold = {cell for cell, patch in table.get_celld().items() if patch.get_text().get_fontweight() == "bold"}
    assert bold == {(7, 1), (7, 2), (7, 3), (7, 4), (5, 5), (6, 5), (5, 6), (7, 7), (7, 8)}


def test_scores_are_read_from_a_run(tmp_path: Path) -> None:
    content = {"system": "v1", "rouge_1": 0.4, "quality": None, "details": {"confidence_95": {"rouge_1": [0.3, 0.5]}}}
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    assert load_scores(tmp_path) == SystemScores("v1", {"rouge_1": 0.4}, {"rouge_1": (0.3, 0.5)})
    (tmp_path / "metrics.json").write_text(json.dumps({"asr": {"wer": 0.1}}))
    with pytest.raises(ValueError, match="names no system"):
        load_scores(tmp_path)


def test_systems_need_different_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="different names"):
        write_table([SystemScores("v1"), SystemScores("V1")], tmp_path)
    with pytest.raises(ValueError, match="one or more"):
        write_table([], tmp_path)


NAMES = [
    '=HYPERLINK("http://x")',
    "@SUM(1)",
    "+1",
    "-1",
    "'quoted",
    "a | b",
    "$\\frac{1}$",
    "cost $5 and $6_{",
    "<b>x</b>",
    "[a](b)",
]


def test_names_are_shown_and_never_run(tmp_path: Path) -> None:
    """In a spreadsheet, on a page, and in a picture."""
    write_table([SystemScores(name, {"rouge_1": 0.5}) for name in [*NAMES, "a\nb\u202e\ud800"]], tmp_path)
    assert [system.name for system in read_scores(tmp_path / "table.csv")] == [*NAMES, r"a b\u202e\ud800"]
    assert not re.search(r"(?m)^\W?[=@+-]", (tmp_path / "table.csv").read_text().replace("'", "a"))
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines[: len(NAMES) + 3]}) == 1
    assert "<b>" not in "".join(lines) and "&lt;b&gt;x&lt;/b&gt;" in "".join(lines)
    assert r"\[a\](b)" in "".join(lines) and r"\$\\frac{1}\$" in "".join(lines)
    assert (tmp_path / "table.png").is_file()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"system": "x"}',
        '{"system": 3, "details": {"confidence_95": {}}}',
        '{"system": "x", "rouge_1": "high", "details": {"confidence_95": {}}}',
        '{"system": "x", "rouge_1": 1e400, "details": {"confidence_95": {}}}',
        '{"system": "x", "details": {"confidence_95": {"rouge_1": [0]}}}',
    ],
)
def test_broken_scores_name_their_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.json .*name"):
        load_scores(tmp_path)
