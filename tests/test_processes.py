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


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "grid.py"
    path.write_text(GRID)
    return path


def launched(script: Path, processes: int, folder: Path, table: Path) -> subprocess.Popen:
    """``accelerate launch`` of the script, one thread each, in a process group of its own."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    several = ["--multi_gpu"] if processes > 1 else ["--cpu"]  # without GPUs, several processes talk over gloo
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [*launcher, *several, *options, str(script), str(folder), str(table)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def workers(launcher: subprocess.Popen) -> list[int]:
    """Process ids of the launcher's children."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


@pytest.fixture(scope="module")
def alone(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    run = launched(script, 1, folder / "parts", folder / "table.parquet")
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    return pd.read_parquet(folder / "table.parquet")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes to kill in /proc")
def test_one_of_two_processes_is_killed_and_another_number_goes_on_to_the_table_of_one(script, alone, tmp_path):
    parts, table = tmp_path / "parts", tmp_path / "table.parquet"
    run = launched(script, 2, parts, table)
    while len(list(parts.glob("*.parquet"))) < 3 and run.poll() is None:
        time.sleep(0.02)
    os.kill(workers(run)[-1], signal.SIGKILL)
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0, output
    kept = {path: path.read_bytes() for path in parts.glob("*.parquet")}
    assert 3 <= len(kept) < PARTS and not table.exists()
    again = launched(script, 3, parts, table)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and output.count("pid 3") == 3, output
    assert all(path.read_bytes() == data for path, data in kept.items())
    assert not list(parts.glob("*.part"))
    pd.testing.assert_frame_equal(pd.read_parquet(table), alone)
