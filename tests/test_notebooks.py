"""The notebooks run from top to bottom, and carry no outputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def printed(notebook: nbformat.NotebookNode) -> str:
    """Everything that the cells of a notebook print."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


def test_notebooks_are_small_and_without_outputs() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["ask_a_model", "train_on_your_own_folder", "what_the_pool_picked"]
    for path in NOTEBOOKS:
        notebook: Any = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert path.stat().st_size < 20_000
        assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "ask_a_model",
            ["'the doctor found a yellow guitar yesterday'", "'yellow'", "a dog barks while an engine hums"],
        ),
        ("train_on_your_own_folder", [" of 18 answers are right"]),
        ("what_the_pool_picked", ["asr [", "the doctor found", "acap ["]),
    ],
)
def test_a_notebook_runs(name: str, expected: list[str]) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=400, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}})
    client.execute()
    text = printed(notebook)
    assert [words for words in expected if words not in text] == [], text
    for share in re.findall(r"(\d+)% of", text):  # chance is 33 %
        assert int(share) >= 80, text
