"""Evaluate a model on a data set: metrics, predictions and a report.

    listen eval --model model_cards/listen-tiny --data runs/corpus/test.jsonl --output runs/eval
    accelerate launch --num_processes 2 examples/evaluate_tasks.py --model DIR --data test.jsonl --num-beams 4
    torchrun --nproc_per_node 2 examples/evaluate_tasks.py ...   # on CPUs, where accelerate starts only one process
    listen eval --model DIR --config examples/configs/listen-llama3-8b.yaml
    listen eval --model DIR --data '{path: datasets/Clotho, format: clotho, split: test}'

Data are read as in training. `--config` takes `eval`, `join_tasks`, `join_silence_seconds`, `features` and, with
`long_audio: cut`, `max_audio_seconds` from the section `data` of a recipe; the flags replace single ones of them.

`--sweep 2 4 8` also evaluates with other numbers of prompts k and plots the scores over them; `--sweep` alone doubles
k from 2 to the processor's own. A sweep always holds k = 0, and the report then shows these scores beside the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils import cached_file

from ..data.features import FeatureStore
from ..evaluation import (
    EvaluationResult,
    default_counts,
    evaluate_model,
    launched_processes,
    metrics_table,
    select_rows,
    sweep_num_prompts,
)
from ..evaluation.cascade import load_recogniser, tag_rows
from ..modeling_listen import ListenForConditionalGeneration
from ..processing_listen import ListenProcessor
from ..training import ArgumentError, DataArguments, build_eval_dataset
from ..training.arguments import parse_sources, task_names
from ..training.parsing import read_config
from ..training.values import check_values, field_names, refuse_unknown
from .check_data import source_of_word
from .help import DTYPES, ArgumentFormatter


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ArgumentFormatter)
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a Hub id")
    parser.add_argument("--data", nargs="+", help="sources of rows: paths, or mappings as in recipes; see docs/data.md")
    parser.add_argument("--config", help="recipe whose evaluation data and joins are used")
    parser.add_argument("--join-tasks", nargs="+", metavar="TASK", help="tasks whose clips are joined, as in training")
    parser.add_argument("--join-silence-seconds", type=float, help="silence between joined clips, as in training")
    parser.add_argument("--tasks", nargs="+", help="evaluate only these tasks")
    parser.add_argument("--max-examples", type=int, help="max examples per task")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a batch, in each process")
    parser.add_argument("--num-prompts", type=int, help="prompts k; by default the processor's")
    parser.add_argument("--max-audio-seconds", type=float, help="truncate longer clips (default: no limit)")
    parser.add_argument("--num-beams", type=int, default=1, help="1 for greedy answers")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="max new tokens of an answer")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that load audio ahead")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the backbones")
    parser.add_argument("--spelling-from", help="Whisper checkpoint whose table of British spellings the WER uses")
    parser.add_argument("--features", help="encoder features by `listen precompute`, in place of encoding")
    parser.add_argument("--cascade", help="classifier whose label is written before the speech, as in <happy>")
    parser.add_argument("--sweep", type=int, nargs="*", metavar="K", help="also evaluate with these numbers of prompts")
    parser.add_argument("--output", type=Path, default=Path("runs/eval"), help="folder of the results")
    return parser.parse_args()


def data_arguments(arguments: argparse.Namespace) -> DataArguments:
    """The data of the recipe with what the command line replaces. All rows: `max_eval_rows` is for training."""
    section = (read_config(arguments.config).get("data") or {}) if arguments.config else {}
    refuse_unknown(section, field_names(DataArguments), "data.")
    kept = {name: value for name, value in section.items() if name not in ("train", "max_eval_rows")}
    if arguments.data:
        words = [source_of_word(word) for word in arguments.data]
        kept["eval"] = [source for word in words for source in parse_sources("--data", word)]
    for name in ("join_tasks", "join_silence_seconds", "features"):
        if getattr(arguments, name) is not None:
            kept[name] = getattr(arguments, name)
    if arguments.max_audio_seconds is not None:
        kept |= {"long_audio": "cut", "max_audio_seconds": arguments.max_audio_seconds}
    data = DataArguments(**check_values("data.", DataArguments, kept))
    if not data.eval:
        raise ArgumentError("no data to evaluate on; name it with --data, or a recipe with data.eval as --config")
    return data


def spelling_mapping(checkpoint: str | None) -> dict[str, str] | None:
    """British to American spellings of a Whisper checkpoint."""
    if checkpoint is None:
        return None
    return json.loads(Path(cached_file(checkpoint, "normalizer.json")).read_text(encoding="utf-8"))


def print_metrics(result: EvaluationResult) -> None:
    """Print the table of scores."""
    for title, metrics in (("Scores", result.metrics), ("Scores without prompts, k = 0", result.without_prompts)):
        table = Table("task", "metric", "value", "n", title=title)
        for row in metrics_table(metrics):
            table.add_row(*row)
        if metrics:
            Console(markup=False).print(table)


def main() -> None:
    """Evaluate, write the results on the main process, and print them."""
    arguments, state = parse_arguments(), launched_processes()
    try:
        data = data_arguments(arguments)
        rows = build_eval_dataset(data, seed=0)  # before the model is loaded
        tasks = task_names("--tasks", arguments.tasks or ()) or None
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    model = ListenForConditionalGeneration.from_pretrained(arguments.model, dtype=arguments.dtype).to(state.device)
    processor = ListenProcessor.from_pretrained(arguments.model)
    longest = data.max_audio_seconds if data.long_audio == "cut" else None
    if longest is not None:
        processor.max_audio_seconds = longest
    options: dict[str, Any] = {
        "batch_size": arguments.batch_size,
        "num_workers": arguments.num_workers,
        "features": FeatureStore(data.features) if data.features else None,
        "join_silence_seconds": data.join_silence_seconds,
        "spelling_mapping": spelling_mapping(arguments.spelling_from),
        "num_beams": arguments.num_beams,
        "max_new_tokens": arguments.max_new_tokens,
        "progress": sys.stderr.isatty(),
    }
    dataset = select_rows(rows, tasks, arguments.max_examples)
    if arguments.cascade:
        dataset = tag_rows(dataset, load_recogniser(arguments.cascade, arguments.batch_size)(dataset))
    evaluate = partial(evaluate_model, model, processor, dataset, **options)
    result = evaluate(num_prompts=arguments.num_prompts).name_data(str(source.path) for source in data.eval)
    if arguments.sweep is not None:
        if state.is_main_process:
            result.save(arguments.output)  # kept if the sweep fails
        sweep = sweep_num_prompts(evaluate, arguments.sweep or default_counts(processor.num_prompts))
        result.without_prompts = sweep.without_prompts
        if state.is_main_process:
            sweep.save(arguments.output / "sweep")
    if state.is_main_process:
        folder = result.save(arguments.output)
        print_metrics(result)
        print(f"report: {folder / 'report.html'}")
