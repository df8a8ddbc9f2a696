"""How far a reader has to go: own functions entered by one forward pass, and by one row on its way to a batch.

    python -m benchmarks.hops

Counts functions of `listen/`, each once, the files that they stand in, and how often a call leads from one file of ours
into another. Comprehensions, generator expressions and lambdas count too: a reader has to go through them as well.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType, FrameType
from typing import Any

import torch

import listen
from listen import ListenForConditionalGeneration, ListenProcessor
from listen.data import ListenCollator, load_manifest

PACKAGE = Path(listen.__file__).parent
MINIATURE = Path(__file__).resolve().parents[1] / "model_cards" / "listen-tiny"


@dataclass
class Hops:
    """What a call entered.

    Attributes:
        functions: `file:function` of ours, each once, in the order of first entry.
        changes: calls from one of our files into another.
    """

    functions: dict[str, None] = field(default_factory=dict)
    changes: int = 0

    @property
    def files(self) -> set[str]:
        """Files of ours that were entered."""
        return {name.split(":")[0] for name in self.functions}


def count_hops(call: Callable[[], Any]) -> Hops:
    """Run `call` and count the functions of `listen/` that it enters."""
    hops = Hops()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        file = own_file(frame.f_code)
        if event != "call" or file is None:
            return
        hops.functions[f"{file}:{frame.f_code.co_qualname}"] = None
        caller = frame.f_back
        while caller is not None and own_file(caller.f_code) is None:  # torch and transformers between two of ours
            caller = caller.f_back
        hops.changes += caller is not None and own_file(caller.f_code) != file

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return hops


def own_file(code: CodeType) -> str | None:
    """Path inside the package of the file that a function stands in; `None` for those of others."""
    path = Path(code.co_filename)
    return str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else None


def training_row(folder: Path) -> dict[str, Any]:
    """A row of speech recognition that names a recording, as training reads it from a manifest."""
    row = {"audio": str(MINIATURE / "samples" / "speech.wav"), "task": "asr", "response": "hello there"}
    manifest = folder / "rows.jsonl"
    manifest.write_text(json.dumps(row), encoding="utf-8")
    return load_manifest(manifest)[0]


def measure() -> dict[str, Hops]:
    """Hops of the miniature: `row to batch` by the training collator, `batch to loss` by a training forward."""
    model = ListenForConditionalGeneration.from_pretrained(MINIATURE).train()
    collator = ListenCollator(ListenProcessor.from_pretrained(MINIATURE), train=True)
    batches: list[dict[str, torch.Tensor]] = []
    with TemporaryDirectory() as folder:
        row = training_row(Path(folder))
    return {
        "row to batch": count_hops(lambda: batches.append(collator([row]))),
        "batch to loss": count_hops(lambda: model(**batches[0])),
    }


def main() -> None:
    """Print both counts, and the functions where asked."""
    for name, hops in measure().items():
        print(f"{name}: {len(hops.functions)} functions in {len(hops.files)} files, {hops.changes} changes of file")
        if "--functions" in sys.argv[1:]:
            print("  " + "\n  ".join(hops.functions))


if __name__ == "__main__":
    main()
