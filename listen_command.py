"""The command `listen`, which lists the commands and runs one of them.

It stands beside the package, as importing that takes seconds: `listen --help` answers at once.
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

COMMANDS = {
    "ask": "ask a model about audio files",
    "serve": "serve a model over HTTP with the OpenAI API",
    "demo": "ask a model in the browser",
    "train": "train an adapter",
    "train-classifier": "train a classifier over a frozen encoder",
    "eval": "evaluate a model: metrics, predictions and a report",
    "compare": "train and evaluate methods with several seeds, and test all differences",
    "precompute": "encode all audio of a recipe once and store the features",
    "targets": "generate the targets of behavioural alignment",
    "check-data": "check data before a run: counts, hours, labels, broken files",
    "cost": "print parameters, memory and FLOPs of a model before it is built",
    "transformers": "run a command of transformers, such as `serve`, that knows LiSTEN models",
    "convert-beats": "convert a published BEATs checkpoint",
    "convert-salmonn": "convert a published SALMONN checkpoint",
}
MODULES = {"eval": "evaluate"}  # where the module has another name than the command
# Errors of use, of the machine or of what is installed. Others are errors of the code and keep their traceback.
ERRORS = (ValueError, OSError, ImportError)
TRACKERS = ("wandb", "mlflow", "trackio")  # their errors, such as that nobody is logged in, are errors of use too

# Options come from the help of a command, which the shell keeps: making it takes seconds.
COMPLETION = """\
_listen() {{
    local program=$1 command=${{COMP_WORDS[1]}} word=${{COMP_WORDS[COMP_CWORD]}}
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    elif [[ $word == -* ]]; then
        local options=_listen_options_${{command//[^a-z]/_}}
        [ -n "${{!options}}" ] || printf -v "$options" %s "$("$program" "$command" --help 2>/dev/null |
            grep -oE -- '--[a-z][A-Za-z0-9_.-]*' | sort -u)"
        COMPREPLY=($(compgen -W "${{!options}}" -- "$word"))
    fi
}}
complete -o default -F _listen listen
"""


def completion() -> str:
    """Commands for bash that complete the names of commands and options, and paths elsewhere."""
    return COMPLETION.format(commands=" ".join(COMMANDS))


def usage() -> str:
    """The text of `listen --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: listen COMMAND ...",
            "",
            "A frozen text LLM with audio input.",
            "",
            *lines,
            "",
            "`listen COMMAND --help` shows the arguments of a command.",
            'eval "$(listen --completion)" completes commands and options in bash.',
            "The variable LISTEN_TRACEBACK=1 shows the traceback of an error.",
        ]
    )


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Within it, an error of use ends the program with one line and exit status 1."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        is_use = isinstance(error, ERRORS) or type(error).__module__.partition(".")[0] in TRACKERS
        if not is_use or os.environ.get("LISTEN_TRACEBACK"):
            raise
        sys.exit(f"error: {error or type(error).__name__}")


def run(name: str) -> None:
    """Run one command with the words of `sys.argv`; see `errors_in_one_line`.

    Progress bars are left out where the output is redirected.
    """
    quiet = not sys.stderr.isatty()
    if quiet:
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when datasets is imported
    if isinstance(sys.stdout, io.TextIOWrapper):  # on Windows not in UTF-8 where it is redirected
        sys.stdout.reconfigure(errors="backslashreplace")
    with errors_in_one_line():
        module = importlib.import_module(f"listen.commands.{MODULES.get(name, name.replace('-', '_'))}")
        if quiet:
            importlib.import_module("transformers.utils.logging").disable_progress_bar()
        module.main()


def main(given: Sequence[str] | None = None) -> None:
    """The entry point: `given` in place of the words of the command line."""
    words = list(sys.argv[1:] if given is None else given)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if words[0] == "--completion":
        print(completion(), end="")
        return
    name, *rest = words
    if name not in COMMANDS:
        close = [known for known in COMMANDS if known.startswith(name)] or difflib.get_close_matches(
            name, COMMANDS, n=1
        )
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(COMMANDS)}"
        sys.exit(f"error: there is no command {name!r}; {hint}")
    sys.argv = [f"listen {name}", *rest]  # argparse names the program by it
    run(name)


if __name__ == "__main__":
    main()
