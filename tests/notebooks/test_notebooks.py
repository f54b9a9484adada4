"""The notebooks: each runs from start to end, and its script and its .ipynb say the same."""

from __future__ import annotations

from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
LARGEST = 500_000
"""Bytes of a notebook with its outputs: a repository carries every version of them."""


def cells(path: Path) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


def test_there_are_notebooks() -> None:
    assert {path.stem for path in SCRIPTS} >= {
        "01_dataset_exploration",
        "02_model_understanding",
        "03_data_preprocessing",
        "04_evaluation_analysis",
        "fine_tuning_vlm_for_object_detection_trl",
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_and_notebook_are_in_step(script: Path) -> None:
    notebook = script.with_suffix(".ipynb")
    assert cells(script) == cells(notebook), f"run: jupytext --sync {script}"
    assert notebook.stat().st_size < LARGEST


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_runs(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = jupytext.read(script)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not [
        output for cell in code for output in cell.outputs if output.output_type == "stream" and output.name == "stderr"
    ]
