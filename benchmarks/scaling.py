"""The grid over 1 and 2 processes, one thread each, in one run: samples a second, and what is lost.

Every round begins `accelerate launch` anew; timed is what the processes do together, from the moment
when all of them have their weights to the moment when the table is whole.

    python benchmarks/scaling.py --prompts 32 --seeds 4 --rounds 3
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


def work(options: argparse.Namespace) -> None:
    """What each process does."""
    import basinlab
    from basinlab.comparison import processes, run_grid

    scenario = basinlab.scenarios.read("emoji-duplicated")
    denoiser, judges = scenario.load(), basinlab.scenarios.Judges(scenario)
    prompts = scenario.table().head(options.prompts)
    methods = {"CFG": [basinlab.ConstantGuidance(5.0)], "STP": [basinlab.StaticTransitionPoint(500, 5.0)]}
    grid = {"block": options.block, "steps": options.steps}
    run_grid(denoiser, prompts.head(1), [0], methods, judges, options.parts / "warm-up", steps=2)
    team = processes()
    team.wait_for_everyone()
    began = time.perf_counter()
    table = run_grid(denoiser, prompts, range(options.seeds), methods, judges, options.parts, **grid)
    seconds = time.perf_counter() - began
    if team.is_main_process:
        bytes_written = sum(path.stat().st_size for path in options.parts.glob("*.parquet"))
        found = {"samples": len(table), "seconds": seconds, "bytes a sample": bytes_written / len(table)}
        options.report.write_text(json.dumps(found))
    team.destroy_process_group()


def launched(processes: int, options: argparse.Namespace) -> dict:
    """What one run with so many processes took."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        several = ["--multi_gpu"] if processes > 1 else ["--cpu"]
        launcher = [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(processes)]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        own = ["--parts", str(Path(folder) / "parts"), "--report", str(report)]
        own += [f"--{name}={getattr(options, name)}" for name in ("prompts", "seeds", "steps", "block")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*launcher, __file__, *own], env=environment, check=True, stderr=subprocess.DEVNULL)
        return json.loads(report.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--block", type=int, default=8, help="prompts a part")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report is not None:
        work(options)
        return
    rows = []
    for _ in range(options.rounds):
        one, two = (launched(processes, options) for processes in (1, 2))
        rates = {n: found["samples"] / found["seconds"] for n, found in ((1, one), (2, two))}
        rows.append(
            {
                "samples/s, 1 process": rates[1],
                "samples/s, 2 processes": rates[2],
                "2 processes / 1": rates[2] / rates[1],
                "bytes a sample": two["bytes a sample"],
            }
        )
        print(rows[-1], flush=True)
    runs = f"{options.prompts} prompts x {options.seeds} seeds x 2 strategies, {options.steps} steps"
    write("scaling", by_column(rows), f"{runs}, one thread a process")


if __name__ == "__main__":
    main()
