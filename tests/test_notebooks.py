"""Every notebook runs from its first cell to its last, and writes its figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p.name for p in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def wordless_pictures(notebook: Path) -> list[int]:
    """Cells with a picture that says nothing to who cannot see it."""
    return [
        number
        for number, cell in enumerate(nbformat.read(notebook, as_version=4).cells)
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {}) and not output.metadata.get("image/png", {}).get("alt")
    ]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_every_committed_picture_is_told_in_words(notebook):
    assert not wordless_pictures(ROOT / "notebooks" / notebook)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_runs_and_writes_its_figures(notebook, tmp_path):
    command = [sys.executable, str(ROOT / "notebooks/execute.py"), notebook, "--out", str(tmp_path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "BASINLAB_DATA": str(ROOT / "data"), "BASINLAB_PROFILE": "tiny"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not wordless_pictures(tmp_path / "notebooks" / notebook)
    number = notebook.split("_")[0]
    made = {p.name for p in (tmp_path / "figures").glob(f"{number}_*")}
    committed = {p.name for p in (ROOT / "figures").glob(f"{number}_*")}
    assert made == committed
    manifest = json.loads((tmp_path / "figures/manifest.json").read_text())
    pictures = {Path(name).stem for name in made if name.endswith(".png")}
    assert pictures == set(manifest)
    assert all({"weights", "prompts", "seeds", "versions", "commit"} <= set(entry) for entry in manifest.values())
