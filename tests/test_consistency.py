"""The repository's own rules of style and documentation, checked by reading it. Each test lists the offenders."""

import ast
import re
import statistics
from pathlib import Path

import yaml
from fixtures_repository import (
    LAUNCHES,
    LIBRARY,
    PACKAGE,
    PAGES,
    RECIPES,
    ROOT,
    SCRIPTS,
    TESTS,
    FunctionNode,
    body_lines,
    functions,
    lines_of,
    name_of,
    offenders,
    parse,
    public,
    tracked,
)

CODE = [*LIBRARY, *SCRIPTS]
SETTINGS = ("Makefile", "pyproject.toml", "requirements.txt", "requirements-quantization.txt", "MANIFEST.in", ".ci/run")
TEXT = [*CODE, *TESTS, *RECIPES, *LAUNCHES, *PAGES, *(ROOT / name for name in SETTINGS)]

MAX_BODY, MAX_MEDIAN, MAX_P90 = 50, 8, 20  # lines of a function, its docstring not counted
MAX_FILE = 600  # lines of a module
MAX_MODEL_BYTES = 24_000_000  # of a model folder: 9.5 M parameters in float16, and a tokenizer
PICKLES = {".pt", ".pth", ".bin", ".pkl", ".ckpt"}
# written in pieces, so that this file may be read by its own rule
FORBIDDEN = [r"\bTO" r"DO\b", r"\bFIX" r"ME\b", r"\bXX" r"X\b", r"(?<![\w.])/wo" r"rk/", r"/ro" r"ot/", r"/ho" r"me/\w"]


# The field says encode, state, trainable parameters; a rule for library, scripts and pages.
UNPLAIN = re.compile(
    r"(?<![a-z])(hears?|heard|hearing|ears|told(?! apart| of the emotion)|listens|listening|what learns|no source of"
    r"|at most so many|upon|unto|wherein|thereof|whence|lest|_nothing|without_waste|_claim)(?![a-z])",
    re.IGNORECASE,
)
# Instructions that models read, in the words of those who wrote them or in the language of users.
INSTRUCTIONS = re.compile(
    "You will hear a speech utterance|Do you only hear the same person|Answer from what you hear"
    "|Say in Chinese what you hear|What can be heard|What is heard before all else"
)

# What tests are about that is no one module: each a file `test_<theme>.py`.
THEMES = {
    *("consistency", "layers", "packaging", "readme", "benchmarks"),  # the repository
    *("modeling", "configuration", "listen_tiny", "real_models", "remote_code", "quantization"),  # the whole model
    *(
        "context",
        "conv_rotary",
        "learned_encoder",
        "speech_features",
        "kills",
        "add_task",
    ),  # one feature across modules
    *("prompts_in_layers", "ids_and_masks", "processing_fuzz"),  # likewise, and inputs that are odd or wrong
    *(
        "devices",
        "sharding",
        "hf_callers",
        "publishing",
        "transformers_serve",
        "deploy",
        "notebooks",
    ),  # machines, stock code and the Hub around the whole model
}


def unannotated(function: FunctionNode) -> list[str]:
    """Names the arguments (and "return") that carry no annotation; self and cls need none."""
    a = function.args
    arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    missing = [arg.arg for arg in arguments if arg.annotation is None and arg.arg not in {"self", "cls"}]
    return missing + (["return"] if function.returns is None else [])


def asserts_something(test: FunctionNode) -> bool:
    """Whether a test asserts something itself or calls a function that is named for doing so."""
    called = (ast.unparse(node.func) for node in ast.walk(test) if isinstance(node, ast.Call))
    checks = re.compile(r"assert|raises|warns|check|expect", re.IGNORECASE)
    return any(isinstance(node, ast.Assert) for node in ast.walk(test)) or any(map(checks.search, called))


def test_library_neither_prints_nor_asserts() -> None:
    def find(path: Path) -> list[str]:
        return [f"{node.lineno}: {type(node).__name__}" for node in ast.walk(parse(path)) if is_forbidden(node)]

    def is_forbidden(node: ast.AST) -> bool:
        is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        is_bare = isinstance(node, ast.ExceptHandler) and node.type is None
        return is_print or is_bare or isinstance(node, ast.Assert)

    assert offenders([path for path in LIBRARY if path.parent.name != "commands"], find) == {}  # commands print


def test_signatures_are_annotated() -> None:
    def find(path: Path) -> dict[str, list[str]]:
        return {f"{f.name}:{f.lineno}": unannotated(f) for f in functions(parse(path)) if unannotated(f)}

    assert offenders(CODE, find) == {}


def test_modules_and_public_names_are_documented() -> None:
    def find(path: Path) -> list[str]:
        missing = [] if ast.get_docstring(parse(path)) else ["the module"]
        return missing + [f"{n.name}:{n.lineno}" for n in public(parse(path)) if not ast.get_docstring(n)]

    assert offenders(CODE, find) == {}


def test_functions_are_short() -> None:
    def find(path: Path) -> dict[str, int]:
        return {f"{f.name}:{f.lineno}": body_lines(f) for f in functions(parse(path)) if body_lines(f) > MAX_BODY}

    assert offenders([*CODE, *TESTS], find) == {}


def test_most_functions_of_the_library_are_small() -> None:
    lengths = [body_lines(f) for path in LIBRARY for f in functions(parse(path))]
    assert statistics.median(lengths) <= MAX_MEDIAN
    assert statistics.quantiles(lengths, n=10, method="inclusive")[-1] <= MAX_P90


def test_modules_are_short() -> None:
    assert offenders(LIBRARY, lambda path: len(lines_of(path)) if len(lines_of(path)) > MAX_FILE else 0) == {}


def test_no_leftovers() -> None:
    def find(path: Path) -> list[str]:
        lines = enumerate(lines_of(path), 1)
        return [f"{i}: {line.strip()}" for i, line in lines if any(re.search(p, line) for p in FORBIDDEN)]

    assert offenders(TEXT, find) == {}


def test_prose_and_names_are_plain() -> None:
    def find(path: Path) -> list[str]:
        lines = ((i, INSTRUCTIONS.sub("", line)) for i, line in enumerate(lines_of(path), 1))
        return [f"{i}: {line.strip()}" for i, line in lines if UNPLAIN.search(line)]

    assert offenders([*CODE, *RECIPES, *PAGES], find) == {}


def test_no_module_is_a_junk_drawer() -> None:
    assert [name_of(path) for path in CODE if re.search("utils?|misc|helpers?", path.stem)] == []


def test_every_test_file_belongs_to_a_module_or_a_theme() -> None:
    """`test_<module>.py`, `test_<package>_<module>.py` or `test_<theme>.py`; `_real_data` marks those on recordings."""
    places = {(path.parent.name, re.sub("^modeling_|_listen$", "", path.stem)) for path in CODE}
    known = THEMES | {name for package, module in places for name in (package, module, f"{package}_{module}")}
    files = [path for path in TESTS if path.stem.startswith("test_")]
    subjects = {path: path.stem.removeprefix("test_").removesuffix("_real_data") for path in files}
    assert [name_of(path) for path, subject in subjects.items() if subject not in known] == []


def test_every_test_can_fail() -> None:
    def find(path: Path) -> list[str]:
        tests = (f for f in functions(parse(path)) if f.name.startswith("test_"))
        return [f"{test.name}:{test.lineno}" for test in tests if not asserts_something(test)]

    assert offenders(TESTS, find) == {}


def test_recipes_are_mappings_without_repeated_keys() -> None:
    """YAML itself takes the last of two equal keys and says nothing."""

    def find(path: Path) -> list[str]:
        recipe = yaml.compose("\n".join(lines_of(path)))
        return repeated_keys(recipe) if isinstance(recipe, yaml.MappingNode) else ["not a mapping"]

    def repeated_keys(node: yaml.Node) -> list[str]:
        if isinstance(node, yaml.SequenceNode):
            return [key for child in node.value for key in repeated_keys(child)]
        if not isinstance(node, yaml.MappingNode):
            return []
        keys = [key.value for key, _ in node.value]
        below = [key for _, child in node.value for key in repeated_keys(child)]
        return [key for key in set(keys) if keys.count(key) > 1] + below

    assert RECIPES
    assert offenders(RECIPES, find) == {}


def test_model_folders_carry_the_code_of_today() -> None:
    """A model folder holds copies of the flat modules, as its Hub repository would; they must not go stale."""

    def is_current(path: Path) -> bool:
        ours = PACKAGE / path.name
        return path.is_file() and ours.is_file() and lines_of(path) == lines_of(ours)

    copies = tracked("*.py", "model_cards")
    assert copies
    assert [name_of(path) for path in copies if not is_current(path)] == []


def test_model_folders_are_small_and_hold_no_pickles() -> None:
    """Backbones that one folder borrows from another by a link count there alone."""
    files = [path for path in tracked("*", "model_cards") if path.resolve() == path]
    assert [name_of(path) for path in files if path.suffix in PICKLES] == []
    folders = (ROOT / "model_cards").iterdir()
    sizes = {name_of(folder): sum(f.stat().st_size for f in files if f.is_relative_to(folder)) for folder in folders}
    assert {name: size for name, size in sizes.items() if not 0 < size < MAX_MODEL_BYTES} == {}
