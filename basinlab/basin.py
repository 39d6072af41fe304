"""The paper's definitions, measured: attractor, perceptual ball, capture probability, transition point, funnel.

Definition 2 calls x_a an attractor of a prompt when trajectories under CFG end, whatever the initial noise, inside the
ball {x : D(x, x_a) <= epsilon} with probability at least 1 - delta. The radius is calibrated on pictures that are no
copies, the noise is many seeds, and Definition 3's transition point is read off many starts of guidance.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from .forks import bisect, flip_table
from .models import Denoiser
from .sampling import Trajectory, sample_from
from .statistics import bootstrap_interval, wilson_interval
from .store import digest


def capture_probability(table: pd.DataFrame, by: str | Sequence[str] = "prompt", of: str = "copied") -> pd.DataFrame:
    """Share of samples with ``of`` true (NA does not count) by group of ``by``: n, value, low, high (Wilson, 95%)."""
    result = table.dropna(subset=of).groupby(by, sort=False)[of].agg(n="size", value="mean").reset_index()
    result["low"], result["high"] = wilson_interval(result["value"] * result["n"], result["n"])
    return result


def estimate_attractor(pictures: Tensor, distance, delta: float = 0.1) -> tuple[int, float]:
    """Definition 2 read off one prompt's samples [B, 3, height, width] under CFG, without knowing the training set.

    Gives the index of the sample that is nearest to all others, the medoid, and epsilon, the smallest radius around it
    that holds at least 1 - ``delta`` of them.
    """
    pairs = distance.pairs(pictures, pictures)
    index = int(pairs.median(dim=1).values.argmin())
    return index, float(pairs[index].sort().values[max(1, math.ceil((1 - delta) * len(pairs) - 1e-9)) - 1])


def dispersion(runs: Mapping[str, Trajectory], of: str = "latents") -> pd.DataFrame:
    """How far apart the seeds of one prompt are, step by step: the funnel's width as a number.

    ``of`` is "latents", the states x_t, or "predicted", the clean latents. Columns name of the run, t, value (mean
    distance of pairs, by the root of their length: 1.41 for unit noise), low, high (95% bootstrap over prompts).
    """
    tables = []
    for name, run in runs.items():
        prompts = list(dict.fromkeys(run.prompts))
        if min(map(run.prompts.count, prompts)) < 2:
            raise ValueError(f"{name!r} has {len(run)} samples of {len(prompts)} prompts: give two seeds or more")
        states = [run.of(prompt).recorded(of)[:, : len(run.timesteps)].flatten(2).transpose(0, 1) for prompt in prompts]
        widths = torch.stack([torch.stack([F.pdist(x).mean() for x in s]) / s.shape[2] ** 0.5 for s in states]).numpy()
        low, high = zip(*[bootstrap_interval(column, resamples=500) for column in widths.T], strict=True)
        curve = {"name": name, "t": run.timesteps, "value": widths.mean(axis=0), "low": low, "high": high}
        tables.append(pd.DataFrame(curve))
    return pd.concat(tables, ignore_index=True)


def aligned_magnitude(magnitudes, timesteps, points, reference: Tensor, by="share", width=40) -> pd.DataFrame:
    """Guidance magnitude [B, S] as a multiple of the mean of ``reference`` [N, S] at the same t, around each point.

    ``points`` has a row a sample: point (NaN: left out) and ``by``. A mean over samples that leave at unequal times
    hides the fall that each shows; here time is counted from each one's own point. Columns ``by``, after (timesteps
    since the point, in bins of ``width``), value (median of samples), low, high (95% bootstrap over them), n.
    """
    ratio = (magnitudes / reference.mean(dim=0)).numpy().ravel()
    after = np.floor((points["point"].to_numpy()[:, None] - timesteps.numpy()) / width + 0.5).ravel() * width
    levels, samples = (np.repeat(x, len(timesteps)) for x in (points[by].to_numpy(), range(len(points))))
    table, keys = pd.DataFrame({by: levels, "after": after, "sample": samples, "ratio": ratio}), [by, "after"]
    bins = table.query("abs(after) <= 6 * @width").groupby([*keys, "sample"])["ratio"].mean().groupby(keys)
    rows = [(*key, r.median(), *bootstrap_interval(r, np.median, 500), len(r)) for key, r in bins if len(r) > 2]
    return pd.DataFrame(rows, columns=[*keys, "value", "low", "high", "n"])


def transition_points(table: pd.DataFrame, of: str = "copied") -> pd.DataFrame:
    """Definition 3, measured: at which start time the outcome of each (prompt, seed) flips.

    ``table`` has a row a sample and start, as `scenarios.Judges` makes it of a sweep; all samples have the same starts.
    Where the outcome ``of`` is not known (NA), they are left out. One row a sample: prompt, seed, outcome ("flips",
    "always" or "never" captured), captured_at and free_at (the start times on either side of the flip), point (their
    middle; NaN where nothing flips), against (how many start times disagree with one flip) and monotone (none does).
    The flip is put where the fewest disagree, of several such places at the earliest.
    """
    table = table.dropna(subset=of)
    wide = table.pivot(index=["prompt", "seed"], columns="start", values=of)
    if wide.isna().any(axis=None):
        raise ValueError("some samples lack some of the starts: no flip can be found")
    wide = wide.astype(bool).reindex(pd.MultiIndex.from_frame(table[["prompt", "seed"]].drop_duplicates()))
    starts = sorted(wide.columns, reverse=True)
    flips = np.tri(len(starts) + 1, len(starts), -1, dtype=bool)  # row m: captured at the first m starts, then free
    wrong = (wide[starts].to_numpy()[:, None] != flips).sum(axis=2)
    against, points = wrong.min(axis=1), flip_table(wide.index.to_frame(index=False), wrong.argmin(axis=1), starts)
    return points.assign(against=against, monotone=against == 0)


def transition_points_by_bisection(
    denoiser: Denoiser, prompts, seeds, attractors: Tensor, distance, radius: float, starts=None, **options
) -> pd.DataFrame:
    """`transition_points` without the whole sweep: one flip of each sample is found by `forks.bisect`.

    ``attractors`` are [B, 3, height, width], one a sample, prompt-major; ``options`` and columns are `forks.bisect`'s.
    """
    weights = getattr(distance, "weights", type(distance).__name__)
    options["judged_by"] = f"{weights}, {radius!r}, {digest(attractors) if options.get('folder') else ''}"
    return bisect(denoiser, prompts, seeds, lambda x, rows: distance(x, attractors[rows]) <= radius, starts, **options)


def placed(points: pd.DataFrame) -> pd.Series:
    """Each sample's transition point, t = 0 for one captured at every start, t = 1000 for one captured at none."""
    return points["point"].fillna(points["outcome"].map({"always": 0.0, "never": 1000.0}))


def median_points(points: pd.DataFrame, by: str) -> pd.DataFrame:
    """Median of the `placed` points of each group of ``by``; columns level, point, low, high (95% bootstrap), n."""
    groups = placed(points).groupby(points[by], sort=False)
    rows = [(level, x.median(), *bootstrap_interval(x, np.median), len(x)) for level, x in groups]
    return pd.DataFrame(rows, columns=["level", "point", "low", "high", "n"])


def membership(
    denoiser: Denoiser, prompt: str, states: Tensor, timestep: int, attractor: Tensor, distance, radius, *args, **named
) -> Tensor:
    """Which states x_t lie in the attraction basin at ``timestep`` (Definition 2), [B] bool.

    From each of ``states`` [B, C, H, W] guidance (default CFG 7.5) goes on; further arguments: `sampling.sample_from`.
    """
    run = sample_from(denoiser, [prompt] * len(states), states, timestep, *args, progress=False, **named)
    return distance(run.images(), attractor.expand(len(states), *attractor.shape[-3:])) <= radius


def escapes(
    run: Trajectory, free: Trajectory, attractors: Tensor, distance, radius, timesteps, places, guidance=None, **options
) -> pd.DataFrame:
    """Push captured trajectories towards unguided ones and see which still end in the ball.

    ``run`` are B recorded trajectories that end in the ball of ``attractors`` [B, 3, height, width]. At each of
    ``timesteps`` the state goes a part of the way, each of ``places``, to that of ``free`` (1), the same samples
    without guidance; then ``guidance`` (default CFG 7.5) goes on, with ``options`` of `sampling.sample_from`. Where
    half escape at 1, unguided trajectories leave (Definition 3). One row a push: prompt, seed, t, push, escaped.
    """
    times, count, parts = run.timesteps.tolist(), len(places), []
    for t in timesteps:
        start, end = (of.recorded("latents")[:, times.index(t)] for of in (run, free))
        pushed = torch.cat([start + r * (end - start) for r in places])
        again = {"seeds": run.seeds * count, "steps": len(times), **options}
        ends = sample_from(run.denoiser, run.prompts * count, pushed, t, guidance, **again)
        copied = distance(ends.images(), attractors.repeat(count, 1, 1, 1)) <= radius
        table = pd.DataFrame({"prompt": ends.prompts, "seed": ends.seeds, "t": t})
        parts.append(table.assign(push=np.repeat(list(places), len(run)), escaped=~copied))
    return pd.concat(parts, ignore_index=True)


def on_the_way(run: Trajectory, captured: Trajectory, free: Trajectory) -> Tensor:
    """Where the states of ``run`` lie on the way from ``captured`` (0) to ``free`` (1), [B, S]; NaN at T."""
    start, end, own = (of.recorded("latents")[:, :-1].flatten(2) for of in (captured, free, run))
    return ((own - start) * (end - start)).sum(dim=2) / (end - start).square().sum(dim=2)


def funnel_width(table: pd.DataFrame) -> pd.DataFrame:
    """The push at which half of the trajectories escape, over t: the wall of the paper's funnel.

    Columns t, value, low, high (95% bootstrap over trajectories) and n. Interpolated between pushes; infinite where
    fewer than half escape at the largest, too large where half do at the smallest.
    """
    rows = []
    for t, part in table.groupby("t", sort=False):
        wide = part.pivot(index=["prompt", "seed"], columns="push", values="escaped").astype(float)
        width, values = partial(_half, wide.columns.to_numpy()), wide.to_numpy()
        rows.append((t, width(values), *bootstrap_interval(values, width, resamples=500), len(values)))
    return pd.DataFrame(rows, columns=["t", "value", "low", "high", "n"])


def _half(pushes: np.ndarray, escaped: np.ndarray) -> float:
    """The push at which the mean of ``escaped`` [N, pushes] first reaches one half."""
    share = escaped.mean(axis=0)
    if share.max() < 0.5:
        return np.inf
    first = int((share >= 0.5).argmax())
    around = slice(max(first - 1, 0), first + 1)
    return float(np.interp(0.5, share[around], pushes[around]))


def first_local_minimum(magnitude: Tensor, timesteps: Tensor) -> Tensor:
    """Timestep of the first local minimum of the guidance magnitude (paper, dynamic transition point).

    ``magnitude`` is [B, S] over falling ``timesteps`` [S]. Returns [B], NaN where there is no interior local minimum.
    """
    if magnitude.shape[1] < 3:
        return torch.full((len(magnitude),), torch.nan)
    inner = (magnitude[:, 1:-1] < magnitude[:, :-2]) & (magnitude[:, 1:-1] <= magnitude[:, 2:])
    return torch.where(inner.any(dim=1), timesteps.float()[inner.float().argmax(dim=1) + 1], torch.nan)
