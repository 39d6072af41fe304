"""Try every setting of every method on the held-out prompts: ``python -m recipe.tune`` writes tuning.csv.

It resumes, and shares its work among the processes of ``accelerate launch --module recipe.tune``.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from basinlab.comparison import HELD_OUT, MAIN, methods, processes, run_grid, summary
from basinlab.guidance import describe
from basinlab.models import data_folder
from basinlab.scenarios import Judges, Scenario, read

MEASURES = ("copied", "object_right", "new_and_right", "similarity", "clip_score")  # that are noted


def tune(scenario: Scenario, parts: str | Path, device: str = "cpu", seeds=range(2), steps: int = 50) -> pd.DataFrame:
    """A `summary` of each method's settings (0 to 3; ``given``) on the held-out prompts, in five measures."""
    prompts = scenario.table("memorized").tail(HELD_OUT).reset_index(drop=True)
    tried = {(name, "CFG", i): x for name, settings in methods(scenario).items() for i, x in enumerate(settings)}
    total, silent = len(tried) * len(prompts) * len(seeds), not processes().is_main_process
    with tqdm(total=total, unit="sample", desc="tuning", disable=silent) as bar:
        denoiser, judges = scenario.load(device=device), Judges(scenario, device)
        table = run_grid(denoiser, prompts, seeds, tried, judges, parts, steps=steps, bar=bar)
    rows = summary(table, by=["method", "setting"]).drop(columns="best")
    rows = rows[rows["measure"].isin(MEASURES)]
    given = [json.dumps([*map(describe, tried[of.method, "CFG", of.setting])]) for of in rows.itertuples()]
    return rows.assign(given=given)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipe.tune", description=__doc__)
    parser.add_argument("--device", help="default: cpu; of several processes each its own GPU")
    parser.add_argument("--parts", type=Path, default=Path("build/tuning"), help="where it resumes from")
    options, team = parser.parse_args(), processes()
    device = options.device or (str(team.device) if team.num_processes > 1 else "cpu")
    table, path = tune(read(MAIN), options.parts, device), data_folder() / MAIN / "tuning.csv"
    if team.is_main_process:
        table.to_csv(path, index=False)
        print(f"{len(table)} settings in {path}")
    team.destroy_process_group()


if __name__ == "__main__":
    main()
