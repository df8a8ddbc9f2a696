"""The first run, from nothing to a trained model: `make demo`, or `python examples/demo.py`.

Synthesises the built-in corpus, caches the features of the frozen encoders, trains a LiSTEN adapter on six tasks and
two auxiliary ones, evaluates it on held-out speakers and sentences with its prompts and without any, and asks it three
questions about recordings. Everything is written to runs/demo: `metrics.json`, the report, the trained `model`. Takes
the arguments of `examples/train.py` as overrides, such as `--training.max_steps 300`; 10 to 20 minutes on two CPU cores
as it is.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import pipeline

from listen.data import FeatureStore, load_manifest, precompute_features
from listen.data.corpus import build_corpus
from listen.evaluation import EvaluationResult, evaluate_model
from listen.training import RunArguments, TrainResult, build_encoders, parse_arguments, train
from listen_command import errors_in_one_line

FOLDER = Path("runs/demo")
CORPUS = FOLDER / "corpus"
HEADLINES = {
    "asr": "wer",
    "er": "accuracy",
    "sv": "accuracy",
    "sqa": "exact_match",
    "en2zh": "bleu",
    "acap": "event_f1",
}
QUESTIONS = {"asr": "What is being said?", "sqa": None, "acap": "Describe the sounds."}
console = Console()


def main() -> None:
    """Run all stages."""
    if "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__)
        return
    os.chdir(Path(__file__).resolve().parents[1])  # paths in recipes start at the repository
    run = parse_arguments(["--config", "examples/configs/demo.yaml", *sys.argv[1:]])
    torch.set_num_threads(run.training.num_threads or 1)
    console.rule("1  The corpus")
    build_corpus(CORPUS, num_workers=min(2, os.cpu_count() or 1))
    console.rule("2  Features of the frozen encoders")
    features = cache_features(run)
    console.rule("3  Training the adapter")
    started = time.perf_counter()
    trained = train(run.model, run.data, run.training, run.raw)
    seconds = time.perf_counter() - started
    console.rule("4  Evaluation on held-out speakers and sentences")
    result = evaluate(trained, features)
    without_prompts = evaluate(trained, features, num_prompts=0)
    without_prompts.save(FOLDER / "without_prompts")
    result.without_prompts = without_prompts.metrics
    result.save(FOLDER, extra={"train_seconds": round(seconds, 1)})
    console.rule("5  Three questions")
    ask(trained.model_folder)
    print_scores(result)
    console.print(f"\nreport: {FOLDER / 'report.html'}   model: {trained.model_folder}")


def cache_features(run: RunArguments) -> FeatureStore:
    """Run the encoders once over every clip of the corpus."""
    model, processor = build_encoders(run.model)
    rows = concatenate_datasets([load_manifest(CORPUS / f"{split}.jsonl") for split in ("train", "dev", "test")])
    return precompute_features(model, processor, rows, run.data.features, batch_size=32, num_workers=1)


@torch.no_grad()
def evaluate(trained: TrainResult, features: FeatureStore, num_prompts: int | None = None) -> EvaluationResult:
    """Evaluate on the test split, which is not in the training data, with the trained number of prompts or another."""
    result = evaluate_model(
        trained.model,
        trained.processor,
        load_manifest(CORPUS / "test.jsonl"),
        features=features,
        batch_size=32,
        num_prompts=num_prompts,
        max_new_tokens=48,
    )
    return result.name_data([CORPUS / "test.jsonl"])


def print_scores(result: EvaluationResult) -> None:
    """Print the leading score of each task with k prompts, and in the last row that of the same model without any."""
    found = {task: metric for task, metric in HEADLINES.items() if task in result.metrics}
    heads = [f"{task}\n{metric}" for task, metric in found.items()]
    table = Table("prompts", *heads, title="Held-out speakers and sentences, with 95 % intervals")
    cells = []
    for task, metric in found.items():
        low, high = result.intervals[task][metric]
        cells.append(f"{result.metrics[task][metric]:.3f}\n{low:.3f} - {high:.3f}")
    table.add_row(f"k = {result.settings['num_prompts']}", *cells, end_section=True)
    table.add_row("k = 0", *(f"{result.without_prompts[task][metric]:.3f}" for task, metric in found.items()))
    console.print(table)


def ask(model_folder: Path) -> None:
    """Ask the saved model about a test clip of three tasks, as a user would."""
    pipe = pipeline("audio-llm", model=str(model_folder), trust_remote_code=True)
    for task, wording in QUESTIONS.items():
        row = first_row(task)
        question = wording or row["question"]
        answer = pipe(str(CORPUS / row["audio"]), text=question)[0]["generated_text"]
        console.print(Text(str(CORPUS / row["audio"]), style="dim"))
        console.print(Text(f"  {question}\n  ").append(answer, style="bold").append(f"  (truth: {row['response']})"))


def first_row(task: str) -> dict[str, Any]:
    """First row of `task` in the test manifest."""
    lines: Sequence[str] = (CORPUS / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return next(row for row in map(json.loads, lines) if row["task"] == task)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
