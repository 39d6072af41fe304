"""How time and memory grow with prompts, seeds, steps and start times: straight lines, and memory by the batch.

Every point is a process of its own, so that its peak memory is its own. A line is fitted through the
points of each axis; reported are how well it fits (R squared) and what doubling the work does.

    python benchmarks/growth.py
"""

import argparse
import json
import subprocess
import sys

import pandas as pd
from common import RESULTS, peak_gib, seconds_of, write
from scipy.stats import linregress

AXES = {"prompts": (4, 8, 16, 32), "seeds": (4, 8, 16, 32), "steps": (10, 20, 40, 80), "starts": (2, 4, 8, 16)}
USUAL = {"prompts": 8, "seeds": 4, "steps": 20, "starts": 0}


def work(prompts: int, seeds: int, steps: int, starts: int) -> None:
    """One point, printed: seconds of sampling without what a first call takes, and the process's peak memory."""
    import basinlab

    denoiser = basinlab.load("emoji-duplicated")
    texts = basinlab.scenarios.read(denoiser.name).table()["prompt"].tolist()[:prompts]
    common = {"steps": steps, "progress": False}
    cfg = basinlab.ConstantGuidance(5.0)
    basinlab.sample(denoiser, texts[0], range(32), cfg, steps=2, progress=False).images()
    if starts:
        times = denoiser.timesteps(steps)
        times = [times[i * steps // starts] for i in range(starts)]
        seconds = seconds_of(lambda: basinlab.sweep(denoiser, texts, range(seeds), times, after=cfg, **common).images())
    else:
        options = {**common, "record": False}
        seconds = seconds_of(lambda: basinlab.sample(denoiser, texts, range(seeds), cfg, **options).images())
    print(json.dumps({"seconds": seconds, "GiB": peak_gib()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point is not None:
        work(**options.point)
        return
    points, columns = [], {}
    for axis, values in AXES.items():
        for value in values:
            settings = {**USUAL, axis: value}
            command = [sys.executable, __file__, "--point", json.dumps(settings)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            points.append({"axis": axis, "value": value, **json.loads(done.stdout.splitlines()[-1])})
            print(points[-1], flush=True)
        rows = pd.DataFrame(points).query("axis == @axis")
        line = linregress(rows["value"], rows["seconds"])
        seconds, memory = rows["seconds"].to_numpy(), rows["GiB"].to_numpy()
        columns |= {
            f"{axis}: R squared of a line": [line.rvalue**2],
            f"{axis}: time for twice as many": (seconds[1:] / seconds[:-1]).tolist(),
            f"{axis}: memory for twice as many": (memory[1:] / memory[:-1]).tolist(),
        }
    pd.DataFrame(points).to_csv(RESULTS / "growth-points.csv", index=False, float_format="%.4g")
    usual = ", ".join(f"{count} {axis}" for axis, count in USUAL.items() if count)
    write("growth", columns, f"along each axis, else {usual}")


if __name__ == "__main__":
    main()
