"""The comparison on a real checkpoint, of which only prompts and some of the pictures learned are known.

``strategies`` are all methods with their authors' constants, ``judges`` what looks at the pictures,
``observed`` what became of each sample and ``measures`` what the paper's tables hold. In the bundled
world, where the truth is known, `bundled.comparison` takes their place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .. import metrics
from .. import mitigations as p
from ..basin import estimate_attractor
from ..experiment import Strategy
from ..forks import Sweep
from ..guidance import (
    ConstantGuidance,
    DynamicTransitionPoint,
    GuidanceInterval,
    OppositeGuidance,
    ScheduledGuidance,
    StaticTransitionPoint,
)
from ..models import read_pictures
from ..sampling import Trajectory
from ..statistics import mean_interval, quantile_interval
from .scenarios import Scenario

COPY = 0.5  # SSCD similarity above which the field counts a picture as a copy (Somepalli et al., CVPR 2023)


def strategies(scenario: Scenario) -> dict[str, Strategy]:
    """The eighteen methods of the comparison with their authors' constants, and the scenario's of the paper's own.

    Opposite guidance with the dynamic point reverses by the scenario's scale too.
    """
    scale = scenario.scale
    cfg = ConstantGuidance(scale)
    prior = {
        "RNA": p.RandomNumbers(),
        "RTA": p.RandomTokens(),
        "CWR": p.RepeatedWords(),
        "GNI": p.EmbeddingNoise(),
        "Wen": p.PromptOptimization(),
        "Ren": p.CrossAttentionMask(),
        "CADS": p.ConditionAnnealing(),
        "Han, per sample": p.NoiseDescent(),
        "SAIL": p.SharpnessAwareNoise(),
    }
    return {
        "CFG": Strategy(cfg),
        "lower scale": Strategy(ConstantGuidance(scale / 2)),
        **{name: Strategy(cfg, (perturbation,)) for name, perturbation in prior.items()},
        "Han, batch-wise": Strategy(StaticTransitionPoint(919, scale), (p.NoiseAscent(),)),  # CFG from the fifth step
        "interval": Strategy(GuidanceInterval(800, 100, scale)),
        "schedule": Strategy(ScheduledGuidance("linear", scale)),
        "STP": Strategy(StaticTransitionPoint(scenario.static_transition_point, scale)),
        "DTP": Strategy(DynamicTransitionPoint(scale)),
        "OG + STP": Strategy(OppositeGuidance(scenario.opposite_until, scale, scenario.opposite_scale)),
        "OG + DTP": Strategy(OppositeGuidance(None, scale, scenario.opposite_scale)),
    }


def shortened(strategies: Mapping[str, Strategy], iterations: int = 2) -> dict[str, Strategy]:
    """The same with at most so many iterations before the first step: for a rehearsal."""

    def cut(q: p.Perturbation) -> p.Perturbation:
        return replace(q, iterations=min(q.iterations, iterations)) if hasattr(q, "iterations") else q

    return {name: replace(s, perturbations=tuple(map(cut, s.perturbations))) for name, s in strategies.items()}


@dataclass(frozen=True)
class Judges:
    """What looks at the pictures of a scenario; None where there are no weights for it, and why in ``notices``.

    ``references`` are descriptors [K, F], by ``distance``, of the K pictures learned with a prompt.
    """

    distance: metrics.CopyDistance | None
    alignment: metrics.Alignment | None
    references: Mapping[str, Tensor] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    def estimated(self, run: Trajectory) -> "Judges":
        """With attractors estimated from ``run``, seeds under CFG from T, where a prompt has no reference."""
        found = dict(self.references)
        for prompt in dict.fromkeys(run.prompts) if self.distance else ():
            if prompt not in found:
                pictures = run.of(prompt).images()
                index = estimate_attractor(pictures, self.distance).index
                found[prompt] = self.distance.features(pictures[index : index + 1])
        return replace(self, references=found)


def judges(scenario: Scenario, prompts: pd.DataFrame, device: str | torch.device = "cpu") -> Judges:
    """The judges of copies and alignment that ``scenario`` names, as far as their weights are on this machine.

    What else it names is told in the notices: it takes real pictures, or pictures that are kept.

    SSCD is looked for in torch hub's cache. ``prompts`` may have a column attractor, paths of pictures
    ("" where there is none).
    """
    notices, distance, alignment = [], None, None
    sscd = Path(torch.hub.get_dir(), "checkpoints", "sscd_disc_mixup.torchscript.pt")
    try:
        distance = metrics.CopyDistance("descriptor" if "descriptor" in scenario.metrics["copy"] else str(sscd), device)
    except (ValueError, OSError) as missing:
        notices.append(f"copy similarity: not measured; {missing}")
    try:
        alignment = metrics.Alignment(scenario.metrics["alignment"], device)
    except (ValueError, OSError) as missing:
        notices.append(f"alignment: not measured; {missing}")
    elsewhere = {"lpips": "PerceptualDistance", "fid": "frechet_distance", "kid": "kid", "cmmd": "cmmd"}
    for name in [*scenario.metrics["copy"], *scenario.metrics["quality"]]:
        if name in elsewhere:
            notices.append(f"{name}: not part of this comparison; metrics.{elsewhere[name]} measures it")
    known = prompts[prompts["attractor"] != ""] if "attractor" in prompts else prompts.head(0)
    references = {}
    if distance is not None:  # one by one: pictures of the web have all sizes
        for prompt, rows in known.groupby("prompt", sort=False):
            references[prompt] = torch.cat([distance.features(read_pictures([path])) for path in rows["attractor"]])
    return Judges(distance, alignment, references, tuple(notices))


def similarity(features: Tensor, prompts: Sequence[str], judging: Judges) -> Tensor:
    """Of pictures with descriptors [B, F] to the nearest reference of their prompt, [B]; NaN where it has none."""
    found = torch.full((len(features),), torch.nan)
    for i, prompt in enumerate(prompts):
        if prompt in judging.references:
            found[i] = (judging.references[prompt] @ features[i]).max()
    return found


def swept(sweep: Sweep, judging: Judges) -> pd.DataFrame:
    """One row a sample and start time: prompt, seed, start, similarity, inside, as `basin.outcomes` has it.

    ``inside``, a copy, is NA where there is no similarity.
    """
    count = len(sweep.starts)
    table = pd.DataFrame({"prompt": np.repeat(sweep.prompts, count), "seed": np.repeat(sweep.seeds, count)})
    table["start"] = np.tile(sweep.starts, len(sweep))
    table["similarity"] = np.nan
    if judging.distance is not None:
        features = judging.distance.features(sweep.images().flatten(0, 1))
        table["similarity"] = similarity(features, table["prompt"].tolist(), judging)
    table["inside"] = (table["similarity"] > COPY).astype("boolean").mask(table["similarity"].isna())
    return table


def observed(run: Trajectory, judging: Judges) -> pd.DataFrame:
    """One row a sample of ``run``: what became of it, and what it took.

    Columns: prompt, seed, similarity to the nearest reference of the prompt (NaN where it has none),
    clip_score, diversity, the mean distance between the prompt's samples (NaN of one), calls, gradient_passes.
    """
    table, pictures = pd.DataFrame({"prompt": run.prompts, "seed": run.seeds}), run.images()
    table[["similarity", "clip_score", "diversity"]] = np.nan
    if judging.distance is not None:
        features = judging.distance.features(pictures)
        table["similarity"] = similarity(features, run.prompts, judging)
        for rows in table.groupby("prompt").indices.values():
            table.loc[rows, "diversity"] = float(metrics.diversity(features[rows])) if len(rows) > 1 else np.nan
    if judging.alignment is not None:
        table["clip_score"] = judging.alignment.score(pictures, run.prompts).numpy()
    table["calls"], table["gradient_passes"] = run.network_calls, run.gradient_passes
    return table


def measures(table: pd.DataFrame) -> pd.DataFrame:
    """What the paper's tables hold, of rows of `observed`: measures of each strategy, with 95% intervals over prompts.

    Columns: strategy, measure (similarity, similarity_95, clip_score, diversity), value, low, high, n, prompts.
    """
    rows = []
    for strategy, part in table.groupby("strategy", sort=False):
        for name in ("similarity", "similarity_95", "clip_score", "diversity"):
            column = name.removesuffix("_95")
            known = part.dropna(subset=column)
            if known.empty:
                continue
            by_prompt = [values.to_numpy() for _, values in known.groupby("prompt")[column]]
            value = quantile_interval(by_prompt) if name.endswith("_95") else mean_interval(known, column)
            rows.append((strategy, name, *map(float, value), len(known), known["prompt"].nunique()))
    return pd.DataFrame(rows, columns=["strategy", "measure", "value", "low", "high", "n", "prompts"])
