"""Generate the targets of behavioural alignment: the frozen LLM's answers to the transcripts.

    listen targets --data speech.jsonl --llm meta-llama/Meta-Llama-3-8B-Instruct --output targets
    accelerate launch --num_processes 8 examples/generate_targets.py ...          # each process takes its share
    listen targets --data speech.jsonl --endpoint http://localhost:8000/v1 --llm NAME --output ...
    listen targets --data neutral.jsonl --kinds repeat response_untagged ...   # no emotions there

Each line of the data holds `audio`, `transcript` (or `text`) and `emotion`; `--columns transcript=sentence` names other
fields, and a data set of the Hub will do as well. The folder gets one manifest for each kind of target, which
`listen train` reads (`examples/configs/speech_emotion`). An interrupted run resumes where it stopped.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from ..data.chat_models import ChatModel, EndpointChatModel, LocalChatModel
from ..data.processes import launched_processes
from ..data.sources import FORMATS
from ..data.targets import KINDS, TargetSummary, generate_targets
from ..data.utterances import read_utterances
from .help import DTYPES, ArgumentFormatter


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ArgumentFormatter)
    parser.add_argument("--data", required=True, help="file, folder, corpus or data set; see docs/data.md")
    parser.add_argument("--format", choices=FORMATS, help="format of the data, by default after its name")
    parser.add_argument("--name", help="configuration of a data set")
    parser.add_argument("--split", default="train", help="part of a data set or corpus")
    parser.add_argument("--data-revision", help="commit or tag of a data set")
    parser.add_argument(
        "--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="audio, transcript, emotion, id"
    )
    parser.add_argument("--emotion-names", nargs="*", default=[], metavar="THEIRS=OURS", help="e.g. disgust=disgusted")
    parser.add_argument("--output", type=Path, required=True, help="folder of the targets")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="targets to write")
    parser.add_argument("--options", nargs="+", help="classes that rows of ser name; the paper's 15 by default")
    parser.add_argument("--llm", help="folder or Hub id of the LLM, or its name at the endpoint")
    parser.add_argument("--revision", help="commit or tag of the LLM")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the LLM")
    parser.add_argument("--attn-implementation", help="eager, sdpa, flash_attention_2")
    parser.add_argument("--endpoint", help="OpenAI-compatible endpoint, up to /v1; the key comes from OPENAI_API_KEY")
    parser.add_argument("--concurrency", type=int, default=16, help="requests to the endpoint at a time")
    parser.add_argument("--max-retries", type=int, default=5, help="max retries of a request")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds within which an attempt is answered")
    parser.add_argument("--batch-size", type=int, default=32, help="conversations at once, in each process")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="max new tokens of an answer")
    parser.add_argument(
        "--decoding",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="e.g. do_sample=true temperature=0.6 (default: greedy)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument(
        "--no-share",
        action="store_true",
        help="generate an answer for every utterance, also for equal words and emotions",
    )
    parser.add_argument("--keep-unfinished", action="store_true", help="keep truncated answers")
    arguments = parser.parse_args()
    _refuse_unread(parser, arguments)
    return arguments


def _refuse_unread(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse options that nothing reads beside the others."""
    local, remote = ("revision", "dtype", "attn_implementation"), ("concurrency", "max_retries", "timeout")
    for name in local if arguments.endpoint else remote:
        if getattr(arguments, name) != parser.get_default(name):
            place = "an LLM in this process" if arguments.endpoint else "requests to an --endpoint"
            parser.error(f"--{name.replace('_', '-')} is an option of {place}; leave it out here")
    if arguments.options and "ser" not in arguments.kinds:
        parser.error("--options are those of the kind ser, which --kinds leaves out")
    if "max_new_tokens" in pairs(arguments.decoding):
        parser.error("give the length of an answer by --max-new-tokens, not by --decoding")


def pairs(words: list[str]) -> dict[str, str]:
    """`["a=b"]` as a mapping."""
    for word in words:
        if "=" not in word:
            raise SystemExit(f"error: expected NAME=VALUE, found {word!r}")
    return dict(word.split("=", 1) for word in words)


def build_llm(arguments: argparse.Namespace) -> ChatModel | None:
    """The LLM that the arguments name; `None` where no kind needs one."""
    if all(KINDS[kind].source is not None for kind in arguments.kinds):
        return None
    if arguments.llm is None:
        raise SystemExit("error: name the LLM that answers: --llm NAME, or --endpoint URL --llm NAME")
    decoding: dict[str, Any] = {name: yaml.safe_load(value) for name, value in pairs(arguments.decoding).items()}
    decoding["max_new_tokens"] = arguments.max_new_tokens
    if arguments.endpoint:
        return EndpointChatModel(
            arguments.endpoint,
            arguments.llm,
            api_key=os.environ.get("OPENAI_API_KEY"),
            concurrency=arguments.concurrency,
            max_retries=arguments.max_retries,
            timeout=arguments.timeout,
            **decoding,
        )
    return LocalChatModel(
        arguments.llm,
        revision=arguments.revision,
        dtype=arguments.dtype,
        attn_implementation=arguments.attn_implementation,
        device=launched_processes().device,
        **decoding,
    )


def print_summary(summary: TargetSummary, folder: Path) -> None:
    """Print the number of rows of each kind, and why utterances have no row."""
    table = Table("kind", "rows", "failed", "empty", "cut off", title=f"Targets in {folder}")
    for kind, rows in summary.rows.items():
        counts = (rows, summary.failed[kind], summary.empty[kind], summary.unfinished[kind])
        table.add_row(kind, *map(str, counts))
    Console(markup=False).print(table)
    for error, count in summary.errors.items():
        print(f"{count} x {error}")
    if any(summary.failed.values()):
        print(f"Reasons are in {folder}/failed-*.jsonl. Run the same command again to retry what failed.")


def main() -> None:
    """Read the utterances, generate the targets, and print what the folder contains."""
    arguments = parse_arguments()
    utterances = read_utterances(
        arguments.data,
        columns=pairs(arguments.columns),
        emotion_names=pairs(arguments.emotion_names),
        name=arguments.name,
        split=arguments.split,
        revision=arguments.data_revision,
        format=arguments.format,
    )
    summary = generate_targets(
        utterances,
        arguments.output,
        build_llm(arguments),
        kinds=arguments.kinds,
        options=arguments.options,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        share_answers=not arguments.no_share,
        keep_unfinished=arguments.keep_unfinished,
    )
    if launched_processes().is_main_process:
        print_summary(summary, arguments.output)
