"""The repository's own rules, checked by reading it: style, documentation, and what may import what."""

import ast
import importlib.metadata
import re
import statistics
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "listen"
FLAT = sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")
LIBRARY = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = [*sorted((ROOT / "examples").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py")), ROOT / "setup.py"]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
TEXT = [
    *LIBRARY,
    *SCRIPTS,
    *TESTS,
    *sorted((ROOT / "examples").rglob("*.yaml")),
    *(path for path in sorted(ROOT.rglob("*.md")) if not {".venv", "runs", ".pytest_cache"} & set(path.parts)),
    *(
        ROOT / name
        for name in (
            "Makefile",
            "pyproject.toml",
            "requirements.txt",
            "requirements-quantization.txt",
            "MANIFEST.in",
            ".ci/run",
        )
    ),
]

SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
PROVIDERS = importlib.metadata.packages_distributions()  # import name -> distributions
MAX_BODY = 50  # lines of a function, its docstring not counted
MAX_MEDIAN = 10
MAX_MODEL_BYTES = 20_000_000  # of all committed weights
HUB_PACKAGES = {
    "torch",
    "transformers",
    "numpy",
    "safetensors",
    "huggingface_hub",
}  # all with transformers
# written in pieces, so that this file may be read by its own rule
FORBIDDEN = [r"\bTO" r"DO\b", r"\bFIX" r"ME\b", r"\bXX" r"X\b", r"(?<![\w.])/wo" r"rk/", r"/ro" r"ot/", r"/ho" r"me/\w"]

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parse(path: Path) -> ast.Module:
    """Reads one file as a syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name_of(path: Path) -> str:
    """Path inside the repository, for test ids and messages."""
    return str(path.relative_to(ROOT))


def functions(tree: ast.AST) -> Iterator[FunctionNode]:
    """Yields every function and method, nested ones included."""
    return (node for node in ast.walk(tree) if isinstance(node, FunctionNode))


def public(tree: ast.Module) -> Iterator[ast.ClassDef | FunctionNode]:
    """Yields the public classes and functions of a module and the public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, FunctionNode)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (n for n in node.body if isinstance(n, FunctionNode) and not n.name.startswith("_"))


def body_lines(function: FunctionNode) -> int:
    """Counts the lines from the first statement after the docstring to the end."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return function.end_lineno - body[0].lineno + 1 if body else 0


def unannotated(function: FunctionNode) -> list[str]:
    """Names the arguments (and "return") that carry no annotation; self and cls need none."""
    a = function.args
    arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    missing = [arg.arg for arg in arguments if arg.annotation is None and arg.arg not in {"self", "cls"}]
    return missing + (["return"] if function.returns is None else [])


def load_time_imports(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yields the imports that surely run with the module: none inside functions, try or TYPE_CHECKING blocks."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.ClassDef):
            pending += node.body


def foreign_packages(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Top-level names outside the standard library that an absolute import asks for."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_library_neither_prints_nor_asserts(path: Path) -> None:
    found = []
    for node in ast.walk(parse(path)):
        is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        is_bare = isinstance(node, ast.ExceptHandler) and node.type is None
        if is_print or is_bare or isinstance(node, ast.Assert):
            found.append(f"{name_of(path)}:{node.lineno} {type(node).__name__}")
    assert found == []


@pytest.mark.parametrize("path", [*LIBRARY, *SCRIPTS], ids=name_of)
def test_signatures_are_annotated(path: Path) -> None:
    missing = {f"{f.name}:{f.lineno}": unannotated(f) for f in functions(parse(path)) if unannotated(f)}
    assert missing == {}


@pytest.mark.parametrize("path", [*LIBRARY, *SCRIPTS], ids=name_of)
def test_public_names_are_documented(path: Path) -> None:
    tree = parse(path)
    missing = [f"{node.name}:{node.lineno}" for node in public(tree) if not ast.get_docstring(node)]
    assert ast.get_docstring(tree), f"{name_of(path)} has no module docstring"
    assert missing == []


@pytest.mark.parametrize("path", [*LIBRARY, *SCRIPTS, *TESTS], ids=name_of)
def test_functions_are_short(path: Path) -> None:
    long = {f"{f.name}:{f.lineno}": body_lines(f) for f in functions(parse(path)) if body_lines(f) > MAX_BODY}
    assert long == {}


def test_the_median_function_is_small() -> None:
    lengths = [body_lines(f) for path in LIBRARY for f in functions(parse(path))]
    assert statistics.median(lengths) <= MAX_MEDIAN


@pytest.mark.parametrize("path", FLAT, ids=name_of)
def test_flat_modules_travel_alone(path: Path) -> None:
    """A checkpoint on the Hub carries flat neighbours only, and its user may have nothing but transformers."""
    text, tree = path.read_text(encoding="utf-8"), parse(path)
    # the pattern by which transformers finds the files to carry, docstrings included; "" stands for `from . import`
    neighbours = set(re.findall(r"^\s*from\s+\.(\S*)\s+import", text, flags=re.MULTILINE))
    assert neighbours <= {flat.stem for flat in FLAT}, "only `from .flat_module import name` reaches the Hub"
    imports = [node for node in load_time_imports(tree) if not getattr(node, "level", 0)]
    foreign = set().union(*map(foreign_packages, imports))
    assert foreign <= HUB_PACKAGES, "import it inside the function that needs it"


@pytest.mark.parametrize("path", [*LIBRARY, *SCRIPTS, *TESTS], ids=name_of)
def test_imports_are_declared(path: Path) -> None:
    """Nothing is imported, wherever the import stands, that setup.py does not ask for."""
    declared = {canonicalize_name(name) for name in re.findall(r'^ +.*?"([\w-]+)[<>=]=.*?"', SETUP, flags=re.MULTILINE)}
    own = {"listen", *(part for script in [*SCRIPTS, *TESTS] for part in (script.stem, script.parent.name))}
    imports = [node for node in ast.walk(parse(path)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    foreign = set().union(*(foreign_packages(node) for node in imports if not getattr(node, "level", 0))) - own
    providers = {name: PROVIDERS.get(name, [name]) for name in foreign}
    assert [name for name, dists in providers.items() if not declared & set(map(canonicalize_name, dists))] == []


@pytest.mark.parametrize("path", FLAT, ids=name_of)
def test_configs_are_told_apart_by_model_type(path: Path) -> None:
    """A local checkpoint folder loads its code twice: isinstance on its own config classes fails there."""
    ours = re.compile(r"(Listen|Beats)\w*Config\b")
    calls = [
        f"{name_of(path)}:{node.lineno}"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
        if ours.search(ast.unparse(node.args[1]))
    ]
    assert calls == []


@pytest.mark.parametrize("path", TEXT, ids=name_of)
def test_no_leftovers(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [f"{i}: {line.strip()}" for i, line in enumerate(lines, 1) for p in FORBIDDEN if re.search(p, line)]
    assert found == []


def test_no_module_is_a_junk_drawer() -> None:
    assert [name_of(path) for path in [*LIBRARY, *SCRIPTS] if re.search("utils?|misc|helpers?", path.stem)] == []


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_every_test_can_fail(path: Path) -> None:
    """Each test asserts something itself or calls a function that is named for doing so."""
    checks = re.compile(r"assert|raises|warns|check|expect", re.IGNORECASE)
    idle = []
    for function in functions(parse(path)):
        if not function.name.startswith("test_"):
            continue
        called = (ast.unparse(n.func) for n in ast.walk(function) if isinstance(n, ast.Call))
        if not any(isinstance(n, ast.Assert) for n in ast.walk(function)) and not any(map(checks.search, called)):
            idle.append(f"{function.name}:{function.lineno}")
    assert idle == []


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.yaml")), ids=name_of)
def test_recipes_are_mappings_without_repeated_keys(path: Path) -> None:
    class Strict(yaml.SafeLoader):
        """Refuses a key that occurs twice, which YAML would take in silence."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            assert len(keys) == len(set(keys)), f"{name_of(path)} repeats a key: {keys}"
            return super().construct_mapping(node, deep=deep)

    assert isinstance(yaml.load(path.read_text(encoding="utf-8"), Loader=Strict), dict)


@pytest.mark.parametrize("path", sorted((ROOT / "model_cards").rglob("*.py")), ids=name_of)
def test_model_folders_carry_the_code_of_today(path: Path) -> None:
    """A model folder holds copies of the flat modules, as its Hub repository would; they must not go stale."""
    assert path.read_text(encoding="utf-8") == (PACKAGE / path.name).read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", sorted((ROOT / "model_cards").iterdir()), ids=name_of)
def test_model_folders_are_small_and_hold_no_pickles(folder: Path) -> None:
    """Backbones that one folder borrows from another by a link count there alone."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.resolve().is_relative_to(folder)]
    assert sum(path.stat().st_size for path in files) < MAX_MODEL_BYTES
    assert [name_of(path) for path in files if path.suffix in {".pt", ".pth", ".bin", ".pkl", ".ckpt"}] == []
