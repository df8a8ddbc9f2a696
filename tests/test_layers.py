"""What may import what: the flat modules that travel with a checkpoint, and the dependencies."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

from fixtures_repository import (
    DOORS,
    FLAT,
    LIBRARY,
    PACKAGE,
    ROOT,
    SCRIPTS,
    TESTS,
    absolute_modules,
    ignored,
    imports_of,
    lines_of,
    load_time_imports,
    name_of,
    offenders,
    package_modules,
    parse,
)
from packaging.utils import canonicalize_name
from transformers.dynamic_module_utils import get_imports

HUB_PACKAGES = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub"}  # all with transformers
# from below; the flat modules lie beneath them
LAYERS = ("data", "analysis", "evaluation", "training", "serving", "demo", "commands")
ROOT_ENTRIES = {
    *("listen", "examples", "tests", "benchmarks", "model_cards", "docs", "deploy", ".ci"),
    *("modeling_listen.py", "configuration_listen.py", "processing_listen.py", "setup.py"),
    "listen_command.py",
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff", "LICENSE", "NOTICE"),
    *("Makefile", "pyproject.toml", "requirements.txt", "requirements-quantization.txt", "MANIFEST.in", ".gitignore"),
}
PROVIDERS = importlib.metadata.packages_distributions()  # import name -> distributions


def foreign_packages(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Top-level names outside the standard library that an absolute import asks for."""
    return {name.split(".")[0] for name in absolute_modules(node)} - sys.stdlib_module_names


def layer(module: tuple[str, ...]) -> int:
    """Layer of a module of the package, given as the parts of its name below `listen`."""
    return LAYERS.index(module[0]) + 1 if module and module[0] in LAYERS else 0


def test_no_module_imports_a_layer_above_its_own() -> None:
    """Neither at load time nor inside functions, nor for type checkers alone."""

    def find(path: Path) -> list[str]:
        own = layer(path.relative_to(PACKAGE).parts)
        asked = [(node.lineno, module) for node in imports_of(parse(path)) for module in package_modules(path, node)]
        return [f"{line}: {'.'.join(module)}" for line, module in asked if layer(module) > own]

    assert {path.parent.name for path in LIBRARY} >= set(LAYERS)
    assert offenders([path for path in LIBRARY if path != PACKAGE / "__init__.py"], find) == {}


def test_the_package_imports_itself_relatively() -> None:
    def find(path: Path) -> list[int]:
        nodes = imports_of(parse(path))
        return [node.lineno for node in nodes if any(n.split(".")[0] == "listen" for n in absolute_modules(node))]

    assert offenders(LIBRARY, find) == {}


def test_doors_at_the_root_are_a_docstring_and_one_import() -> None:
    def find(path: Path) -> list[str]:
        docstring, *body = parse(path).body
        whole = isinstance(docstring, ast.Expr) and [type(node) for node in body] == [ast.ImportFrom, ast.Assign]
        if not whole or body[0].module != "listen":
            return [ast.unparse(node) for node in body]
        names, (target,) = [alias.name for alias in body[0].names], body[1].targets
        exported = ast.literal_eval(body[1].value)
        return [] if (ast.unparse(target), sorted(exported)) == ("__all__", sorted(names)) else exported

    assert [name_of(path) for path in DOORS] == [
        "configuration_listen.py",
        "modeling_listen.py",
        "processing_listen.py",
    ]
    assert offenders(DOORS, find) == {}


def test_the_root_holds_what_a_newcomer_looks_for() -> None:
    assert {path.name for path in ROOT.iterdir() if not ignored(path)} - ROOT_ENTRIES == set()


def test_flat_modules_travel_alone() -> None:
    """A checkpoint on the Hub carries flat neighbours only, and its user may have nothing but transformers."""
    flat = {path.stem for path in FLAT}
    # the pattern by which transformers finds the files to carry, docstrings included; "" stands for `from . import`
    carried = re.compile(r"^\s*from\s+\.(\S*)\s+import", flags=re.MULTILINE)

    def find(path: Path) -> set[str]:
        neighbours = set(carried.findall("\n".join(lines_of(path))))
        foreign = set().union(*map(foreign_packages, load_time_imports(parse(path))))  # those in functions are free
        return {f".{name}" for name in neighbours - flat} | (foreign - HUB_PACKAGES)

    assert offenders(FLAT, find) == {}


def test_loading_from_the_hub_asks_for_no_optional_package() -> None:
    """transformers loads no repository of which a file imports a missing package, be it inside a function."""
    always = HUB_PACKAGES | {"soundfile", "fsspec"} | set(sys.stdlib_module_names)  # fsspec comes with huggingface_hub

    def find(path: Path) -> set[str]:
        return set(get_imports(path)) - always

    assert offenders(FLAT, find) == {}


def test_imports_are_declared() -> None:
    """Nothing is imported, wherever the import stands, that setup.py does not ask for."""
    setup = "\n".join(lines_of(ROOT / "setup.py"))
    declared = {canonicalize_name(name) for name in re.findall(r'^ +.*?"([\w-]+)[<>=]=.*?"', setup, flags=re.MULTILINE)}
    own = {"listen", *(part for script in [*SCRIPTS, *TESTS] for part in (script.stem, script.parent.name))}

    def find(path: Path) -> list[str]:
        foreign = set().union(*map(foreign_packages, imports_of(parse(path)))) - own
        return [name for name in foreign if not declared & set(map(canonicalize_name, PROVIDERS.get(name, [name])))]

    assert offenders([*LIBRARY, *SCRIPTS, *TESTS], find) == {}


def test_configs_are_told_apart_by_model_type() -> None:
    """A local checkpoint folder loads its code twice: isinstance on its own config classes fails there."""
    ours = re.compile(r"(Listen|Beats)\w*Config\b")

    def find(path: Path) -> list[int]:
        calls = (node for node in ast.walk(parse(path)) if isinstance(node, ast.Call))
        checks = (call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "isinstance")
        return [call.lineno for call in checks if ours.search(ast.unparse(call.args[1]))]

    assert offenders(FLAT, find) == {}
