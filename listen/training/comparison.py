"""Comparisons: several methods, each trained with several seeds and evaluated on the same data. One cell is one run.

A recipe is a YAML file; paths in it start at the working folder, except those of recipes to extend:

    base: {extends: ../demo.yaml, training: {max_steps: 600}}       # sections of a training recipe, for all methods
    methods:
      connector alone: {model: {prompt_pool: {pool_size: 0}}}       # what differs from the base
      similarity pool: {model: {prompt_pool: {strategy: similarity}}}
      similarity pool, fixed k: {extends: similarity pool, model: {prompt_pool: {stochastic: false}}}
      trained on: {start_from: similarity pool, data: {train: [other.jsonl]}}   # its model of the same seed
    seeds: [0, 1, 2]
    evaluation: {data: [test.jsonl], max_examples: 100, further_num_prompts: [0]}
    output: runs/compare/example

Runs of one seed have the same data order, wordings and connector at the start, whatever their pool.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import TrainerCallback

from ..configuration_listen import BACKBONES, ListenPromptPoolConfig
from ..data.features import FeatureStore
from ..data.files import hold_folder, write_json
from ..data.precompute import precompute_features
from ..data.sources import DataSource, load_rows
from ..evaluation import evaluate_model
from ..evaluation.comparison import CELL_FILE, EVALUATION_FOLDER
from ..evaluation.evaluator import select_rows
from .arguments import SECTIONS, ModelArguments, parse_sources, task_names
from .build import adapter_settings, build_encoders
from .cost import CostCallback, parameter_counts
from .datasets import build_eval_dataset, build_train_dataset
from .parsing import RunArguments, build_arguments, merge_sections, read_config
from .push import MODEL_FOLDER
from .run import TrainResult, train
from .run_folder import RUN_FILE
from .values import ArgumentError, check_values, closest_name, field_names, refuse_unknown

ARGUMENTS_FILE = "arguments.json"
_OWN_TO_CELLS = ("output_dir", "resume", "seed")  # training arguments that the comparison sets


@dataclass(frozen=True)
class EvaluationArguments:
    """How cells are evaluated.

    Attributes:
        data: sources, as in `data.train`.
        tasks: evaluate only these tasks.
        max_examples: max examples per task, the first ones.
        batch_size: rows of a batch.
        max_new_tokens: max new tokens of an answer.
        num_beams: 1 for greedy answers.
        num_resamples: bootstrap resamples behind the intervals of each evaluation; the comparison draws its own.
        further_num_prompts: numbers of prompts at which models with a pool are evaluated too, such as 0; each is a
            row of the table.
    """

    data: list[Any]
    tasks: list[str] | None = None
    max_examples: int | None = None
    batch_size: int = 8
    max_new_tokens: int = 200
    num_beams: int = 1
    num_resamples: int = 1000
    further_num_prompts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
            ArgumentError: one is too small.
        """
        least = {"max_examples": 1, "batch_size": 1, "max_new_tokens": 1, "num_beams": 1, "num_resamples": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ArgumentError(f"evaluation.{name}={value} must be at least {bound}")
        if any(k < 0 for k in self.further_num_prompts):
            raise ArgumentError(f"evaluation.further_num_prompts={self.further_num_prompts} must be 0 or more")

    def sources(self) -> list[DataSource]:
        """What `data` names.

        Raises:
            ArgumentError: see `parse_sources`.
        """
        return parse_sources("evaluation.data", self.data)


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        method: name of the method.
        seed: seed of the run.
        sections: sections of its training arguments.
        evaluation: how it is evaluated.
        start_from: method whose trained model of the same seed it starts from; its folder in the comparison's is
            `model.checkpoint`.
        start: the run of that method with the same seed.
    """

    method: str
    seed: int
    sections: dict[str, dict[str, Any]]
    evaluation: EvaluationArguments
    start_from: str | None = None
    start: Cell | None = None

    @property
    def folder(self) -> str:
        """Its folder inside that of the comparison."""
        return _folder(self.method, self.seed)

    def identity(self) -> dict[str, Any]:
        """All arguments that its result depends on, as plain data."""
        training = {k: v for k, v in self.sections["training"].items() if k not in _OWN_TO_CELLS}
        sections = {**self.sections, "training": training, "evaluation": asdict(self.evaluation)}
        if self.start is not None:
            start = self.start.identity()
            sections["start"] = {name: start[name] for name in SECTIONS}
        return json.loads(json.dumps({"method": self.method, "seed": self.seed, **sections}, default=str))


def _folder(method: str, seed: int) -> str:
    return f"{''.join(c if c.isalnum() else '-' for c in method)}/seed-{seed}"


@dataclass(frozen=True)
class Comparison:
    """A comparison's recipe.

    Attributes:
        cells: all runs, method after method.
        output: folder of the results.
        reference: method that the table marks differences from.
        corpus: folder that the built-in corpus is generated in first; `None` for other data.
    """

    cells: list[Cell]
    output: str
    reference: str
    corpus: str | None = None

    @property
    def methods(self) -> list[str]:
        """Names of the methods."""
        return list(dict.fromkeys(cell.method for cell in self.cells))

    def cell(self, method: str, seed: int) -> Cell:
        """The run of a method with a seed.

        Raises:
            ArgumentError: there is none.
        """
        for cell in self.cells:
            if (cell.method, cell.seed) == (method, seed):
                return cell
        seeds = sorted({cell.seed for cell in self.cells})
        raise ArgumentError(f"no cell {method!r} with seed {seed}; the methods are {self.methods}, the seeds {seeds}")


def read_comparison(path: str | os.PathLike[str]) -> Comparison:
    """Read a comparison's recipe.

    Raises:
        ArgumentError: an unknown or missing name, a method that extends or starts from none, or a value that cannot be.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    content = read_config(path)
    refuse_unknown(content, ("base", "methods", "seeds", "evaluation", "output", "reference", "corpus"), "")
    methods, seeds = content.get("methods") or {}, content.get("seeds") or []
    if not methods or not seeds or not isinstance(methods, dict) or not all(isinstance(seed, int) for seed in seeds):
        raise ArgumentError(f"{path} needs methods (a mapping) and seeds (a list of whole numbers)")
    base = _base(path, content.get("base") or {})
    cells = []
    for name in methods:
        own = _method(name, methods, ())
        evaluation = {**(content.get("evaluation") or {}), **(own.pop("evaluation", None) or {})}
        cells += _cells(name, base, own, evaluation, seeds)
    folders = {cell.folder: cell.method for cell in cells}
    if len(folders) < len(cells):
        raise ArgumentError(f"{path}: two methods need the same folder, or a seed occurs twice; change their names")
    _check_starts(cells)
    runs = {(cell.method, cell.seed): cell for cell in cells}
    cells = [replace(cell, start=runs.get((cell.start_from, cell.seed))) for cell in cells]
    reference = content.get("reference") or next(iter(methods))
    if reference not in methods:
        raise ArgumentError(f"{path}: reference={reference!r} is no method{closest_name(reference, list(methods))}")
    output = content.get("output") or f"runs/compare/{path.stem}"
    return Comparison(cells, output, reference, content.get("corpus"))


def _check_starts(cells: Sequence[Cell]) -> None:
    starts = {cell.method: cell.start_from for cell in cells}
    for method, start in starts.items():
        if start is not None and starts.get(start, start) is not None:
            roots = [name for name, other in starts.items() if other is None]
            raise ArgumentError(f"method {method!r} starts from {start!r}; it can start from one of {roots}")


def _base(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    own = dict(given)
    extended = own.pop("extends", None)
    sections = read_config(path.parent / extended) if extended else {}
    merge_sections(sections, own)
    return sections


def _method(name: str, methods: Mapping[str, Any], heirs: tuple[str, ...]) -> dict[str, Any]:
    """What a method changes, with that of the method it extends."""
    if name not in methods:
        raise ArgumentError(f"method {heirs[-1]!r} extends {name!r}, which is none{closest_name(name, list(methods))}")
    if name in heirs:
        raise ArgumentError(f"methods extend each other in a circle: {' -> '.join((*heirs, name))}; remove an extends")
    own = copy.deepcopy(methods[name] or {})
    refuse_unknown(own, ("extends", "start_from", "evaluation", *SECTIONS), f"methods.{name}.")
    extended = own.pop("extends", None)
    changes = _method(extended, methods, (*heirs, name)) if extended else {}
    merge_sections(changes, own)
    return changes


def _cells(
    method: str, base: Mapping[str, Any], own: Mapping[str, Any], evaluation: Mapping[str, Any], seeds: Sequence[int]
) -> Iterator[Cell]:
    sections: dict[str, Any] = copy.deepcopy({name: dict(base.get(name) or {}) for name in SECTIONS})
    refuse_unknown(base, list(SECTIONS), "base.")
    own = dict(own)
    start_from = own.pop("start_from", None)
    if start_from is not None:  # a checkpoint brings all other settings of the model
        sections["model"] = {k: v for k, v in sections["model"].items() if k in ("dtype", "attn_implementation")}
    merge_sections(sections, own)
    for name in set(_OWN_TO_CELLS) & set(own.get("training") or {}):
        raise ArgumentError(f"methods.{method}.training.{name} is set by the comparison; leave it out")
    refuse_unknown(evaluation, field_names(EvaluationArguments), "evaluation.")
    if not evaluation.get("data"):
        raise ArgumentError("evaluation.data names no source; give the test split")
    if evaluation.get("tasks"):
        evaluation = {**evaluation, "tasks": task_names("evaluation.tasks", evaluation["tasks"])}
    checked = EvaluationArguments(**check_values("evaluation.", EvaluationArguments, evaluation))
    checked.sources()  # an error shows before the first run
    for seed in seeds:
        mine = copy.deepcopy(sections)
        mine["training"]["seed"] = seed
        if start_from is not None:
            mine["model"]["checkpoint"] = f"{_folder(start_from, seed)}/{MODEL_FOLDER}"
        model = build_arguments(mine).model  # an error of any method shows before the first run
        _check_further(method, model, checked)
        yield Cell(method, seed, mine, checked, start_from)


def _check_further(method: str, model: ModelArguments, evaluation: EvaluationArguments) -> None:
    """Refuse more prompts than a new pool holds; the pool of a checkpoint is not known yet."""
    pool = None if model.checkpoint else adapter_settings(model)["prompt_pool_config"]
    size = ListenPromptPoolConfig(**pool).pool_size if pool is not None else math.inf
    if any(k > size for k in evaluation.further_num_prompts):
        raise ArgumentError(
            f"methods.{method}: evaluation.further_num_prompts={evaluation.further_num_prompts} asks for more prompts "
            f"than pool_size={size}; give the method an evaluation.further_num_prompts of its own"
        )


def unequal_arguments(comparison: Comparison) -> list[str]:
    """A sentence for each argument of data, training or evaluation that is not the same for all methods."""
    flat = {}
    for cell in comparison.cells:
        identity = cell.identity()
        flat[cell.method] = flatten({name: identity[name] for name in ("data", "training", "evaluation")})
    sentences = []
    for name in sorted({name for values in flat.values() for name in values}):
        groups: dict[str, list[str]] = {}
        for method, values in flat.items():
            groups.setdefault(json.dumps(values.get(name)), []).append(method)
        if len(groups) > 1:
            usual = max(groups, key=lambda value: len(groups[value]))
            others = [f"{value} for {', '.join(map(repr, names))}" for value, names in groups.items() if value != usual]
            sentences.append(f"Not the same for all methods: `{name}` is {usual}, but {'; '.join(others)}.")
    return sentences


def unequal_machines(folders: Sequence[Path]) -> list[str]:
    """A sentence for each of precision, device, system and version that is not the same for all cells.

    Args:
        folders: of finished cells.
    """
    groups: dict[str, dict[str, list[str]]] = {}
    for folder in folders:
        for name, value in _machine_of(folder).items():
            groups.setdefault(name, {}).setdefault(json.dumps(value), []).append("/".join(folder.parts[-2:]))
    sentences = []
    for name, places in groups.items():
        usual = max(places, key=lambda value: len(places[value]))
        others = [f"{value} for {', '.join(found)}" for value, found in places.items() if value != usual]
        if others:
            sentences.append(f"Not the same for all cells: {name} is {usual}, but {'; '.join(others)}.")
    return sentences


def _machine_of(folder: Path) -> dict[str, Any]:
    """What a cell was trained with, all values in order if it went on elsewhere; nothing where that is not known."""
    if not (folder / RUN_FILE).is_file():
        return {}
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    machine = {}
    for name in ("bf16", "devices", "platform", "torch", "transformers"):
        values = [part.get(name, part["versions"].get(name)) for part in (run, *run.get("resumed", []))]
        machine[name] = values[0] if values.count(values[0]) == len(values) else values
    return machine


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {prefix + name: value}
    return found


def is_finished(cell: Cell, output: str | Path) -> bool:
    """Whether the cell was run to its end.

    Raises:
        ArgumentError: it was started with other arguments; the message names them.
    """
    folder = Path(output) / cell.folder
    started = folder / ARGUMENTS_FILE
    if started.is_file():
        before, now = json.loads(started.read_text(encoding="utf-8")), cell.identity()
        if "start" not in before:  # of earlier versions
            now.pop("start", None)
        old, new = flatten(before), flatten(now)
        changed = [
            f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
            for name in sorted({*old, *new})
            if old.get(name) != new.get(name)
        ]
        if changed:
            raise ArgumentError(
                f"{folder} was started with other arguments: {'; '.join(changed)}; choose another output folder, or "
                "remove this one"
            )
    return (folder / CELL_FILE).is_file()


def prepare(comparison: Comparison, models: str | Path | None = None, progress: bool = True) -> None:
    """Generate the corpus and encode all recordings, once for all cells that read stored features.

    Args:
        comparison: the recipe.
        models: see `run_cell`.
        progress: whether a progress bar is shown.
    """
    if comparison.corpus is not None:
        from ..data.corpus import build_corpus  # needs espeak-ng, which other data does not

        build_corpus(comparison.corpus, num_workers=min(2, os.cpu_count() or 1), progress=progress)
    by_folder: dict[str, Cell] = {}
    for cell in comparison.cells:
        features = cell.sections["data"].get("features")
        if features is not None and cell.start_from is None:  # others have no model yet
            by_folder.setdefault(features, cell)
    for features, cell in by_folder.items():
        run = _arguments(cell, models)
        model, processor = build_encoders(run.model)
        model.to(run.training.device)
        seed = run.training.sampling_seed
        parts = [build_train_dataset(run.data, seed), build_eval_dataset(run.data, seed), _test_rows(cell)]
        for part in parts:
            if part is not None:
                options = {"batch_size": run.training.per_device_eval_batch_size, "progress": progress}
                silence = run.data.join_silence_seconds
                precompute_features(model, processor, part, features, join_silence_seconds=silence, **options)


def run_cell(
    cell: Cell, output: str | Path, models: str | Path | None = None, callbacks: Sequence[TrainerCallback] = ()
) -> Path:
    """Train and evaluate one cell; a finished one is left as it is, an interrupted one goes on from its checkpoint.

    Args:
        cell: the run.
        output: folder of the comparison.
        models: folder whose subfolders replace backbones that the recipe names by Hub id: `openai/whisper-base` is
            read from `whisper-base` there if that exists.
        callbacks: further callbacks of the Trainer.

    Returns:
        The cell's folder, with `cell.json`, `evaluation/` and `model/`.

    Raises:
        ArgumentError: it was started with other arguments, or the cell that it starts from is not finished.
        FolderInUseError: another process runs it.
    """
    folder = Path(output) / cell.folder
    with hold_folder(folder, "cell"):
        if not is_finished(cell, output):
            _check_start_is_finished(cell, Path(output))
            write_json(folder / ARGUMENTS_FILE, cell.identity())
            _run(cell, Path(output), models, callbacks)
    return folder


def _check_start_is_finished(cell: Cell, output: Path) -> None:
    if cell.start is not None and not is_finished(cell.start, output):
        raise ArgumentError(
            f"{cell.method!r} starts from {cell.start_from!r}, whose run with seed {cell.seed} is not finished in "
            f"{output}; run that cell first"
        )


def _run(cell: Cell, output: Path, models: str | Path | None, callbacks: Sequence[TrainerCallback]) -> None:
    folder = output / cell.folder
    run = _arguments(cell, models, output, output_dir=str(folder), resume=True)
    settings = cell.evaluation
    rows = select_rows(_test_rows(cell), settings.tasks, settings.max_examples)  # missing ones show before the training
    cost = CostCallback(folder)
    result = train(run.model, run.data, run.training, raw=run.raw, callbacks=[cost, *callbacks])
    further = _evaluate(settings, run, result, rows, folder)
    losses = {name: value for name, value in result.eval_metrics.items() if name in ("eval_lm_loss", "eval_key_loss")}
    logs = [entry for entry in result.history if "lm_loss" in entry]
    pool = {name: value for name, value in logs[-1].items() if name.startswith("pool_")} if logs else {}
    content = {
        "method": cell.method,
        "seed": cell.seed,
        "figures": {**parameter_counts(result.model), **cost.figures(), **losses, **pool},
        "further_num_prompts": further,
        "history": result.history,
    }
    write_json(folder / CELL_FILE, content)
    for checkpoint in folder.glob("checkpoint-*"):  # only to go on from
        shutil.rmtree(checkpoint)


def _evaluate(
    settings: EvaluationArguments, run: RunArguments, result: TrainResult, rows: Dataset, folder: Path
) -> list[int]:
    """Evaluate the trained model with its own k and, if it has a pool, with each further k; return these."""
    names = [source.path for source in settings.sources()]
    options = {
        "batch_size": settings.batch_size,
        "max_new_tokens": settings.max_new_tokens,
        "num_beams": settings.num_beams,
        "num_resamples": settings.num_resamples,
        "features": FeatureStore(run.data.features) if run.data.features else None,
        "join_silence_seconds": run.data.join_silence_seconds,
        "progress": False,
    }
    evaluate = partial(evaluate_model, result.model, result.processor, rows, **options)
    evaluate().name_data(names).save(folder / EVALUATION_FOLDER)
    has_pool = result.model.config.prompt_pool_config is not None
    further = sorted(set(settings.further_num_prompts) - {result.processor.num_prompts}) if has_pool else []
    for k in further:
        evaluate(num_prompts=k).name_data(names).save(folder / f"{EVALUATION_FOLDER}-k{k}")
    return further


def _arguments(cell: Cell, models: str | Path | None, output: Path = Path(), **training: Any) -> RunArguments:
    sections = copy.deepcopy(cell.sections)
    sections["training"] |= training
    if cell.start_from is not None:
        sections["model"]["checkpoint"] = str(output / sections["model"]["checkpoint"])
    for name in BACKBONES:
        source = sections["model"].get(name)
        local = Path(models) / source.rpartition("/")[2].lower() if models and source else None
        if local is not None and not Path(source).exists() and local.is_dir():
            sections["model"][name] = str(local)
    return build_arguments(sections)


def _test_rows(cell: Cell) -> Dataset:
    return concatenate_datasets([load_rows(source) for source in cell.evaluation.sources()])
