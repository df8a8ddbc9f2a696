"""The table of systems and the paper's orderings, from figures that are known."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from listen.evaluation.response_table import (
    COLUMNS,
    SystemScores,
    check_orderings,
    load_scores,
    markdown_table,
    plot_table,
    write_table,
)

# Table I of the paper, R-L, BERTScore, quality, emotion, SER, linear probe
PAPER = {
    "Baseline 1": (0.314, 0.112, 0.213, 0.9464, 5.46, 4.13, 0.2045, 0.2508),
    "Cascade + Baseline 1": (0.325, 0.122, 0.224, 0.9464, 5.58, 4.58, 0.8081, None),
    "Baseline 2": (0.375, 0.145, 0.245, 0.9473, 7.57, 5.59, 0.1389, 0.3120),
    "Cascade + Baseline 2": (0.381, 0.151, 0.250, 0.9478, 7.63, 5.83, 0.8081, None),
    "v1": (0.437, 0.214, 0.309, 0.9476, 7.79, 7.56, 0.4126, 0.6815),
    "v2": (0.439, 0.218, 0.312, 0.9475, 7.79, 7.45, 0.5995, 0.7315),
    "v3": (0.446, 0.224, 0.318, 0.9479, 7.74, 7.54, 0.8151, 0.7840),
}


def systems() -> list[SystemScores]:
    found = []
    for name, figures in PAPER.items():
        named = zip((column.name for column in COLUMNS), figures, strict=True)
        found.append(SystemScores(name, {key: value for key, value in named if value is not None}))
    return found


def test_all_orderings_hold_on_the_papers_own_figures() -> None:
    found = check_orderings(systems())
    assert len(found) == 6 and all(ordering.holds for ordering in found)
    assert found[-1].values == (0.8151, 0.8081) and found[-1].clear is None


def test_orderings_follow_the_figures() -> None:
    rows = {system.name: system for system in systems()}
    rows["v3"].values["probe_accuracy"] = 0.70
    rows["v3"].values["ser_accuracy"] = 0.8081
    del rows["Baseline 2"].values["emotion"]
    rows["v2"].intervals["probe_accuracy"], rows["v1"].intervals["probe_accuracy"] = (0.70, 0.76), (0.65, 0.71)
    holds = [ordering.holds for ordering in check_orderings(list(rows.values()))]
    assert holds == [None, None, None, True, False, True]  # equal recognition will do
    overlap = check_orderings(list(rows.values()))[3]
    assert overlap.clear is False
    text = markdown_table(list(rows.values()))
    assert "73.15 against 68.15 | yes, but the intervals overlap |" in text and "not measured" in text
    rows["v1"].intervals["probe_accuracy"] = (0.60, 0.69)
    assert check_orderings(list(rows.values()))[3].clear is True
    assert [o.holds for o in check_orderings([])] == [None] * 6


def test_names_are_told_whatever_their_case_and_spaces() -> None:
    renamed = [SystemScores(s.name.upper().replace(" + ", "+"), s.values) for s in systems()]
    assert all(ordering.holds for ordering in check_orderings(renamed))


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
    assert [row["system"] for row in cells] == [*PAPER, "pool"] and cells[1]["probe_accuracy"] == ""
    assert float(cells[0]["bertscore"]) == 0.9464 and cells[-1]["rouge_1_low"] == "0.4"
    assert all(record["holds"] for record in json.loads((tmp_path / "orderings.json").read_text()))
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
