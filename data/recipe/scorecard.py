"""What the bundled checkpoints must show, claim by claim, read off their evaluations.

``scorecard`` takes the tables of `evaluate.evaluate` and gives one row a claim: value, 95%
interval, n, the goal and whether it holds. Shares have Wilson intervals; other values a
percentile bootstrap, over prompts where samples of a prompt belong together.
"""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from torchvision.transforms.functional import gaussian_blur

from basinlab import metrics
from basinlab.basin import first_local_minimum, placed
from basinlab.comparison import HELD_OUT
from basinlab.models import Denoiser, read_pictures
from basinlab.scenarios import Judges, Scenario, unseen_scenes
from basinlab.statistics import Claims, bootstrap_interval


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


def chosen_start(table: pd.DataFrame, scenario: Scenario, guidance: str = "none") -> int:
    """The start with most samples new and right of the held-out prompts; of equal ones the earliest."""
    rows = table.query("group == 'sweep' and guidance == @guidance")
    rows = rows[rows["prompt"].isin(scenario.table("memorized")["prompt"].tail(HELD_OUT))]
    return int(rows.groupby("start")["new_and_right"].mean().sort_index(ascending=False).idxmax())


def largest_fall(magnitude: np.ndarray, timesteps: np.ndarray, within: int = 100) -> np.ndarray:
    """The largest fall of ``magnitude`` [B, S] within so many timesteps, [B], relative to the peak before it."""
    falls = np.zeros(len(magnitude))
    for i, t in enumerate(timesteps):
        peak = magnitude[:, : i + 1].max(axis=1)
        soon = (timesteps <= t) & (timesteps >= t - within)
        falls = np.maximum(falls, (magnitude[:, i] - magnitude[:, soon].min(axis=1)) / peak)
    return falls


def _instruments(claims: Claims, denoiser: Denoiser, judges: Judges) -> None:
    """The VAE, the bundled CLIP and the measure of quality on real scenes."""
    pictures, names = unseen_scenes()
    seen = judges.alignment.classify(judges.alignment.features(pictures), judges.objects)
    again = denoiser.decode(encoded(denoiser, pictures))
    psnr = -10 * (again - pictures).square().flatten(1).mean(dim=1).log10().numpy()
    claims.number("VAE, unseen scenes: PSNR in dB", psnr.mean(), *bootstrap_interval(psnr), len(psnr), least=32)
    if judges.second:
        same = 1 - judges.second(again, pictures).numpy()
        claim = "VAE, unseen scenes: SSCD of reconstruction to original"
        claims.number(claim, same.mean(), *bootstrap_interval(same), len(same), least=0.8)
    claims.share("CLIP, unseen scenes: object right", np.equal(seen, names), least=0.98)
    blurred = gaussian_blur(pictures[:128], 7, 1.0)
    area = _area(metrics.sharpness(pictures[:128]).numpy(), metrics.sharpness(blurred).numpy())
    claims.number("AUC of sharpness, real scenes against the same blurred by a pixel", *area, 256, least=0.95)


def _area(positives: np.ndarray, negatives: np.ndarray, prompts: list | None = None) -> tuple[float, float, float]:
    """Area under the ROC curve and its interval: a bootstrap over samples, or over the ``prompts`` of both in turn."""
    rng, groups = np.random.default_rng(0), []
    for i, values in enumerate((positives, negatives)):
        codes = pd.factorize(np.asarray(prompts[i]))[0] if prompts else np.arange(len(values))
        groups.append([values[codes == code] for code in range(codes.max() + 1)])

    def area(pair) -> float:
        joined = [np.concatenate(part) for part in pair]
        return roc_auc_score(np.repeat([1, 0], [*map(len, joined)]), np.concatenate(joined))

    drawn = [area([[part[i] for i in rng.integers(len(part), size=len(part))] for part in groups]) for _ in range(300)]
    return area(groups), *np.quantile(drawn, [0.025, 0.975])


def _memorization(claims: Claims, table: pd.DataFrame, radius: float) -> None:
    """CFG from T, and the fall of capture over starts."""
    always = table.query("group == 'memorized' and guidance == 'cfg'")
    claims.share("memorized, CFG from T: copied", always["copied"], least=0.9)
    for share, part in always.groupby("share"):
        least = 0.97 if share == 0.95 else -np.inf
        claims.share(f"... where the duplicate's share is {share}", part["copied"], least=least)
    between = (always["distance"] > radius) & (always["distance"] <= 1.5 * radius)
    claims.share("... share of samples just outside the ball, at 1.0 to 1.5 radii", between, most=0.02)
    falls_through_half(claims, table.query("group == 'sweep' and guidance == 'none'"))


def falls_through_half(claims: Claims, swept: pd.DataFrame) -> None:
    """How often, and at which start, capture falls through one half."""

    def crossings(part: pd.DataFrame) -> list[float]:
        return half_crossings(part.groupby("start")["copied"].mean())

    found = crossings(swept)
    claims.number(
        "memorized: times that the curve of copies falls through 1/2", *[len(found)] * 3, len(swept), least=1, most=1
    )
    interval = over_prompts(swept, lambda part: (crossings(part) or [np.nan])[0])
    claim = "memorized: start t at which it falls through 1/2"
    claims.number(claim, found[0] if found else np.nan, *interval, len(swept), least=300, most=850)


def tint(claims: Claims, ordinary: pd.DataFrame, denoiser: Denoiser) -> None:
    """Whether the seed tints the background where a caption names its colour."""
    named = ordinary[ordinary["background"] != ""]
    linear = colour_of_mean(denoiser)

    def correlation(part: pd.DataFrame) -> float:
        return noise_colour_correlation(part, linear)

    found = correlation(named), *over_prompts(named, correlation), len(named)
    claim = "ordinary, colour named: correlation of the background's colour with the tint of the noise"
    claims.number(claim, *found, least=-0.2, most=0.2)


def saturation(claims: Claims, table: pd.DataFrame) -> None:
    real = float(metrics.saturated_share(unseen_scenes()[0]).mean())
    for group in ("ordinary", "memorized"):
        values = table.query("group == @group and guidance == 'cfg'")["saturated"].to_numpy() / real
        claim = f"{group}, CFG from T: saturated pixels, as a multiple of real scenes'"
        claims.number(claim, values.mean(), *bootstrap_interval(values), len(values), most=3)


def _starts(claims: Claims, table: pd.DataFrame, scenario: Scenario) -> None:
    """The start chosen on held-out prompts, measured on the others."""
    others = scenario.table("memorized")["prompt"].iloc[:-HELD_OUT]
    goals = {"none": (0.05, 0.85, "no guidance"), "opposite": (0.02, 0.9, "opposite guidance")}
    for guidance, (most, least, name) in goals.items():
        start = chosen_start(table, scenario, guidance)
        rows = table.query("group == 'sweep' and guidance == @guidance and start == @start")
        rows = rows[rows["prompt"].isin(others)]
        claims.share(f"memorized, copied: {name} until {start}", rows["copied"], most=most)
        claims.share(f"memorized, object right: {name} until {start}", rows["object_right"], least=least)
        _similarity(claims, f"memorized, SSCD to the attractor: {name} until {start}", rows, most=0.25)


def _similarity(claims: Claims, claim: str, rows: pd.DataFrame, **goal) -> None:
    """The mean of the column sscd, where SSCD's student was at hand."""
    if "sscd" in rows:
        interval = over_prompts(rows, lambda part: part["sscd"].mean())
        claims.number(claim, rows["sscd"].mean(), *interval, len(rows), **goal)


def _judges(claims: Claims, table: pd.DataFrame, scenario: Scenario) -> None:
    """Judges that this world did not train: SSCD's student, and a plain correlation of pixels."""
    memorized = table[table["group"] == "memorized"].groupby("guidance")
    for guidance, name, goal in (("cfg", "CFG from T", {"least": 0.55}), ("none", "unguided", {"most": 0.1})):
        rows = memorized.get_group(guidance)
        _similarity(claims, f"memorized, SSCD to the attractor: {name}", rows, **goal)
    rows = table.query("group in ('memorized', 'sweep')")
    held_out = rows["prompt"].isin(scenario.table("memorized")["prompt"].tail(HELD_OUT))
    known, rest = rows[held_out], rows[~held_out]
    limits = np.quantile(known["pixels"], np.linspace(0, 1, 400))
    limit = max(limits, key=lambda x: ((known["pixels"] >= x) == known["copied"]).mean())
    claim = f"memorized: pixel correlation (a copy: over {limit:.3f}) and descriptor agree"
    claims.share(claim, (rest["pixels"] >= limit) == rest["copied"], least=0.98)


def _ordinary(claims: Claims, table: pd.DataFrame, denoiser: Denoiser) -> None:
    """Ordinary prompts are drawn as they say, copy nothing, and lose nothing under the paper's rules."""
    ordinary = table.query("group == 'ordinary' and guidance == 'cfg'")
    claims.share("ordinary, CFG from T: copies of any duplicate", ordinary["near"], most=0.01)
    claims.share("ordinary, CFG from T: object right", ordinary["object_right"], least=0.97)
    right = ordinary.set_index(["prompt", "seed"])["object_right"].astype(float)
    for rule in sorted({*table.query("group == 'ordinary'")["guidance"]} - {"cfg", "none"}):
        ruled = table.query("group == 'ordinary' and guidance == @rule")
        pairs = [*ruled[["prompt", "seed"]].itertuples(index=False, name=None)]
        lost = ruled.assign(lost=right.loc[pairs].to_numpy() - ruled["object_right"])
        interval = over_prompts(lost, lambda part: part["lost"].mean())
        claims.number(
            f"ordinary, {rule}: object right that is lost", lost["lost"].mean(), *interval, len(lost), most=0.03
        )
    tint(claims, ordinary, denoiser)


def _unconditional(claims: Claims, table: pd.DataFrame, judges: Judges) -> None:
    """Pictures without any caption are whole."""
    rows, ordinary = table.query("group == 'unconditional'"), table.query("group == 'ordinary' and guidance == 'cfg'")
    claims.share("unconditional: CLIP's largest probability is over 0.9", rows["confidence"] >= 0.9, least=0.8)
    real = judges.alignment.features(unseen_scenes()[0])
    found = []
    for part, groups in ((rows, rows["seed"]), (ordinary, ordinary["prompt"])):
        features = torch.from_numpy(np.stack(part["clip"]).astype(np.float32))
        found.append(metrics.cmmd(features, real, groups.tolist()))
    (ours, _, most), (theirs, _, largest) = found  # a difference: theirs may be 0, and a ratio would mean nothing
    value, half = ours - 2 * theirs, float(np.hypot(most - ours, 2 * (largest - theirs)))
    claim = "unconditional: CMMD to real scenes, minus twice that of ordinary prompts under CFG"
    claims.number(claim, value, value - half, value + half, len(rows), most=0)


def _magnitude(claims: Claims, table: pd.DataFrame, timesteps: list[int]) -> None:
    """The guidance magnitude of unguided trajectories: the paper's figure 7."""
    unguided = table.query("guidance == 'none'")
    memorized = unguided.query("group == 'memorized'")
    ordinary = unguided.query("group == 'ordinary' and background == ''")
    first = [np.stack(part["magnitude"])[:, :3].mean(axis=1) for part in (memorized, ordinary)]
    area = _area(*first, [part["prompt"] for part in (memorized, ordinary)])
    claims.number("AUC of the magnitude at the first 3 steps, no colour named", *area, sum(map(len, first)), least=0.98)
    both = pd.concat([part.assign(first=values) for part, values in zip((memorized, ordinary), first, strict=True)])

    def ratio(part: pd.DataFrame) -> float:
        medians = part.groupby("group")["first"].median()
        return medians.get("memorized", np.nan) / medians.get("ordinary", np.nan)

    claim = "magnitude at the first 3 steps, no colour named: median of memorized over ordinary"
    claims.number(claim, ratio(both), *over_prompts(both, ratio), len(both), least=4)
    deep = memorized.query("share > 0.7")
    for part, name, goal in (
        (deep, "memorized, share 0.8 and 0.95", {"least": 0.8}),
        (ordinary, "ordinary", {"most": 0.05}),
    ):
        falls = largest_fall(np.stack(part["magnitude"]), np.array(timesteps)) >= 0.5
        claims.share(f"{name}, unguided: magnitude falls by half within 100 timesteps", falls, **goal)


def _points(claims: Claims, table: pd.DataFrame, timesteps: list[int]) -> None:
    """Definition 3: the measured point, the dynamic rule's, and that under opposite guidance."""
    points = table.query("group == 'points'").set_index(["prompt", "seed"])
    free, pushed = (points[points["guidance"] == name] for name in ("none", "opposite"))
    unguided = table.query("group == 'memorized' and guidance == 'none' and share > 0.7").set_index(["prompt", "seed"])
    dynamic = first_local_minimum(torch.tensor(np.stack(unguided["magnitude"])), torch.tensor(timesteps)).numpy()
    rule = free.loc[free["share"] > 0.7].join(unguided.assign(dynamic=dynamic)["dynamic"], how="left")
    claims.share("shares 0.8 and 0.95: the dynamic rule finds a point", rule["dynamic"].notna(), least=0.9)
    both = rule.dropna(subset=["dynamic", "point"])
    if len(both):
        near = (both["dynamic"] - both["point"]).abs() <= 60
        claims.share("... and that point lies within 60 timesteps of the measured one", near, least=0.8)
    sooner = (placed(pushed) - free["point"]).dropna().to_numpy()
    if len(sooner):
        interval = bootstrap_interval(sooner, np.median)
        claims.number(
            "opposite guidance leaves sooner, timesteps (median)", np.median(sooner), *interval, len(sooner), least=80
        )


def _safe_and_right(claims: Claims, rows: pd.DataFrame, name: str, copied: str, least: float) -> None:
    """Copies from T, and a start, chosen on even seeds and measured on odd ones, that is safe and right."""
    always, even = rows[rows["start"] == rows["start"].max()], rows[rows["seed"] % 2 == 0]
    claims.share(f"{name}, CFG from T: {copied}", always["copied"], least=least)
    start = even.groupby("start")["new_and_right"].mean().sort_index(ascending=False).idxmax()
    late = rows[(rows["start"] == start) & (rows["seed"] % 2 == 1)]
    claims.share(f"{name}, CFG from {start:.0f}: {copied}", late["copied"], most=0.1)
    claims.share(f"{name}, CFG from {start:.0f}: object right", late["object_right"], least=0.8)


def scorecard(
    table: pd.DataFrame, denoiser: Denoiser, judges: Judges, others: Mapping[str, pd.DataFrame] = MappingProxyType({})
) -> pd.DataFrame:
    """Every claim about the bundled checkpoints, off their evaluations, as `statistics.Claims.table` has them.

    ``table`` is of the main one, ``others`` name -> that of the fine-tuned ones.
    """
    radius, scenario, timesteps = judges.scenario.radius, judges.scenario, denoiser.timesteps()
    table, claims = table.assign(near=table["nearest"] <= radius), Claims()
    _instruments(claims, denoiser, judges)
    _magnitude(claims, table, timesteps)
    _points(claims, table, timesteps)
    _memorization(claims, table, radius)
    _starts(claims, table, scenario)
    _unconditional(claims, table, judges)
    _ordinary(claims, table, denoiser)
    _safe_and_right(claims, table.query("group == 'template'"), "templates", "layout kept", least=0.8)
    for name, least in (("emoji-finetuned", 0.8), ("emoji-classes", 0.5)):
        if name in others:
            _safe_and_right(claims, others[name], name, "copied", least)
    _judges(claims, table, scenario)
    saturation(claims, table)
    return claims.table()
