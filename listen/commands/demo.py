"""Ask a LiSTEN model in the browser: record or upload clips, choose a task or type a question.

listen demo
listen demo --model my/checkpoint --adapter other=my/other-checkpoint
listen demo --url http://localhost:8000/v1 --key KEY
listen demo --tasks asr er sv --host 0.0.0.0 --port 7860
"""

from __future__ import annotations

import argparse
import os

from .ask import TINY, add_model_argument
from .help import DTYPES, ArgumentFormatter

KEY_VARIABLE = "LISTEN_API_KEY"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ArgumentFormatter)
    source = parser.add_mutually_exclusive_group(required=not TINY.exists())
    add_model_argument(source, required=False)
    source.add_argument("--url", help="ask `listen serve` or another server with the OpenAI API: http://HOST:PORT/v1")
    parser.add_argument("--key", default=os.environ.get(KEY_VARIABLE), help=f"its key; default: {KEY_VARIABLE}")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=MODEL",
        help="offer the adapter of another checkpoint too; may be repeated",
    )
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the backbones")
    parser.add_argument("--tasks", nargs="+", help="tasks to offer (default: all of the model)")
    parser.add_argument("--max-audio-seconds", type=float, help="truncate longer clips (default: no limit)")
    parser.add_argument("--host", help="address to serve on (default: this machine alone)")
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="open a public link through gradio's servers")
    return parser.parse_args()


def main() -> None:
    """Load the model, or reach the server, and serve the page until it is interrupted."""
    arguments = parse_arguments()
    unnamed = [entry for entry in arguments.adapter if not all(entry.partition("="))]
    if unnamed:
        raise ValueError(f"--adapter {unnamed[0]} must be NAME=MODEL")
    if arguments.url and (arguments.adapter or arguments.max_audio_seconds or arguments.dtype != "auto"):
        raise ValueError(
            "--adapter, --dtype and --max-audio-seconds are options of the server: give them to `listen serve`"
        )
    adapters = dict(entry.split("=", 1) for entry in arguments.adapter)
    if len(adapters) < len(arguments.adapter):
        raise ValueError(f"--adapter {' '.join(arguments.adapter)}: two adapters have one name; rename one")
    from ..demo import LocalAnswers, ServedAnswers, build_page, launch  # gradio takes seconds, which --help need not

    if arguments.url:
        answers = ServedAnswers(arguments.url, arguments.key)
    else:
        answers = LocalAnswers(arguments.model, adapters, arguments.max_audio_seconds, arguments.dtype)
    page = build_page(answers, arguments.tasks)
    launch(page, server_name=arguments.host, server_port=arguments.port, share=arguments.share)
