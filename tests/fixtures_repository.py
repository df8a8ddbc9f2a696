"""The repository's files as text and syntax trees, for tests that read it."""

from __future__ import annotations

import ast
import fnmatch
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "listen"
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def ignored(path: Path) -> bool:
    """Whether git ignores a path, by the plain patterns of `.gitignore`."""
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    patterns = [".git", *(line.rstrip("/") for line in lines if line and not line.startswith("#"))]
    return any(fnmatch.fnmatch(part, pattern) for part in path.relative_to(ROOT).parts for pattern in patterns)


def tracked(pattern: str, *folders: str) -> list[Path]:
    """Files below some folders of the repository, or below all of it, that git does not ignore."""
    found = [path for folder in folders or (".",) for path in (ROOT / folder).rglob(pattern)]
    return sorted(path for path in found if not path.is_dir() and not ignored(path))


LIBRARY = tracked("*.py", "listen")
FLAT = [path for path in LIBRARY if path.parent == PACKAGE and path.stem not in ("__init__", "__main__")]
DOORS = sorted(ROOT.glob("*_listen.py"))
SCRIPTS = [*tracked("*.py", "examples", "benchmarks"), *DOORS, ROOT / "listen_command.py", ROOT / "setup.py"]
TESTS = tracked("*.py", "tests")
RECIPES = [path for path in tracked("*.yaml", "examples") if path.parent.name != "accelerate"]
LAUNCHES = tracked("*.yaml", "examples/configs/accelerate")
PAGES = tracked("*.md")


def name_of(path: Path) -> str:
    """Path inside the repository, for messages."""
    return str(path.relative_to(ROOT))


@cache
def lines_of(path: Path) -> list[str]:
    """The lines of a file."""
    return path.read_text(encoding="utf-8").splitlines()


@cache
def parse(path: Path) -> ast.Module:
    """Reads one file as a syntax tree."""
    return ast.parse("\n".join(lines_of(path)), filename=str(path))


def offenders(paths: Iterable[Path], find: Callable[[Path], Any]) -> dict[str, Any]:
    """What a rule finds wrong, by file; files without a finding are left out."""
    return {name_of(path): found for path in paths if (found := find(path))}


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


def imports_of(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    """Every import, wherever it stands."""
    return [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


def load_time_imports(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yields the imports that surely run with the module: none inside functions, try or TYPE_CHECKING blocks."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.ClassDef):
            pending += node.body


def absolute_modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Dotted names of the modules that an absolute import asks for; none for a relative one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [] if node.level else [node.module or ""]


def package_modules(path: Path, node: ast.Import | ast.ImportFrom) -> list[tuple[str, ...]]:
    """Modules inside `listen`, as parts of their names, that an import of a library file asks for.

    For `from .. import name` that is `name`, which may be a module or something that the package re-exports.
    """
    if isinstance(node, ast.Import) or not node.level:
        parts = [tuple(name.split(".")) for name in absolute_modules(node)]
        return [module[1:] for module in parts if module[0] == "listen"]
    above = path.relative_to(PACKAGE).parts[: -node.level]
    if node.module:
        return [(*above, *node.module.split("."))]
    return [(*above, alias.name) for alias in node.names]
