"""Every mitigation on the same prompts, the same noise and the same judges, in any scenario.

A method has a name and *settings*: each a list of mitigations that ends in a guidance, as `sampling.sample` takes it.

    python -m basinlab.comparison sd14-webster --profile paper --device cuda    # or, on several, by accelerate launch
"""

import argparse
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from diffusers.guiders import AdaptiveProjectedGuidance, BaseGuidance, ClassifierFreeZeroStarGuidance
from tqdm import tqdm

from . import guidance as g
from . import metrics
from . import mitigations as m
from .guidance import describe
from .models import Denoiser, data_folder
from .sampling import every_pair, sample
from .scenarios import Judges, Scenario, names, read
from .statistics import mean_interval, quantile_interval
from .store import digest, kept

MAIN = "emoji-duplicated"
SCENARIOS = (MAIN, "emoji-finetuned", "emoji-classes")
OWN = ("STP", "DTP", "OG + STP", "OG + DTP")  # the paper's
PRIOR = ("RNA", "RTA", "CWR", "GNI", "Wen", "Ren", "CADS", "Han, per sample", "SAIL")  # that leave guidance alone
TINY = ("CFG", "GNI", *OWN)  # what the smallest profile compares
HELD_OUT = 16  # of the main scenario's memorized prompts, the last ones: settings are chosen on them
PROFILES = {  # prompts and seeds of the main scenario, prompts of the others, prompts and seeds of pairs and attack
    "tiny": {"main": 3, "elsewhere": 3, "seeds": 2, "pairs": (3, 1), "attack": (2, 2), "steps": 4, "methods": TINY},
    "reader": {"main": 4, "elsewhere": 2, "seeds": 2, "pairs": (3, 1), "attack": (3, 4), "steps": 25},
    "paper": {"main": 32, "elsewhere": 16, "seeds": 3, "pairs": (16, 1), "attack": (8, 32), "steps": 50},
}


# our four lie around the scenario's own points, or the authors' constants rescaled to latents of a quarter of the norm
def methods(scenario: Scenario) -> dict[str, list[list]]:
    """Each method's settings: the authors' for Stable Diffusion; four for the bundled world, from weak to strong."""
    bundled, s, push = scenario.copy == "descriptor", scenario.guidance_scale, scenario.opposite_scale
    stp, og = scenario.static_transition_point, scenario.opposite_until or scenario.static_transition_point

    def settings(kind, authors: Sequence, ours: Sequence, guidance=None) -> list[list]:
        made = [kind(*constants) for constants in (ours if bundled else [authors])]
        return [[x] if isinstance(x, BaseGuidance) else [x, guidance or g.ConstantGuidance(s)] for x in made]

    words, fifth = [(1,), (2,), (4,), (8,)], g.StaticTransitionPoint(899 if bundled else 919, s)  # the fifth step
    guards = [(0.6, s / 8), (0.3, s / 3.75), (0.3, s / 2.5), (0.1, s / 2)] if bundled else [(0.3, s / 3.75)]
    ordinary, apg = ordinary_prompts(scenario), [(s, None, norm, None, 0) for norm in (7.5, 3.75, 2, 1)]
    dips, pushes = ((1, 0), (0, 0), (0, 100), (0, 200)), ((100, 0.5), (50, 1), (0, 1), (0, 2))
    every = {
        "CFG": [[g.ConstantGuidance(s)]],
        "lower scale": settings(g.ConstantGuidance, [s / 2], [(s * part,) for part in (0.6, 0.4, 0.3, 0.2)]),
        "RNA": settings(m.RandomNumbers, (), words),
        "RTA": settings(m.RandomTokens, (), words),
        "CWR": settings(m.RepeatedWords, (), words),
        "GNI": settings(m.EmbeddingNoise, (), [(0.05,), (0.2,), (0.4,), (0.8,)]),
        "Wen": settings(m.PromptOptimization, (), [(t, 0.02) for t in (0.3, 0.2, 0.1, 0.05)]),
        "Ren": settings(m.CrossAttentionMask, (), [(1.25, True), (1.25, False), (2, False), (3, False)]),
        "CADS": settings(m.ConditionAnnealing, (), [(0.2, t + 300, t) for t in (600, 500, 350, 200)]),
        "Han, per sample": settings(m.NoiseDescent, (), [(t, 0.02, 30) for t in (0.3, 0.2, 0.15, 0.1)]),
        "Han, batch-wise": settings(m.NoiseAscent, (), [(12.5, gamma) for gamma in (3, 10, 20, 40)], fifth),
        "SAIL": settings(m.SharpnessAwareNoise, (), [(t, 0.25, 0.01, 0.02) for t in (0.6, 0.5, 0.45, 0.4)]),
        "interval": settings(g.GuidanceInterval, (800, 100, s), [(t, 100, s) for t in (800, 700, 600, 500)]),
        "schedule": settings(g.ScheduledGuidance, ("linear", s), [(n, s) for n in ("v", "a", "linear", "cosine")]),
        "STP": settings(g.StaticTransitionPoint, (stp, s), [(stp + x, s) for x in (100, 0, -100, -200)]),
        "DTP": settings(g.DynamicTransitionPoint, (s,), [(s, n, stp - x) for n, x in dips]),
        "OG + STP": settings(g.OppositeGuidance, (og, s, push), [(og + x, s, o) for x, o in pushes]),
        "OG + DTP": settings(g.OppositeGuidance, (None, s, push), [(None, s, o) for o in (0.25, 0.5, 1, 2)]),
        "GUARD": [[m.SpikeDamping(scale), g.AttractRepel(s, repel)] for scale, repel in guards],
        "PRSS": settings(m.Reanchoring, (), [(t,) for t in (0.4, 0.2, 0.1, 0.05)]),
        "stability": settings(m.StabilityRegion, (3, ordinary, s), [(gamma, ordinary, s) for gamma in (4, 3, 2, 1)]),
        "APG": settings(AdaptiveProjectedGuidance, (s, None, 15, None, 0), apg),
        # without zeros at first: they are for a velocity; an epsilon of 0 at T would take the noise for the picture
        "CFG-Zero*": settings(ClassifierFreeZeroStarGuidance, (s, 0), [(s * part, 0) for part in (1, 0.6, 0.4, 0.2)]),
    }
    return {name: tried for name, tried in every.items() if ordinary or name != "stability"}


def ordinary_prompts(scenario: Scenario, count: int = 50) -> tuple[str, ...]:
    """Ordinary prompts that are not compared, to measure norms and limits on; none where there is no list."""
    try:
        prompts = scenario.table("ordinary").drop_duplicates("prompt")
    except (KeyError, FileNotFoundError):
        return ()
    sizes = {size[of] for size in PROFILES.values() for of in ("main", "elsewhere")}
    compared = {prompt for size in sizes for prompt in spread(prompts, size)["prompt"]}
    return tuple(prompt for prompt in prompts["prompt"] if prompt not in compared)[:count]


def best_settings(tuning: pd.DataFrame) -> dict[str, int]:
    """Each method's number of the setting with most samples new and right; of equal ones the weakest."""
    rows = tuning[tuning["measure"] == "new_and_right"].sort_values("setting")
    return rows.loc[rows.groupby("method")["value"].idxmax()].set_index("method")["setting"].to_dict()


def tuned(scenario: Scenario) -> dict[str, list]:
    """Methods at the setting best on the held-out prompts, or at their only one; one not tuned yet is left out."""
    every, path, best = methods(scenario), data_folder() / MAIN / "tuning.csv", {}
    if path.exists():
        tuning = pd.read_csv(path)
        best = {name: k for name, k in best_settings(tuning).items() if name in every}
        if scenario.name == MAIN:  # other models have other points
            tried = {*zip(tuning["method"], tuning["setting"], tuning["given"], strict=True)}
            best = {n: k for n, k in best.items() if (n, k, json.dumps([*map(describe, every[n][k])])) in tried}
    best |= {name: 0 for name, tried in every.items() if len(tried) == 1}
    if missing := [name for name in every if name not in best]:
        warnings.warn(f"not tuned, so not compared: {', '.join(missing)} (`make tune`)", stacklevel=2)
    return {name: tried[best[name]] for name, tried in every.items() if name in best}


def pairs(chosen: Mapping[str, list]) -> dict[tuple, list]:
    """(prior, rule) -> each prior method that leaves guidance alone, with the guidance of DTP and OG + DTP."""
    prior = [name for name in PRIOR if name in chosen]
    return {(name, rule): [*chosen[name][:-1], *chosen[rule]] for rule in ("DTP", "OG + DTP") for name in prior}


def processes() -> PartialState:
    """This process among those of ``accelerate launch``, over gloo where there is no GPU."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


def run_grid(
    denoiser: Denoiser, prompts: pd.DataFrame, seeds: Sequence[int], methods: Mapping[str | tuple, list],
    judges: Judges, folder: str | Path | None, *, steps=50, measure=False, block=16, batch_size=32, bar=None,
) -> pd.DataFrame:  # fmt: skip
    """Sample ``prompts`` x ``seeds`` under every method and judge the images; resumes from ``folder``.

    ``block`` prompts of a method are one file; processes share the files out, and each returns the whole table: the
    columns of ``judges``, seconds a sample, and method (of a tuple, method, rule and setting). ``bar`` is a tqdm's.
    """
    every_pair(prompts["prompt"].tolist(), seeds)  # is checked as a whole
    team, options = processes(), {"steps": steps, "measure": measure}
    common = {**denoiser.settings(), "judges": judges.settings(), "seeds": [*map(int, seeds)], **options}

    def made(setting: list, rows: pd.DataFrame) -> pd.DataFrame:
        given, began = (denoiser, rows["prompt"].tolist(), seeds, setting), time.perf_counter()
        run = sample(*given, **options, batch_size=batch_size, record=False, progress=False)
        seconds = (time.perf_counter() - began) / len(run)
        return judges(run, rows).assign(seconds=seconds)

    def table(name: str | tuple, setting: list, rows: pd.DataFrame) -> pd.DataFrame:
        names = dict(zip(("method", "rule", "setting"), name if isinstance(name, tuple) else [name], strict=False))
        plain = rows.drop(columns=["attractor", "swapped"], errors="ignore")  # where pictures lie may change
        settings = {"setting": [*map(describe, setting)], "rows": plain.to_json(orient="records"), **common}
        return kept(folder, " ".join(map(str, names.values())), settings, lambda: made(setting, rows)).assign(**names)

    blocks = [prompts.iloc[i : i + block] for i in range(0, len(prompts), block)]
    parts, own = [(*method, rows) for method in methods.items() for rows in blocks], {}
    for i in range(team.process_index, len(parts), team.num_processes):
        own[i] = table(*parts[i])
        if bar is not None:
            bar.update(len(own[i]) * team.num_processes)
    team.wait_for_everyone()
    return pd.concat([own[i] if i in own else table(*part) for i, part in enumerate(parts)], ignore_index=True)


def spread(rows: pd.DataFrame, count: int) -> pd.DataFrame:
    """``count`` of ``rows``, or all, at even distances."""
    return rows.iloc[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)].reset_index(drop=True)


def groups(scenario: Scenario, profile: str = "reader") -> dict[str, pd.DataFrame]:
    """Prompts of a scenario by group, none of them held out."""
    size, other, found = PROFILES[profile], scenario.name in SCENARIOS[1:], {}
    for group in scenario.prompts:
        rows = scenario.table(group).drop_duplicates("prompt")
        rows = rows.iloc[:-HELD_OUT] if (scenario.name, group) == (MAIN, "memorized") else rows
        found[group] = spread(rows, size["elsewhere" if other or group == "template" else "main"])
    return found


def plan(scenario: Scenario, profile: str = "reader") -> list[tuple]:
    """What `compare` samples: (of, group, prompts, seeds, what is tried) of each grid.

    ``of`` is "methods", on the main scenario's memorized prompts "pairs" and "attack" (many seeds) too. What is tried
    is (method, rule that it is paired with or "CFG") -> setting.
    """
    size, parts, chosen = PROFILES[profile], groups(scenario, profile), tuned(scenario)
    chosen = {name: chosen[name] for name in size.get("methods", chosen)}
    alone = {(name, "CFG"): setting for name, setting in chosen.items()}
    if elsewhere := scenario.name in SCENARIOS[1:]:
        parts.pop("ordinary", None)
    seeds = range(min(2, size["seeds"]) if elsewhere else size["seeds"])  # of other groups one: prompts are the units
    grids = [("methods", x, rows, seeds if x == "memorized" else range(1), alone) for x, rows in parts.items()]
    if scenario.name == MAIN:
        for of, tried in (("pairs", pairs(chosen)), ("attack", alone)):
            grids.append((of, "memorized", spread(parts["memorized"], size[of][0]), range(size[of][1]), tried))
    return grids


def compare(scenario: Scenario, profile: str, folder: str | Path | None, device: str = "cpu") -> pd.DataFrame:
    """All that is in `plan`: the columns of `run_grid`, scenario, of and group. It resumes from ``folder``."""
    denoiser, judges, grids = scenario.load(device=device), Judges(scenario, device), plan(scenario, profile)
    total, tables = sum(len(rows) * len(seeds) * len(tried) for _, _, rows, seeds, tried in grids), []
    with tqdm(total=total, unit="sample", desc=scenario.name, disable=not processes().is_main_process) as bar:
        for of, group, rows, seeds, tried in grids:
            found = run_grid(denoiser, rows, seeds, tried, judges, folder, steps=PROFILES[profile]["steps"], bar=bar)
            tables.append(found.drop(columns=["clip"] if of == "attack" else []).assign(of=of, group=group))
    return pd.concat(tables, ignore_index=True).assign(scenario=scenario.name)


def made_with(scenarios: Sequence[Scenario], profile: str) -> str:
    """The digest of what a comparison depends on: weights, judges, prompts, methods, seeds, steps."""
    parts = [PROFILES[profile]["steps"]]
    for scenario in scenarios:
        judges = {name: of for name, of in Judges(scenario).settings().items() if name != "second"}  # it is optional
        parts += [scenario.load().settings(), judges]
        for *grid, rows, seeds, tried in plan(scenario, profile):
            settings = [[*name, *map(describe, setting)] for name, setting in tried.items()]
            parts.append([*grid, rows["prompt"].tolist(), len(seeds), settings])
    return digest(parts)


def obtain(profile: str = "reader", folder: str | Path = "build/comparison") -> pd.DataFrame:
    """The bundled scenarios' table: the kept one, of profile "paper", if these weights and methods made it; or new."""
    scenarios, path = [*map(read, SCENARIOS)], data_folder() / "comparison.parquet"
    if PROFILES[profile] is not PROFILES["tiny"] and path.exists():
        if (table := pd.read_parquet(path)).attrs.get("made_with") == made_with(scenarios, "paper"):
            return table
        processes().print(f"{path} was made with other weights, judges or methods: sampled anew, profile {profile}")
    return pd.concat([compare(scenario, profile, folder) for scenario in scenarios], ignore_index=True)


MEASURES = {  # name -> its heading, and whether more of it is better on memorized prompts
    "copied": ("copied", False), "similarity": ("copy similarity", False),
    "similarity_95": ("its 95th percentile", False), "sscd": ("SSCD", False),
    "sscd_95": ("SSCD, 95th percentile", False), "object_right": ("object right", True),
    "clip_score": ("CLIP score", True), "new_and_right": ("new and right", True), "cmmd": ("CMMD", False),
    "diversity": ("diversity", True), "saturated": ("saturated", False),
    "sharpness": ("sharpness", True), "calls": ("predictions, multiple of CFG's", None),
    "gradient_passes": ("gradient passes", None), "seconds": ("seconds, multiple of CFG's", None),
}  # fmt: skip


def _measured(part: pd.DataFrame, name: str, real: torch.Tensor | None) -> tuple | None:
    """Value, low, high, samples and prompts of one measure; None where it was not measured."""
    column = "clip" if name == "cmmd" else name.removesuffix("_95")
    known = part.dropna(subset=column) if column in part else part.head(0)
    if known.empty or (name == "cmmd" and (real is None or known["prompt"].nunique() < 2)):
        return None
    if name == "cmmd":
        features = torch.from_numpy(np.stack(known["clip"]).astype(np.float32))
        found = metrics.cmmd(features, real, known["prompt"].tolist())
    elif name.endswith("_95"):
        found = quantile_interval([values.to_numpy() for _, values in known.groupby("prompt")[column]])
    elif MEASURES[name][1] is None:
        found = (known[name].mean(),) * 3
    else:
        found = mean_interval(known.astype({name: bool}) if known[name].dtype == "boolean" else known, name)
    return (*map(float, found), len(known), known["prompt"].nunique())


def summary(table: pd.DataFrame, by=("scenario", "group", "method"), real: torch.Tensor | None = None) -> pd.DataFrame:
    """One row a group of ``by`` and measure that was made: value, low, high (95%), n samples, prompts, and ``best``.

    Intervals are bootstraps over prompts; that of CMMD, to the image features ``real`` [N, F], is a jackknife. ``best``
    is "best", "tied" where the interval overlaps the best's, or "". Predictions and seconds are CFG's, times so many.
    """
    table, rows = table.assign(similarity=1 - table["distance"].fillna(table["nearest"])), []
    groups = table.groupby(list(by), sort=False)
    if mixed := [x for x in ("setting", "rule") if x in table and (groups[x].nunique(dropna=False) > 1).any()]:
        raise ValueError(f"a group of {[*by]} would hold rows of several {mixed}: choose some, or group by them")
    for key, part in groups:
        found = {name: _measured(part, name, real) for name in MEASURES}
        rows += [(*key, name, *numbers) for name, numbers in found.items() if numbers]
    rows = pd.DataFrame(rows, columns=[*by, "measure", "value", "low", "high", "n", "prompts"]).assign(best="")
    for _, part in rows.groupby([*(name for name in by if name != "method"), "measure"]):
        more, cfg = MEASURES[part["measure"].iloc[0]][1], part.loc[part["method"] == "CFG", "value"]
        if more is None and (cfg.empty or cfg.iloc[0]):
            rows.loc[part.index, ["value", "low", "high"]] /= np.nan if cfg.empty else cfg.iloc[0]
        elif more is not None:
            top = part.loc[part["value"].idxmax() if more else part["value"].idxmin()]
            tied = (part["low"] <= top["high"]) & (part["high"] >= top["low"])
            rows.loc[part.index, "best"] = np.where(part.index == top.name, "best", np.where(tied, "tied", ""))
    return rows.dropna(subset="value")


def wide(rows: pd.DataFrame, measures: Sequence[str] = tuple(MEASURES)) -> pd.DataFrame:
    """One line a method, one column a measure, "value [low, high]"; ** the best, * tied with it."""
    text = [f"{r.value:.2f}" + (f" [{r.low:.2f}, {r.high:.2f}]" if r.low < r.high else "") for r in rows.itertuples()]
    shown = rows.assign(text=text + rows["best"].map({"best": "**", "tied": "*", "": ""}))
    table = shown.pivot(index="method", columns="measure", values="text").reindex(rows["method"].unique())
    return table[[m for m in measures if m in table]].rename(columns={m: label for m, (label, _) in MEASURES.items()})


def export(rows: pd.DataFrame, path: str | Path) -> None:
    """Write a summary as PATH.csv (one row a measure), PATH.md and PATH.tex (a table a scenario and group)."""
    rows.to_csv(f"{path}.csv", index=False, float_format="%.5g")
    parts = {", ".join(key): wide(part) for key, part in rows.groupby(["scenario", "group"], sort=False)}
    Path(f"{path}.md").write_text("\n".join(f"## {n}\n\n{t.to_markdown()}\n" for n, t in parts.items()))
    Path(f"{path}.tex").write_text("\n".join(t.to_latex(caption=n, escape=True) for n, t in parts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", default=SCENARIOS, help=f"of {', '.join(names())}, or .yaml files")
    parser.add_argument("--profile", choices=PROFILES, default="reader", help="how much")
    parser.add_argument("--device", help="default: cpu; of several processes each its own GPU")
    parser.add_argument("--out", type=Path, default=Path("build/comparison.parquet"), help="the table")
    options, team = parser.parse_args(), processes()
    device = options.device or (str(team.device) if team.num_processes > 1 else "cpu")
    scenarios = [*map(read, options.scenarios)]
    table = pd.concat([compare(scenario, options.profile, "build/comparison", device) for scenario in scenarios])
    if team.is_main_process:
        table.attrs["made_with"] = made_with(scenarios, options.profile)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(options.out, index=False)
        print(f"{len(table)} samples in {options.out}; parts in build/comparison")
    team.destroy_process_group()


if __name__ == "__main__":
    main()
