"""The bundled checkpoints, sampled and judged: what each of their pictures is, where the truth is known.

``judged`` says of the samples of a run or a sweep what became of them; ``evaluate`` makes all samples that
the claims about a checkpoint rest on (see `scorecard`), and they are kept beside it.
"""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from .. import metrics
from ..basin import Ball, outcomes
from ..experiment import processes, read_part, run_grid, write_part
from ..forks import Sweep
from ..guidance import ConstantGuidance, StaticTransitionPoint
from ..models import Denoiser, data_folder, read_pictures, read_prompts, read_scenario
from ..sampling import Trajectory, initial_noise


def measured(run: Trajectory, prompts: pd.DataFrame, judges: "Judges") -> pd.DataFrame:
    """One row a sample of ``run``: what became of it.

    ``prompts`` has one row a sample with at least ``prompt`` and ``object``. Columns of the result
    beside those of ``prompts``: seed; distance and layout similarity to the own attractor, where
    there is one; to_duplicates, the distance to every duplicated scene; seen, the object that CLIP
    names; object_right; saturated; background_rgb and noise_mean; magnitude, over the steps (NaN
    where not measured); calls.
    """
    pictures = run.images()
    features = judges.distance.features(pictures)
    table = prompts.drop(columns=["attractor", "swapped"], errors="ignore")
    table["seed"] = run.seeds
    table["to_duplicates"] = (1 - features @ judges.duplicates.T).tolist()
    if "attractor" in prompts:
        wanted = read_pictures(prompts["attractor"])
        table["distance"] = 1 - (features * judges.distance.features(wanted)).sum(dim=1)
        boxes = [metrics.Box(*row) for row in prompts[["left", "top", "size"]].itertuples(index=False)]
        table["layout"] = metrics.layout_similarity(pictures, wanted, boxes)
    table["seen"] = [judges.names[i] for i in judges.alignment.classify(pictures, judges.names).tolist()]
    table["object_right"] = table["seen"] == table["object"]
    table["saturated"] = metrics.saturated_share(pictures)
    table["background_rgb"] = metrics.background_colour(pictures).tolist()
    table["noise_mean"] = initial_noise(run.denoiser, run.seeds).mean(dim=(2, 3)).tolist()
    table["magnitude"] = run.guidance_magnitude.tolist()
    table["calls"] = run.network_calls
    return table


def judged(run: Trajectory | Sweep, prompts: pd.DataFrame, judges: "Judges", ball: Ball) -> pd.DataFrame:
    """One row a sample of ``run``, or a sample and start time of a sweep: what became of it.

    Columns: prompt, seed, (start,) distance, inside, object_right, new_and_right (right and outside
    the ball), saturated, and ``share`` of the duplicate. ``prompts`` has a row for each prompt of the
    run, as `models.read_prompts` gives it.
    """
    rows = prompts.set_index("prompt").loc[run.prompts]
    table = outcomes(run, read_pictures(rows["attractor"]), judges.distance, ball)
    pictures = run.images().flatten(0, 1) if isinstance(run, Sweep) else run.images()
    rows = rows.iloc[np.arange(len(table)) * len(run) // len(table)]  # of a sweep, once for each start
    table["object_right"] = metrics.object_right(judges.alignment, pictures, rows["object"].tolist(), judges.names)
    table["new_and_right"] = table["object_right"] & ~table["inside"]
    table["saturated"] = metrics.saturated_share(pictures)
    table["share"] = rows["share"].to_numpy()
    return table


class Judges:
    """What looks at pictures: the distance D, CLIP, all object names, and the scenes that were learned by heart.

    ``duplicates`` are descriptors of all of these but the templates', ``attractors`` those of each prompt,
    and ``scenes`` each prompt's pictures. ``lpips`` is a `metrics.PerceptualDistance` or None.
    """

    def __init__(
        self, scenario: str, device: str | torch.device = "cpu", lpips: metrics.PerceptualDistance | None = None
    ):
        self.lpips = lpips
        memorized, ordinary = read_prompts(scenario, "memorized"), read_prompts(scenario, "ordinary")
        self.distance, self.alignment = metrics.CopyDistance(device=device), metrics.Alignment(device=device)
        self.names = sorted({*memorized["object"], *ordinary["object"]})
        pictures, of = read_pictures(memorized["attractor"]), memorized.groupby("prompt").indices
        features = self.distance.features(pictures)
        self.duplicates = features[torch.tensor((memorized["kind"] != "template").tolist())]
        self.attractors = {prompt: features[rows] for prompt, rows in of.items()}
        self.scenes = {prompt: pictures[rows] for prompt, rows in of.items()}

    def fingerprint(self) -> str:
        """Which weights judge: the first 16 digits of the SHA-256 of the descriptor's and CLIP's, and whether LPIPS."""
        digest = hashlib.sha256(self.lpips.name.encode() if self.lpips else b"")
        for model in (self.distance.network, self.alignment.model):
            for tensor in model.state_dict().values():
                digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


STARTS = (900, 800, 700, 650, 600, 500, 400, 300)


def evaluate(denoiser: Denoiser, parts: str | Path, *, steps: int = 50, progress: bool = True) -> pd.DataFrame:
    """All samples that the claims about a bundled checkpoint rest on; column ``group`` says which they are.

    * memorized: 48 verbatim prompts x 8 seeds under CFG from T ("cfg"), CFG late ("late"), unguided ("none");
    * sweep: the same prompts x 4 seeds, one guidance a start time ("start-700", ...; column ``start``);
    * ordinary: 96 prompts x 4 seeds, "cfg" and "none";
    * calibration: the same prompts x 2 other seeds, "cfg", for the ball's radius only;
    * template: 96 prompts x 2 seeds, "cfg".

    Resumes from ``parts``; about 300,000 network predictions in all.
    """
    settings, judges = read_scenario(denoiser.name), Judges(denoiser.name, denoiser.device)
    scale, late = settings["guidance_scale"], settings["late_start"]
    memorized, ordinary = read_prompts(denoiser.name, "memorized"), read_prompts(denoiser.name, "ordinary")
    verbatim, template = (memorized[memorized["kind"] == kind] for kind in ("verbatim", "template"))
    always, never = ConstantGuidance(scale), ConstantGuidance(0.0)
    sweep = {f"start-{t}": StaticTransitionPoint(t, scale) for t in STARTS}
    plan = {
        "memorized": (verbatim, range(8), {"cfg": always, "late": StaticTransitionPoint(late, scale), "none": never}),
        "ordinary": (ordinary, range(4), {"cfg": always, "none": never}),
        "calibration": (ordinary, range(4, 6), {"cfg": always}),
        "template": (template, range(2), {"cfg": always}),
        "sweep": (verbatim, range(4), sweep),
    }
    tables, progress = [], progress and processes().is_main_process
    for group, (prompts, seeds, guidances) in plan.items():
        if progress:
            print(f"{group}: {len(prompts)} prompts x {len(seeds)} seeds x {len(guidances)} guidances", flush=True)
        folder = Path(parts) / group
        judge = lambda run, rows: measured(run, rows, judges)  # noqa: E731
        with tqdm(total=len(prompts) * len(seeds) * len(guidances), unit="sample", disable=not progress) as bar:
            options = {"steps": steps, "measure": ("none",), "block": 24, "judges": judges.fingerprint(), "bar": bar}
            table = run_grid(denoiser, prompts, seeds, guidances, judge, folder, **options)
        tables.append(table.rename(columns={"strategy": "guidance"}).drop(columns="seconds").assign(group=group))
    table = pd.concat(tables, ignore_index=True)
    table["start"] = pd.to_numeric(table["guidance"].str.removeprefix("start-"), errors="coerce")
    return table


def evaluation_path(name: str) -> Path:
    """Where the evaluation of a bundled checkpoint is kept."""
    return data_folder() / name / "evaluation.parquet"


def write_evaluation(denoiser: Denoiser, table: pd.DataFrame) -> Path:
    """Keep an evaluation beside its checkpoint, with the fingerprint of the weights inside."""
    path = evaluation_path(denoiser.name)
    write_part(table, path, {"weights": denoiser.fingerprint()})
    return path


def read_evaluation(denoiser: Denoiser) -> pd.DataFrame:
    """The kept evaluation; raises ValueError when it was made with other weights, OSError when damaged."""
    return read_part(evaluation_path(denoiser.name), {"weights": denoiser.fingerprint()})[0]


def unguided_magnitudes(table: pd.DataFrame) -> dict[str, torch.Tensor]:
    """Guidance magnitudes [B, S] of the unguided trajectories of an evaluation, memorized and ordinary."""
    return {
        f"{group}, no CFG": torch.tensor(np.stack(table.query("group == @group and guidance == 'none'")["magnitude"]))
        for group in ("memorized", "ordinary")
    }
