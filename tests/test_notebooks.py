"""Every notebook runs from its first cell to its last, and writes its figures."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p.name for p in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def wordless_pictures(notebook: Path) -> list[int]:
    """Cells with a picture that says nothing to who cannot see it."""
    cells = enumerate(nbformat.read(notebook, as_version=4).cells)
    outputs = [(number, output) for number, cell in cells for output in cell.get("outputs", [])]
    pictures = [(number, x.metadata) for number, x in outputs if "image/png" in x.get("data", {})]
    return [number for number, metadata in pictures if not metadata.get("image/png", {}).get("alt")]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_every_committed_picture_is_told_in_words(notebook):
    assert not wordless_pictures(ROOT / "notebooks" / notebook)


def with_answers(notebook: str, folder: Path) -> Path:
    """A copy of the notebook at whose end the code of its exercises' answers is run."""
    content = nbformat.read(ROOT / "notebooks" / notebook, as_version=4)
    text = "".join(cell.source for cell in content.cells if cell.cell_type == "markdown").partition("## Exercises")[2]
    content.cells += [nbformat.v4.new_code_cell(code) for code in re.findall("```python\n(.*?)```", text, re.DOTALL)]
    nbformat.write(content, folder / notebook)
    return folder / notebook


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_runs_with_its_answers_and_writes_its_figures(notebook, tmp_path):
    source = with_answers(notebook, tmp_path)
    command = [sys.executable, str(ROOT / "notebooks/execute.py"), str(source), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "BASINLAB_DATA": str(ROOT / "data"), "BASINLAB_PROFILE": "tiny"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not wordless_pictures(tmp_path / "out/notebooks" / notebook)
    number = notebook.split("_")[0]
    made, committed = ({p.name for p in (at / "figures").glob(f"{number}_*")} for at in (tmp_path / "out", ROOT))
    assert made == committed
    manifest = json.loads((tmp_path / "out/figures/manifest.json").read_text()) if made else {}  # 04 saves no figure
    pictures = {Path(name).stem for name in made if name.endswith(".png")}
    assert pictures == set(manifest)
    told = {"weights", "prompts", "seeds", "section", "versions", "commit"}
    assert all(told <= set(entry) for entry in manifest.values())
