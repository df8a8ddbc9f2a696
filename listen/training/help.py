"""What `--help` and `--print_config` show: every argument of a run with its type, default and meaning."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from .arguments import SECTIONS
from .parsing import merge_sections, parse_arguments
from .values import check_values

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def answer_questions(argv: Sequence[str], description: str, sections: Mapping[str, type] = SECTIONS) -> None:
    """Answer `--help` or `--print_config` on stdout and exit with status 0; return where neither is asked for.

    `--print_config` prints all values that the recipes and the other arguments make, as a recipe that can be run.

    Args:
        argv: command line without the program's name.
        description: text above the arguments.
        sections: dataclass of each section.

    Raises:
        ArgumentError: the other arguments are not valid.
        FileNotFoundError: there is no such recipe.
    """
    if "--help" in argv or "-h" in argv:
        argument_parser(description, sections).print_help()
    elif "--print_config" in argv:
        run = parse_arguments([word for word in argv if word != "--print_config"], sections)
        sys.stdout.write(yaml.safe_dump(complete_recipe(run.raw, sections), sort_keys=False, allow_unicode=True))
    else:
        return
    sys.exit(0)


def argument_parser(description: str, sections: Mapping[str, type]) -> ArgumentParser:
    """A parser whose help lists all fields of the sections.

    It is for the help alone. `listen.training.parsing` reads the values, because jsonargparse 4.53 drops the rest of a
    mapping that a second recipe changes in part, makes text of numbers deeper in a mapping (`--model.lora.a.b 3`),
    refuses `1e4` for whole numbers, takes quoted text of a recipe as a number, and suggests no name for a wrong one.
    """
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Types and defaults by jsonargparse, the description as it is written."""

    parser = ArgumentParser(
        description=description,
        usage="%(prog)s [--config RECIPE] [--SECTION.NAME VALUE ...]",
        formatter_class=Formatter,
        print_config=None,
    )
    parser.add_argument("--config", metavar="RECIPE", help="recipe: a YAML file, or the name of one of the package's")
    parser.add_argument("--print_config", action="store_true", help="print all values as a recipe, and exit")
    notes = {}
    for section, kind in sections.items():
        parser.add_class_arguments(kind, section, fail_untyped=False)
        notes |= {f"{section}.{name}": text for name, text in _upstream_meanings(kind).items()}
    for action in parser._actions:
        if action.dest in sections:
            action.help = argparse.SUPPRESS  # of jsonargparse: a file for each section
        action.option_strings = [name for name in action.option_strings if not name.endswith("+")]
        action.help = action.help or notes.get(action.dest)
    return parser


def complete_recipe(raw: Mapping[str, Any], sections: Mapping[str, type] = SECTIONS) -> dict[str, Any]:
    """The values of a run with the defaults of all fields that it leaves out, as a recipe holds them."""
    complete: dict[str, Any] = {}
    for section, kind in sections.items():
        complete[section] = {entry.name: _default(entry) for entry in dataclasses.fields(kind) if entry.init}
        merge_sections(complete[section], check_values(f"{section}.", kind, raw.get(section) or {}))
    return complete


def _upstream_meanings(kind: type) -> dict[str, str]:
    """What transformers says of its fields; a field of ours that changes the default keeps the meaning."""
    bases = [base for base in reversed(kind.__mro__) if dataclasses.is_dataclass(base)]
    entries = [entry for base in bases for entry in dataclasses.fields(base) if "help" in entry.metadata]
    return {entry.name: entry.metadata["help"].replace("%%", "%") for entry in entries}


def _default(entry: dataclasses.Field[Any]) -> Any:
    value = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
    return getattr(value, "value", value)  # of an Enum
