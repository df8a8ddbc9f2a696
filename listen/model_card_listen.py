"""Model cards: the README.md that checkpoints get, with metadata of the Hub, unless a person wrote one."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

CARD = "README.md"
_MARK = re.compile(r"\n<!-- Made by save_pretrained \(([0-9a-f]{12})\): an edited card is left as it is. -->\n\Z")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_UPSTREAM = "This model card has been automatically generated."  # of transformers, which says nothing of this model
_INHERITED = ("license", "license_name", "license_link", "language", "datasets", "tags")
_TASKS = {"listen": "audio-text-to-text", "listen_audio_classification": "audio-classification"}
_TEXT = """\
# {name}

{what}

```bash
pip install "transformers>=5.23" torch soundfile soxr{peft}
```

```python
from transformers import pipeline

{code}
```

`trust_remote_code=True` runs the model's code in this repository; read it first.

## Parts

{parts}
"""
_WHAT = {
    "listen": "A frozen text LLM with audio input ([LiSTEN](https://arxiv.org/abs/2505.18517)): frozen encoders, a "
    "trained connector, and a pool of soft prompts from which each input selects its own.",
    "listen_audio_classification": "A trained classifier over all layers of a frozen speech encoder.",
}
_CODE = {
    "listen": 'listen = pipeline("audio-llm", model={name!r}, trust_remote_code=True)\n'
    'print(listen("clip.wav", "What is being said?"))',
    "listen_audio_classification": 'classify = pipeline("audio-classification", model={name!r}, '
    'trust_remote_code=True)\nprint(classify("clip.wav"))',
}


class ModelCardMixin:
    """Pushing a model with a card of its own, and without folders of this machine."""

    card_data: dict[str, Any] | None = None  # metadata that only the user knows: license, language, datasets, tags

    _own_card: str | None = None

    @contextmanager
    def kept_card(self, folder: str | os.PathLike) -> Iterator[None]:
        """Within it a card that a person wrote stays: upstream writes its own, or the Hub's, over it before a push."""
        path = Path(folder) / CARD
        self._own_card = path.read_text(encoding="utf-8") if is_written_by_hand(path) else None
        try:
            yield
        finally:
            self._own_card = None

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """As upstream, which has put its own card into the folder by now, or the one on the Hub."""
        if self._own_card is not None:
            (Path(working_dir) / CARD).write_text(self._own_card, encoding="utf-8")
        write_model_card(working_dir, self, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def write_model_card(folder: str | os.PathLike, model: Any, repo_id: str | None = None) -> None:
    """Write `README.md` into a checkpoint, unless a person wrote or edited the one that is there.

    Args:
        folder: The checkpoint; scores are read from its `metrics.json`, if it has one.
        model: What was saved. Its `card_data`, and the card of the checkpoint that it came from, give what the weights
            do not tell: license, language, datasets and tags.
        repo_id: Where it goes on the Hub; the folder's name stands for it by default.
    """
    path = Path(folder) / CARD
    if is_written_by_hand(path):
        return
    name = repo_id or Path(folder).resolve().name
    saved = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    source = Path(model.config.name_or_path or folder) / CARD
    card = ModelCard(
        f"---\n{_metadata(name, saved, model, source, Path(folder)).to_yaml()}\n---\n\n{_text(name, saved)}"
    )
    content = str(card).rstrip() + "\n"
    mark = f"\n<!-- Made by save_pretrained ({_digest(content)}): an edited card is left as it is. -->\n"
    path.write_text(content + mark, encoding="utf-8")


def is_written_by_hand(path: Path) -> bool:
    """Whether a card is there that neither this module nor transformers made, or that was edited since."""
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8")
    mark = _MARK.search(text)
    return _UPSTREAM not in text if mark is None else _digest(text[: mark.start()]) != mark.group(1)


def _digest(content: str) -> str:
    return hashlib.sha256(content.strip().encode()).hexdigest()[:12]


def _metadata(name: str, saved: dict[str, Any], model: Any, source: Path, folder: Path) -> ModelCardData:
    known = ModelCard.load(source, ignore_metadata_errors=True).data.to_dict() if source.is_file() else {}
    given = model.card_data or {}
    if "license" in given:  # a name and a link belong to the license that they stood beside
        known = {field: value for field, value in known.items() if field not in ("license_name", "license_link")}
    data = {field: known[field] for field in _INHERITED if field in known} | given
    if not data.get("license"):  # ours covers the code alone
        data |= {"license": "other", "license_name": "see-base-models"}
    bases = dict.fromkeys(base_model_ids(saved))
    data["tags"] = list(dict.fromkeys([*(data.get("tags") or []), "listen", "audio", "custom_code"]))
    data.setdefault("language", ["en"])
    if bases:
        data |= {"base_model": [*bases], "base_model_relation": "adapter"}
    results = _results(folder / "metrics.json", saved, data.get("datasets") or [])
    if results:
        data |= {"model_name": name, "eval_results": results}
    return ModelCardData(library_name="transformers", pipeline_tag=_TASKS[saved["model_type"]], **data)


def base_model_ids(saved: dict[str, Any]) -> list[str]:
    """Hub ids of the backbones of a saved config; folders are no ids."""
    places = [spec["base_model_name_or_path"] for spec in (saved.get("base_models") or {}).values()]
    return [place for place in places if _HUB_ID.fullmatch(place)]


def _results(path: Path, saved: dict[str, Any], datasets: list[str] | str) -> list[EvalResult]:
    """The scores of each task in a `metrics.json` of an evaluation."""
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    names = [datasets] if isinstance(datasets, str) else datasets
    dataset = names[0] if len(names) == 1 else "other"
    return [
        EvalResult(
            task_type=_TASKS[saved["model_type"]],
            task_name=task,
            dataset_type=dataset,
            dataset_config=task,  # the Hub merges results that differ in the name of the task alone
            dataset_name=f"{task} of {dataset}" if names else task,
            metric_type=metric,
            metric_name=metric,
            metric_value=value,
        )
        for task, values in scores.items()
        if isinstance(values, dict) and "n" in values
        for metric, value in values.items()
        if metric != "n" and isinstance(value, (int, float)) and math.isfinite(value)
    ]


def _text(name: str, saved: dict[str, Any]) -> str:
    kind = saved["model_type"]
    parts = [
        f"- {part.replace('_', ' ')}, frozen: {_place(spec)}" for part, spec in (saved.get("base_models") or {}).items()
    ]
    parts.append("- this repository: the trained weights" if parts else "- this repository: all weights")
    peft = " peft" if saved.get("lora_config") else ""
    code = _CODE[kind].format(name=name)
    return _TEXT.format(name=name, what=_WHAT[kind], peft=peft, code=code, parts="\n".join(parts))


def _place(spec: dict[str, Any]) -> str:
    path, revision = spec["base_model_name_or_path"], spec.get("revision") or "main"
    if path.startswith("./"):
        return f"the folder `{path[2:]}` of this repository"
    return f"`{path}` at revision `{revision}`" if _HUB_ID.fullmatch(path) else "a local folder"


__all__ = ["ModelCardMixin", "base_model_ids", "is_written_by_hand", "write_model_card"]
