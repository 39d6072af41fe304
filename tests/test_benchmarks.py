"""The benchmarks run, at sizes whose figures mean nothing."""

import subprocess
import sys
from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, str(FOLDER / script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_sampling_is_rehearsed_at_tiny_size(tmp_path):
    output = run("sampling.py", "--tiny", *"--steps 2 --batch 2 --rounds 1 --out".split(), str(tmp_path))
    table = pd.read_csv(tmp_path / "random.csv").set_index("figure")
    assert table.loc["basinlab, CFG / pipeline, same batch", "rounds"] == 1
    assert 0 < table.loc["share of our time in the U-Net", "median"] < 1
    assert table["of"].str.startswith("a rehearsal at tiny size").all() and "a rehearsal" in output
