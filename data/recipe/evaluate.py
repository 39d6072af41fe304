"""Sample and judge all that the claims about the bundled checkpoints rest on: ``python -m recipe.evaluate``.

Writes NAME/evaluation.parquet and prints, for the scenario file, the radius, the layout floor and the start times that
held-out samples choose. It resumes; runs share their work among the processes of ``accelerate launch``.
"""

import argparse
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from basinlab.basin import transition_points_by_bisection
from basinlab.comparison import MAIN, SCENARIOS, processes, run_grid, spread, tuned
from basinlab.forks import Sweep, sweep
from basinlab.guidance import ConstantGuidance
from basinlab.metrics import CopyDistance, layout_similarity
from basinlab.models import Denoiser, data_folder, read_pictures
from basinlab.sampling import Trajectory, initial_noise
from basinlab.scenarios import Judges, Scenario, read

from .scorecard import background_colour, calibrate_radius, chosen_start, layout_floor, negatives_of

STARTS = (999, 899, 839, 799, 759, 719, 679, 639, 599, 559, 519, 460, 400, 300)
RULES = ("STP", "DTP", "OG + STP", "OG + DTP")


class Measuring(Judges):
    """Judges that also note what only the scorecard needs.

    Further columns: to_duplicates, the distance to every picture learned with a memorized prompt; confidence, CLIP's
    probability of the object that it names; pixels, the correlation with the attractor; background_rgb; and of a
    trajectory noise_mean and magnitude, over the steps (NaN where it was not measured).
    """

    def __call__(self, run: Trajectory | Sweep, prompts: pd.DataFrame) -> pd.DataFrame:
        pictures, table = run.images().flatten(0, -4), super().__call__(run, prompts)
        table["to_duplicates"] = (1 - self.distance.features(pictures) @ self.learned.T).tolist()
        texts = self.alignment.text_features([f"a picture of a {name}" for name in self.objects])
        logits = self.alignment.features(pictures) @ texts.T * self.alignment.network.logit_scale.exp().detach()
        table["confidence"] = logits.softmax(dim=1).amax(dim=1)
        table["background_rgb"] = background_colour(pictures).tolist()
        if "attractor" in prompts:
            paths = table["prompt"].map(prompts.drop_duplicates("prompt").set_index("prompt")["attractor"])
            table["pixels"] = layout_similarity(pictures, read_pictures(paths), [(0, 0, 0)] * len(paths))
        if isinstance(run, Trajectory):
            table["noise_mean"] = initial_noise(run.denoiser, run.seeds).mean(dim=(2, 3)).tolist()
            table["magnitude"] = run.guidance_magnitude.tolist()
        return table


def plan(scenario: Scenario) -> list[tuple]:
    """(group, prompts, seeds, mitigations by name) of all runs.

    * memorized: each prompt x 8 seeds under CFG from T ("cfg") and unguided ("none");
    * ordinary: each x 4 seeds, "cfg" and "none"; x 2 seeds, the paper's rules;
    * calibration: the same prompts x 2 other seeds, "cfg", for the ball's radius only;
    * unconditional: 256 seeds, "none".
    """
    if scenario.name != MAIN:
        return []
    memorized, ordinary = (scenario.table(group) for group in ("memorized", "ordinary"))
    always, never = {"cfg": [ConstantGuidance(scenario.guidance_scale)]}, {"none": [ConstantGuidance(0.0)]}
    rules = {name: setting for name, setting in tuned(scenario).items() if name in RULES}
    return [
        ("memorized", memorized, range(8), always | never),
        ("ordinary", ordinary, range(4), always | never),
        ("ordinary", ordinary, range(2), rules),
        ("calibration", ordinary, range(4, 6), always),
        ("unconditional", ordinary.head(1), range(256), never),
    ]


def sweeps(scenario: Scenario) -> list[tuple]:
    """(group, prompts, seeds, name of the guidance before the start, its scale) of all sweeps over `STARTS`.

    Memorized prompts with no and with opposite guidance before, templates with none; of another scenario's prompts 24.
    """
    memorized, opposite = scenario.table("memorized"), -scenario.opposite_scale
    if scenario.name != MAIN:
        rows = spread(memorized.drop_duplicates("prompt"), 24)
        return [("sweep", rows, range(4), "none", 0.0)]
    kinds = {"none": 0.0, "opposite": opposite}
    found = [("sweep", memorized, range(4), name, scale) for name, scale in kinds.items()]
    return [*found, ("template", spread(scenario.table("template"), 24), range(4), "none", 0.0)]


def evaluate(
    scenario: Scenario, parts: str | Path, device: str = "cpu", steps: int = 50, only: str | None = None
) -> pd.DataFrame:
    """The table of all samples of `plan` and `sweeps`, and of the points of `measured_points`; resumes from ``parts``.

    Column guidance is a method's name; of a sweep that before the start, whose time is in the column start. ``only``
    names one group, where the others are not wanted.
    """
    denoiser, judges, tables = scenario.load(device=device), Measuring(scenario, device), []
    after = ConstantGuidance(scenario.guidance_scale)
    for group, prompts, seeds, settings in [part for part in plan(scenario) if only in (None, part[0])]:
        total, silent = len(prompts) * len(seeds) * len(settings), not processes().is_main_process
        with tqdm(total=total, unit="sample", desc=group, disable=silent) as bar:
            for name, setting in settings.items():
                options = {"steps": steps, "measure": name == "none", "block": 24, "batch_size": 64, "bar": bar}
                table = run_grid(denoiser, prompts, seeds, {name: setting}, judges, parts, **options)
                tables.append(table.rename(columns={"method": "guidance"}).drop(columns="seconds").assign(group=group))
    for group, prompts, seeds, name, scale in [part for part in sweeps(scenario) if only in (None, part[0])]:
        options = {"before": ConstantGuidance(scale), "after": after, "steps": steps, "batch_size": 64, "folder": parts}
        swept = sweep(denoiser, prompts["prompt"], seeds, STARTS, **options)
        tables.append(judges(swept, prompts).assign(guidance=name, group=group))
        if group == "sweep" and scenario.name == MAIN:
            tables.append(measured_points(denoiser, judges, range(2), **options).assign(guidance=name))
    table = pd.concat(tables, ignore_index=True)
    table["clip"] = table["clip"].where(table["group"].isin(["ordinary", "unconditional"]), None)
    table["to_duplicates"] = table["to_duplicates"].where(table["group"] == "calibration", None)
    table.attrs["weights"] = denoiser.fingerprint()
    return table


def measured_points(denoiser: Denoiser, judges: Judges, seeds, steps: int, **options) -> pd.DataFrame:
    """The transition point of each memorized prompt and seed, to one step of the sampler, as group "points"."""
    prompts = judges.scenario.table("memorized")
    attractors = read_pictures(prompts["attractor"]).repeat_interleave(len(seeds), dim=0)
    options |= {"starts": [*denoiser.timesteps(steps), 0], "steps": steps}
    given = denoiser, prompts["prompt"].tolist(), seeds, attractors, judges.distance, judges.scenario.radius
    points = transition_points_by_bisection(*given, **options).drop(columns="calls")
    return points.merge(prompts[["prompt", "share"]], on="prompt").assign(group="points")


def read_evaluation(denoiser: Denoiser) -> pd.DataFrame:
    """The kept evaluation of a bundled checkpoint; raises ValueError when it is of other weights."""
    path = data_folder() / denoiser.name / "evaluation.parquet"
    table = pd.read_parquet(path)
    if table.attrs["weights"] != denoiser.fingerprint():
        raise ValueError(f"{path} is of the weights {table.attrs['weights']}: run `make evaluate`")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipe.evaluate", description=__doc__)
    parser.add_argument("names", nargs="*", default=SCENARIOS, help="bundled scenarios (default: all three)")
    parser.add_argument("--device", help="default: cpu; of several processes each its own GPU")
    parser.add_argument("--only", help="calibration: print the radius; sweep: the chosen starts; write nothing")
    parser.add_argument("--parts", type=Path, default=Path("build/evaluation"), help="where it resumes from")
    options, team = parser.parse_args(), processes()
    device = options.device or (str(team.device) if team.num_processes > 1 else "cpu")
    for scenario in map(read, [MAIN] if options.only else options.names):
        table = evaluate(scenario, options.parts, device, only=options.only)
        if not team.is_main_process:
            continue
        if options.only is None:
            path = data_folder() / scenario.model / "evaluation.parquet"
            table.to_parquet(path, index=False)
            print(f"{len(table)} rows in {path}")
        if scenario.name == MAIN and options.only != "sweep":
            radius = calibrate_radius(negatives_of(table, scenario, CopyDistance()))
            print(f"radius: {radius!r}, layout_floor: {layout_floor(scenario)!r}")
        if scenario.name == MAIN and options.only != "calibration":
            print("starts:", {name: chosen_start(table, scenario, name) for name in ("none", "opposite")})
    team.destroy_process_group()


if __name__ == "__main__":
    main()
