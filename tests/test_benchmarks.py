"""The benchmarks run, at sizes whose figures mean nothing."""

import runpy
import sys
from pathlib import Path

import pandas as pd


def test_sampling_runs_at_a_size_whose_figures_mean_nothing(tmp_path, monkeypatch, tiny_folder):
    options = f"--steps 2 --batch 2 --rounds 1 --model {tiny_folder} --out {tmp_path}"
    script = Path(__file__).parents[1] / "benchmarks/sampling.py"
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script), *options.split()])
    runpy.run_path(str(script), run_name="__main__")
    table = pd.read_csv(tmp_path / "sampling.csv").set_index("figure")
    assert table.loc["basinlab, CFG / pipeline, same batch", "rounds"] == 1
    assert 0 < table.loc["share of our time in the U-Net", "median"] < 1
    assert table["of"].eq(f"{tiny_folder}, batches of 2, 2 steps, float32, cpu").all()
