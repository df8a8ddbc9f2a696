"""Ask a LiSTEN model about sound files.

listen ask some.wav "What is being said?"
listen ask one.wav other.wav --task sv
listen ask some.wav "Who is late?" --model my/checkpoint --num-prompts 5 --show-prompts
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .. import ListenForConditionalGeneration, ListenPipeline, ListenProcessor

TINY = Path(__file__).resolve().parents[2] / "model_cards" / "listen-tiny"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="FILE ... QUESTION", help="sound files or URLs, then the question")
    parser.add_argument(
        "--model",
        default=str(TINY) if TINY.exists() else None,
        required=not TINY.exists(),  # the miniature is part of the repository, not of the package
        help="folder or Hub id of a LiSTEN model (default in the repository: listen-tiny)",
    )
    parser.add_argument("--task", help="name of a task in place of a question: asr, er, sv, en2zh, acap ...")
    parser.add_argument("--num-prompts", type=int, help="prompts to select from the pool (default: the model's)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="max new tokens of the answer")
    parser.add_argument("--max-audio-seconds", type=float, help="truncate longer files (default: no limit)")
    parser.add_argument("--number-clips", action="store_true", help="write `Clip 1:`, `Clip 2:` ... before the files")
    parser.add_argument("--show-prompts", action="store_true", help="also print which prompts were selected")
    return parser.parse_args()


def main() -> None:
    """Load the model, ask, print the answer."""
    arguments = parse_arguments()
    processor = ListenProcessor.from_pretrained(arguments.model)
    model = ListenForConditionalGeneration.from_pretrained(arguments.model)
    listen = ListenPipeline(model=model, processor=processor)
    clips, question = arguments.inputs, None
    if arguments.task is None or "{question}" in processor.task_instructions.get(arguments.task, ""):
        *clips, question = arguments.inputs
    if not clips or os.path.isfile(question or ""):
        raise SystemExit(f"{question!r} is where the question should be: ask FILE ... QUESTION")
    (answer,) = listen(
        {"audio": clips, "text": question, "task": arguments.task},
        num_prompts=arguments.num_prompts,
        max_audio_seconds=arguments.max_audio_seconds,
        number_clips=arguments.number_clips,
        return_prompts=arguments.show_prompts,
        max_new_tokens=arguments.max_new_tokens,
    )
    print(answer["generated_text"])
    for prompt in answer.get("prompts", []):
        print(f"prompt {prompt['index']:>4}  score {prompt['score']:.3f}")
