"""Every format of rows gives the same rows, and names what is wrong with its place."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, List, Value, load_dataset
from fixtures_training import write_clip, write_manifest

from listen.data import tasks
from listen.data.manifest import FEATURES, ManifestError, from_datasets, open_dataset
from listen.data.sources import FORMATS, DataSource, checked_rows, load_rows
from listen.data.text_files import read_table
from listen.training.arguments import ArgumentError, DataArguments
from listen.training.datasets import build_eval_dataset, load

ROWS = [
    {"id": "a", "audio": "clips/0.wav", "task": "asr", "response": 'hello, "you"', "speaker": "0093"},
    {"id": "b", "audio": "clips/1.wav", "task": "er", "response": "sad", "speaker": "0007"},
]


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    for number in range(2):
        write_clip(tmp_path / "clips" / f"{number}.wav", 0.1, seed=number)
    return tmp_path


def write_table(path: Path, rows: list[dict], delimiter: str = ",") -> Path:
    cells = [list(rows[0]), *([str(row[name]) for name in rows[0]] for row in rows)]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in line] for line in cells]
    path.write_text("".join(delimiter.join(line) + "\n" for line in quoted), encoding="utf-8")
    return path


def source_of(form: str, folder: Path, rows: list[dict]) -> dict:
    """The same rows in one format."""
    if form == "manifest":
        return {"path": str(write_manifest(folder / "m.jsonl", rows))}
    if form in ("csv", "tsv"):
        return {"path": str(write_table(folder / f"m.{form}", rows, {"csv": ",", "tsv": "\t"}[form]))}
    if form == "parquet":
        Dataset.from_list(rows).to_parquet(folder / "m.parquet")
        return {"path": str(folder / "m.parquet")}
    if form == "audiofolder":
        named = [{**{k: v for k, v in row.items() if k != "audio"}, "file_name": row["audio"]} for row in rows]
        write_table(folder / "metadata.csv", named)
        return {"path": str(folder)}
    if form == "salmonn":
        names = {"audio": "path", "response": "text"}
        annotation = [{names.get(name, name): value for name, value in row.items()} for row in rows]
        (folder / "m.json").write_text(json.dumps({"annotation": annotation}))
        return {"path": str(folder / "m.json")}
    if form == "disk":
        DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(folder / "saved")
        return {"path": str(folder / "saved")}
    whole = [{**row, "audio": str(folder / row["audio"])} for row in rows]
    if form == "object":
        return {"path": Dataset.from_list(whole)}
    return {"path": "json", "format": "datasets", "data_files": str(write_manifest(folder / "rows.jsonl", rows))}


KINDS = ("manifest", "csv", "tsv", "parquet", "audiofolder", "salmonn", "object", "builder")


@pytest.mark.parametrize("form", KINDS)
def test_a_format_does_not_change_the_rows(folder: Path, form: str) -> None:
    expected = [{"path": str(folder / row["audio"]), "bytes": None} for row in ROWS]
    source = source_of(form, folder, ROWS)
    dataset = load_rows(DataSource(**source))
    assert dataset.features == FEATURES
    assert [row["audio"] for row in dataset] == [[clip] for clip in expected]
    assert dataset["task"][:] == ["asr", "er"] and dataset["response"][:] == [['hello, "you"'], ["sad"]]
    assert dataset["id"][:] == ["a", "b"]
    assert [json.loads(extra) for extra in dataset["extra"]] == [{"speaker": "0093"}, {"speaker": "0007"}]
    stream = load_rows(DataSource(**source, streaming=True))
    assert isinstance(stream, IterableDataset)
    assert list(stream) == list(dataset)


@pytest.mark.parametrize("form", KINDS)
def test_missing_files_are_named_before_the_run(folder: Path, form: str) -> None:
    rows = [*ROWS, *({**ROWS[0], "audio": f"clips/{number}.wav", "id": str(number)} for number in range(5, 12))]
    source = source_of(form, folder, rows)
    with pytest.raises(
        ManifestError, match=r"no audio file .*5.wav; 7 of 9 files are missing: also .*6.wav.*8.wav, ...$"
    ):
        load_rows(DataSource(**source))
    assert len(load_rows(DataSource(**source), check_files=False)) == 9


@pytest.mark.parametrize(
    ("form", "where"),
    [
        ("manifest", r"m.jsonl:2"),
        ("csv", r"m.csv:3"),
        ("tsv", r"m.tsv:3"),
        ("audiofolder", r"metadata.csv:3"),
        ("salmonn", r"m.json: annotation 1"),
        ("parquet", r"m.parquet: row 1"),
        ("object", r"dataset: row 1"),
        ("builder", r"json:train: row 1"),
    ],
)
def test_a_broken_row_is_named_with_its_place(folder: Path, form: str, where: str) -> None:
    source = DataSource(**source_of(form, folder, [ROWS[0], {**ROWS[1], "task": "singing"}, ROWS[0]]))
    with pytest.raises(ManifestError, match=f"{where}: unknown task 'singing'"):
        load_rows(source)
    first, broken, last = (row for _, row in checked_rows(source))
    assert isinstance(broken, ManifestError) and first["task"] == last["task"] == "asr"


def test_a_row_of_another_length_and_an_empty_table_are_named(folder: Path) -> None:
    (folder / "m.csv").write_text("audio,task,response\nclips/0.wav,asr,well, then\n")
    with pytest.raises(ManifestError, match=r"m.csv:2: expected 3 cells \(audio, task, response\), found 4; quote"):
        load_rows(DataSource(str(folder / "m.csv")))
    (folder / "m.csv").write_text("")
    with pytest.raises(ManifestError, match="m.csv: the file is empty"):
        load_rows(DataSource(str(folder / "m.csv")))
    (folder / "m.csv").write_text("audio,audio,task,response\nclips/0.wav,clips/0.wav,asr,well\n")
    with pytest.raises(ManifestError, match="m.csv:1: columns with the same name: audio; rename"):
        load_rows(DataSource(str(folder / "m.csv")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",,\na,b,c\n", "m.csv:1: its header names no column"),
        ("audio,,\na.wav,,\nb.wav,x,y\n", "m.csv:3: column 2 has no name but holds 'x'; name it in the header"),
        ("\n  \n", "m.csv: the file is empty"),
        ('audio,response\na.wav,"open\nb.wav,two\n', "m.csv:2: the row that starts here cannot be read .*close each"),
        ('audio,response\na.wav,"open\nb.wav,"two"\n', "m.csv:2: the row that starts here cannot be read"),
        ('audio,response\na.wav,"Hi" he said\n', "m.csv:2: .* write a quote inside it twice"),
        (f"audio,response\n{'a' * 200_000},x\n", r"m.csv:2: .*field limit.*; if no quote is missing, keep so long a"),
        ("audio,response\na.wav\n", "m.csv:2: expected 2 cells .audio, response., found 1; add the others"),
        ("audio|text\na.wav|x, y\n", r"m.csv:1: cells are separated by '\|', expected ','"),
    ],
)
def test_no_cell_of_a_table_is_lost_in_silence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ManifestError, match=message):
        list(read_table(tmp_path / "m.csv"))


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("\n \naudio,response\n\na.wav,x\n,\n", [{"audio": "a.wav", "response": "x"}]),
        ("path;or|url\na.wav\n", [{"path;or|url": "a.wav"}]),
        (",audio,response\n0,a.wav,x\n", [{"": "0", "audio": "a.wav", "response": "x"}]),  # as pandas writes it
        ("audio,response,,\na.wav,x,,\n", [{"audio": "a.wav", "response": "x", "": ""}]),  # as Excel writes it
        ('audio,response\na.wav,"two\nlines, ""quoted"""\n', [{"audio": "a.wav", "response": 'two\nlines, "quoted"'}]),
    ],
)
def test_tables_of_usual_programs_are_read(tmp_path: Path, text: str, rows: list[dict]) -> None:
    (tmp_path / "m.csv").write_text(text)
    assert [row for _, row in read_table(tmp_path / "m.csv")] == rows


def test_advice_for_a_table_with_plain_quotes_does_not_tell_to_quote(tmp_path: Path) -> None:
    (tmp_path / "m.tsv").write_text('path\ttext\na.mp3\t"one\nb.mp3\ttwo\tmore\n')
    rows = read_table(tmp_path / "m.tsv", "\t", escaped=True)
    assert next(rows)[1]["text"] == '"one'
    with pytest.raises(ManifestError, match="m.tsv:3: expected 2 cells .*, found 3; write a backslash before each"):
        next(rows)


def test_recordings_without_answers_are_named(folder: Path) -> None:
    with pytest.raises(ManifestError, match=r"clips: no metadata.csv, .*; write the answers into a metadata.csv"):
        load_rows(DataSource(str(folder / "clips"), task="asr"))


def test_columns_get_our_names_and_several_make_a_list(folder: Path) -> None:
    table = write_table(
        folder / "pairs.csv",
        [{"left": "clips/0.wav", "right": "clips/1.wav", "one": "yes", "two": "", "note": "x"}],
    )
    columns = {"audio": ["left", "right"], "response": ["one", "two"]}
    (row,) = load_rows(DataSource(str(table), task="sv", columns=columns))
    assert len(row["audio"]) == 2 and row["response"] == ["yes"] and json.loads(row["extra"]) == {"note": "x"}
    with pytest.raises(ManifestError, match=r"pairs.csv:2: no column 'answer' for 'response'.*columns={'response'"):
        load_rows(DataSource(str(table), task="sv", columns={**columns, "response": "answer"}))
    with pytest.raises(ManifestError, match=r"pairs.csv:2: no column 'task' for 'task'.*give task="):
        load_rows(DataSource(str(table), columns=columns))


def test_a_pair_without_its_second_clip_is_refused(folder: Path) -> None:
    pairs = [{"left": "clips/0.wav", "right": right, "response": "yes"} for right in ("clips/1.wav", "")]
    columns = {"audio": ["left", "right"]}
    with pytest.raises(ManifestError, match=r"pairs.csv:3: column 'right' of 'audio' is empty; name a file"):
        load_rows(DataSource(str(write_table(folder / "pairs.csv", pairs)), task="sv", columns=columns))


def test_folders_of_classes_name_the_answer(tmp_path: Path) -> None:
    for place in ("train/dog/0.wav", "train/dog/1.wav", "train/cat/0.wav", "test/cat/2.wav"):
        write_clip(tmp_path / place, 0.1)
    rows = load_rows(DataSource(str(tmp_path), task="acap"))
    assert rows["response"][:] == [["cat"], ["dog"], ["dog"]] and rows["id"][0] == "cat/0.wav"
    assert load_rows(DataSource(str(tmp_path), task="acap", split="test"))["response"][:] == [["cat"]]
    with pytest.raises(FileNotFoundError, match="of the split 'dev'"):
        load_rows(DataSource(str(tmp_path), task="acap", split="dev"))


def test_no_recording_of_a_folder_is_left_out_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_clip(tmp_path / "dog" / "0.wav", 0.1)
    (tmp_path / "dog" / "1.wma").touch()
    (tmp_path / "dog" / ".DS_Store").touch()
    with caplog.at_level(logging.WARNING):
        assert len(load_rows(DataSource(str(tmp_path), task="acap"))) == 1
    assert "left out 1 files that are no known audio, such as" in caplog.text and "1.wma" in caplog.text
    for place in ("1.wav", "cat/old/2.wav"):
        write_clip(tmp_path / place, 0.1)
        with pytest.raises(
            ManifestError, match=f"{place}: 1 recordings lie beside or below the folders of the classes"
        ):
            load_rows(DataSource(str(tmp_path), task="acap"))
        (tmp_path / place).unlink()


def test_a_folder_of_clips_beside_a_table_is_no_class(folder: Path) -> None:
    write_table(folder / "train.csv", ROWS)
    with pytest.raises(ManifestError, match="the answer to each would be 'clips', and train.csv is not read; name"):
        load_rows(DataSource(str(folder), task="asr"))


def test_two_tables_of_one_folder_are_refused(folder: Path) -> None:
    source_of("audiofolder", folder, ROWS)
    (folder / "metadata.jsonl").write_text("{}")
    with pytest.raises(ManifestError, match="both metadata.csv and metadata.jsonl name its recordings; keep one"):
        load_rows(DataSource(str(folder)))


def test_labels_of_a_data_set_are_named(folder: Path) -> None:
    features = Features({"audio": Value("string"), "response": ClassLabel(names=["sad", "happy"])})
    rows = {"audio": [str(folder / "clips" / "0.wav")], "response": [1]}
    assert load_rows(DataSource(Dataset.from_dict(rows, features=features), task="er"))["response"][0] == ["happy"]


def test_bytes_need_no_file(folder: Path) -> None:
    clip = {"path": "elsewhere.wav", "bytes": (folder / "clips" / "0.wav").read_bytes()}
    features = Features(
        {"audio": List({"path": Value("string"), "bytes": Value("binary")}), "response": Value("string")}
    )
    dataset = Dataset.from_dict({"audio": [[clip]], "response": ["x"]}, features=features)
    assert load_rows(DataSource(dataset, task="asr"))[0]["audio"] == [clip]


def test_a_saved_data_set_is_read(folder: Path) -> None:
    rows = [{**row, "audio": str(folder / row["audio"])} for row in ROWS]
    assert load_rows(DataSource(**source_of("disk", folder, rows)))["id"][:] == ["a", "b"]


@pytest.mark.parametrize("form", ["saved", "object"])
def test_a_data_set_without_splits_is_not_taken_for_one_of_them(folder: Path, form: str) -> None:
    rows = Dataset.from_list([{**row, "audio": str(folder / row["audio"])} for row in ROWS])
    rows.save_to_disk(folder / "whole")
    path = str(folder / "whole") if form == "saved" else rows
    assert len(load_rows(DataSource(path))) == 2
    for fields, message in (
        ({"split": "test"}, "there is no split 'test'; the data set has no splits"),
        ({"split": "train[:1]"}, "there is no split 'train"),
        ({"name": "clean"}, "name='clean' has no meaning for a saved or open data set; leave it out"),
        ({"data_files": "m.jsonl"}, "data_files='m.jsonl' has no meaning"),
    ):
        with pytest.raises(ManifestError, match=message.replace("[", r"\[")):
            load_rows(DataSource(path, **fields))
    assert load_rows(DataSource(DatasetDict(test=rows.select([1])), split="test"))["id"][:] == ["b"]


def test_the_rows_of_a_data_set_are_written_to_the_cache_once(tmp_path: Path) -> None:
    """And anew for other columns or another task, as these make other rows."""
    rows = [{"audio": f"{name}.wav", "text": name, "other": name.upper()} for name in "ab"]
    Dataset.from_list(rows).to_parquet(tmp_path / "m.parquet")

    def load(**options: Any) -> Dataset:
        opened = load_dataset("parquet", data_files=str(tmp_path / "m.parquet"), split="train", cache_dir=str(tmp_path))
        return from_datasets(opened, **options)

    first, again = (load(columns={"response": "text"}, task="asr") for _ in range(2))
    assert first.cache_files == again.cache_files and first["response"] == again["response"]
    assert load(columns={"response": "other"}, task="asr")["response"][:] == [["A"], ["B"]]
    assert load(columns={"response": "text"}, task="acap")["task"][:] == ["acap"] * 2
    assert len(list(tmp_path.rglob("cache-*.arrow"))) == 3


def test_cached_rows_of_a_task_that_is_not_registered_now_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Dataset.from_list([{"audio": "a.wav", "response": "north"}]).to_parquet(tmp_path / "m.parquet")
    opened = load_dataset("parquet", data_files=str(tmp_path / "m.parquet"), split="train", cache_dir=str(tmp_path))
    with monkeypatch.context() as registered:
        registered.setattr(tasks, "_TASKS", dict(tasks._TASKS))
        tasks.register_task(replace(tasks.get_task("asr"), name="dialect"))
        assert from_datasets(opened, task="dialect")["task"][:] == ["dialect"]
    with pytest.raises(ManifestError, match="dialect"):
        from_datasets(opened, task="dialect")


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ManifestError, match=r"m\.parquet.*: "):
        load_rows(DataSource(str(tmp_path / "m.parquet")))


@pytest.mark.parametrize(("form", "streaming"), [("json", False), ("json", True), ("parquet", True)])
def test_the_broken_one_of_several_files_is_named(tmp_path: Path, form: str, streaming: bool) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    rows = Dataset.from_list([{"audio": "a.wav", "response": "x"}])
    rows.to_parquet(good) if form == "parquet" else rows.to_json(good)
    bad.write_text('{"audio"')
    files = [str(good), str(bad)]
    source = DataSource(form, format="datasets", task="asr", data_files=files, streaming=streaming)
    with pytest.raises(ManifestError) as caught:
        list(load_rows(source, check_files=False))
    assert str(caught.value).startswith(f"{bad}: ") and "good" not in str(caught.value)


def test_files_of_several_folders_do_not_read_the_audio_of_one(tmp_path: Path) -> None:
    rows = [{"audio": "clips/0.wav", "task": "asr", "response": "x"}]
    files = []
    for name in ("one", "two"):
        write_clip(tmp_path / name / "clips" / "0.wav", 0.1)
        files.append(str(write_manifest(tmp_path / name / "m.jsonl", rows)))
    with pytest.raises(ManifestError, match=f"there is no audio file {tmp_path}/clips/0.wav"):
        load_rows(DataSource("json", format="datasets", data_files=files))
    assert len(load_rows(DataSource("json", format="datasets", data_files=files[:1]))) == 1


@pytest.mark.parametrize(
    ("path", "files", "streaming"),
    [
        ("json", "{}/m*.jsonl", False),
        ("json", ["{}/m.json[l]"], True),
        ("json", "{}/clips/../*.jsonl", False),
        ("{}", "m.jsonl", False),
        ("{}", ["m*.jsonl"], True),
    ],
)
def test_patterns_and_files_of_a_folder_read_the_audio_beside_them(
    folder: Path, path: str, files: str | list[str], streaming: bool
) -> None:
    source_of("manifest", folder, ROWS)
    named = [file.format(folder) for file in files] if isinstance(files, list) else files.format(folder)
    source = DataSource(path.format(folder), format="datasets", data_files=named, streaming=streaming)
    assert [row["audio"][0]["path"] for row in load_rows(source)] == [str(folder / row["audio"]) for row in ROWS]


def test_a_missing_split_and_an_empty_file_are_named(tmp_path: Path) -> None:
    DatasetDict(train=Dataset.from_dict({"a": [1]})).save_to_disk(tmp_path / "saved")
    with pytest.raises(ManifestError, match=r"saved: there is no split 'test'; it has train"):
        load_rows(DataSource(str(tmp_path / "saved"), split="test"))
    (tmp_path / "m.json").write_text("")
    with pytest.raises(ManifestError, match=r"m\.json.*: no rows"):
        open_dataset("json", data_files=str(tmp_path / "m.json"))
    Dataset.from_dict({"audio": []}).to_parquet(tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match=r"m\.parquet: no rows$"):
        open_dataset("parquet", data_files=str(tmp_path / "m.parquet"))


def test_a_source_says_what_it_cannot_read(tmp_path: Path) -> None:
    for fields, message in (
        ({"path": "a.csv", "split": "dev"}, "a.csv: split='dev' has no meaning for format='csv'"),
        ({"path": __file__}, r"test_data_sources.py: unknown suffix '.py'; expected .jsonl, .json, .csv"),
        ({"path": "a", "format": "mp3"}, "format='mp3' is unknown; choose one of manifest"),
        ({"path": "a", "format": "clotho", "split": "tets"}, "has no split 'tets'; choose among development"),
        ({"path": "a.jsonl", "options": {"clips": "x"}}, "options=.* has no meaning for format='manifest'"),
    ):
        with pytest.raises(ArgumentError, match=message):
            DataArguments(train=[fields])
    with pytest.raises(FileNotFoundError, match=r"no folder .*none with Clotho"):
        load_rows(DataSource(str(tmp_path / "none"), format="clotho"))
    assert len(FORMATS) == len(set(FORMATS)) == 19


def test_data_sets_stand_for_paths_in_training_and_evaluation(folder: Path) -> None:
    data = DataArguments(train=source_of("object", folder, ROWS)["path"], eval=[source_of("csv", folder, ROWS)])
    assert len(load(data.train[0], data)) == len(build_eval_dataset(data, 0)) == 2
