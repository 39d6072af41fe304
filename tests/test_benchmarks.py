"""The benchmarks run, at sizes whose figures mean nothing."""

import subprocess
import sys
from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_sampling_runs_at_a_size_whose_figures_mean_nothing(tmp_path):
    command = [FOLDER / "sampling.py", *"--steps 2 --batch 2 --rounds 1 --out".split(), tmp_path]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = pd.read_csv(tmp_path / "sampling.csv").set_index("figure")
    assert table.loc["basinlab, CFG / pipeline, same batch", "rounds"] == 1
    assert 0 < table.loc["share of our time in the U-Net", "median"] < 1
    assert table["of"].eq("emoji-duplicated, batches of 2, 2 steps, float32, cpu").all()
