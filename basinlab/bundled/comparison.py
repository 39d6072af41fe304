"""Every mitigation on the same prompts, the same noise and the same metrics, over all scenarios.

``contenders`` names the methods, each with four settings from weak to strong. ``tune`` tries them on
held-out prompts, ``tuned`` takes the best of each; ``compare`` samples the grid scenario x group x
prompt x seed x strategy; ``summary`` gives one row a scenario, group and strategy, with intervals.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from .. import metrics
from .. import perturbation as p
from ..basin import Ball
from ..experiment import processes, read_part, run_grid, write_part
from ..guidance import (
    ConstantGuidance,
    DynamicTransitionPoint,
    GuidanceInterval,
    OppositeGuidance,
    ScheduledGuidance,
    StaticTransitionPoint,
)
from ..models import Denoiser, data_folder, load, read_pictures, read_prompts, read_scenario
from ..perturbation import Perturbation, Strategy, combined
from ..sampling import Trajectory
from .evaluation import Judges, read_evaluation
from .scorecard import ball_of, layout_floor

MAIN = "emoji-duplicated"
SCENARIOS = (MAIN, "emoji-finetuned", "emoji-classes")


def contenders(scale: float) -> dict[str, tuple[Strategy, ...]]:
    """Each method with four settings, from weak to strong; CFG at ``scale``, from T on, has one.

    Constants are the authors', rescaled for the bundled world: latents have a quarter of Stable
    Diffusion's norm, embeddings a deviation of 0.22 instead of 1, and the guidance magnitude of a
    memorized prompt at T is about 0.4 of epsilon's norm.
    """
    cfg = ConstantGuidance(scale)

    def before(*perturbations: Perturbation, guidance=cfg) -> tuple[Strategy, ...]:
        return tuple(Strategy(guidance, (perturbation,)) for perturbation in perturbations)

    def guided(*guidances) -> tuple[Strategy, ...]:
        return tuple(Strategy(guidance) for guidance in guidances)

    after_five_steps = StaticTransitionPoint(899, scale)
    return {
        "CFG": guided(cfg),
        "lower scale": guided(*(ConstantGuidance(scale * part) for part in (0.6, 0.4, 0.3, 0.2))),
        "RNA": before(*(p.RandomNumbers(n) for n in (1, 2, 4, 8))),
        "RTA": before(*(p.RandomTokens(n) for n in (1, 2, 4, 8))),
        "CWR": before(*(p.RepeatedWords(n) for n in (1, 2, 4, 8))),
        "GNI": before(*(p.EmbeddingNoise(s) for s in (0.025, 0.1, 0.2, 0.4))),
        "Wen": before(*(p.PromptOptimization(t, rate=0.01) for t in (0.3, 0.2, 0.1, 0.05))),
        "Ren": before(
            *(p.CrossAttentionMask(c, keep) for c, keep in ((1.25, True), (1.25, False), (2, False), (3, False)))
        ),
        "CADS": before(*(p.ConditionAnnealing(0.1, t + 300, t) for t in (600, 500, 350, 200))),
        "Han, per sample": before(*(p.NoiseDescent(t, 0.02, 30) for t in (0.3, 0.2, 0.15, 0.1))),
        "Han, batch-wise": before(*(p.NoiseAscent(12.5, g) for g in (3, 10, 20, 40)), guidance=after_five_steps),
        "SAIL": before(*(p.SharpnessAwareNoise(t, 0.25, 0.01, 0.02) for t in (0.6, 0.5, 0.45, 0.4))),
        "interval": guided(*(GuidanceInterval(t, 100, scale) for t in (800, 700, 600, 500))),
        "schedule": guided(*(ScheduledGuidance(name, scale) for name in ("v", "a", "linear", "cosine"))),
        "STP": guided(*(StaticTransitionPoint(t, scale) for t in (700, 600, 500, 400))),
        "DTP": guided(*(DynamicTransitionPoint(scale, s, t) for s, t in ((1, 500), (0, 500), (0, 400), (0, 300)))),
        "OG + STP": guided(*(OppositeGuidance(t, scale, s) for t, s in ((750, 0.5), (700, 1), (650, 1), (650, 2)))),
        "OG + DTP": guided(*(OppositeGuidance(None, scale, s) for s in (0.25, 0.5, 1, 2))),
    }


OWN = ("STP", "DTP", "OG + STP", "OG + DTP")
PRIOR = ("RNA", "RTA", "CWR", "GNI", "Wen", "Ren", "CADS", "Han, per sample", "SAIL")


def combinations(chosen: Mapping[str, Strategy]) -> dict[str, Strategy]:
    """Each prior method that leaves guidance alone, with the guidance of DTP and of OG + DTP."""
    return {
        f"{prior} + {rule}": combined(chosen[prior], chosen[rule]) for rule in ("DTP", "OG + DTP") for prior in PRIOR
    }


@dataclass(frozen=True)
class Profile:
    """How much is sampled: prompts and seeds of each group, what the trade-offs and combinations get, the steps.

    ``ordinary_elsewhere``: whether ordinary prompts are sampled in the other scenarios too.
    """

    memorized: int
    elsewhere: int
    seeds: int
    extra: tuple[int, int]  # prompts, seeds
    ordinary_elsewhere: bool = False
    steps: int = 50
    iterations: int | None = None  # at most so many before the first step
    few: bool = False  # one setting a method, two combinations, and elsewhere the paper's methods alone


PROFILES = {
    "tiny": Profile(3, 3, 2, (3, 1), steps=4, iterations=1, few=True),  # for tests
    "reader": Profile(6, 4, 2, (6, 1)),
    "paper": Profile(32, 16, 4, (16, 2), ordinary_elsewhere=True),
}
HELD_OUT = 16  # of the verbatim prompts, the last ones


def groups(scenario: str, profile: Profile) -> dict[str, pd.DataFrame]:
    """Prompts of a scenario by group, spread evenly over what there is; none of the held-out ones."""
    memorized, ordinary = read_prompts(scenario, "memorized"), read_prompts(scenario, "ordinary")
    kinds = {kind: rows.drop_duplicates("prompt") for kind, rows in memorized.groupby("kind", sort=False)}
    if scenario == MAIN:
        kinds["verbatim"] = kinds["verbatim"].iloc[:-HELD_OUT]
    main = profile.memorized if scenario == MAIN else profile.elsewhere
    wanted = {"verbatim": main, "class": profile.elsewhere, "template": profile.elsewhere}
    found = {"memorized" if kind != "template" else kind: _spread(rows, wanted[kind]) for kind, rows in kinds.items()}
    if scenario != MAIN and not profile.ordinary_elsewhere:
        return found
    ordinary = ordinary[~ordinary["object"].isin(memorized.query("kind == 'class'")["object"])]
    return found | {"ordinary": _spread(ordinary, main)}


def at_most(strategies: Mapping[str, Strategy], iterations: int | None) -> dict[str, Strategy]:
    """The same strategies with at most so many iterations before the first step; None leaves them as they are."""
    if iterations is None:
        return dict(strategies)

    def cut(q: Perturbation) -> Perturbation:
        return replace(q, iterations=min(q.iterations, iterations)) if hasattr(q, "iterations") else q

    return {name: replace(s, perturbations=tuple(map(cut, s.perturbations))) for name, s in strategies.items()}


def _spread(rows: pd.DataFrame, count: int) -> pd.DataFrame:
    """``count`` of ``rows``, or all, at even distances."""
    at = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return rows.iloc[at].reset_index(drop=True)


def held_out(scenario: str = MAIN) -> pd.DataFrame:
    """The memorized prompts that settings are chosen on."""
    return read_prompts(scenario, "memorized").query("kind == 'verbatim'").tail(HELD_OUT).reset_index(drop=True)


def outcome(run: Trajectory, prompts: pd.DataFrame, judges: Judges) -> pd.DataFrame:
    """One row a sample of ``run``: what became of it, and what it took.

    Columns: prompt, object, seed; distance to the nearest picture learned with the prompt (NaN for
    ordinary prompts) and to the nearest learned with any; lpips to the former, where there are weights for it;
    layout, for templates; object_right;
    clip_score; saturated; diversity, the mean distance between the prompt's samples; calls,
    gradient_passes; clip, the image features [F].
    """
    pictures = run.images()
    features, clip = judges.distance.features(pictures), judges.alignment.picture_features(pictures)
    table = prompts[["prompt", "object"]].copy()
    table["seed"] = run.seeds
    table["distance"] = np.nan
    table["nearest"] = (1 - features @ judges.duplicates.T).amin(dim=1)
    if "attractor" in prompts:
        own = [1 - judges.attractors[prompt] @ f for prompt, f in zip(run.prompts, features, strict=True)]
        table["distance"] = [float(d.min()) for d in own]
        if judges.lpips is not None:
            learned = [judges.scenes[prompt][d.argmin()] for prompt, d in zip(run.prompts, own, strict=True)]
            table["lpips"] = judges.lpips(pictures, torch.stack(learned))
    table["layout"] = np.nan
    if "kind" in prompts and (prompts["kind"] == "template").all():
        boxes = [metrics.Box(*row) for row in prompts[["left", "top", "size"]].itertuples(index=False)]
        table["layout"] = metrics.layout_similarity(pictures, read_pictures(prompts["attractor"]), boxes)
    table["object_right"] = metrics.object_right(judges.alignment, pictures, table["object"].tolist(), judges.names)
    table["clip_score"] = (clip * judges.alignment.text_features(run.prompts)).sum(dim=1)
    table["saturated"] = metrics.saturated_share(pictures)
    rows = table.groupby("prompt").indices
    spread = {prompt: float(metrics.diversity(features[i])) if len(i) > 1 else np.nan for prompt, i in rows.items()}
    table["diversity"] = table["prompt"].map(spread)
    table["calls"], table["gradient_passes"] = run.network_calls, run.gradient_passes
    table["clip"] = list(clip.half().numpy())
    return table


def tune(denoiser: Denoiser, judges: Judges, ball: Ball, folder: str | Path, seeds=range(2), steps: int = 50):
    """Every setting of every contender on the held-out prompts.

    One row a method and setting (0 to 3): copied, right, new_and_right (shares of n samples).
    """
    tries = _settings(contenders(read_scenario(denoiser.name)["guidance_scale"]))
    prompts = held_out(denoiser.name)
    total, silent = len(tries) * len(prompts) * len(seeds), not processes().is_main_process
    with tqdm(total=total, unit="sample", desc="tuning", disable=silent) as bar:
        judge = lambda run, rows: outcome(run, rows, judges)  # noqa: E731
        options = {"steps": steps, "judges": judges.fingerprint(), "bar": bar}
        table = run_grid(denoiser, prompts, seeds, tries, judge, folder, **options)
    copied = table["distance"] <= ball.radius
    table = table.assign(copied=copied, right=table["object_right"], new_and_right=table["object_right"] & ~copied)
    shares = table.groupby("strategy", sort=False)[["copied", "right", "new_and_right"]].mean()
    shares["n"] = table.groupby("strategy").size()
    shares[["method", "setting"]] = [name.rsplit(" #", 1) for name in shares.index]
    return shares.astype({"setting": int}).reset_index(drop=True)


def _settings(methods: Mapping[str, tuple[Strategy, ...]]) -> dict[str, Strategy]:
    """Each setting as a strategy of its own, called "method #setting"."""
    return {f"{name} #{i}": strategy for name, tries in methods.items() for i, strategy in enumerate(tries)}


def tuning_path() -> Path:
    """Where the tried settings are kept."""
    return data_folder() / MAIN / "tuning.csv"


def chosen_settings(tuning: pd.DataFrame) -> dict[str, int]:
    """Of each method the setting with most samples new and right; of equal ones the weakest."""
    best = tuning.sort_values("setting", kind="stable").groupby("method", sort=False)["new_and_right"].idxmax()
    return dict(zip(best.index, tuning.loc[best, "setting"].tolist(), strict=True))


def tuned(scale: float, tuning: pd.DataFrame | None = None) -> dict[str, Strategy]:
    """Every contender at the setting that did best on the held-out prompts (default: the kept tuning).

    Raises ValueError when there is no kept tuning, or it lacks a contender.
    """
    if tuning is None:
        if not tuning_path().exists():
            raise ValueError(f"{tuning_path()} is missing: restore it with `git checkout -- data`, or run `make tune`")
        tuning = pd.read_csv(tuning_path())
    if missing := sorted(set(contenders(scale)) - set(tuning["method"])):
        raise ValueError(f"no setting of {missing} was tried: run `make tune`")
    settings = chosen_settings(tuning)
    return {name: tries[settings[name]] for name, tries in contenders(scale).items()}


@dataclass(frozen=True)
class Task:
    """A part of the comparison: some strategies on one group of one scenario's prompts."""

    scenario: str
    group: str
    prompts: pd.DataFrame
    seeds: range
    strategies: Mapping[str, Strategy]
    of: str  # "methods", "settings" or "combinations"
    steps: int

    def settings(self) -> dict:
        """All that tells it from another of the same size, for a record of what was done."""
        return {
            **{name: getattr(self, name) for name in ("scenario", "group", "of")},
            "prompts": self.prompts["prompt"].tolist(),
            "seeds": list(self.seeds),
            "strategies": {name: strategy.settings() for name, strategy in self.strategies.items()},
        }

    def samples(self) -> int:
        return len(self.prompts) * len(self.seeds) * len(self.strategies)

    def predictions(self, denoiser: Denoiser) -> int:
        """At most so many network predictions, a differentiated one counted as three."""
        each = sum(strategy.predictions(denoiser, self.steps) for strategy in self.strategies.values())
        return len(self.prompts) * len(self.seeds) * each


def plan(
    profile: str = "reader", strategies: Mapping[str, Strategy] | None = None, only: Sequence[str] = ()
) -> list[Task]:
    """What `compare` samples: all methods everywhere, all settings and combinations on the main scenario's memorized.

    Args:
        profile: the size, one of `PROFILES`.
        strategies: further ones.
        only: names of the methods wanted, with neither settings nor combinations (default: all).

    Raises ValueError for an unknown profile or method.
    """
    if profile not in PROFILES:
        raise ValueError(f"no profile {profile!r}: give one of {sorted(PROFILES)}")
    size, tasks = PROFILES[profile], []
    for scenario in SCENARIOS:
        scale = read_scenario(scenario)["guidance_scale"]
        methods = at_most({**tuned(scale), **(strategies or {})}, size.iterations)
        if unknown := [name for name in only if name not in methods]:
            raise ValueError(f"no method {unknown}: give some of {sorted(methods)}")
        methods = {name: methods[name] for name in only or methods}
        parts, paper = groups(scenario, size), {name: methods[name] for name in ("CFG", *OWN) if name in methods}
        every = {
            group: paper if size.few and not only and (scenario, group) != (MAIN, "memorized") else methods
            for group in parts
        }
        wanted = [(group, rows, size.seeds, every[group], "methods") for group, rows in parts.items()]
        if scenario == MAIN and not only:
            few = ("memorized", _spread(parts["memorized"], size.extra[0]), size.extra[1])
            tried, pairs = _settings(contenders(scale)), combinations(methods)
            if size.few:
                best = chosen_settings(pd.read_csv(tuning_path()))
                tried = {f"{m} #{i}": tried[f"{m} #{i}"] for m, i in best.items()}
                pairs = {name: s for name, s in pairs.items() if name.startswith("GNI")}
            wanted += [(*few, at_most(tried, size.iterations), "settings"), (*few, pairs, "combinations")]
        tasks += [Task(scenario, g, rows, range(seeds), tried, of, size.steps) for g, rows, seeds, tried, of in wanted]
    return tasks


def cost(tasks: list[Task], device: str = "cpu", shared_by: int = 1) -> str:
    """The plan in words: samples and predictions of each task, and how long they take at the rate measured here."""
    denoiser = load(MAIN, device=device)
    latents, embedding = torch.zeros(64, *denoiser.latent_shape), denoiser.embed([""]).expand(64, -1, -1)
    predict = lambda: denoiser(latents.to(device), 500, embedding).sum().item()  # noqa: E731  (waits for the device)
    predict()
    began = time.perf_counter()
    predict()
    rate = (time.perf_counter() - began) / 64
    lines = [
        f"{'scenario':18} {'group':10} {'of':13} {'prompts':>7} {'seeds':>5} {'strategies':>10} {'predictions':>12}"
    ]
    total = 0
    for task in tasks:
        count = task.predictions(denoiser)
        lines.append(
            f"{task.scenario:18} {task.group:10} {task.of:13} {len(task.prompts):7} {len(task.seeds):5} "
            f"{len(task.strategies):10} {count:12,}"
        )
        total += count
    minutes, team = total * rate / 60 / shared_by, f" in {shared_by} processes" if shared_by > 1 else ""
    lines.append(f"at most {total:,} predictions; at {rate * 1000:.2f} ms each about {minutes:.0f} minutes{team}")
    return "\n".join(lines)


def compare(tasks: list[Task], folder: str | Path, *, device: str = "cpu", progress: bool = True) -> pd.DataFrame:
    """Sample and judge all ``tasks``: the columns of `outcome`, and scenario, group, of, strategy, seconds, copied.

    ``copied``: inside the ball of a picture learned with the prompt; for templates, the layout is
    kept; for ordinary prompts, inside the ball of any picture learned. Resumes from ``folder``. Warns
    where LPIPS cannot be measured.
    """
    ball = ball_of(read_evaluation(load(MAIN)), MAIN, metrics.CopyDistance())
    floor, tables, lpips = layout_floor(MAIN), [], metrics.perceptual_distance(device=device)
    silent = not progress or not processes().is_main_process
    with tqdm(total=sum(task.samples() for task in tasks), unit="sample", disable=silent) as bar:
        for scenario in dict.fromkeys(task.scenario for task in tasks):
            denoiser, judges = load(scenario, device=device), Judges(scenario, device, lpips)
            judge = lambda run, rows, judges=judges: outcome(run, rows, judges)  # noqa: E731
            options = {"judges": judges.fingerprint(), "bar": bar}
            for task in (task for task in tasks if task.scenario == scenario):
                place, options["steps"] = Path(folder) / f"{scenario}-{task.group}-{task.of}", task.steps
                rows = run_grid(denoiser, task.prompts, task.seeds, task.strategies, judge, place, **options)
                tables.append(rows.assign(scenario=scenario, group=task.group, of=task.of))
    table = pd.concat(tables, ignore_index=True)
    near = table["distance"].where(table["group"] != "ordinary", table["nearest"]) <= ball.radius
    table["copied"] = near.where(table["group"] != "template", table["layout"] > floor)
    return table


def kept_path() -> Path:
    """Where the comparison of the committed figures is kept."""
    return data_folder() / "comparison.parquet"


def obtain(profile: str, folder: str | Path, **options) -> pd.DataFrame:
    """The comparison in the size of ``profile``: the kept one if it is that, else made now (see `compare`) and kept.

    Only that of profile "paper" is kept, in `kept_path`. Raises OSError when the kept one is damaged.
    """
    tasks = plan(profile)
    weights = {scenario: load(scenario).fingerprint() for scenario in SCENARIOS}
    made_with = {"weights": weights, "plan": [task.settings() for task in tasks]}
    if profile == "paper" and kept_path().exists():
        try:
            return read_part(kept_path(), made_with)[0]
        except ValueError as changed:
            processes().print(f"made anew: {changed}")
    table = compare(tasks, Path(folder) / profile, **options)
    if profile == "paper" and processes().is_main_process:
        write_part(table, kept_path(), made_with)
    return table
