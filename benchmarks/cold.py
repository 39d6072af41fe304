"""From nothing to a picture: importing, loading, the first image; each round in a new process."""

import json
import os
import subprocess
import sys

from common import by_column, write

ROUNDS = 5
SCRIPT = """
import json, time
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


def once(**changes: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=os.environ | changes, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    os.environ.pop("GOMP_SPINCOUNT", None)  # the Makefile's
    rows = [once(GOMP_SPINCOUNT="10000") for _ in range(ROUNDS)]
    asleep = by_column([once() for _ in range(ROUNDS)])["first image after import, s"]
    columns = by_column(rows) | {"the same, where OpenMP's threads fall asleep, s": asleep}
    write("cold", columns, "new processes, files in the system's cache but for the first")
