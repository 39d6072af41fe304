"""A grid prompt x seed x strategy -> one tidy table, one row a sample, resumable.

The table is kept in parts, one parquet file per strategy and block of prompts, each written
beside its place and moved there, with the weights' fingerprint and the settings inside: a
killed run goes on with the missing parts, and a part of other weights or settings is named
instead of being mixed in. Under ``accelerate launch`` every process makes its share of the missing
parts; how many processes there are matters to no part, and may differ from run to run.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers.guiders import BaseGuidance
from tqdm.auto import tqdm

from . import metrics
from .basin import Ball, outcomes
from .guidance import ConstantGuidance, StaticTransitionPoint
from .models import Denoiser, data_folder, read_pictures, read_prompts, read_scenario
from .perturbation import Strategy
from .sampling import Sweep, Trajectory, initial_noise, sample


def read_part(path: Path, expected: dict) -> tuple[pd.DataFrame, dict]:
    """A part, after checking that it is whole and belongs to this grid, and what is noted in it.

    Raises OSError when it is damaged, ValueError when its settings are others. Parts written before there
    were checksums have none to check.
    """
    try:
        arrow = pq.read_table(path)
        metadata, table = arrow.schema.metadata or {}, arrow.to_pandas()
        noted = metadata.get(b"basinlab", b"{}")
        found = dict(json.loads(noted))
        if b"sha256" in metadata and metadata[b"sha256"] != _digest(table, noted):
            raise ValueError("its checksum is another")
    except Exception as error:  # of damaged bytes, arrow and pandas raise of all sorts
        raise OSError(f"{path} is damaged ({error}): delete it, and the next run makes it again") from error
    different = [key for key in expected if found.get(key) != expected[key]]
    if different:
        raise ValueError(f"{path} was made with another {', '.join(different)}: delete it, or give another folder")
    return table, found


def _digest(table: pd.DataFrame, noted: bytes) -> bytes:
    """The checksum that a part holds, of its table as pandas reads it and of what is noted in it."""
    arrow = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata().combine_chunks()
    content = pa.BufferOutputStream()
    with pa.ipc.new_stream(content, arrow.schema) as stream:
        stream.write_table(arrow)
    return hashlib.sha256(noted + content.getvalue()).hexdigest().encode()


def write_part(table: pd.DataFrame, path: Path, settings: dict) -> None:
    """Write ``table`` with its ``settings`` inside, whole or not at all."""
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    noted = json.dumps(settings).encode()
    note = {b"basinlab": noted, b"sha256": _digest(arrow.to_pandas(), noted)}
    arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), **note})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(arrow, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


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
        """Which weights judge: the first 16 digits of the SHA-256 of the descriptor's and CLIP's."""
        digest = hashlib.sha256()
        for model in (self.distance.network, self.alignment.model):
            for tensor in model.state_dict().values():
                digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def processes() -> PartialState:
    """The processes of this run: one, or those that ``accelerate launch`` began, over gloo where there is no GPU."""
    # one may wait for the others' last parts for long
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


@dataclass(frozen=True)
class _Part:
    """One strategy on one block of prompts: what is kept in one file."""

    strategy: str
    rows: pd.DataFrame
    path: Path
    settings: dict


def shares(costs: Sequence[float], processes: int) -> list[list[int]]:
    """Which of the tasks with ``costs`` each process does, the dearest first: each goes to who has least so far.

    >>> shares([1, 1, 4, 1, 1], 2)
    [[2], [0, 1, 3, 4]]
    """
    loads, found = [0.0] * processes, [[] for _ in range(processes)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        found[least].append(i)
        loads[least] += costs[i]
    return found


def run_grid(
    denoiser: Denoiser,
    prompts: pd.DataFrame,
    seeds: Sequence[int],
    strategies: Mapping[str, Strategy | BaseGuidance],
    judge: Callable[[Trajectory, pd.DataFrame], pd.DataFrame],
    folder: str | Path,
    *,
    steps: int = 50,
    measure: Sequence[str] = (),
    block: int = 16,
    batch_size: int = 32,
    judges: str = "",
    bar: tqdm | None = None,
) -> pd.DataFrame:
    """Sample ``prompts`` x ``seeds`` under every strategy and judge the pictures; resumes from ``folder``.

    Args:
        prompts: a table of `read_prompts`.
        strategies: name -> strategy, or guidance alone; the name becomes the column ``strategy``.
        judge: of a run and the rows of ``prompts`` that its samples are of, the rows of the result.
        folder: of the parts; where several processes work, all of them see it.
        measure: names of strategies whose guidance magnitude is measured at every step.
        block: prompts in one part.
        batch_size: samples that go through the network together.
        judges: which they are, `Judges.fingerprint`; noted in every part.
        bar: moved on by the samples of every part.

    Raises ValueError or OSError when a part in ``folder`` has other settings or is damaged.
    """
    strategies = {name: s if isinstance(s, Strategy) else Strategy(s) for name, s in strategies.items()}
    parts = _parts(denoiser, prompts, seeds, strategies, Path(folder), steps, block, judges)
    done = {part.path: read_part(part.path, part.settings) for part in parts if part.path.exists()}
    before = 0 if bar is None else bar.n

    def show() -> None:
        if bar is not None:
            bar.update(before + sum(len(p.rows) * len(seeds) for p in parts if p.path.exists()) - bar.n)

    show()
    team = processes()
    missing = [i for i, part in enumerate(parts) if part.path not in done]
    missing = broadcast_object_list([missing])[0]  # the first process's list: others may have come later
    each = {name: strategy.predictions(denoiser, steps) for name, strategy in strategies.items()}
    costs = [each[parts[i].strategy] * len(parts[i].rows) for i in missing]
    for i in (missing[n] for n in shares(costs, team.num_processes)[team.process_index]):
        part, strategy = parts[i], strategies[parts[i].strategy]
        options = {"steps": steps, "batch_size": batch_size, "measure": part.strategy in measure}
        _make(denoiser, part, strategy, seeds, judge, options)
        show()
    team.wait_for_everyone()
    show()
    found = [(part, *(done.get(part.path) or read_part(part.path, part.settings))) for part in parts]
    tables = [table.assign(strategy=part.strategy, seconds=note["seconds"]) for part, table, note in found]
    return pd.concat(tables, ignore_index=True)


def _make(denoiser: Denoiser, part: _Part, strategy: Strategy, seeds: Sequence[int], judge, options: dict) -> None:
    """Sample the pictures of one part, judge them, and write it."""
    prompts, options = part.rows["prompt"].tolist(), {"record": False, "progress": False, **options}
    began = time.perf_counter()
    run = sample(denoiser, prompts, seeds, strategy.guidance, perturbations=strategy.perturbations, **options)
    seconds = (time.perf_counter() - began) / len(run)
    table = judge(run, part.rows.loc[part.rows.index.repeat(len(seeds))].reset_index(drop=True))
    write_part(table, part.path, {**part.settings, "seconds": seconds})


def _parts(denoiser, prompts, seeds, strategies, folder: Path, steps: int, block: int, judges: str) -> list[_Part]:
    """All parts of a grid, in the order of its table."""
    weights, parts = denoiser.fingerprint(), []
    for name, strategy in strategies.items():
        for number, start in enumerate(range(0, len(prompts), block)):
            rows = prompts.iloc[start : start + block]
            settings = {
                "weights": weights,
                **strategy.settings(),
                "prompts": rows["prompt"].tolist(),
                "seeds": list(seeds),
                "steps": steps,
                "dtype": str(denoiser.dtype),
                "judges": judges,
            }
            parts.append(_Part(name, rows, folder / f"{name}-{number:02d}.parquet", settings))
    return parts


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
