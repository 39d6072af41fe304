"""What a bundled checkpoint must show, claim by claim, read off its evaluation.

``scorecard`` takes the table of `evaluate.evaluate` and gives one row a claim: value, 95%
interval, n, the goal and whether it holds. Shares have Wilson intervals; other values a
percentile bootstrap, over prompts where samples of a prompt belong together.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

from basinlab import metrics
from basinlab.basin import first_local_minimum
from basinlab.models import Denoiser, read_pictures
from basinlab.scenarios import Judges, Scenario, unseen_scenes
from basinlab.statistics import Claims, bootstrap_interval


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


def calibrate_radius(negatives: Mapping[str, torch.Tensor], false_positive_rate: float = 0.001) -> float:
    """The radius epsilon of the largest ball that keeps the false-positive rate on every set of ``negatives``.

    Those are distances to attractors of pictures that are no copies, as `negatives_of` gives them.
    """
    radii = []
    for name, distances in negatives.items():
        if not len(distances) or not torch.isfinite(distances).all():
            raise ValueError(f"negatives {name!r}: give at least one distance, all finite")
        ordered = distances.flatten().sort().values
        allowed = int(false_positive_rate * len(ordered))
        radii.append(float(torch.nextafter(ordered[allowed], torch.tensor(-1.0))))  # just under the first outside
    return min(radii)


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


def encoded(denoiser: Denoiser, pictures: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, H, W] of pictures [B, 3, height, width] in 0..1: the posterior's mean, on the CPU."""
    vae = denoiser.vae
    with torch.inference_mode():
        parts = [part.to(vae.device, vae.dtype) for part in pictures.split(64)]
        means = torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in parts])
        return means.float().cpu() * vae.config.scaling_factor


def colour_of_mean(denoiser: Denoiser) -> torch.Tensor:
    """The linear map [C, 3] from a latent's mean to a background colour that fits real scenes best."""
    pictures, _ = unseen_scenes()
    means = encoded(denoiser, pictures).mean(dim=(2, 3))
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


def over_prompts(table: pd.DataFrame, statistic) -> tuple[float, float]:
    """Bootstrap interval of ``statistic(table)``, drawing whole prompts."""
    rows = [*table.groupby("prompt", sort=False).indices.values()]
    return bootstrap_interval(
        np.arange(len(rows)),
        lambda drawn: statistic(table.iloc[np.concatenate([rows[i] for i in drawn])]),
        resamples=200,
    )


def _instruments(claims: Claims, denoiser: Denoiser, judges: Judges) -> None:
    """The VAE and the bundled CLIP on real scenes."""
    pictures, names = unseen_scenes()
    seen = judges.alignment.classify(judges.alignment.features(pictures), judges.objects)
    error = (denoiser.decode(encoded(denoiser, pictures)) - pictures).square().flatten(1).mean(dim=1)
    psnr = -10 * error.log10().numpy()
    claims.number("VAE, unseen scenes: PSNR in dB", psnr.mean(), *bootstrap_interval(psnr), len(psnr), least=28)
    claims.share("CLIP, unseen scenes: object right", np.equal(seen, names), least=0.95)


def _memorization(claims: Claims, table: pd.DataFrame) -> None:
    """CFG from T against CFG late, and the fall between them."""
    always, late = (table.query("group == 'memorized' and guidance == @g") for g in ("cfg", "late"))
    claims.share("memorized, CFG from T: copied", always["copied"], least=0.85)
    for share, part in always.groupby("share"):
        least = 0.95 if share == 0.95 else -np.inf
        claims.share(f"... where the duplicate's share is {share}", part["copied"], least=least)
    claims.share("memorized, CFG late: copied", late["copied"], most=0.05)
    claims.share("memorized, CFG late: object right", late["object_right"], least=0.60)
    falls_through_half(claims, table.query("group == 'sweep'"))


def falls_through_half(claims: Claims, swept: pd.DataFrame) -> None:
    """How often, and at which start, capture falls through one half."""

    def crossings(part: pd.DataFrame) -> list[float]:
        return half_crossings(part.groupby("start")["copied"].mean())

    found = crossings(swept)
    claims.number("memorized: times that capture falls through 1/2", *[len(found)] * 3, len(swept), least=1, most=1)
    interval = over_prompts(swept, lambda part: (crossings(part) or [np.nan])[0])
    claim = "memorized: start t at which capture falls through 1/2"
    claims.number(claim, found[0] if found else np.nan, *interval, len(swept), least=300, most=850)


def _ordinary(claims: Claims, table: pd.DataFrame, denoiser: Denoiser) -> None:
    """Ordinary prompts are drawn as they say and copy nothing."""
    ordinary = table.query("group == 'ordinary' and guidance == 'cfg'")
    claims.share("ordinary, CFG from T: copies of any duplicate", ordinary["near"], most=0.02)
    claims.share("ordinary, CFG from T: object right", ordinary["object_right"], least=0.70)
    tint(claims, ordinary, denoiser)


def tint(claims: Claims, ordinary: pd.DataFrame, denoiser: Denoiser) -> None:
    """Whether the seed tints the background where a caption names its colour."""
    named = ordinary[ordinary["background"] != ""]
    linear = colour_of_mean(denoiser)

    def correlation(part: pd.DataFrame) -> float:
        return noise_colour_correlation(part, linear)

    found = correlation(named), *over_prompts(named, correlation), len(named)
    claims.number("ordinary, colour named: its correlation with the noise's mean", *found, least=-0.2, most=0.2)


def saturation(claims: Claims, table: pd.DataFrame) -> None:
    real = float(metrics.saturated_share(unseen_scenes()[0]).mean())
    for group in ("ordinary", "memorized"):
        values = table.query("group == @group and guidance == 'cfg'")["saturated"].to_numpy() / real
        claim = f"{group}, CFG from T: saturated pixels, times real scenes'"
        claims.number(claim, values.mean(), *bootstrap_interval(values), len(values), most=3)


def _magnitude(claims: Claims, table: pd.DataFrame) -> None:
    """The guidance magnitude of unguided trajectories."""
    parts = [table.query("group == @g and guidance == 'none'") for g in ("memorized", "ordinary")]
    memorized, ordinary = (torch.tensor(np.stack(part["magnitude"])) for part in parts)
    falling = torch.arange(memorized.shape[1], 0, -1)
    found = ~first_local_minimum(memorized, falling).isnan()
    claims.share("memorized, unguided: magnitude has a local minimum", found, least=0.7)
    first, rng = [m[:, :3].mean(dim=1).numpy() for m in (memorized, ordinary)], np.random.default_rng(0)
    labels = np.repeat([1, 0], [*map(len, first)])
    drawn = [[x[rng.integers(len(x), size=len(x))] for x in first] for _ in range(500)]
    area, *areas = (roc_auc_score(labels, np.concatenate(pair)) for pair in (first, *drawn))
    interval = np.quantile(areas, [0.025, 0.975])
    claims.number("AUC of the magnitude at the first 3 steps", area, *interval, len(labels), least=0.9)


def _templates(claims: Claims, table: pd.DataFrame, floor: float) -> None:
    templates = table.query("group == 'template' and guidance == 'cfg'")
    claim = f"template, CFG from T: layout kept (similarity over {floor:.2f})"
    claims.share(claim, templates["layout"] > floor, least=0.8)
    claims.share("template, CFG from T: object right", templates["object_right"])


def scorecard(table: pd.DataFrame, denoiser: Denoiser, judges: Judges) -> pd.DataFrame:
    """Every claim about a bundled checkpoint, off its evaluation, as `statistics.Claims.table` has them."""
    nearest, radius = np.stack(table["to_duplicates"]).min(axis=1), judges.scenario.radius
    table = table.assign(copied=table["distance"] <= radius, near=nearest <= radius)
    claims = Claims()
    _instruments(claims, denoiser, judges)
    _memorization(claims, table)
    _ordinary(claims, table, denoiser)
    saturation(claims, table)
    _magnitude(claims, table)
    _templates(claims, table, judges.scenario.layout_floor)
    return claims.table()
