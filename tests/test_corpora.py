"""Published corpora in their own layouts, on small folders of the true shape."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

import pytest
from fixtures_corpora import BUILDERS
from fixtures_repository import RECIPES, ROOT, name_of
from fixtures_training import write_clip

from listen.data.corpora import CORPORA
from listen.data.corpora.speech import DIGITS
from listen.data.manifest import FEATURES, ManifestError, extra_fields
from listen.data.sources import DataSource, load_rows, read_records
from listen.data.tasks import get_task
from listen.data.utterances import read_utterances, text_input
from listen.training.arguments import DataArguments, parse_sources
from listen.training.datasets import build_train_dataset
from listen.training.parsing import read_config

SMALL = {"voxceleb1": {"num_pairs": 4, "dev_speakers": 2}}


def read(tmp_path: Path, form: str, **fields: object) -> list[dict]:
    root = tmp_path / form
    if not root.exists():
        BUILDERS[form](root)
    return list(load_rows(DataSource(str(root), format=form, **fields)))


def first_split(form: str) -> str:
    return {"voxceleb1": "test"}.get(form, "train")


@pytest.mark.parametrize("form", BUILDERS)
def test_every_task_of_a_corpus_gives_rows_of_the_schema(tmp_path: Path, form: str) -> None:
    for task in CORPORA[form].answers:
        options = {"skip_missing": True} if form == "audiocaps" else {}
        rows = read(tmp_path, form, task=task, split=first_split(form), options=options)
        assert rows and all(row.keys() == FEATURES.keys() and row["task"] == task for row in rows)
        assert len({row["id"] for row in rows}) == len(rows)
        assert all(response.strip() for row in rows for response in row["response"])
        labels = get_task(task).labels
        assert not labels or {response for row in rows for response in row["response"]} <= set(labels)


@pytest.mark.parametrize("form", BUILDERS)
def test_rows_are_read_one_by_one_and_missing_files_are_named(tmp_path: Path, form: str) -> None:
    BUILDERS[form](tmp_path / form)
    source = DataSource(str(tmp_path / form), format=form, split=first_split(form))
    records = read_records(source)
    assert next(records)[1].keys() >= {"id", "audio", "task", "response"}
    for file in [*tmp_path.rglob("*.*")]:
        if file.suffix in (".wav", ".WAV", ".flac", ".mp3") and form not in ("ravdess", "fsdd", "fsdd_questions"):
            file.unlink()
    if form not in ("ravdess", "fsdd", "fsdd_questions"):  # there, the files are the list
        with pytest.raises(ManifestError, match="there is no audio file"):
            load_rows(source)


def test_every_corpus_says_what_it_is() -> None:
    assert list(CORPORA) == list(BUILDERS)
    for name, corpus in CORPORA.items():
        assert name == corpus.name and corpus.licence and corpus.text and corpus.homepage.startswith("https://")
        assert all(count > 0 for count in corpus.splits.values())
        assert all(set(parts) <= set(corpus.splits) for parts in corpus.aliases.values())
        assert all(get_task(task) for task in corpus.answers)
        assert corpus.expected_rows("train") > 0 and corpus.read.__doc__


def test_an_incomplete_corpus_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read(tmp_path, "librispeech", split="dev-clean")
    assert "LibriSpeech, dev-clean: 2 rows of 2703" in caplog.text


def test_the_page_lists_each_corpus_with_its_tasks_rows_and_licence() -> None:
    lines = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").splitlines()
    for name, corpus in CORPORA.items():
        (line,) = (line for line in lines if line.startswith(f"| [{corpus.title}]({corpus.homepage}) | `{name}` |"))
        cells = line.strip("| ").split(" | ")
        assert cells[2] == ", ".join(f"`{task}`" for task in corpus.answers) and cells[4] == corpus.licence
        stated = dict(re.findall(r"`?([\w-]+)`? (\d+)", cells[3].split("(")[0].split(";")[0]))
        assert stated and all(corpus.expected_rows(split) == int(rows) for split, rows in stated.items())


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_the_data_of_recipes_can_be_made(recipe: Path, tmp_path: Path) -> None:
    content = read_config(recipe)
    section = (content.get("base") or content).get("data") or {}  # a comparison's may be those of the recipe it extends
    tested = (content.get("evaluation") or {}).get("data", [])
    sources = parse_sources("data", [*section.get("train", []), *section.get("eval", []), *tested])
    assert sources
    for source in sources:
        if source.format not in CORPORA:  # made by the demo or by examples/generate_targets.py
            assert source.path.startswith(("runs/", "targets/"))
            continue
        assert source.path.startswith("datasets/")
        source.path = str(tmp_path / source.path)
        if not Path(source.path).is_dir():
            BUILDERS[source.format](Path(source.path))
        assert len(load_rows(dataclasses.replace(source, options=SMALL.get(source.format, {}))))


def test_unknown_tasks_and_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Clotho v2.1 has no answers for task 'asr'; it has acap"):
        read(tmp_path, "clotho", task="asr")
    with pytest.raises(ValueError, match="LibriSQA, part I has no option 'part'; it has librispeech"):
        read(tmp_path, "librisqa", options={"part": 2})


def test_files_beside_the_recordings_are_not_read(tmp_path: Path) -> None:
    """Notes named like recordings, and what other systems leave behind."""
    for form, split, folder in (
        ("fsdd", "train", "recordings"),
        ("ravdess", "actor01", "Actor_01"),
        ("voxceleb1", "train", "vox1_dev_wav/wav/id10001/v1"),
    ):
        options = SMALL.get(form, {})
        rows = read(tmp_path, form, split=split, options=options)
        place = tmp_path / form / folder
        for file in [*place.iterdir()]:
            for name in (f"{file.stem}.txt", f"._{file.name}"):
                (place / name).write_text("a note")
        assert read(tmp_path, form, split=split, options=options) == rows


@pytest.mark.parametrize(
    ("form", "file", "text", "message"),
    [
        ("speechocean762", "resource/scores.json", "{", "scores.json: not valid JSON"),
        ("speechocean762", "resource/scores.json", "[]", "scores.json: expected an object with an object of scores"),
        ("speechocean762", "train/text", "000010011 A\n000010011 B\n", "text:2: utterance '000010011' has another"),
        ("librisqa", "LibriSQA-PartI/LibriSQA-PartI-train.json", '[{"answer": 3}]', "row 0: expected texts for"),
        ("expresso", "splits/train.txt", "ex01\n", "train.txt:1: 'ex01' has no line"),
    ],
)
def test_a_broken_file_of_a_corpus_is_named(tmp_path: Path, form: str, file: str, text: str, message: str) -> None:
    BUILDERS[form](tmp_path / form)
    (tmp_path / form / file).write_text(text)
    with pytest.raises(ManifestError, match=message):
        read(tmp_path, form, split="train")


def test_numbers_of_ravdess_start_at_one(tmp_path: Path) -> None:
    write_clip(tmp_path / "ravdess" / "Actor_01" / "03-01-00-01-02-01-01.wav", 0.05)
    with pytest.raises(ManifestError, match="expected a name such as 03-01-06-01-02-01-12.wav"):
        read(tmp_path, "ravdess", split="actor01")


def test_questions_about_digits_have_the_answers_that_are_said(tmp_path: Path) -> None:
    for digit, name in ((3, "theo_5"), (8, "theo_6"), (1, "lucas_7"), (9, "lucas_3")):
        write_clip(tmp_path / "fsdd_questions" / "recordings" / f"{digit}_{name}.wav", 0.1)
    rows = read(tmp_path, "fsdd_questions")
    assert len(rows) == 1350 == CORPORA["fsdd_questions"].expected_rows("train")
    for row in rows:
        digits = [int(Path(clip["path"]).name[0]) for clip in row["audio"]]
        assert 3 <= len(digits) <= 5 and set(digits) in ({3}, {8}, {3, 8}, {1}) and row["join"] == "concatenate"
        words = [DIGITS[digit] for digit in digits]
        question, last = row["question"], row["question"].split()[-1].rstrip("?")
        expected = {
            "How many": str(len(words)),
            "Which digit is": DIGITS[max(digits)],
            "What do": str(digits[0] + digits[-1]),
            "Does the": "yes" if last in words else "no",
            "Which digit comes": words[int(last) - 1] if last.isdigit() else "",
        }
        assert row["response"] == [next(answer for start, answer in expected.items() if question.startswith(start))]
    assert read(tmp_path, "fsdd_questions") == rows != read(tmp_path, "fsdd_questions", options={"seed": 1})


def test_librispeech(tmp_path: Path) -> None:
    rows = read(tmp_path, "librispeech", split="train-clean-100+dev-clean")
    assert [row["id"] for row in rows] == ["19-198-0000", "19-198-0001", "84-198-0000", "84-198-0001"]
    assert rows[1]["response"] == ["don't go"] and extra_fields(rows[1])["speaker"] == "19"
    assert {row["task"] for row in read(tmp_path, "librispeech", split="dev-clean", task="transcribe")} == {"asr"}
    (tmp_path / "librispeech" / "dev-clean" / "84" / "198" / "84-198.trans.txt").write_text("84-198-0000\n")
    with pytest.raises(ManifestError, match=r"84-198.trans.txt:1: expected an utterance and its words"):
        read(tmp_path, "librispeech", split="dev-clean")


def test_covost2(tmp_path: Path) -> None:
    first, second = read(tmp_path, "covost2", split="dev")
    assert first["response"] == ["\u597d\uff0c\u5979\u8bf4\u3002"] and second["response"] == ["\u4e8c\u3002"]
    assert extra_fields(first) == {"speaker": "ab12", "transcript": '"Well, she said.'}
    (tmp_path / "covost2" / "clips").rename(tmp_path / "voices")
    assert len(read(tmp_path, "covost2", options={"clips": "../voices"})) == 2


def test_iemocap_leaves_one_session_out(tmp_path: Path) -> None:
    rows = read(tmp_path, "iemocap", split="session1")
    assert [row["response"][0] for row in rows] == ["neutral", "happy", "happy"]  # excited is happy, xxx is left out
    assert [extra_fields(row)["speaker"] for row in rows] == ["Ses01F", "Ses01M", "Ses01F"]
    assert text_input(rows[0], tagged=True) == "<neutral> Line 0."
    spoken = read_utterances(tmp_path / "iemocap", format="iemocap", split="session1")
    assert [(one.transcript, one.emotion) for one in spoken] == [
        ("Line 0.", "neutral"), ("Line 1.", "happy"), ("Line 3.", "happy"),
    ]  # fmt: skip
    for held_out in range(1, 6):
        parts = [
            {row["id"][:5] for row in read(tmp_path, "iemocap", split=f"{p}-{held_out}")} for p in ("train", "test")
        ]
        assert parts[1] == {f"Ses0{held_out}"} and len(parts[0]) == 4 and not parts[0] & parts[1]
    assert CORPORA["iemocap"].expected_rows("train+test") == 5531


def test_voxceleb_draws_pairs_by_a_seed_without_the_speakers_of_the_trials(tmp_path: Path) -> None:
    options = {"num_pairs": 40, "dev_speakers": 2}
    trials = read(tmp_path, "voxceleb1", split="test")
    assert [row["response"][0] for row in trials] == ["yes", "no"] and all(len(row["audio"]) == 2 for row in trials)
    speakers: dict[str, set[str]] = {"test": {Path(c["path"]).parts[-3] for row in trials for c in row["audio"]}}
    for split in ("train", "dev"):
        rows = read(tmp_path, "voxceleb1", split=split, options=options)
        assert rows == read(tmp_path, "voxceleb1", split=split, options=options)
        assert rows != read(tmp_path, "voxceleb1", split=split, options={**options, "seed": 1})
        assert len(rows) == 40 and [row["response"][0] for row in rows].count("yes") == 20
        for row in rows:
            one, two = (Path(clip["path"]) for clip in row["audio"])
            assert (one.parts[-3] == two.parts[-3]) == (row["response"] == ["yes"])
            assert row["response"] == ["no"] or one.parent != two.parent  # two videos
        speakers[split] = {Path(clip["path"]).parts[-3] for row in rows for clip in row["audio"]}
    assert len(set.union(*speakers.values())) == sum(map(len, speakers.values())) == 8


def test_librisqa_finds_its_recordings_in_librispeech(tmp_path: Path) -> None:
    BUILDERS["librisqa"](tmp_path / "librisqa")
    (row,) = read(tmp_path, "librisqa")
    assert (row["question"], row["response"]) == ("What is kind?", ["A word."])
    assert extra_fields(row) == {"transcript": "a kind word"}


def test_captions_of_a_clip_are_responses_of_one_row(tmp_path: Path) -> None:
    (row,) = read(tmp_path, "clotho", split="evaluation")
    assert len(row["response"]) == 5 and row["response"][0] == "A door, opening"
    (row,) = read(tmp_path, "audiocaps", split="dev")
    assert row["response"] == ["A dog barks", "Barks, then silence"]
    with pytest.raises(ManifestError, match="train.csv:3: there is no audio file .*gone.wav"):
        read(tmp_path, "audiocaps")
    options = {"file_name": "clips/{split}/{youtube_id}_{start_time}.wav"}
    with pytest.raises(ManifestError, match="clips/val/abc_30.wav"):
        read(tmp_path, "audiocaps", split="val", options=options)
    with pytest.raises(ManifestError, match=r"file_name='\{nobody\}.wav' may hold \{split\} and audiocap_id"):
        read(tmp_path, "audiocaps", options={"file_name": "{nobody}.wav"})


def test_corpora_of_emotions_and_sounds(tmp_path: Path) -> None:
    expresso = read(tmp_path, "expresso", task="er")
    assert [row["response"][0] for row in expresso] == ["neutral", "neutral", "happy"]
    ravdess = read(tmp_path, "ravdess", split="actor03")
    assert [row["response"][0] for row in ravdess] == ["neutral", "fearful"]
    assert [extra_fields(row)["transcript"].split()[0] for row in ravdess] == ["Dogs", "Kids"]
    sizes = {split: len(read(tmp_path, "ravdess", split=split)) for split in ("train", "dev", "test")}
    assert sizes == {"train": 36, "dev": 4, "test": 8}
    sounds = read(tmp_path, "esc50", split="fold2+fold3")
    assert [row["response"][0] for row in sounds] == ["dog", "crackling fire"] * 2
    assert [extra_fields(row)["label"] for row in sounds[:2]] == ["dog", "crackling_fire"]


def test_corpora_of_read_words(tmp_path: Path) -> None:
    assert [row["response"][0] for row in read(tmp_path, "fsdd")] == ["zero", "seven"]
    assert [row["id"] for row in read(tmp_path, "fsdd", split="test")] == ["7_jackson_4"]
    (row,) = read(tmp_path, "speechocean762")
    assert row["response"] == ["a kind word"]
    assert extra_fields(row) == {"speaker": "0001", "accuracy": 8, "fluency": 9, "transcript": "a kind word"}
    (tmp_path / "speechocean762" / "test" / "utt2spk").write_text("")
    with pytest.raises(ManifestError, match=r"wav.scp:1: utterance '000030012' needs a file"):
        read(tmp_path, "speechocean762", split="test")


def test_a_corpus_streams_and_trains_like_a_manifest(tmp_path: Path) -> None:
    rows = read(tmp_path, "esc50")
    source = {"path": str(tmp_path / "esc50"), "format": "esc50"}
    assert list(load_rows(DataSource(**source, streaming=True))) == rows
    mixed = build_train_dataset(DataArguments(train=[source, {**source, "split": "test", "max_rows": 1}]), 0)
    assert len(mixed) == len(rows) + 1
