"""The benchmarks run, at sizes whose figures mean nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, str(FOLDER / script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_gpu_benchmark_is_rehearsed_at_tiny_size(tmp_path):
    size = ["--tiny", "--device", "cpu", "--steps", "4", "--batch", "2", "--rounds", "2", "--out", str(tmp_path)]
    output = run("gpu.py", *size)
    table = pd.read_csv(tmp_path / "gpu.csv").set_index("figure")
    assert table.loc["basinlab, CFG / pipeline, CFG", "rounds"] == 2
    assert 0 < table.loc["share of time in the U-Net", "median"] < 1
    assert table["of"].str.startswith("a rehearsal at tiny size").all() and "a rehearsal" in output


def test_one_point_of_growth_tells_time_and_memory():
    output = run("growth.py", "--point", '{"prompts": 1, "seeds": 1, "steps": 2, "starts": 2}')
    point = json.loads(output.splitlines()[-1])
    assert point["seconds"] > 0 and 0.1 < point["GiB"] < 8
