"""The grid over several processes: one table, whatever their number, and whichever is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

GRID = """
import sys
import basinlab
from basinlab import comparison, scenarios
scenario = scenarios.read("emoji-duplicated")
denoiser, judges = scenario.load(), scenarios.Judges(scenario)
methods = {"CFG": [basinlab.ConstantGuidance(3.0)], "STP": [basinlab.StaticTransitionPoint(500, 3.0)]}
prompts = scenario.table().head(6)
table = comparison.run_grid(denoiser, prompts, range(4), methods, judges, sys.argv[1], steps=10, block=1)
team = comparison.processes()
if team.is_main_process:
    table.drop(columns="seconds").to_parquet(sys.argv[2])
print(f"pid {team.num_processes}")
team.destroy_process_group()
"""
PARTS = 12


def launched(script: Path, processes: int, folder: Path, table: Path) -> subprocess.Popen:
    """``accelerate launch`` of the script, one thread each."""
    several = "--multi_gpu" if processes > 1 else "--cpu"  # without GPUs, several processes talk over gloo
    options = f"{several} --num_processes {processes} --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = ["-m", "accelerate.commands.launch", *options.split(), "--main_process_port", "0", script, folder, table]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment, **pipes)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes to kill in /proc")
def test_one_of_two_processes_is_killed_and_another_number_goes_on_to_the_table_of_one(tmp_path):
    script = tmp_path / "grid.py"
    script.write_text(GRID)
    alone = launched(script, 1, tmp_path / "alone", tmp_path / "alone.parquet")
    output, _ = alone.communicate(timeout=300)
    assert alone.returncode == 0, output
    parts, table = tmp_path / "parts", tmp_path / "table.parquet"
    run = launched(script, 2, parts, table)
    while len(list(parts.glob("*.parquet"))) < 3 and run.poll() is None:
        time.sleep(0.02)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0, output
    kept = {path: path.read_bytes() for path in parts.glob("*.parquet")}
    assert 3 <= len(kept) < PARTS and not table.exists()
    again = launched(script, 3, parts, table)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and output.count("pid 3") == 3, output
    assert all(path.read_bytes() == data for path, data in kept.items())
    assert not list(parts.glob("*.part"))
    pd.testing.assert_frame_equal(pd.read_parquet(table), pd.read_parquet(tmp_path / "alone.parquet"))
