"""From nothing to a picture: importing, loading, the first image; each round in a new process.

python benchmarks/cold.py
python benchmarks/cold.py --clone    # once also from `git clone` on: packages, then the figures of notebook 00
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import by_column, seconds_of, write

SCRIPT = """
import json, sys, time
began = time.perf_counter()
import basinlab
imported = time.perf_counter()
denoiser = basinlab.load("emoji-duplicated")
loaded = time.perf_counter()
basinlab.sample(denoiser, "true pretzel sun room other year", 0, progress=False).images()
done = time.perf_counter()
print(json.dumps({"import basinlab, s": imported - began, "load after that, s": loaded - imported,
                  "first image after import, s": done - imported}))
"""


def cloned() -> dict[str, list[float]]:
    """Seconds of a newcomer's first steps, from the packages' cache of this machine or the net."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder) / "basinlab"
        steps = {
            "git clone, s": ["git", "clone", "--quiet", str(Path(__file__).parents[1]), str(here)],
            "make setup after that, s": ["make", "--silent", "-C", str(here), "setup"],
            "first figures after that, s": [
                str(here / ".venv/bin/python"),
                str(here / "notebooks/execute.py"),
                "00_background.ipynb",
            ],
        }
        quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return {name: [seconds_of(lambda step=step: subprocess.run(step, **quiet))] for name, step in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clone", action="store_true", help="also time a clone's installation and first figures")
    options = parser.parse_args()
    rows = []
    for _ in range(options.rounds):
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    columns = by_column(rows) | (cloned() if options.clone else {})
    write("cold", columns, "new processes, files in the system's cache but for the first")


if __name__ == "__main__":
    main()
