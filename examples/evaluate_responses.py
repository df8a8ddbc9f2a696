"""Evaluate a model's answers to speech, and put several systems into one table.

    python examples/evaluate_responses.py --model runs/v3 --system v3 --data test.jsonl --output runs/v3/responses
    python examples/evaluate_responses.py --table runs/*/responses --output runs/table
    python examples/evaluate_responses.py --table runs/table/table.csv --output runs/table    # its orderings anew

The data are manifests: rows of the task `response` are answered (or those of `--references`, as
`examples/generate_targets.py` writes them), and every recording with an `emotion` is classified and probed. The folder
gets ROUGE, BERTScore with `--bert-score ENCODER`, the two scores of a judge with `--judge`, accuracy and unweighted
recall of emotion recognition, the linear probe, and a t-SNE map of the embeddings, all with 95 % intervals.

With `--cascade DIR` the system is a cascade: the label of that classifier is written before the speech, as in
`<happy>`, and its accuracy is that of the system.

`--judge` names a chat model: a folder or Hub id, or its name at `--judge-endpoint URL` (the key comes from
OPENAI_API_KEY). Its verdicts are stored in `verdicts.jsonl` as they come, and a second run asks only for those that are
missing. `--judge rules` scores answers of the built-in corpus exactly, by the rules they were made with. With
`--judge none` there are no scores by a judge, and the table shows "-".
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from rich.console import Console
from rich.table import Table

from listen.data.chat_models import EndpointChatModel, LocalChatModel
from listen.data.manifest import load_manifest
from listen.data.processes import launched_processes
from listen.evaluation.bert_score import BertScore
from listen.evaluation.cascade import load_recogniser
from listen.evaluation.judge import JudgeItem, Judgement, judge_by_rules, judge_responses
from listen.evaluation.response_table import load_scores, markdown_table, read_scores, write_table
from listen.evaluation.responses import ResponseEvaluation, evaluate_responses
from listen.modeling_listen import ListenForConditionalGeneration
from listen.processing_listen import ListenProcessor
from listen_command import errors_in_one_line


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("--model", help="checkpoint to evaluate: a folder or a Hub id")
    work.add_argument("--table", type=Path, nargs="+", metavar="RUN", help="folders of earlier runs, or a table.csv")
    parser.add_argument("--system", help="name of the system in tables; by default that of the model's folder")
    parser.add_argument("--data", nargs="+", default=[], help="one or more JSONL manifests")
    parser.add_argument("--references", nargs="+", help="manifests of the rows to answer, if not in the data")
    parser.add_argument(
        "--probe-train", nargs="+", help="manifests that the probe is trained on; else it holds out speakers"
    )
    parser.add_argument(
        "--classes", nargs="+", help="emotions to choose from; those of the rows or the task by default"
    )
    parser.add_argument("--cascade", help="classifier whose label is written before the speech, as in <happy>")
    parser.add_argument("--bert-score", metavar="ENCODER", help="text model behind BERTScore: a folder or a Hub id")
    parser.add_argument("--bert-score-layer", type=int, help="its layer; the last one by default")
    parser.add_argument("--judge", default="none", help="none, rules, or a chat model")
    parser.add_argument("--judge-endpoint", metavar="URL", help="OpenAI-compatible endpoint of the judge, up to /v1")
    parser.add_argument("--judge-max-new-tokens", type=int, default=256, help="max new tokens of a verdict")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order in which answers are judged")
    parser.add_argument("--max-examples", type=int, help="max examples to answer, and max other examples")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a batch, in each process")
    parser.add_argument("--num-prompts", type=int, help="prompts k; by default the processor's")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="max new tokens of an answer")
    parser.add_argument("--dtype", default="auto", help="of the backbones: auto, float32, bfloat16")
    parser.add_argument("--output", type=Path, default=Path("runs/responses"), help="folder of the results")
    arguments = parser.parse_args()
    if arguments.model and not arguments.data:
        parser.error("--model needs --data")
    if arguments.max_examples is not None and arguments.max_examples < 1:
        parser.error(f"--max-examples {arguments.max_examples} must be at least 1")
    if arguments.judge_endpoint and arguments.judge in ("none", "rules"):
        parser.error("--judge-endpoint needs the model's name there: --judge NAME")
    return arguments


def load(paths: Sequence[str] | None, most: int | None) -> Dataset | None:
    """Rows of manifests, at most `most` of the task `response` and of the others."""
    if not paths:
        return None
    rows = concatenate_datasets([load_manifest(path) for path in paths])
    if most is None:
        return rows
    is_response = [task == "response" for task in rows["task"]]
    some = [[place for place, flag in enumerate(is_response) if flag is kind][:most] for kind in (True, False)]
    return rows.select(sorted(sum(some, [])))


def build_judge(arguments: argparse.Namespace) -> Callable[[Sequence[JudgeItem]], Judgement] | None:
    """The judge that the arguments name; `None` for none."""
    if arguments.judge == "none":
        return None
    if arguments.judge == "rules":
        return judge_by_rules
    longest = arguments.judge_max_new_tokens
    if arguments.judge_endpoint:
        key = os.environ.get("OPENAI_API_KEY")
        model = EndpointChatModel(arguments.judge_endpoint, arguments.judge, api_key=key, max_new_tokens=longest)
    else:
        model = LocalChatModel(arguments.judge, device=launched_processes().device, max_new_tokens=longest)
    return partial(judge_responses, model, seed=arguments.seed, folder=arguments.output)


def run(arguments: argparse.Namespace) -> ResponseEvaluation:
    """Evaluate one system."""
    device = launched_processes().device
    model = ListenForConditionalGeneration.from_pretrained(arguments.model, dtype=arguments.dtype).to(device)
    bert_score = None
    if arguments.bert_score:
        bert_score = BertScore.from_pretrained(arguments.bert_score, arguments.bert_score_layer, device=device)
    return evaluate_responses(
        model,
        ListenProcessor.from_pretrained(arguments.model),
        load(arguments.data, arguments.max_examples),
        system=arguments.system or Path(arguments.model).name,
        references=load(arguments.references, arguments.max_examples),
        classes=arguments.classes,
        probe_train=load(arguments.probe_train, None),
        recognise=load_recogniser(arguments.cascade, arguments.batch_size) if arguments.cascade else None,
        bert_score=bert_score,
        judge=build_judge(arguments),
        batch_size=arguments.batch_size,
        num_prompts=arguments.num_prompts,
        max_new_tokens=arguments.max_new_tokens,
    )


def print_values(result: ResponseEvaluation) -> None:
    """Print the scores."""
    table = Table("score", "value", "95 % interval", title=result.system)
    for name, value in result.values.items():
        ends = result.intervals.get(name)
        table.add_row(name, f"{value:.3f}", f"{ends[0]:.3f} .. {ends[1]:.3f}" if ends else "")
    Console(markup=False).print(table)


def main() -> None:
    """Evaluate a system, or make a table of several."""
    arguments = parse_arguments()
    if arguments.table:
        systems = [
            system
            for path in arguments.table
            for system in (read_scores(path) if path.suffix == ".csv" else [load_scores(path)])
        ]
        print(markdown_table(systems))
        print(f"table: {write_table(systems, arguments.output) / 'table.md'}")
        return
    result = run(arguments)
    if launched_processes().is_main_process:
        result.save(arguments.output)
        print_values(result)
        print(f"scores: {arguments.output / 'metrics.json'}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
