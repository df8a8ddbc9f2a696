"""Small folders in the layouts of published corpora, with tones in place of the recordings and words of our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fixtures_training import write_clip


def _clips(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        write_clip(root / name, 0.05, seed=number)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def librispeech(root: Path) -> None:
    for split, speaker in (
        ("train-clean-100", "19"),
        ("train-clean-360", "100"),
        ("train-other-500", "30"),
        ("dev-clean", "84"),
        ("test-clean", "61"),
    ):
        chapter = root / split / speaker / "198"
        _write(chapter / f"{speaker}-198.trans.txt", f"{speaker}-198-0000 A KIND WORD\n{speaker}-198-0001 DON'T GO\n")
        _clips(chapter, f"{speaker}-198-0000.flac", f"{speaker}-198-0001.flac")


def covost2(root: Path) -> None:
    header = "path\tsentence\ttranslation\tclient_id\n"
    rows = 'common_voice_en_1.mp3\t"Well, she said.\t\u597d\uff0c\u5979\u8bf4\u3002\tab12\n'
    rows += "common_voice_en_2.mp3\tTwo.\t\u4e8c\u3002\tcd34\n"
    for split in ("train", "dev", "test"):
        _write(root / f"covost_v2.en_zh-CN.{split}.tsv", header + rows)
    # named .mp3 as in Common Voice; the content does not matter to a reader of rows
    _clips(root / "clips", "1.wav", "2.wav")
    for number in (1, 2):
        (root / "clips" / f"{number}.wav").rename(root / "clips" / f"common_voice_en_{number}.mp3")


def iemocap(root: Path) -> None:
    for session in range(1, 6):
        dialog, folder = f"Ses0{session}F_impro01", root / f"Session{session}"
        names = [f"{dialog}_{turn}" for turn in ("F000", "M000", "M001", "F001")]
        labels = ("neu", "exc", "xxx", "hap")
        lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
        for name, label in zip(names, labels, strict=True):
            lines += [f"[6.2901 - 8.2357]\t{name}\t{label}\t[2.5000, 2.5000, 2.5000]", "C-E2:\tNeutral;\t()", ""]
        _write(folder / "dialog" / "EmoEvaluation" / f"{dialog}.txt", "\n".join(lines))
        words = "".join(f"{name} [006.2901-008.2357]: Line {number}.\n" for number, name in enumerate(names))
        _write(folder / "dialog" / "transcriptions" / f"{dialog}.txt", words)
        _clips(folder / "sentences" / "wav" / dialog, *(f"{name}.wav" for name in names))


def voxceleb1(root: Path) -> None:
    trials = "1 id10270/v1/00001.wav id10270/v2/00001.wav\n0 id10270/v1/00001.wav id10271/v1/00001.wav\n"
    _write(root / "veri_test.txt", trials)
    for speaker in (10270, 10271):
        _clips(root / "vox1_test_wav" / "wav" / f"id{speaker}", "v1/00001.wav", "v2/00001.wav")
    for speaker in range(10001, 10007):
        _clips(root / "vox1_dev_wav" / "wav" / f"id{speaker}", "v1/00001.wav", "v1/00002.wav", "v2/00001.wav")


def librisqa(root: Path) -> None:
    librispeech(root.parent / "LibriSpeech")
    for split, place in (("train", "train-clean-360/100/198/100-198-0000"), ("test", "test-clean/61/198/61-198-0000")):
        row = {"speech_path": f"data/LibriSpeech/{place}.flac", "question": "What is kind?", "answer": "A word."}
        text = json.dumps([{**row, "text": "A KIND WORD"}])
        _write(root / "LibriSQA-PartI" / f"LibriSQA-PartI-{split}.json", text)


def clotho(root: Path) -> None:
    header = "file_name," + ",".join(f"caption_{number}" for number in range(1, 6)) + "\n"
    for split in ("development", "validation", "evaluation"):
        row = 'A door (1).wav,"A door, opening",A door shuts,Wood creaks,Somebody enters,A hinge\n'
        _write(root / f"clotho_captions_{split}.csv", header + row)
        _clips(root / split, "A door (1).wav")


def audiocaps(root: Path) -> None:
    header = "audiocap_id,youtube_id,start_time,caption\n"
    _write(root / "train.csv", header + "1,abc,30,A dog barks\n2,gone,10,Rain\n")
    _write(root / "val.csv", header + '3,abc,30,A dog barks\n4,abc,30,"Barks, then silence"\n')
    _clips(root / "audio", "abc.wav")


def expresso(root: Path) -> None:
    names = ("ex01_default_00001", "ex01_default_emphasis_00002", "ex02_happy_00003")
    lines = ["# comment", "ex01-ex02_laughing_001\t(,60.0s)", "ex01_default_longform_00001\t(3s,)", *names]
    _write(root / "splits" / "train.txt", "\n".join(lines))
    _write(root / "read_transcriptions.txt", "".join(f"{name}\tWords of {name}.\n" for name in names))
    for name in names:
        speaker, style = name.split("_")[:2]
        _clips(root / "audio_48khz" / "read" / speaker / style / "base", f"{name}.wav")


def ravdess(root: Path) -> None:
    for actor in range(1, 25):
        names = (f"03-01-01-01-02-01-{actor:02d}.wav", f"03-01-06-02-01-01-{actor:02d}.wav")
        _clips(root / f"Actor_{actor:02d}", *names, f"03-02-06-02-01-01-{actor:02d}.wav")  # the last one is sung


def esc50(root: Path) -> None:
    rows = [f"{fold}-100-A-{target}.wav,{fold},{target},{name},{flag},100,A" for fold in range(1, 6)
            for target, name, flag in ((0, "dog", True), (12, "crackling_fire", False))]  # fmt: skip
    _write(root / "meta" / "esc50.csv", "filename,fold,target,category,esc10,src_file,take\n" + "\n".join(rows) + "\n")
    _clips(root / "audio", *(row.split(",")[0] for row in rows))


def fsdd(root: Path) -> None:
    _clips(root / "recordings", "7_jackson_4.wav", "7_jackson_5.wav", "0_theo_49.wav")


def fsdd_questions(root: Path) -> None:
    fsdd(root)


def speechocean762(root: Path) -> None:
    for split, name in (("train", "000010011"), ("test", "000030012")):
        speaker = name[1:5]
        _write(root / split / "wav.scp", f"{name}\tWAVE/SPEAKER{speaker}/{name}.WAV\n")
        _write(root / split / "text", f"{name}\tA KIND WORD\n")
        _write(root / split / "utt2spk", f"{name}\t{speaker}\n")
        _clips(root / "WAVE" / f"SPEAKER{speaker}", f"{name}.WAV")
    scores = {"000010011": {"text": "A KIND WORD", "accuracy": 8, "fluency": 9, "words": []}}
    _write(root / "resource" / "scores.json", json.dumps(scores))


BUILDERS: dict[str, Callable[[Path], None]] = {
    build.__name__: build
    for build in (
        *(librispeech, covost2, iemocap, voxceleb1, librisqa, clotho),
        *(audiocaps, expresso, ravdess, esc50, fsdd, fsdd_questions, speechocean762),
    )
}

__all__ = ["BUILDERS"]
