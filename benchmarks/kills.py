"""Kill the notebooks, and a grid of two processes, at random moments: what is made in the end is the same to the bit.

python benchmarks/kills.py --kills 50         # hours on 2 cores; half of the kills for each
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
GRID = f"{LAUNCH} --dynamo_backend no --main_process_port 0 --module basinlab.comparison emoji-duplicated"
COMMANDS = {
    "notebooks": lambda out: [str(ROOT / "notebooks/execute.py"), "--out", str(out)],
    "grid": lambda out: [*GRID.split(), "--profile", "tiny", "--out", str(out / "table.parquet")],
}


def start(name: str, out: Path) -> subprocess.Popen:
    (out / "cwd").mkdir(parents=True, exist_ok=True)
    environment = {"BASINLAB_PROFILE": "tiny", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    command = [sys.executable, *COMMANDS[name](out)]
    return subprocess.Popen(command, cwd=out / "cwd", env=os.environ | environment, **options)


def tables(out: Path) -> dict[str, pd.DataFrame]:
    """All tables that were written, without what tells the time."""
    read = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    found = {path.name: read[path.suffix](path) for path in out.glob("**/*") if path.suffix in read}
    return {name: table.drop(columns="seconds", errors="ignore") for name, table in found.items()}


def survives(name: str, kills: int, rng: random.Random, folder: Path) -> tuple[float, int]:
    """Seconds of an undisturbed run; raises AssertionError where one that was killed ends otherwise."""
    began = time.monotonic()
    assert start(name, folder / "whole").wait() == 0
    seconds = time.monotonic() - began
    for _ in range(kills):
        run = start(name, folder / "killed")
        time.sleep(rng.uniform(0, seconds))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    assert start(name, folder / "killed").wait() == 0
    whole, killed = tables(folder / "whole"), tables(folder / "killed")
    assert whole.keys() <= killed.keys(), whole.keys() - killed.keys()
    for table in whole:
        pd.testing.assert_frame_equal(killed[table], whole[table], check_exact=True)
    stray = [path.name for path in (folder / "killed").glob("**/*") if "part" in path.suffix]
    assert not stray, stray
    return seconds, len(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in COMMANDS:
        with tempfile.TemporaryDirectory() as folder:
            seconds, count = survives(name, options.kills // 2, random.Random(options.seed), Path(folder))
        print(f"{name}: {options.kills // 2} kills of a run of {seconds:.0f} s, {count} tables the same to the bit")


if __name__ == "__main__":
    main()
