"""What `pip install` ships, what it asks for, and that the checkout works from anywhere."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
CARD = {  # the packages that the design names
    *("torch", "transformers", "accelerate", "peft", "datasets", "evaluate"),
    *("huggingface_hub", "safetensors", "soundfile", "librosa"),
}
GENERATED = shutil.ignore_patterns(
    ".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "model_cards"
)


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    """Runs this interpreter and returns what it wrote; a failure shows both of its streams."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{arguments} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_checkout(target: Path) -> Path:
    """Copies the checkout without anything that is generated, as a fresh clone would have it."""
    return Path(shutil.copytree(ROOT, target, ignore=GENERATED))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a checkout in which stray files lie about."""
    source = copy_checkout(tmp_path_factory.mktemp("source") / "my-clone")
    for stray in ("conftest.py", "runs/demo/left.py", "build/lib/listen/removed.py"):
        (source / stray).parent.mkdir(parents=True, exist_ok=True)
        (source / stray).write_text('"""Not part of the package."""\n')
    out = tmp_path_factory.mktemp("wheel")
    python("-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", str(out), ".", cwd=source)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def requirements(wheel: Path) -> dict[str, Requirement]:
    """The requirements that the wheel's metadata states, by canonical name."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    parsed = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    return {canonicalize_name(r.name): r for r in parsed}


BASE_PROGRAM = """
import sys
from importlib.machinery import PathFinder

class Base(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {refused!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Base
{program}
"""
ANSWER = """
from transformers import AutoModel, pipeline
import listen, listen.data
ask = pipeline("audio-llm", model={model!r}, trust_remote_code=True)
print(ask({model!r} + "/samples/speech.wav", "What is being said?", max_new_tokens=2)[0]["generated_text"])
"""
REFUSALS = """
def refusal(ask):
    try:
        ask()
    except (ImportError, ValueError) as error:
        print(error)

import importlib
refusal(lambda: importlib.import_module("listen.evaluation"))
refusal(lambda: importlib.import_module("listen.analysis.queries"))
from listen.data.corpus.espeak import find_espeak_library
refusal(find_espeak_library)
from listen.training import ListenTrainingArguments
refusal(lambda: ListenTrainingArguments(output_dir={folder!r}, use_cpu=True))
"""


def modules_of_extras(requirements: dict[str, Requirement]) -> set[str]:
    """Import names of the packages that extras alone install, and that nothing of the base brings."""
    providers = importlib.metadata.packages_distributions()
    extras = {name for name, requirement in requirements.items() if requirement.marker}
    brought = {"packaging", "setuptools", "tokenizers", "pandas"}  # by torch, transformers and datasets
    names = {module for module, by in providers.items() for one in by if canonicalize_name(one) in extras - brought}
    assert names >= {"jiwer", "matplotlib", "nltk", "sacrebleu", "sklearn", "tensorboard", "torchao"}
    return names


def test_answering_needs_no_extra(requirements: dict[str, Requirement], tmp_path: Path) -> None:
    model = ROOT / "model_cards" / "listen-tiny"
    if not (model / "config.json").exists():
        pytest.skip("model_cards/listen-tiny is absent")
    program = ANSWER.format(model=str(model)) + REFUSALS.format(folder=str(tmp_path / "run"))
    text = BASE_PROGRAM.format(refused=modules_of_extras(requirements), program=program)
    answer, *refusals = python("-c", text, cwd=tmp_path, PYTHONPATH=str(ROOT)).strip().splitlines()
    assert answer
    named = [re.search(r"(\w+).*is not installed.*pip install 'listen-audio-llm\[(\w+)\]'", line) for line in refusals]
    assert [match and match[2] for match in named] == ["eval", "eval", "corpus", "train"], refusals


def test_no_text_installs_the_other_project_of_that_name() -> None:
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "listen").rglob("*.py"), ROOT / "setup.py"]
    texts += [*(ROOT / "examples").rglob("*.py"), *ROOT.glob("*.txt")]
    pattern = re.compile(r"pip install (-\S+ )*['\"]?listen(?![\w-])")
    assert [path for path in texts if pattern.search(path.read_text(encoding="utf-8"))] == []
    assert 'name="listen-audio-llm"' in (ROOT / "setup.py").read_text(encoding="utf-8")


def pins() -> list[Requirement]:
    """The lines of requirements.txt, and of those that the tests need beside it."""
    texts = [(ROOT / name).read_text() for name in ("requirements.txt", "requirements-quantization.txt")]
    lines = (line.split("#")[0].strip() for text in texts for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


def expected_modules() -> set[str]:
    """Archive names of all modules by rule: everything below the package folder."""
    return {str(path.relative_to(ROOT)) for path in (ROOT / "listen").rglob("*.py")}


def expected_recipes() -> set[str]:
    """Archive names of the recipes, which lie below examples."""
    configs = ROOT / "examples" / "configs"
    return {f"listen/recipes/{path.relative_to(configs)}" for path in configs.rglob("*.yaml")}


def test_wheel_holds_exactly_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    info = {name for name in names if ".dist-info/" in name}
    assert names - info == expected_modules() | expected_recipes() | {"listen/py.typed", "listen_command.py"}
    assert any(name.endswith("LICENSE") for name in info)


def test_the_package_holds_code_only() -> None:
    """Data files would need a package_data entry to be shipped; there are none to forget."""
    files = [path for path in (ROOT / "listen").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert [path.name for path in files if path.suffix != ".py"] == ["py.typed"]


def test_every_module_of_the_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    python("-m", "pip", "install", "-qq", "--no-deps", "--target", str(tmp_path), str(wheel), cwd=tmp_path)
    program = (
        "import importlib, pkgutil, listen\n"
        "names = [m.name for m in pkgutil.walk_packages(listen.__path__, 'listen.')]\n"
        "modules = [importlib.import_module(name) for name in names]\n"
        "print(listen.__file__, len(modules))"
    )
    where, count = python("-c", program, cwd=Path("/"), PYTHONPATH=str(tmp_path)).split()
    assert Path(where) == tmp_path / "listen" / "__init__.py"
    assert int(count) == len(expected_modules()) - 1  # all but listen/__init__.py itself


def test_requirements_have_bounds_and_hold_the_design_card(requirements: dict[str, Requirement]) -> None:
    hard = {name: r for name, r in requirements.items() if r.marker is None}
    assert {canonicalize_name(name) for name in CARD} <= set(hard)
    for requirement in requirements.values():
        assert any(s.operator in {">=", "=="} for s in requirement.specifier), f"no lower bound: {requirement}"
    assert hard["transformers"].specifier == Requirement("transformers>=5.23").specifier
    assert str(requirements["espeakng-loader"].marker) == 'extra == "corpus"'


def test_each_requirement_states_its_reason() -> None:
    lines = re.findall(r'^ +"[\w-]+[>=]=[\d.]+",.*$', (ROOT / "setup.py").read_text(), flags=re.MULTILINE)
    assert len(lines) >= len(CARD)
    assert [line for line in lines if not re.search(r"  # \w+", line)] == []


def test_pins_are_exact_start_with_torch_and_cover_setup(requirements: dict[str, Requirement]) -> None:
    exact = {canonicalize_name(pin.name): pin for pin in pins()}
    assert str(pins()[0]) == "torch==2.13.0"
    assert set(exact) == set(requirements)
    for name, pin in exact.items():
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert specifier.version in requirements[name].specifier, f"{pin} is outside {requirements[name]}"


def test_tests_run_on_the_pins() -> None:
    installed = {pin: Version(importlib.metadata.version(pin.name)) for pin in pins()}
    # a local build such as 2.13.0+cpu is the pinned version
    assert [f"{pin}, but {is_} is installed" for pin, is_ in installed.items() if is_.public not in pin.specifier] == []


def test_editable_install_imports_from_elsewhere(tmp_path: Path) -> None:
    where = python("-c", "import listen, listen.data.tasks; print(listen.__file__)", cwd=tmp_path)
    assert Path(where.strip()) == ROOT / "listen" / "__init__.py"


@pytest.mark.slow
def test_editable_install_works_in_a_stock_environment(tmp_path: Path) -> None:
    """The pip and setuptools that `venv` itself brings must be enough."""
    source = copy_checkout(tmp_path / "my-clone")
    python("-m", "venv", "fresh", cwd=tmp_path)
    interpreter = tmp_path / "fresh" / "bin" / "python"
    done = subprocess.run(
        [interpreter, "-m", "pip", "install", "-q", "--no-deps", "-e", source], capture_output=True, text=True
    )
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("no package registry to fetch the build backend from")
    assert done.returncode == 0, done.stderr
    program = "import importlib.util; print(importlib.util.find_spec('listen').origin)"  # finds without importing torch
    found = subprocess.run([interpreter, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.strip() == str(source / "listen" / "__init__.py"), found.stderr


def test_pytest_collects_in_a_folder_of_any_name(tmp_path: Path) -> None:
    clone = copy_checkout(tmp_path / "a clone-with.odd name")
    listed = python("-m", "pytest", "--collect-only", "-q", "tests/test_packaging.py", cwd=clone)
    assert "tests/test_packaging.py::test_pytest_collects_in_a_folder_of_any_name" in listed


CI_MAKEFILE = """
environment:
\t@mkdir -p .venv/bin && ln -sf {python} .venv/bin/python
test:
\t@echo "data=$(LISTEN_REAL_DATA)"; echo "models=$(LISTEN_REAL_MODELS)"; exit {status}
"""


def run_ci(folder: Path, status: int = 0) -> tuple[list[str], bool]:
    """Output and success of `.ci/run` in a clone whose `make test` only shows its settings; `folder` is around it."""
    clone = folder / "clone"
    (clone / ".ci").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / ".ci" / "run", clone / ".ci" / "run")
    (clone / "Makefile").write_text(CI_MAKEFILE.format(python=sys.executable, status=status))
    # these tests may run below `make test` themselves
    inherited = {"LISTEN_REAL_DATA", "LISTEN_REAL_MODELS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
    environment = {key: value for key, value in os.environ.items() if key not in inherited}
    environment["XDG_CACHE_HOME"] = str(folder / "cache")
    done = subprocess.run(["bash", clone / ".ci" / "run"], env=environment, cwd="/", capture_output=True, text=True)
    return done.stdout.splitlines(), done.returncode == 0


@pytest.mark.parametrize("status", [0, 3])
def test_ci_passes_on_real_data_and_exit_code(tmp_path: Path, status: int) -> None:
    assert run_ci(tmp_path, status) == (["data=", "models="], status == 0)
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert run_ci(tmp_path, status) == ([f"data={tmp_path / 'shared' / 'data'}", "models="], status == 0)


def test_ci_fetches_real_models_and_goes_on_without_them(tmp_path: Path) -> None:
    fetch = tmp_path / "shared" / "tools" / "real_models.py"
    fetch.parent.mkdir(parents=True)
    fetch.write_text("import pathlib, sys; pathlib.Path(sys.argv[1], 'whisper').mkdir()")
    folder = tmp_path / "cache" / "listen-real-models"
    assert run_ci(tmp_path) == (["data=", f"models={folder}"], True)
    assert (folder / "whisper").is_dir()
    fetch.write_text("import sys; sys.exit('no registry')")
    assert run_ci(tmp_path) == (["Tests of real models are skipped: no registry", "data=", "models="], True)
