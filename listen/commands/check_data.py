"""Check data before a run: rows, hours, labels, longest recordings, and what is broken or missing.

    listen check-data examples/configs/listen-llama3-8b.yaml
    listen check-data mine/train.jsonl '{path: datasets/LibriSpeech, format: librispeech, split: dev-clean}'

Takes recipes, whose sections `data` are read, and sources as a recipe names them. The exit status is 1 if something is
broken: a row, a missing or unreadable file, or a corpus with another number of rows than it must have.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from ..data.check import SourceReport, check_source
from ..data.sources import DataSource
from ..training import ArgumentError
from ..training.arguments import DataArguments, parse_sources
from ..training.classifier_arguments import ClassifierDataArguments
from ..training.parsing import RECIPES, read_config
from ..training.values import field_names, refuse_unknown
from .help import ArgumentFormatter


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ArgumentFormatter)
    parser.add_argument("data", nargs="+", metavar="CONFIG", help="recipes (.yaml), or sources of rows")
    parser.add_argument("--decode", action="store_true", help="decode every file in full: slow, finds truncated files")
    parser.add_argument("--max-problems", type=int, default=10, help="max problems to print for a source")
    arguments = parser.parse_args()
    if arguments.max_problems < 0:
        parser.error(f"--max-problems {arguments.max_problems} must be at least 0")
    return arguments


def sources_of(word: str) -> Iterator[tuple[str, DataSource]]:
    """The sources that a word of the command line names, each with its part: train, eval or none."""
    if not (word.endswith((".yaml", ".yml")) or (RECIPES / f"{word}.yaml").is_file()):
        yield from (("", source) for source in parse_sources(word, source_of_word(word)))
        return
    section: dict[str, Any] = read_config(word).get("data") or {}
    refuse_unknown(section, [*field_names(DataArguments), *field_names(ClassifierDataArguments)], "data.")
    for part in ("train", "eval"):
        yield from ((part, source) for source in parse_sources(f"data.{part}", section.get(part) or []))


def source_of_word(word: str) -> Any:
    """A mapping or a list as in a recipe; any other word is a path, whatever YAML would make of it."""
    try:
        value = yaml.safe_load(word)
    except yaml.YAMLError as error:
        if word.startswith(("{", "[")):
            raise ArgumentError(f"{word}: expected a path, or a source such as '{{path: a.csv, task: asr}}'") from error
        return word
    return value if isinstance(value, (dict, list)) else word


def print_report(part: str, report: SourceReport, max_problems: int) -> None:
    """Print what one source holds."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"\n{part + ': ' if part else ''}{report.label}")
    table = Table("task", "rows", "hours", "answers")
    for task, rows in report.tasks.items():
        labels = ", ".join(f"{label} {count}" for label, count in report.labels.get(task, {}).items())
        table.add_row(task, str(rows), f"{report.seconds[task] / 3600:.2f}", labels or "free text")
    if report.rows:
        console.print(table)
    if report.longest:
        console.print("longest: " + ", ".join(f"{seconds:.1f} s {name}" for seconds, name in report.longest))
    if report.unmeasured:
        console.print(f"not looked at: {report.unmeasured} clips elsewhere, such as URLs")
    for problem in report.problems[:max_problems]:
        console.print(f"  broken: {problem}")
    if len(report.problems) > max_problems:
        console.print(f"  ... and {len(report.problems) - max_problems} further problems")


def main() -> None:
    """Check every source; exit with 1 if something is broken."""
    arguments = parse_arguments()
    try:
        sources = [pair for word in arguments.data for pair in sources_of(word)]
    except (ArgumentError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if not sources:
        sys.exit(f"error: {', '.join(arguments.data)} names no data")
    num_problems = 0
    for part, source in sources:
        report = check_source(source, arguments.decode)
        print_report(part, report, arguments.max_problems)
        num_problems += len(report.problems)
    words = [f"{n} {word}{'' if n == 1 else 's'}" for n, word in ((len(sources), "source"), (num_problems, "problem"))]
    print(f"\n{', '.join(words)}")
    sys.exit(1 if num_problems else 0)
