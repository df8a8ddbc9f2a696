"""The folder of a run: what it holds, whose it is, and where the run goes on.

Every run writes its arguments, versions, seed and code, so that it can be understood and repeated. `run.json` gives the
run an id, which its checkpoints carry: a run resumes from its own checkpoints alone. One run writes to a folder at a
time, and a folder that holds the results of a run is only written to by resuming that run.
"""

from __future__ import annotations

import json
import platform
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..data.extras import DISTRIBUTION
from ..data.files import hold_folder, write_json, write_text
from ..data.processes import launched_processes
from ..data.revision import git_revision
from .push import MODEL_FOLDER
from .resumable import read_run_state
from .values import ArgumentError

logger = logging.get_logger(__name__)

CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"
_OPTIMIZER_FILES = ("*optimizer*", "global_step*")  # the Trainer's or FSDP's, and DeepSpeed's
_PACKAGES = (DISTRIBUTION, "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "numpy")
_NOT_COMPARED = {f"training.{name}" for name in ("output_dir", "resume", "resume_from_checkpoint", "disable_tqdm")}
_OPTIMIZER_FIELDS = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
_OF_OPTIMIZER = {f"training.{name}" for name in (*_OPTIMIZER_FIELDS, "layerwise_lr_decay", "pool_lr_factor")}


@dataclass
class Run:
    """A run and its folder.

    Attributes:
        folder: the run's `output_dir`.
        id: names the run in `run.json` and in its checkpoints.
        checkpoint: where it resumes from; `None` starts it.
        finished: steps after which it was finished; `None` before that.
        changed: settings that differ from those of the run so far: name -> old and new value.
    """

    folder: Path
    id: str
    checkpoint: str | None = None
    finished: int | None = None
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def write(self, arguments: Mapping[str, Any], seed: int, data: Mapping[str, Any] | None = None) -> None:
        """Write `config.yaml`, which `--config` reads, and `run.json`; the latter keeps what it holds of a resumed run.

        Args:
            arguments: sections of the arguments, as given.
            seed: the run's seed.
            data: what is known about the data, such as rows of each task.
        """
        known, data = _read_run(self.folder), dict(data or {})
        environment = {**describe_environment(), "bf16": (arguments.get("training") or {}).get("bf16", False)}
        if known.get("id") == self.id:
            if known.get("data", data) != data:  # a resumed run counts on the batches of before
                logger.warning(f"{self.folder} is resumed with other data: rows were {known['data']} and are {data}")
            resumed = {**environment, "data": data, "checkpoint": self.checkpoint, "changed": self.changed}
            run = {**known, "resumed": [*known.get("resumed", []), resumed]}
        else:
            run = {"id": self.id, **environment, "seed": seed, "data": data}
        write_text(self.folder / CONFIG_FILE, yaml.safe_dump(_plain(arguments), sort_keys=False, allow_unicode=True))
        write_json(self.folder / RUN_FILE, _plain(run))

    def finish(self, steps: int) -> None:
        """Note that the run is finished and its model is saved."""
        self.finished = steps
        write_json(self.folder / RUN_FILE, {**_read_run(self.folder), "id": self.id, "finished": steps})


@contextmanager
def open_run(arguments: TrainingArguments, settings: Mapping[str, Any] | None = None) -> Iterator[Run]:
    """Start or resume the run of a folder, and keep other processes from it.

    Args:
        arguments: their fields `output_dir`, `resume` and `resume_from_checkpoint` are used.
        settings: sections of all arguments, as given, to compare with those of a run that is resumed.

    Raises:
        ArgumentError: the folder holds a run and is not to be resumed, or the checkpoint to resume from does not exist,
            has no optimiser state or is another run's.
        FolderInUseError: another process trains in the folder.
    """
    folder = Path(arguments.output_dir)
    with hold_folder(folder, "training") if arguments.process_index == 0 else nullcontext():
        known = _read_run(folder)
        resume = arguments.resume_from_checkpoint or arguments.resume
        if resume:
            run = _resumed_run(arguments, folder, known, settings)
        else:
            _refuse_to_overwrite(folder)
            run = Run(folder, _new_id())
        launched_processes().wait_for_everyone()  # no process may write before all have read
        yield run


def chosen_settings(given: Mapping[str, Any], arguments: TrainingArguments) -> dict[str, Any]:
    """The settings with `training.bf16: auto` as what it is on this machine: a run may be resumed on another one."""
    training = given.get("training") or {}
    if training.get("bf16") != "auto":
        return dict(given)
    return {**given, "training": {**training, "bf16": arguments.bf16}}


def _new_id() -> str:
    return uuid.uuid4().hex[:12]


def _resumed_run(
    arguments: TrainingArguments, folder: Path, known: Mapping[str, Any], settings: Mapping[str, Any] | None
) -> Run:
    checkpoint = checkpoint_to_resume(arguments, known.get("id"))
    run_id = known.get("id") or (checkpoint and read_run_state(checkpoint).get("run_id")) or _new_id()
    finished = known.get("finished") if (folder / MODEL_FOLDER).is_dir() else None
    changed = _changed_settings(folder, settings) if settings else {}
    if changed and arguments.process_index == 0:
        listed = ", ".join(f"{name}: {old!r} -> {new!r}" for name, (old, new) in changed.items())
        logger.warning(f"{folder} is resumed with other settings than before: {listed}")
        for name in _OF_OPTIMIZER & changed.keys() if checkpoint else ():
            logger.warning(
                f"{name} stays as in the checkpoint, which holds the optimiser; for another value, start a run with "
                f"model.checkpoint={checkpoint}"
            )
    return Run(folder, run_id, checkpoint, finished, changed)


def _refuse_to_overwrite(folder: Path) -> None:
    results = [path.name for path in _checkpoints(folder)]
    if (folder / MODEL_FOLDER).is_dir():
        results.append(MODEL_FOLDER)
    if results:
        run = _read_run(folder)
        raise ArgumentError(
            f"training.output_dir={str(folder)!r} holds a run (id {run.get('id')}, started {run.get('started')}) with "
            f"{', '.join(results)}; resume it with training.resume=true, choose another training.output_dir, or delete "
            "the folder"
        )


def checkpoint_to_resume(arguments: TrainingArguments, run_id: str | None = None) -> str | None:
    """The checkpoint that the fields `resume` and `resume_from_checkpoint` ask for.

    Args:
        arguments: the run's arguments.
        run_id: id of the run; `None` takes a checkpoint of any run.

    Raises:
        ArgumentError: it does not exist, has no optimiser state, or is another run's.
    """
    wanted = arguments.resume_from_checkpoint or arguments.resume
    if wanted is True or wanted == "true":
        wanted = last_complete_checkpoint(Path(arguments.output_dir), run_id)
    if wanted and not Path(wanted).is_dir():
        raise ArgumentError(f"training.resume={wanted!r} is no checkpoint folder; give one, or true for the last")
    if wanted and _is_of_another_run(Path(wanted), run_id):
        raise ArgumentError(
            f"training.resume={wanted!r} is a checkpoint of the run {read_run_state(wanted)['run_id']}, but "
            f"{arguments.output_dir} holds the run {run_id}; give a checkpoint of that run, or another "
            "training.output_dir"
        )
    if wanted and not any(path for pattern in _OPTIMIZER_FILES for path in Path(wanted).glob(pattern)):
        raise ArgumentError(
            f"{wanted} holds no state of the optimiser (save_only_model), so no run can resume from it; leave "
            "training.resume out, and continue training with model.checkpoint"
        )
    return wanted or None


def last_complete_checkpoint(folder: Path, run_id: str | None = None) -> str | None:
    """The newest complete checkpoint of a run: its last file, the state of the Trainer, can be read.

    Args:
        folder: the run's folder.
        run_id: id of the run; `None` takes that of any.

    Raises:
        ArgumentError: all complete checkpoints are other runs'.
    """
    others = []
    for path in _checkpoints(folder):
        if not _is_complete(path):
            logger.warning(f"{path} is incomplete and is ignored")
        elif _is_of_another_run(path, run_id):
            others.append(f"{path.name} of the run {read_run_state(path)['run_id']}")
        else:
            if others:
                logger.warning(f"{folder} holds checkpoints of other runs, which are ignored: {', '.join(others)}")
            return str(path)
    if others:
        raise ArgumentError(
            f"{folder} holds the run {run_id}, but only checkpoints of other runs: {', '.join(others)}; choose another "
            "training.output_dir"
        )
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """Folders of checkpoints, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def _is_complete(checkpoint: Path) -> bool:
    try:
        return isinstance(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def _is_of_another_run(checkpoint: Path, run_id: str | None) -> bool:
    """Checkpoints of earlier versions carry no id."""
    return run_id is not None and read_run_state(checkpoint).get("run_id") not in (None, run_id)


def _read_run(folder: Path) -> dict[str, Any]:
    path = folder / RUN_FILE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise ArgumentError(
            f"{path} is damaged ({error}); delete it, and resume from a checkpoint by its path"
        ) from error


def _changed_settings(folder: Path, settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from those in the folder's `config.yaml`: name -> old and new value."""
    try:
        before = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, yaml.YAMLError):
        return {}
    old, new = _flat(before), _flat(_plain(settings))
    names = [name for name in {**old, **new} if name not in _NOT_COMPARED and old.get(name) != new.get(name)]
    return {name: (old.get(name), new.get(name)) for name in names}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {name: value} if name else {}
    parts = (_flat(item, f"{name}.{key}" if name else str(key)) for key, item in value.items())
    return {key: item for part in parts for key, item in part.items()}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def describe_environment() -> dict[str, Any]:
    """Command, time, versions, devices and the revision of the code."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "devices": devices or ["cpu"],
        "threads": torch.get_num_threads(),
        "git": git_revision(Path(__file__).resolve().parent),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
