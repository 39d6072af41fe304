"""Kill a notebook that keeps its parts, and a grid of two processes, at random moments: the tables are the same.

python benchmarks/kills.py --kills 50         # half an hour on 2 cores; half of the kills for each
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import psutil

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
GRID = f"{LAUNCH} --dynamo_backend no --main_process_port 0 --module basinlab.comparison emoji-duplicated"
COMMANDS = {"grid": [*GRID.split(), "--profile", "tiny", "--out", "table.parquet"]}
COMMANDS["notebook"] = [f"{ROOT}/notebooks/execute.py", "02_transition_point_sweep.ipynb", "--out", "."]


def start(name: str, folder: Path) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"BASINLAB_PROFILE": "tiny", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    return subprocess.Popen([sys.executable, *COMMANDS[name]], cwd=folder, env=environment, **options)


def tables(folder: Path) -> dict[str, pd.DataFrame]:  # all that were written, without what tells the time
    read = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    found = {path.name: read[path.suffix](path) for path in folder.glob("**/*") if path.suffix in read}
    return {name: table.drop(columns="seconds", errors="ignore") for name, table in found.items()}


def survives(name: str, kills: int, rng: random.Random, whole: Path, killed: Path) -> str:
    """What was done, in words; AssertionError where a run that was killed ends otherwise than a ``whole`` one."""
    began = time.monotonic()
    assert start(name, whole).wait() == 0
    seconds = time.monotonic() - began
    for _ in range(kills):
        run = start(name, killed)
        time.sleep(rng.uniform(0, seconds))
        every = [run, *psutil.Process(run.pid).children(recursive=True)]  # accelerate's workers would outlive it
        subprocess.run(["kill", "-9", *(str(process.pid) for process in every)], stderr=subprocess.DEVNULL)
        run.wait()
    assert start(name, killed).wait() == 0
    expected, found = tables(whole), tables(killed)
    for table in expected:
        pd.testing.assert_frame_equal(found[table], expected[table], check_exact=True)
    assert not [path.name for path in killed.glob("**/*") if "part" in path.suffix]
    return f"{name}: {kills} kills of a run of {seconds:.0f} s, {len(expected)} tables the same to the bit"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    for each in COMMANDS:
        with tempfile.TemporaryDirectory() as out:
            folders = Path(out, "whole"), Path(out, "killed")
            print(survives(each, parser.parse_args().kills // 2, random.Random(0), *folders))
