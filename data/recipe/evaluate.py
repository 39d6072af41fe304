"""Sample and judge all that the claims about a bundled checkpoint rest on: ``python -m recipe.evaluate``.

Writes NAME/evaluation.parquet and prints the radius and the layout floor for its scenario file. It resumes, and shares
its work among the processes of ``accelerate launch --module recipe.evaluate``.
"""

import argparse
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from basinlab.comparison import MAIN, processes, run_grid
from basinlab.guidance import ConstantGuidance, StaticTransitionPoint
from basinlab.metrics import CopyDistance
from basinlab.models import Denoiser, data_folder
from basinlab.sampling import Trajectory, initial_noise
from basinlab.scenarios import Judges, Scenario, read

from .scorecard import background_colour, calibrate_radius, layout_floor, negatives_of

STARTS = (900, 800, 700, 650, 600, 500, 400, 300)


class Measuring(Judges):
    """Judges that also note what only the scorecard needs.

    Further columns: to_duplicates, the distance to every picture learned with a memorized prompt; seen, the object that
    CLIP names; background_rgb; noise_mean; magnitude, over the steps (NaN where it was not measured).
    """

    def __call__(self, run: Trajectory, prompts: pd.DataFrame) -> pd.DataFrame:
        pictures, table = run.images(), super().__call__(run, prompts).drop(columns="clip")
        table["to_duplicates"] = (1 - self.distance.features(pictures) @ self.learned.T).tolist()
        table["seen"] = self.alignment.classify(self.alignment.features(pictures), self.objects)
        table["background_rgb"] = background_colour(pictures).tolist()
        table["noise_mean"] = initial_noise(run.denoiser, run.seeds).mean(dim=(2, 3)).tolist()
        table["magnitude"] = run.guidance_magnitude.tolist()
        return table


def plan(scenario: Scenario) -> list[tuple]:
    """(group, prompts, seeds, guidances by name) of all that is sampled.

    * memorized: each prompt x 8 seeds under CFG from T ("cfg"), CFG late ("late"), unguided ("none");
    * sweep: the same prompts x 4 seeds, one guidance a start time ("start-700", ...; column ``start``);
    * ordinary: each x 4 seeds, "cfg" and "none";
    * calibration: the same prompts x 2 other seeds, "cfg", for the ball's radius only;
    * template: each x 2 seeds, "cfg".
    """
    scale = scenario.guidance_scale
    memorized, ordinary, template = (scenario.table(group) for group in ("memorized", "ordinary", "template"))
    always, never = {"cfg": ConstantGuidance(scale)}, {"none": ConstantGuidance(0.0)}
    late = {"late": StaticTransitionPoint(scenario.late_start, scale)}
    return [
        ("memorized", memorized, range(8), always | late | never),
        ("ordinary", ordinary, range(4), always | never),
        ("calibration", ordinary, range(4, 6), always),
        ("template", template, range(2), always),
        ("sweep", memorized, range(4), {f"start-{t}": StaticTransitionPoint(t, scale) for t in STARTS}),
    ]


def evaluate(scenario: Scenario, parts: str | Path, device: str = "cpu", steps: int = 50) -> pd.DataFrame:
    """The table of all samples in `plan`, about 300,000 network predictions; resumes from ``parts``."""
    denoiser, judges, tables = scenario.load(device=device), Measuring(scenario, device), []
    for group, prompts, seeds, guidances in plan(scenario):
        total, silent = len(prompts) * len(seeds) * len(guidances), not processes().is_main_process
        with tqdm(total=total, unit="sample", desc=group, disable=silent) as bar:
            for name, guidance in guidances.items():
                options = {"steps": steps, "measure": name == "none", "block": 24, "bar": bar}
                table = run_grid(denoiser, prompts, seeds, {name: [guidance]}, judges, parts, **options)
                tables.append(table.rename(columns={"method": "guidance"}).drop(columns="seconds").assign(group=group))
    table = pd.concat(tables, ignore_index=True)
    table["start"] = pd.to_numeric(table["guidance"].str.removeprefix("start-"), errors="coerce")
    table.attrs["weights"] = denoiser.fingerprint()
    return table


def read_evaluation(denoiser: Denoiser) -> pd.DataFrame:
    """The kept evaluation of a bundled checkpoint; raises ValueError when it is of other weights."""
    path = data_folder() / denoiser.name / "evaluation.parquet"
    table = pd.read_parquet(path)
    if table.attrs["weights"] != denoiser.fingerprint():
        raise ValueError(f"{path} is of the weights {table.attrs['weights']}: run `make evaluate`")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipe.evaluate", description=__doc__)
    parser.add_argument("name", nargs="?", default=MAIN)
    parser.add_argument("--device", help="default: cpu; of several processes each its own GPU")
    parser.add_argument("--parts", type=Path, default=Path("build/evaluation"), help="where it resumes from")
    options, team = parser.parse_args(), processes()
    scenario, device = read(options.name), options.device or (str(team.device) if team.num_processes > 1 else "cpu")
    table = evaluate(scenario, options.parts, device)
    if team.is_main_process:
        path = data_folder() / scenario.model / "evaluation.parquet"
        table.to_parquet(path, index=False)
        radius = calibrate_radius(negatives_of(table, scenario, CopyDistance()))
        print(f"{len(table)} samples in {path}; radius: {radius!r}, layout_floor: {layout_floor(scenario)!r}")
    team.destroy_process_group()


if __name__ == "__main__":
    main()
