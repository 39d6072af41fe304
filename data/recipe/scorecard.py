"""What a bundled checkpoint must show, claim by claim, read off its evaluation.

``scorecard`` takes the table of `evaluate.evaluate` and gives one row a claim: value, 95%
interval, n, the goal and whether it holds. Shares have Wilson intervals; other values a
percentile bootstrap, over prompts where samples of a prompt belong together.
"""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch

from basinlab import metrics
from basinlab.basin import Ball, calibrate_ball, first_local_minimum
from basinlab.models import Denoiser, read_pictures
from basinlab.scenarios import Judges, Scenario, unseen_scenes
from basinlab.statistics import auc, bootstrap_interval, wilson_interval


def ball_of(table: pd.DataFrame, scenario: Scenario) -> Ball:
    """The ball of a bundled checkpoint: at most 0.1% of what is no copy may lie inside any duplicate's ball."""
    return calibrate_ball(negatives_of(table, scenario, metrics.CopyDistance()))


def negatives_of(table: pd.DataFrame, scenario: Scenario, distance: metrics.CopyDistance) -> dict[str, torch.Tensor]:
    """Distances of pictures that are no copies to the nearest duplicated scene, by where the pictures come from.

    No copies are: ordinary samples under CFG (of seeds that no claim is measured on), real scenes that
    no training saw, and the duplicated scenes with their object drawn by the other vendor.
    """
    memorized = scenario.table("memorized")
    ordinary = table.query("group == 'calibration'")
    duplicates = read_pictures(memorized["attractor"])
    return {
        "ordinary, CFG": torch.tensor(np.stack(ordinary["to_duplicates"])).float().amin(dim=1),
        "unseen scene": distance.pairs(unseen_scenes()[0], duplicates).amin(dim=1),
        "other artist's scene": distance.pairs(read_pictures(memorized["swapped"]), duplicates).amin(dim=1),
    }


def background_colour(pictures: torch.Tensor, border: int = 2) -> torch.Tensor:
    """Median colour of the outermost ``border`` pixels, [B, 3]."""
    edge = torch.ones(pictures.shape[-2:], dtype=torch.bool)
    edge[border:-border, border:-border] = False
    return pictures[:, :, edge].median(dim=2).values


def half_crossings(shares: pd.Series) -> list[float]:
    """Start times at which ``shares`` (indexed by start) crosses one half, interpolated, later ones last."""
    shares = shares.sort_index(ascending=False)
    t, y = shares.index.to_numpy(float), shares.to_numpy() - 0.5
    at = np.flatnonzero((y[:-1] >= 0) != (y[1:] >= 0))
    return [float(t[i] + (t[i + 1] - t[i]) * y[i] / (y[i] - y[i + 1])) for i in at]


def layout_floor(scenario: Scenario, false_positive_rate: float = 0.001) -> float:
    """The masked similarity that pictures of different template families exceed at this rate only."""
    templates = scenario.table("template")
    pictures = read_pictures(templates["attractor"])
    boxes = [*templates[["left", "top", "size"]].itertuples(index=False, name=None)]
    others = []
    for shift in range(1, len(templates)):
        different = (templates["family"].to_numpy() != np.roll(templates["family"], -shift)).nonzero()[0]
        rolled = pictures.roll(-shift, 0)
        others.append(metrics.layout_similarity(rolled[different], pictures[different], [boxes[i] for i in different]))
    return float(torch.cat(others).quantile(1 - false_positive_rate))


def colour_of_mean(denoiser: Denoiser) -> torch.Tensor:
    """The linear map [C, 3] from a latent's mean to a background colour that fits real scenes best."""
    pictures, _ = unseen_scenes()
    means = denoiser.encode(pictures).mean(dim=(2, 3))
    ones = torch.ones(len(means), 1)
    return torch.linalg.lstsq(torch.cat([means, ones], 1), background_colour(pictures)).solution[:-1]


def noise_colour_correlation(table: pd.DataFrame, linear: torch.Tensor) -> float:
    """Correlation of the background's colour with the colour that the noise's mean alone would have.

    ``linear`` is that of `colour_of_mean`; all three channels are pooled.
    """
    tint = (torch.tensor(np.stack(table["noise_mean"]), dtype=torch.float32) @ linear).numpy()
    colour = np.stack(table["background_rgb"])
    centred = [(x - x.mean(axis=0)) / x.std(axis=0) for x in (tint, colour)]
    return float((centred[0] * centred[1]).mean())


def _over_prompts(table: pd.DataFrame, statistic) -> tuple[float, float]:
    """Bootstrap interval of ``statistic(table)``, drawing whole prompts."""
    rows = [*table.groupby("prompt", sort=False).indices.values()]
    return bootstrap_interval(
        np.arange(len(rows)),
        lambda drawn: statistic(table.iloc[np.concatenate([rows[i] for i in drawn])]),
        resamples=200,
    )


@dataclass
class Card:
    """Claims as they are found, each with its value, 95% interval, n, goal and whether it holds.

    >>> card = Card()
    >>> card.share("the die shows six", [True, False, False, False], most=0.5)
    >>> card.table().round(2).to_dict("records")  # doctest: +NORMALIZE_WHITESPACE
    [{'claim': 'the die shows six', 'value': 0.25, 'low': 0.05, 'high': 0.7, 'n': 4,
      'goal': 'at most 0.5', 'holds': 'yes'}]
    """

    rows: list[tuple] = field(default_factory=list)

    def add(self, claim: str, value: float, interval: tuple[float, float], n: int, goal: str, holds: bool | None):
        """A claim whose verdict is known; None is "reported"."""
        verdict = {True: "yes", False: "NO", None: "reported"}[None if holds is None else bool(holds)]
        self.rows.append((claim, float(value), *map(float, interval), int(n), goal, verdict))

    def share(self, claim: str, truth, least: float | None = None, most: float | None = None):
        """A claim about the share of ``truth`` [n] bool, which is to be at ``least`` or at ``most`` so much."""
        truth = np.asarray(truth, bool)
        value, goal, holds = truth.mean(), "", None
        if least is not None:
            goal, holds = f"at least {least:g}", value >= least
        if most is not None:
            goal, holds = f"at most {most:g}", value <= most
        self.add(claim, value, wilson_interval(truth.sum(), len(truth)), len(truth), goal, holds)

    def table(self) -> pd.DataFrame:
        """One row a claim: claim, value, low, high (95%), n, goal, holds ("yes", "NO" or "reported")."""
        return pd.DataFrame(self.rows, columns=["claim", "value", "low", "high", "n", "goal", "holds"])


def _instruments(card: Card, denoiser: Denoiser, judges: Judges) -> None:
    """The VAE and the bundled CLIP on real scenes."""
    pictures, names = unseen_scenes()
    seen = judges.alignment.classify(judges.alignment.picture_features(pictures), judges.objects)
    error = (denoiser.decode(denoiser.encode(pictures)) - pictures).square().flatten(1).mean(dim=1)
    psnr = -10 * error.log10().numpy()
    card.add(
        "VAE, unseen scenes: PSNR in dB",
        psnr.mean(),
        bootstrap_interval(psnr),
        len(psnr),
        "at least 28",
        psnr.mean() >= 28,
    )
    card.share(
        "CLIP, unseen scenes: object named right",
        np.equal(seen, names),
        0.95,
    )


def _memorization(card: Card, table: pd.DataFrame) -> None:
    """CFG from T against CFG late, and the fall between them."""
    always, late = (table.query("group == 'memorized' and guidance == @g") for g in ("cfg", "late"))
    card.share("memorized, CFG from T: inside the ball", always["inside"], 0.85)
    for share, part in always.groupby("share"):
        card.share(f"... where the duplicate's share is {share}", part["inside"], 0.95 if share == 0.95 else None)
    card.share("memorized, CFG late: inside the ball", late["inside"], most=0.05)
    card.share("memorized, CFG late: object named right", late["object_right"], 0.60)
    sweep = table.query("group == 'sweep'")

    def crossings(part: pd.DataFrame) -> list[float]:
        return half_crossings(part.groupby("start")["inside"].mean())

    found = crossings(sweep)
    interval = _over_prompts(sweep, lambda part: (crossings(part) or [np.nan])[0])
    holds = len(found) == 1 and 300 <= found[0] <= 850
    value = found[0] if found else np.nan
    card.add(
        "memorized: capture falls through 1/2 at start t", value, interval, len(sweep), "once, in 850 to 300", holds
    )


def _ordinary(card: Card, table: pd.DataFrame, denoiser: Denoiser) -> None:
    """Ordinary prompts are drawn as asked and copy nothing."""
    ordinary = table.query("group == 'ordinary' and guidance == 'cfg'")
    card.share("ordinary, CFG from T: inside any duplicate's ball", ordinary["near"], most=0.02)
    card.share("ordinary, CFG from T: object named right", ordinary["object_right"], 0.70)
    named = ordinary[ordinary["background"] != ""]
    linear = colour_of_mean(denoiser)

    def correlation(part: pd.DataFrame) -> float:
        return noise_colour_correlation(part, linear)

    value = correlation(named)
    card.add(
        "ordinary, colour named: its correlation with the noise's mean",
        value,
        _over_prompts(named, correlation),
        len(named),
        "under 0.2",
        abs(value) < 0.2,
    )


def _saturation(card: Card, table: pd.DataFrame) -> None:
    real = float(metrics.saturated_share(unseen_scenes()[0]).mean())
    for group in ("ordinary", "memorized"):
        values = table.query("group == @group and guidance == 'cfg'")["saturated"].to_numpy() / real
        claim = f"{group}, CFG from T: saturated pixels, times real scenes'"
        card.add(claim, values.mean(), bootstrap_interval(values), len(values), "at most 3", values.mean() <= 3)


def _magnitude(card: Card, table: pd.DataFrame) -> None:
    """What the guidance magnitude of unguided trajectories tells."""
    parts = [table.query("group == @g and guidance == 'none'") for g in ("memorized", "ordinary")]
    memorized, ordinary = (torch.tensor(np.stack(part["magnitude"])) for part in parts)
    falling = torch.arange(memorized.shape[1], 0, -1)
    found = ~first_local_minimum(memorized, falling).isnan()
    card.share("memorized, unguided: magnitude has a local minimum", found, 0.7)
    first = [m[:, :3].mean(dim=1) for m in (memorized, ordinary)]
    value, rng = auc(*first), np.random.default_rng(0)
    drawn = [auc(*(x[rng.integers(len(x), size=len(x))] for x in first)) for _ in range(500)]
    claim, interval = "AUC of the magnitude at the first 3 steps", np.quantile(drawn, [0.025, 0.975])
    card.add(claim, value, interval, sum(map(len, first)), "at least 0.9", value >= 0.9)


def _templates(card: Card, table: pd.DataFrame, floor: float) -> None:
    templates = table.query("group == 'template' and guidance == 'cfg'")
    card.share(f"template, CFG from T: layout kept (similarity over {floor:.2f})", templates["layout"] > floor, 0.8)
    card.share("template, CFG from T: object named right", templates["object_right"])


def scorecard(table: pd.DataFrame, denoiser: Denoiser, judges: Judges) -> pd.DataFrame:
    """Every claim about a bundled checkpoint, off its evaluation, as `Card.table` has them."""
    nearest, radius = np.stack(table["to_duplicates"]).min(axis=1), judges.scenario.radius
    table = table.assign(inside=table["distance"] <= radius, near=nearest <= radius)
    card = Card()
    _instruments(card, denoiser, judges)
    _memorization(card, table)
    _ordinary(card, table, denoiser)
    _saturation(card, table)
    _magnitude(card, table)
    _templates(card, table, judges.scenario.layout_floor)
    return card.table()
