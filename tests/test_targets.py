"""Targets of behavioural alignment: what is asked, what is kept, and what an interruption costs."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import soundfile
from conftest import tiny_config
from datasets import Audio, ClassLabel, Dataset, load_from_disk
from fixtures_endpoint import serve_chat
from fixtures_training import save_tiny_llm, tiny_processor, write_clip, write_manifest

from listen.data import ListenCollator, load_manifest
from listen.data.chat_models import Answer, EndpointChatModel, LocalChatModel
from listen.data.files import FolderInUseError, hold_folder
from listen.data.manifest import ManifestError, extra_fields
from listen.data.targets import KINDS, TargetError, generate_targets
from listen.data.tasks import get_task
from listen.data.utterances import Utterance, read_utterances

SCRIPT = Path(__file__).parent.parent / "examples" / "generate_targets.py"
WORDS = ["i won", "the rain came", "here", "look at that dog", "no", "we met today"]
EMOTIONS = ["happy", "sad", "neutral", "happy", "angry", "fearful"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six utterances, some of them in rows of several tasks, and a recording without words."""
    folder = tmp_path_factory.mktemp("source")
    rows: list[dict[str, Any]] = []
    for i, (words, emotion) in enumerate(zip(WORDS, EMOTIONS, strict=True)):
        write_clip(folder / "audio" / f"{i}.wav", 0.3, seed=i)
        place = {"audio": f"audio/{i}.wav", "speaker": f"s{i % 2}"}
        if i % 2:
            rows.append({**place, "id": f"u{i}", "transcript": words, "emotion": emotion})
        else:  # as in a manifest of tasks
            rows.append({**place, "id": f"u{i}", "task": "asr", "response": words})
            rows.append({**place, "id": f"e{i}", "task": "er", "response": [emotion]})
    write_clip(folder / "audio" / "rain.wav", 0.3)
    rows.append({"audio": "audio/rain.wav", "task": "acap", "response": "it rains"})
    rows.append({"audio": ["audio/0.wav", "audio/1.wav"], "task": "sv", "response": "no", "text": "not one recording"})
    return write_manifest(folder / "speech.jsonl", rows)


@pytest.fixture(scope="module")
def utterances(source: Path) -> list[Utterance]:
    return read_utterances(source)


@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def llm(llm_folder: str) -> LocalChatModel:
    return LocalChatModel(llm_folder, max_new_tokens=6)


class Interrupted(Exception):
    """The machine went away."""


class Recorder:
    """A chat model that notes what another one is asked, and breaks off after some batches."""

    def __init__(self, llm: Any, batches: int = 1000) -> None:
        self.llm, self.batches, self.prompts = llm, batches, []

    def answer(self, conversations: Sequence[Any], seed: int = 0) -> list[Answer]:
        if not self.batches:
            raise Interrupted
        self.batches -= 1
        self.prompts += [conversation[-1]["content"] for conversation in conversations]
        return self.llm.answer(conversations, seed=seed)

    def describe(self) -> dict[str, Any]:
        return self.llm.describe()


def manifests(folder: Path) -> dict[str, str]:
    return {kind: (folder / f"{kind}.jsonl").read_text() for kind in KINDS if (folder / f"{kind}.jsonl").is_file()}


def make(utterances: Sequence[Utterance], folder: Path, llm: Any, **options: Any) -> Any:
    return generate_targets(
        utterances, folder, llm, **{"keep_unfinished": True, "batch_size": 4, "progress": False, **options}
    )


# ------------------------------------------------------------------ utterances


def test_rows_of_one_recording_are_one_utterance(utterances: list[Utterance]) -> None:
    assert [(u.id, u.transcript, u.emotion) for u in utterances] == [
        (f"u{i}", words, emotion) for i, (words, emotion) in enumerate(zip(WORDS, EMOTIONS, strict=True))
    ]
    assert utterances[3].extra == {"speaker": "s1"}


def test_rows_that_contradict_each_other_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_clip(tmp_path / "a.wav", 0.1)
    rows = [{"audio": "a.wav", "transcript": words} for words in ("one", "two")]
    with caplog.at_level(logging.WARNING):
        (utterance,) = read_utterances(write_manifest(tmp_path / "m.jsonl", rows))
    assert utterance.transcript == "one"
    assert "1 rows contradict an earlier row of the same recording" in caplog.text and "m.jsonl:2" in caplog.text


def test_data_sets_with_other_columns_classes_and_embedded_audio(tmp_path: Path) -> None:
    clips = [str(write_clip(tmp_path / f"{i}.wav", 0.2, seed=i)) for i in range(2)]
    rows = {"sound": clips, "sentence": ["a b", "c"], "mood": [1, 0]}
    dataset = (
        Dataset.from_dict(rows).cast_column("sound", Audio()).cast_column("mood", ClassLabel(names=["sad", "joy"]))
    )
    (tmp_path / "data").mkdir()
    dataset.to_parquet(tmp_path / "data" / "train.parquet")
    found = read_utterances(
        str(tmp_path / "data"),
        columns={"audio": "sound", "transcript": "sentence", "emotion": "mood"},
        emotion_names={"joy": "happy"},
    )
    assert [(u.transcript, u.emotion) for u in found] == [("a b", "happy"), ("c", "sad")]
    generate_targets(found, tmp_path / "targets", kinds=["repeat"], progress=False)
    row = load_manifest(tmp_path / "targets" / "repeat.jsonl")[1]
    samples, _ = soundfile.read(row["audio"][0]["path"])
    assert (samples == soundfile.read(clips[1])[0]).all()


def test_embedded_audio_of_a_format_that_soundfile_lacks_is_kept_for_other_decoders(tmp_path: Path) -> None:
    clip = {"path": "a.m4a", "bytes": b"\0\0\0\x18ftypM4A "}
    generate_targets([Utterance("a", [clip], "hello")], tmp_path, kinds=["repeat"], progress=False)
    (row,) = load_manifest(tmp_path / "repeat.jsonl")
    assert row["audio"][0]["path"].endswith(".m4a") and Path(row["audio"][0]["path"]).read_bytes() == clip["bytes"]


def test_sources_that_say_nothing_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_clip(tmp_path / "a.wav", 0.2)
    silent = write_manifest(tmp_path / "silent.jsonl", [{"audio": "a.wav", "caption": "rain"}])
    with pytest.raises(ManifestError, match="transcript.*columns="):
        read_utterances(silent)
    assert read_utterances(silent, columns={"transcript": "caption"})[0].transcript == "rain"
    with pytest.raises(ManifestError, match=r"columns names \['words'\]"):
        read_utterances(silent, columns={"words": "caption"})
    with pytest.raises(ManifestError, match="no row has the field 'capton'"):
        read_utterances(silent, columns={"transcript": "caption", "id": "capton"})
    assert read_utterances(silent, columns={"transcript": "caption"}, emotion_names={"raining": "sad"})
    assert "no recording has the emotion 'raining' that emotion_names names" in caplog.text
    with pytest.raises(ManifestError, match="there is no audio file"):
        read_utterances(write_manifest(tmp_path / "gone.jsonl", [{"audio": "b.wav", "text": "hello"}]))


# ------------------------------------------------------------------ targets


def test_each_kind_asks_in_its_words_and_training_reads_the_answers(
    utterances: list[Utterance], llm: LocalChatModel, tmp_path: Path
) -> None:
    recorder = Recorder(llm)
    summary = make(utterances, tmp_path, recorder)
    assert summary.rows == dict.fromkeys(KINDS, 6)
    instruction = get_task("response").target_instruction
    assert instruction.replace("{input}", "<happy> i won") in recorder.prompts
    assert instruction.replace("{input}", "i won") in recorder.prompts
    assert get_task("speech_caption").instruction().replace("{input}", "<sad> the rain came") in recorder.prompts
    assert len(recorder.prompts) == len(set(recorder.prompts)) == 18
    tagged = load_manifest(tmp_path / "response.jsonl")[0]
    asked = llm.answer([[{"role": "user", "content": instruction.replace("{input}", "<happy> i won")}]])[0].text
    assert tagged["response"] == [asked] and tagged["task"] == "response"
    assert extra_fields(tagged)["text_input"] == "<happy> i won"
    untagged = load_manifest(tmp_path / "response_untagged.jsonl")[0]
    assert untagged["task"] == "response" and extra_fields(untagged)["text_input"] == "i won"
    assert load_manifest(tmp_path / "repeat.jsonl")["response"] == [[words] for words in WORDS]
    assert load_manifest(tmp_path / "ser.jsonl")["response"] == [[emotion] for emotion in EMOTIONS]
    batch = ListenCollator(tiny_processor(tiny_config()), train=True)(list(load_manifest(tmp_path / "response.jsonl")))
    assert (batch["labels"] != -100).any(-1).all()


def test_the_folder_is_also_a_data_set_and_says_how_it_was_made(
    utterances: list[Utterance], llm: LocalChatModel, tmp_path: Path
) -> None:
    make(utterances, tmp_path, llm, seed=5, kinds=["response", "ser"])
    dataset = load_from_disk(tmp_path / "dataset")
    assert set(dataset) == {"response", "ser"}
    assert dataset["response"][:] == load_manifest(tmp_path / "response.jsonl")[:]
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["llm"]["decoding"]["max_new_tokens"] == 6 and settings["llm"]["fingerprint"]
    assert settings["seed"] == 5 and settings["instructions"]["response"] == get_task("response").target_instruction
    assert json.loads((tmp_path / "summary.json").read_text())["rows"]["ser"] == 6


@pytest.mark.parametrize("decoding", [{}, {"do_sample": True, "temperature": 3.0}], ids=["greedy", "sampled"])
def test_an_interrupted_run_goes_on_and_asks_nothing_twice(
    utterances: list[Utterance], llm_folder: str, tmp_path: Path, decoding: dict
) -> None:
    llm = LocalChatModel(llm_folder, max_new_tokens=4, **decoding)
    options = {"seed": 1, "kinds": ["response_untagged"], "batch_size": 2}
    make(utterances, tmp_path / "straight", llm, **options)
    first, second, third = Recorder(llm, batches=1), Recorder(llm), Recorder(llm)
    with pytest.raises(Interrupted):
        make(utterances, tmp_path / "resumed", first, **options)
    with (tmp_path / "resumed" / "answers-000.jsonl").open("a") as file:
        file.write('{"key": "cut o')  # the process ended while it wrote
    make(utterances, tmp_path / "resumed", second, **options)
    make(utterances, tmp_path / "resumed", third, **options)
    assert len(first.prompts) == 2 and len(second.prompts) == 4 and third.prompts == []
    assert not set(first.prompts) & set(second.prompts)
    assert manifests(tmp_path / "resumed") == manifests(tmp_path / "straight")


def test_the_same_words_in_the_same_emotion_are_asked_once_unless_told_otherwise(
    utterances: list[Utterance], llm: LocalChatModel, tmp_path: Path
) -> None:
    twins = [utterances[0], Utterance("twin", utterances[1].audio, utterances[0].transcript, utterances[0].emotion)]
    for share, asked in ((True, 1), (False, 2)):
        recorder = Recorder(llm)
        make(twins, tmp_path / str(share), recorder, kinds=["response"], share_answers=share)
        assert len(recorder.prompts) == asked
        assert len(load_manifest(tmp_path / str(share) / "response.jsonl")) == 2


def test_a_folder_never_mixes_llms_or_settings(
    utterances: list[Utterance], llm: LocalChatModel, tmp_path: Path
) -> None:
    make(utterances[:1], tmp_path, llm, kinds=["response"])
    make(utterances[:1], tmp_path, llm, kinds=["speech_caption"])  # more of the same is welcome
    assert set(manifests(tmp_path)) == {"response", "speech_caption"}
    assert set(load_from_disk(tmp_path / "dataset")) == {"response", "speech_caption"}
    assert json.loads((tmp_path / "summary.json").read_text())["rows"] == {"response": 1, "speech_caption": 1}
    with pytest.raises(TargetError, match="seed=0.* seed=1.*another folder"):
        make(utterances, tmp_path, llm, seed=1)
    longer = LocalChatModel(llm.name, max_new_tokens=7)
    with pytest.raises(TargetError, match="were made with llm="):
        make(utterances, tmp_path, longer)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"emotion": None}, {}, "no emotion, which response, speech_caption, ser need"),
        ({"emotion": "disgust"}, {}, "'disgust' is not among the options"),
        ({}, {"kinds": ["answer"]}, r"kinds \['answer'\] are unknown; choose some of response"),
        ({}, {"llm": None}, "need an LLM"),
        ({"id": "u1"}, {}, "1 ids are used twice, such as 'u1'; make them unique"),
        ({}, {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_impossible_targets_are_refused_before_anything_is_asked(
    utterances: list[Utterance], llm: LocalChatModel, tmp_path: Path, fields: dict, options: dict, message: str
) -> None:
    changed = Utterance(**{**vars(utterances[0]), **fields})
    recorder = Recorder(llm)
    with pytest.raises(TargetError, match=message):
        make([changed, utterances[1]], tmp_path, **{"llm": recorder, **options})
    assert recorder.prompts == []


def test_options_go_with_the_rows_and_into_the_instruction(utterances: list[Utterance], tmp_path: Path) -> None:
    options = ["neutral", "happy", "sad", "angry", "fearful"]
    generate_targets(utterances, tmp_path, kinds=["ser"], options=options, progress=False)
    rows = list(load_manifest(tmp_path / "ser.jsonl"))
    batch = ListenCollator(tiny_processor(tiny_config()), for_generation=True)(rows)
    assert batch["rows"][0]["instruction"].endswith("options: neutral, happy, sad, angry, fearful: {input}")


# ------------------------------------------------------------------ endpoints and processes


def test_an_endpoint_writes_targets_and_what_failed_is_asked_again(utterances: list[Utterance], tmp_path: Path) -> None:
    fail = True

    def reply(body: dict) -> tuple[int, str]:
        text = body["messages"][-1]["content"].rsplit(": ", 1)[1]
        if fail and text == "<sad> the rain came":
            return 400, "not now"
        return 200, {"<angry> no": "", "<neutral> here": "cut of"}.get(text, f"You said {text}.")

    with serve_chat(reply) as server:
        llm = EndpointChatModel(server.url, "m", backoff_seconds=0.01)
        options = {"kinds": ["response"], "keep_unfinished": False}
        summary = make(utterances, tmp_path, llm, **options)
        assert (summary.rows, summary.failed) == ({"response": 3}, {"response": 1})
        assert (summary.empty, summary.unfinished) == ({"response": 1}, {"response": 1})
        assert list(summary.errors.values()) == [1] and "400" in next(iter(summary.errors))
        asked, fail = len(server.requests), False
        assert make(utterances, tmp_path, llm, **options).rows == {"response": 4}
        assert len(server.requests) == asked + 1
    rows = load_manifest(tmp_path / "response.jsonl")
    assert rows["response"][:2] == [["You said <happy> i won."], ["You said <sad> the rain came."]]


def test_an_llm_that_has_nothing_to_say_leaves_empty_manifests(utterances: list[Utterance], tmp_path: Path) -> None:
    with serve_chat(lambda body: (200, " ")) as server:
        summary = make(utterances, tmp_path, EndpointChatModel(server.url, "m"), kinds=["response"])
    assert (summary.rows, summary.empty, summary.failed) == ({"response": 0}, {"response": 6}, {"response": 0})
    assert len(load_manifest(tmp_path / "response.jsonl")) == 0 and not (tmp_path / "dataset").exists()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_one_request_that_always_fails_does_not_keep_a_run_from_its_end(
    utterances: list[Utterance], tmp_path: Path, batch_size: int
) -> None:
    def reply(body: dict) -> tuple[int, str]:
        return (400, "no") if "<sad>" in body["messages"][0]["content"] else (200, "Yes.")

    with serve_chat(reply) as server:
        llm = EndpointChatModel(server.url, "m")
        for asked in (6, 7):
            summary = make(utterances, tmp_path, llm, kinds=["response"], batch_size=batch_size)
            assert (summary.rows, summary.failed) == ({"response": 5}, {"response": 1})
            assert list(summary.errors.values()) == [1] and len(server.requests) == asked


def test_an_endpoint_that_answers_nothing_ends_the_run(utterances: list[Utterance], tmp_path: Path) -> None:
    with serve_chat(lambda body: (400, "no")) as server:
        with pytest.raises(TargetError, match="every request of a batch failed.*400"):
            make(utterances, tmp_path, EndpointChatModel(server.url, "m"))
        assert len(server.requests) == 4  # not the whole data


SURROGATE = json.dumps({"choices": [{"message": {"content": "\ud800"}, "finish_reason": "stop"}]}).encode()


@pytest.mark.parametrize("odd", [(200, SURROGATE), (200, b"[" * 100_000), (403, "filtered"), (404, "no"), (200, b"no")])
def test_an_odd_answer_is_set_aside_with_its_reason_and_costs_no_other(
    utterances: list[Utterance], tmp_path: Path, odd: tuple
) -> None:
    is_odd = True

    def reply(body: dict) -> tuple[int, Any]:
        return odd if is_odd and "<sad>" in body["messages"][0]["content"] else (200, "Yes.")

    with serve_chat(reply) as server:
        for asked in (6, 7):  # the second run repeats the failed prompt alone
            llm = EndpointChatModel(server.url, "m", max_retries=0)
            summary = make(utterances, tmp_path, llm, kinds=["response"])
            assert (summary.rows, summary.failed) == ({"response": 5}, {"response": 1})
            (line,) = (tmp_path / "failed-000.jsonl").read_text().splitlines()
            assert "<sad>" in json.loads(line)["prompt"] and json.loads(line)["reason"] in summary.errors
            assert len(server.requests) == asked
        is_odd = False
        assert make(utterances, tmp_path, llm, kinds=["response"]).rows == {"response": 6}
    assert not list(tmp_path.glob("failed-*"))


def test_an_answer_that_no_file_can_hold_has_failed(utterances: list[Utterance], tmp_path: Path) -> None:
    class Odd:
        def answer(self, conversations: Sequence[Any], seed: int = 0) -> list[Answer]:
            return [Answer("\udcff" if "<sad>" in c[0]["content"] else "Yes.") for c in conversations]

        def describe(self) -> dict[str, Any]:
            return {"model": "odd \ud800"}

    summary = make(utterances, tmp_path, Odd(), kinds=["response"])
    assert (summary.rows, summary.failed) == ({"response": 5}, {"response": 1})
    make(utterances, tmp_path, Odd(), kinds=["response"])  # its settings are equal
    broken = Utterance(**{**vars(utterances[0]), "transcript": "\ud800"})
    with pytest.raises(TargetError, match="'u0'.*not valid Unicode"):
        make([broken], tmp_path, Odd(), kinds=["response"])


@pytest.mark.parametrize("room", [0, 60, 200, 400, 1000, 2000])
def test_a_full_disk_blocks_no_later_run(utterances: list[Utterance], tmp_path: Path, room: int) -> None:
    def with_little_room(server_url: str) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))  # no file grows beyond it
        make(utterances, tmp_path, EndpointChatModel(server_url, "m"), kinds=["response", "repeat"])

    with serve_chat(lambda body: (200, "Fine.")) as server:
        process = multiprocessing.get_context("fork").Process(target=with_little_room, args=(server.url,))
        process.start()
        process.join()
        assert process.exitcode == 1
        assert all(path.stat().st_size for path in tmp_path.glob("*.json"))
        asked = len(server.requests)
        summary = make(utterances, tmp_path, EndpointChatModel(server.url, "m"), kinds=["response", "repeat"])
        assert summary.rows == {"response": 6, "repeat": 6} and len(server.requests) <= asked + 6
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))


def test_damaged_settings_are_written_again_only_where_there_are_no_answers(
    utterances: list[Utterance], llm: LocalChatModel, tmp_path: Path
) -> None:
    (tmp_path / "settings.json").write_text("")
    make(utterances[:1], tmp_path, llm, kinds=["response"])
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(TargetError, match="settings.json is damaged.*another folder"):
        make(utterances[:1], tmp_path, llm, kinds=["response"])


def test_a_folder_that_another_run_writes_to_is_refused_until_that_run_is_gone(
    utterances: list[Utterance], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def hold() -> None:
        with hold_folder(tmp_path, "target-generation"):
            ready.set()
            time.sleep(60)

    process = context.Process(target=hold)
    process.start()
    assert ready.wait(30)
    with pytest.raises(FolderInUseError, match=f"target-generation by process {process.pid} on .*another folder"):
        make(utterances, tmp_path, kinds=["repeat"], llm=None)
    process.kill()
    process.join()
    assert make(utterances, tmp_path, kinds=["repeat"], llm=None).rows == {"repeat": 6}


@pytest.mark.slow
def test_two_processes_write_what_one_writes(
    source: Path, utterances: list[Utterance], llm: LocalChatModel, llm_folder: str, tmp_path: Path
) -> None:
    make(utterances, tmp_path / "one", llm, kinds=["response", "repeat"], batch_size=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    arguments = ["--data", str(source), "--llm", llm_folder, "--output", str(tmp_path / "two"), "--batch-size", "2"]
    done = subprocess.run(
        [*command, *arguments, "--max-new-tokens", "6", "--keep-unfinished", "--kinds", "response", "repeat"],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert manifests(tmp_path / "two") == manifests(tmp_path / "one")
    answered = [len(path.read_text().splitlines()) for path in sorted((tmp_path / "two").glob("answers-*.jsonl"))]
    assert len(answered) == 2 and min(answered) > 0 and sum(answered) == 6
    assert "Targets in" in done.stdout
