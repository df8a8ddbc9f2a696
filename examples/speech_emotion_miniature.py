"""All systems of SpeechEmotionLlama's table (arXiv 2410.01162, Table I), in miniature, by one command.

    python examples/speech_emotion_miniature.py

On the built-in corpus: the frozen miniature LLM writes the targets from `<emotion> transcript`. Baseline 1 is trained
on neutral voices; the others start from it, two at a time, each with its own targets. All are evaluated on held-out
speakers and sentences. Two further systems are in no paper: a prompt pool over a frozen encoder, and distillation from
the logits of the text. Everything is written to runs/speech-emotion; existing results are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from listen.data.files import write_text

FOLDER = Path("runs/speech-emotion")
CORPUS = Path("runs/demo/corpus")  # the demo's own, so that it is made once
CONFIGS = Path("examples/configs/speech_emotion")
LANGUAGE_MODEL = Path("model_cards/speech-emotion-miniature/backbones/language_model")
CLASSIFIER = FOLDER / "classifier"
console = Console(markup=False)


@dataclass(frozen=True)
class System:
    """One row of the table.

    Attributes:
        title: its name in the table.
        folder: of the trained model; two systems may share one.
        targets: manifests that it is trained on.
        overrides: arguments of `examples/train.py` that differ.
        cascade: whether the classifier writes the emotion before the speech.
    """

    title: str
    folder: str
    targets: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    cascade: bool = False


_FROM_BASELINE = (
    "--model.checkpoint", str(FOLDER / "baseline1" / "model"), "--training.max_steps", "350",
    "--model.preset", "null", "--model.speech_encoder", "null", "--model.language_model", "null",
)  # fmt: skip
_NEUTRAL = ("neutral_repeat", "neutral_response_untagged")
_UNTAGGED = ("repeat", "response_untagged")
_ALL = ("repeat", "response", "speech_caption", "ser")
_POOL = (
    "--model.trainable", "[adapter]",
    "--model.prompt_pool", "{pool_size: 24, num_prompts: 10, key_loss_weight: 1.0, center_query: true}",
    "--training.keys_from_rows", "256", "--training.layerwise_lr_decay", "1",
)  # fmt: skip
SYSTEMS = (
    System("Baseline 1", "baseline1", _NEUTRAL),
    System("Cascade + Baseline 1", "baseline1", _NEUTRAL, cascade=True),
    System("Baseline 2", "baseline2", _UNTAGGED, _FROM_BASELINE),
    System("Cascade + Baseline 2", "baseline2", _UNTAGGED, _FROM_BASELINE, cascade=True),
    System("v1", "v1", _ALL[:2], _FROM_BASELINE),
    System("v2", "v2", _ALL[:3], _FROM_BASELINE),
    System("v3", "v3", _ALL, _FROM_BASELINE),
    System("v3, prompt pool", "pool", _ALL, _POOL),
    System("v3, distilled", "distilled", _ALL, (*_FROM_BASELINE, "--training.alignment", "distill")),
)


def main() -> None:
    """Run all stages."""
    options = parse_arguments()
    os.chdir(Path(__file__).resolve().parents[1])  # paths in recipes start at the repository
    started = time.perf_counter()
    console.rule("1  The corpus")
    call("corpus", "-c", f"from listen.data.corpus import build_corpus; build_corpus({str(CORPUS)!r}, num_workers=2)")
    console.rule("2  Targets by the text model")
    together({split: target_arguments(split) for split in ("train", "test")}, options.processes)
    for kind in _UNTAGGED:
        keep_neutral(kind)
    console.rule("3  Training")
    systems = {system.folder: system for system in SYSTEMS}
    jobs = {name: training_arguments(system) for name, system in systems.items()} | {
        "classifier": classifier_arguments()
    }
    first = {name: jobs.pop(name) for name in ("baseline1", "pool", "classifier")}  # the others start from Baseline 1
    for stage in (first, jobs):
        missing = {name: job for name, job in stage.items() if not (FOLDER / name / "model").exists()}
        together(missing, options.processes)
    console.rule("4  Evaluation on held-out speakers and sentences")
    answers = {f"responses-{slug(system)}": evaluation_arguments(system) for system in SYSTEMS}
    together(answers, options.processes)
    runs = [str(FOLDER / name) for name in answers]
    call("table", "examples/evaluate_responses.py", "--table", *runs, "--output", str(FOLDER / "table"))
    console.print((FOLDER / "table" / "table.md").read_text())
    console.print(f"{time.perf_counter() - started:.0f} s in all; everything is in {FOLDER}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="jobs at a time, each on one thread")
    return parser.parse_args()


def target_arguments(split: str) -> list[str]:
    """Answers of the text model to the transcripts of a split."""
    return [
        "examples/generate_targets.py", "--data", str(CORPUS / f"{split}.jsonl"), "--llm", str(LANGUAGE_MODEL),
        "--output", str(FOLDER / "targets" / split), "--batch-size", "64", "--max-new-tokens", "48",
    ]  # fmt: skip


def keep_neutral(kind: str) -> None:
    """Write the rows of neutral voices to a file of their own, for Baseline 1."""
    folder = FOLDER / "targets" / "train"
    lines = (folder / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    neutral = [line for line in lines if json.loads(line)["emotion"] == "neutral"]
    write_text(folder / f"neutral_{kind}.jsonl", "".join(neutral))


def training_arguments(system: System) -> list[str]:
    """Training of a system."""
    manifests = [str(FOLDER / "targets" / "train" / f"{name}.jsonl") for name in system.targets]
    return [
        "examples/train.py", "--config", str(CONFIGS / "miniature.yaml"), "--data.train", json.dumps(manifests),
        "--training.output_dir", str(FOLDER / system.folder), "--training.resume", *system.overrides,
    ]  # fmt: skip


def classifier_arguments() -> list[str]:
    """Training of the cascades' classifier, over the encoder that all systems start from."""
    return ["examples/train_classifier.py", "--config", str(CONFIGS / "miniature_classifier.yaml"), "--training.resume"]


def evaluation_arguments(system: System) -> list[str]:
    """Evaluation of a system on the test split."""
    test, train = (FOLDER / "targets" / split for split in ("test", "train"))
    cascade = ["--cascade", str(CLASSIFIER / "model")] if system.cascade else []
    return [
        "examples/evaluate_responses.py", "--model", str(FOLDER / system.folder / "model"), "--system", system.title,
        "--data", str(test / "ser.jsonl"), "--references", str(test / "response.jsonl"),
        "--probe-train", str(train / "ser.jsonl"), "--bert-score", str(LANGUAGE_MODEL), "--judge", "rules",
        "--batch-size", "32", "--max-new-tokens", "48", "--output", str(FOLDER / f"responses-{slug(system)}"), *cascade,
    ]  # fmt: skip


def slug(system: System) -> str:
    """A folder's name for a system."""
    return f"cascade-{system.folder}" if system.cascade else system.folder


def together(jobs: dict[str, list[str]], processes: int) -> None:
    """Run jobs, `processes` of them at a time; a failed one ends the script once the others have ended."""
    with ThreadPoolExecutor(processes) as pool:
        for running in [pool.submit(call, name, *arguments) for name, arguments in jobs.items()]:
            running.result()


def call(name: str, *arguments: str) -> None:
    """Run Python with `arguments`, its output in `logs/<name>.log`; print how long it took."""
    log, started = FOLDER / "logs" / f"{name}.log", time.perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        ended = subprocess.run([sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT, check=False)
    if ended.returncode:
        raise SystemExit(f"{name} failed, see {log}:\n{log.read_text()[-2000:]}")
    console.print(f"{name}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
