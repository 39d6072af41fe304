"""The grid over several processes: one table, whatever their number, and whichever is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

import basinlab
from basinlab import comparison, scenarios

GRID = """
import sys
from test_processes import grid
from basinlab import comparison
table, team = grid(*sys.argv[1:3]), comparison.processes()
if team.is_main_process:
    table.to_parquet(sys.argv[3])
print(f"pid {team.num_processes}")
team.destroy_process_group()
"""
PARTS = 12


def grid(model, folder) -> pd.DataFrame:
    scenario = scenarios.read("emoji-duplicated")
    methods = {"CFG": [basinlab.ConstantGuidance(3.0)], "STP": [basinlab.StaticTransitionPoint(500, 3.0)]}
    given = basinlab.load(model), scenario.table().head(6), range(4), methods, scenarios.Judges(scenario), folder
    return comparison.run_grid(*given, steps=10, block=1).drop(columns="seconds")


def launched(processes: int, script: Path, *given: Path) -> subprocess.Popen:
    """``accelerate launch`` of the script, one thread each."""
    # without GPUs, several processes talk over gloo
    options = f"--multi_gpu --num_processes {processes} --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = ["-m", "accelerate.commands.launch", *options.split(), "--main_process_port", "0", script, *given]
    here = Path(__file__).parent
    paths = os.pathsep.join([*map(str, (here, here.parent, here.parent / "data")), os.environ.get("PYTHONPATH", "")])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment, **pipes)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes to kill in /proc")
def test_one_of_two_processes_is_killed_and_another_number_goes_on_to_the_table_of_one(tmp_path, tiny_folder):
    script, parts, table = tmp_path / "grid.py", tmp_path / "parts", tmp_path / "table.parquet"
    script.write_text(GRID)
    run = launched(2, script, tiny_folder, parts, table)
    while len(list(parts.glob("*.parquet"))) < 3 and run.poll() is None:
        time.sleep(0.02)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0, output
    kept = {path: path.read_bytes() for path in parts.glob("*.parquet")}
    assert 3 <= len(kept) < PARTS and not table.exists()
    again = launched(3, script, tiny_folder, parts, table)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and output.count("pid 3") == 3, output
    assert all(path.read_bytes() == data for path, data in kept.items())
    assert not list(parts.glob("*.part"))
    pd.testing.assert_frame_equal(pd.read_parquet(table), grid(tiny_folder, tmp_path / "alone"))
