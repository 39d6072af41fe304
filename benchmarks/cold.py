"""From nothing to a picture: importing, loading, the first image; each round in a new process.

python benchmarks/cold.py
"""

import argparse
import json
import subprocess
import sys

from common import by_column, write

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for _ in range(options.rounds):
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    write("cold", by_column(rows), "new processes, files in the system's cache but for the first")


if __name__ == "__main__":
    main()
