"""All benchmarks, one after the other, and one table of them: ``make bench``.

python benchmarks/all.py                       # about half an hour alone on 2 cores
python benchmarks/all.py --table               # only the table, of what was measured before
python benchmarks/all.py --official FOLDER     # also against a clone of the official code
"""

import argparse
import platform
import subprocess
import sys
from pathlib import Path

import pandas as pd
from common import RESULTS

HERE = Path(__file__).parent
RUNS = ["cold.py", "limits.py", "limits.py --dtype bfloat16", "sampling.py --compiled"]
RUNS += ["sweep.py", "sweep.py --dtype bfloat16", "scaling.py"]
NAMES = "cold limits-float32 limits-bfloat16 sampling sweep-float32 sweep-bfloat16 scaling official".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--official", type=Path, help="a clone of the official code")
    options = parser.parse_args()
    runs = [] if options.table else [run.split() for run in RUNS]
    if options.official and not options.table:
        runs.append(["official.py", str(options.official)])
    for number, (script, *arguments) in enumerate(runs, start=1):
        print(f"[{number}/{len(runs)}] {script} {' '.join(arguments)}", flush=True)
        subprocess.run([sys.executable, str(HERE / script), *arguments], check=True)
    tables = {name: RESULTS / f"{name}.csv" for name in NAMES}
    found = [pd.read_csv(path).assign(benchmark=name) for name, path in tables.items() if path.exists()]
    columns = ["benchmark", "figure", "median", "lowest", "highest", "rounds", "of"]
    table = pd.concat(found)[columns]
    table.to_csv(RESULTS / "table.csv", index=False)
    text = "# What was measured\n\nRatios are of one run. " + f"Machine: {platform.machine()}, {platform.system()}.\n\n"
    (RESULTS / "table.md").write_text(text + table.to_markdown(index=False, floatfmt=".4g") + "\n")
    print(f"{len(table)} figures in {RESULTS / 'table.csv'} and table.md")


if __name__ == "__main__":
    main()
