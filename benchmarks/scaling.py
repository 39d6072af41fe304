"""The grid over 1 and 2 processes, one thread each: samples a second, and what is lost.

Every round begins `accelerate launch` anew; timed is what the processes do together, once they have their weights.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import by_column, write

PROMPTS, SEEDS, STEPS = 32, 4, 50


def work(folder: Path) -> None:
    """What each process does; the main one leaves a report."""
    import basinlab
    from basinlab.comparison import processes, run_grid

    scenario, team = basinlab.scenarios.read("emoji-duplicated"), processes()
    denoiser, judges = scenario.load(), basinlab.scenarios.Judges(scenario)
    prompts = scenario.table().head(PROMPTS)
    methods = {"CFG": [basinlab.ConstantGuidance(5.0)], "STP": [basinlab.StaticTransitionPoint(500, 5.0)]}
    team.wait_for_everyone()
    began = time.perf_counter()
    table = run_grid(denoiser, prompts, range(SEEDS), methods, judges, folder / "parts", steps=STEPS)
    seconds = time.perf_counter() - began
    if team.is_main_process:
        (folder / "report.json").write_text(json.dumps(len(table) / seconds))
    team.destroy_process_group()


def launched(processes: int) -> float:  # samples a second
    with tempfile.TemporaryDirectory() as folder:
        several = ["--multi_gpu"] if processes > 1 else ["--cpu"]
        launcher = [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(processes)]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        options = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "check": True, "stderr": subprocess.DEVNULL}
        subprocess.run([*launcher, __file__, "--work", folder], **options)
        return json.loads((Path(folder) / "report.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    if (folder := parser.parse_args().work) is not None:
        return work(folder)
    pairs = [(launched(1), launched(2)) for _ in range(3)]
    rows = [{"samples/s, 1 process": a, "samples/s, 2 processes": b, "2 processes / 1": b / a} for a, b in pairs]
    runs = f"{PROMPTS} prompts x {SEEDS} seeds x 2 methods, {STEPS} steps"
    write("scaling", by_column(rows), f"{runs}, one thread a process")


if __name__ == "__main__":
    main()
