"""Checks of data before a run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from fixtures_corpora import BUILDERS
from fixtures_training import write_clip, write_manifest

from listen.commands import check_data
from listen.data.check import check_source
from listen.data.sources import DataSource


@pytest.fixture()
def manifest(tmp_path: Path) -> Path:
    for number in range(6):
        write_clip(tmp_path / f"{number}.wav", 0.25 * (number + 1))
    emotions = ("sad", "sad", "sad", "happy", "sad", "happy")
    rows = [{"audio": f"{i}.wav", "task": "er", "response": emotion} for i, emotion in enumerate(emotions)]
    rows += [{"audio": "5.wav", "task": "asr", "response": "words"}]
    return write_manifest(tmp_path / "m.jsonl", rows)


def test_a_report_counts_rows_hours_and_labels(manifest: Path) -> None:
    report = check_source(DataSource(str(manifest)))
    assert report.is_good and report.rows == 7 and report.tasks == {"er": 6, "asr": 1}
    assert report.seconds == pytest.approx({"er": 0.25 * 21, "asr": 1.5})
    assert report.labels == {"er": {"sad": 4, "happy": 2}}
    assert [(seconds, Path(name).name) for seconds, name in report.longest] == [
        (1.5, "5.wav"), (1.25, "4.wav"), (1.0, "3.wav"),
    ]  # fmt: skip


def test_all_that_is_broken_is_named_and_the_rest_is_counted(manifest: Path) -> None:
    folder, good = manifest.parent, {"task": "asr", "response": "x"}
    (folder / "text.wav").write_text("no audio at all")
    write_clip(folder / "empty.wav", 0.0)
    rows = [
        *({**good, "audio": name} for name in ("0.wav", "gone.wav", "text.wav", "empty.wav", "gone.wav")),
        {"audio": "0.wav", "task": "asrr", "response": "x"},
        {"audio": "0.wav", "task": "asr", "response": " "},
        {**good, "audio": "https://example.org/a.wav"},
    ]
    report = check_source(DataSource(str(write_manifest(folder / "bad.jsonl", rows))))
    assert not report.is_good and report.rows == 7 and report.unmeasured == 1
    lines = ("2: there is no audio file", "3: .*text.wav cannot be read", "4: .*empty.wav holds no samples")
    lines += ("6: unknown task", "7: 'response' is empty")
    assert len(report.problems) == len(lines)
    for line, problem in zip(lines, report.problems, strict=True):
        assert re.search(f"bad.jsonl:{line}", problem)


def test_truncated_files_are_found_by_decoding(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "cut.flac", 1.0)
    clip.write_bytes(clip.read_bytes()[:9000])
    source = DataSource(
        str(write_manifest(tmp_path / "m.jsonl", [{"audio": "cut.flac", "task": "asr", "response": "x"}]))
    )
    assert check_source(source).is_good
    assert "cut.flac" in check_source(source, decode=True).problems[0]


def test_an_incomplete_or_absent_corpus_is_a_problem(tmp_path: Path) -> None:
    BUILDERS["clotho"](tmp_path / "clotho")
    report = check_source(DataSource(str(tmp_path / "clotho"), format="clotho", split="dev"))
    assert report.problems == [f"{tmp_path}/clotho (dev): 1 rows, but the corpus has 1045"]
    absent = check_source(DataSource(str(tmp_path / "none"), format="clotho"))
    assert "there is no folder" in absent.problems[0] and absent.rows == 0


def test_a_file_of_no_bytes_is_named_as_empty(tmp_path: Path) -> None:
    (tmp_path / "a.wav").touch()
    source = DataSource(str(write_manifest(tmp_path / "m.jsonl", [{"audio": "a.wav", "task": "asr", "response": "x"}])))
    assert re.search("m.jsonl:1: .*empty audio: '?.*a.wav'? has 0 bytes", check_source(source).problems[0])


def test_a_source_without_rows_is_a_problem(tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    table.write_text("audio,task,response\n")
    assert check_source(DataSource(str(table))).problems == [f"{table}: no rows"]
    table.write_text("audio;task;response\na.wav;asr;x\n")
    (problem,) = check_source(DataSource(str(table))).problems
    assert problem.startswith(f"{table}:1: cells are separated by ';', expected ','")


def test_a_check_says_that_it_stopped(tmp_path: Path) -> None:
    row = '{"audio": "a.wav", "task": "asr", "response": "x"}\n'
    (tmp_path / "m.jsonl").write_text(f'{row}{{"audio"\n{row}')
    problems = check_source(DataSource(str(tmp_path / "m.jsonl"))).problems
    assert problems[-1].startswith(f"{tmp_path}/m.jsonl:2: not valid JSON")
    assert problems[-1].endswith("; what follows in this source was not read")


def run_script(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    monkeypatch.setattr(sys, "argv", ["check_data.py", *words])
    with pytest.raises(SystemExit) as stopped:
        check_data.main()
    return stopped.value.code


def test_the_script_checks_recipes_and_sources_and_fails_for_broken_ones(
    manifest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    bad = write_manifest(
        manifest.parent / "bad.jsonl", [{"audio": f"x{i}.wav", "task": "asr", "response": "x"} for i in range(3)]
    )
    recipe = manifest.parent / "recipe.yaml"
    recipe.write_text(f"data: {{train: [{manifest}], eval: [{{path: {bad}, tasks: [asr]}}]}}\n")
    assert run_script(monkeypatch, str(manifest)) == 0
    assert "sad 4, happy 2" in capsys.readouterr().out
    assert run_script(monkeypatch, str(recipe), "--max-problems", "2") == 1
    out = capsys.readouterr().out
    assert (
        "train: " in out and "eval: " in out and "... and 1 further problems" in out and "2 sources, 3 problems" in out
    )
    assert run_script(monkeypatch, f"{{path: {manifest}, format: xml}}").startswith("error: ")
    for data, message in (("[a.csv]", "data must be a mapping"), ("{evl: [a.csv]}", "evl; did you mean eval")):
        recipe.write_text(f"data: {data}\n")
        assert message in str(run_script(monkeypatch, str(recipe)))
    assert run_script(monkeypatch, "{path: a.csv").startswith("error: {path: a.csv: expected a path, or a source")
    capsys.readouterr()
    assert run_script(monkeypatch, "*.csv") == 1  # no YAML, but a path
    assert "broken: *.csv: " in capsys.readouterr().out
