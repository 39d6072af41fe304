"""From nothing to a picture: importing, loading, the first image; each round in a new process.

python benchmarks/cold.py
"""

import json
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

if __name__ == "__main__":
    told = [subprocess.run([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, check=True) for _ in range(ROUNDS)]
    rows = [json.loads(done.stdout.splitlines()[-1]) for done in told]
    write("cold", by_column(rows), "new processes, files in the system's cache but for the first")
