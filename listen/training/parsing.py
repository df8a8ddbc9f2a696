"""From a recipe and the command line to the arguments of a run.

A recipe is a YAML file with one section for each dataclass. Any value can be overridden by its dotted name, or by its
bare name where only one section has it:

    accelerate launch examples/train.py --config examples/configs/listen-llama3-8b.yaml \\
        --model.prompt_pool.pool_size 200 --training.learning_rate 1e-4 --bf16

Values are read as YAML (`true`, `1e-4`, `[a, b]`, `{x: 1}`, `null`); a flag without a value is `true`. A name that no
section has is an error that suggests the closest one, and so is a value of another type than its field's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .arguments import SECTIONS, DataArguments, ListenTrainingArguments, ModelArguments
from .values import ArgumentError, check_values, closest_name, field_names, refuse_unknown

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
"""The recipes of the package: in the repository a link to `examples/configs`."""


@dataclass(frozen=True)
class RunArguments:
    """All arguments of a run.

    Attributes:
        model: section `model`.
        data: section `data`.
        training: section `training`.
        raw: what the file and the command line said, for the run folder.
    """

    model: ModelArguments
    data: DataArguments
    training: ListenTrainingArguments
    raw: dict[str, Any]


def parse_arguments(argv: Sequence[str], sections: Mapping[str, type] = SECTIONS) -> RunArguments:
    """Read `--config FILE` and overrides.

    Args:
        argv: command line without the program's name.
        sections: dataclass of each section, for runs of another kind.

    Returns:
        The checked arguments.

    Raises:
        ArgumentError: an unknown name, a missing value, or a value that cannot be.
        FileNotFoundError: there is no such file.
    """
    overrides = _split(argv)
    files = [value for name, value in overrides if name == "config"]
    raw: dict[str, Any] = {}
    for file in files:
        merge_sections(raw, read_config(file))
    for name, value in overrides:
        if name != "config":
            _set(raw, resolve_name(name, sections), _parse_value(value))
    return build_arguments(raw, sections)


def build_arguments(raw: Mapping[str, Any], sections: Mapping[str, type] = SECTIONS) -> RunArguments:
    """Arguments from nested mappings, as a file would hold them, with a dataclass for each section.

    Raises:
        ArgumentError: see `parse_arguments`.
    """
    refuse_unknown(raw, list(sections), "")
    built = {}
    for section, kind in sections.items():
        values = raw.get(section) or {}
        refuse_unknown(values, field_names(kind), f"{section}.")
        built[section] = _construct(section, kind, check_values(f"{section}.", kind, values))
    return RunArguments(**built, raw={section: dict(raw.get(section) or {}) for section in sections})


def _construct(section: str, kind: type, values: Mapping[str, Any]) -> Any:
    try:
        return kind(**values)
    except ArgumentError:
        raise
    except ValueError as error:  # of transformers
        raise ArgumentError(f"section {section}: {error}") from error


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a recipe, a YAML file of sections.

    A recipe may name another one as `extends`, by its path relative to its own folder, and give only what differs:
    mappings are merged, all other values, lists too, replace those of the other recipe.

    Args:
        path: of a file, or the name of a recipe of the package, such as `listen-llama3-8b`.

    Raises:
        ArgumentError: it is not YAML, or not a mapping, or recipes extend each other in a circle.
        FileNotFoundError: there is no such file.
    """
    return _read_recipe(find_recipe(path), ())


def find_recipe(path: str | os.PathLike[str]) -> Path:
    """The file of a recipe that is given by its path, or by its name where the package has it.

    Raises:
        FileNotFoundError: there is no such file and no such name.
    """
    if Path(path).is_file():
        return Path(path)
    packaged = RECIPES / f"{os.fspath(path).removesuffix('.yaml')}.yaml"
    if packaged.is_file():
        return packaged
    known = sorted(str(file.relative_to(RECIPES).with_suffix("")) for file in recipe_files())
    raise FileNotFoundError(f"No such file or recipe {os.fspath(path)!r}{closest_name(os.fspath(path), known)}")


def recipe_files() -> list[Path]:
    """All recipes of the package; the folder `accelerate` configures launches."""
    found = [*RECIPES.glob("*.yaml"), *RECIPES.glob("*/*.yaml")]
    return [path for path in found if path.parent.name != "accelerate"]


def _read_recipe(path: Path, heirs: tuple[Path, ...]) -> dict[str, Any]:
    """Sections of a recipe that `heirs` extend, one after the other."""
    chain = (*heirs, path)
    if path.resolve() in {heir.resolve() for heir in heirs}:
        raise ArgumentError(f"recipes extend each other in a circle: {' -> '.join(map(str, chain))}; remove an extends")
    content = _read_yaml(path)
    base = content.pop("extends", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise ArgumentError(f"{path}: extends={base!r} must be the path of one recipe, relative to {path.parent}")
    sections = _read_recipe(path.parent / base, chain)
    merge_sections(sections, content)
    return sections


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}
    except yaml.YAMLError as error:
        raise ArgumentError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ArgumentError(f"{path} must hold the sections {', '.join(SECTIONS)}, found {type(content).__name__}")
    return content


def resolve_name(name: str, sections: Mapping[str, type] = SECTIONS) -> str:
    """Dotted name of an argument given with or without its section.

    Raises:
        ArgumentError: no section has it, or several have.
    """
    if name.split(".")[0] in sections:
        return name
    homes = [section for section, kind in sections.items() if name.split(".")[0] in field_names(kind)]
    if len(homes) == 1:
        return f"{homes[0]}.{name}"
    if homes:
        raise ArgumentError(f"--{name} is in the sections {', '.join(homes)}; write --{homes[0]}.{name}")
    everything = [f"{section}.{known}" for section, kind in sections.items() for known in field_names(kind)]
    raise ArgumentError(f"unknown argument --{name}{closest_name(name, everything)}")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: PyYAML would read `1e-4` as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _split(argv: Sequence[str]) -> list[tuple[str, str]]:
    """`--a 1 --b=2 --c` as pairs."""
    pairs: list[tuple[str, str]] = []
    position = 0
    while position < len(argv):
        word = argv[position]
        if not word.startswith("--"):
            raise ArgumentError(f"expected --name before {word!r}")
        name, equals, value = word[2:].partition("=")
        position += 1
        if not equals:
            has_value = position < len(argv) and not argv[position].startswith("--")
            value = argv[position] if has_value else "true"
            position += has_value
        pairs.append((name, value))
    return pairs


def _parse_value(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def _set(raw: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split(".")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ArgumentError(f"--{name}: {parent!r} holds {node!r}, which has no fields")
    node[last] = value


def merge_sections(base: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Merge `other` into `base`: mappings are merged, all other values, lists too, replace those of `base`."""
    for name, value in other.items():
        if isinstance(value, Mapping) and isinstance(base.get(name), dict):
            merge_sections(base[name], value)
        else:
            base[name] = value
