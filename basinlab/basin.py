"""The paper's definitions, measured: attractor, perceptual ball, capture probability.

Definition 2 calls x_a an attractor of a prompt when trajectories under CFG end, whatever the
initial noise, inside the ball {x : D(x, x_a) <= epsilon} with probability at least 1 - delta.
Here the ball's radius is calibrated on pictures that are known not to be copies, "whatever
the noise" becomes many seeds, and a probability comes with its Wilson interval.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.stats import norm
from torch import Tensor

from .metrics import mean_pairwise_distance
from .sampling import Trajectory


def wilson_interval(successes, trials, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's score interval of a proportion (Wilson 1927, eq. 4), elementwise.

    >>> low, high = wilson_interval(8, 10)
    >>> round(float(low), 3), round(float(high), 3)
    (0.49, 0.943)
    """
    z = norm.ppf(0.5 + confidence / 2)
    n = np.asarray(trials, float)
    p = np.asarray(successes, float) / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return centre - half, centre + half


def bootstrap_interval(
    values, statistic=np.mean, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of ``statistic`` over the first axis of ``values``."""
    values, rng = np.asarray(values), np.random.default_rng(seed)
    drawn = [statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(resamples)]
    tail = (1 - confidence) / 2
    return float(np.quantile(drawn, tail)), float(np.quantile(drawn, 1 - tail))


@dataclass(frozen=True)
class Ball:
    """The radius epsilon of the perceptual ball and what it was calibrated on.

    Attributes:
        radius: epsilon; a picture within it of an attractor counts as memorized.
        false_positive_rate: the share of each set of negatives that may lie inside.
        negatives: name of each set -> number of distances in it.
    """

    radius: float
    false_positive_rate: float
    negatives: dict[str, int]


def calibrate_ball(negatives: dict[str, Tensor], false_positive_rate: float = 0.001) -> Ball:
    """The largest ball that keeps the false-positive rate on every set of negatives.

    Args:
        negatives: name -> distances to attractors of pictures that are no copies, such as ordinary
            samples, or the attractors' own scenes with the object drawn by another artist.

    Raises ValueError when a set is empty, a distance is not finite or the rate is not in [0, 1).
    """
    if not 0 <= false_positive_rate < 1:
        raise ValueError(f"false_positive_rate is {false_positive_rate}: give at least 0 and less than 1")
    radii = []
    for name, distances in negatives.items():
        if not len(distances) or not torch.isfinite(distances).all():
            raise ValueError(f"negatives {name!r}: give at least one distance, all finite")
        ordered = distances.flatten().sort().values
        allowed = int(false_positive_rate * len(ordered))
        # just under the first distance that must stay outside
        radii.append(float(torch.nextafter(ordered[allowed], torch.tensor(-1.0))))
    return Ball(min(radii), false_positive_rate, {name: d.numel() for name, d in negatives.items()})


def roc(positives: Tensor, negatives: Tensor) -> pd.DataFrame:
    """Receiver operating characteristic of "distance <= radius": columns radius, false_positive, true_positive."""
    radii = torch.cat([positives, negatives]).flatten().unique()
    share = lambda d: torch.searchsorted(d.flatten().sort().values, radii, right=True).double() / d.numel()  # noqa: E731
    return pd.DataFrame({"radius": radii, "false_positive": share(negatives), "true_positive": share(positives)})


def auc(positives: Tensor, negatives: Tensor) -> float:
    """Probability that a positive is larger than a negative, ties counting half (Mann-Whitney).

    >>> auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    p, n = positives.flatten()[:, None].double(), negatives.flatten()[None].double()
    return float(((p > n).double() + 0.5 * (p == n).double()).mean())


def outcomes(run, attractors: Tensor, distance, ball: Ball) -> pd.DataFrame:
    """One row a sample of ``run``: prompt, seed, distance to its attractor, inside or not.

    Args:
        run: a Trajectory of B samples.
        attractors: [B, 3, height, width], the attractor of each sample's prompt.
        distance: D, such as `metrics.CopyDistance`.
    """
    distances = distance(run.images(), attractors)
    return pd.DataFrame(
        {"prompt": run.prompts, "seed": run.seeds, "distance": distances, "inside": distances <= ball.radius}
    )


def capture_probability(table: pd.DataFrame, by: str | Sequence[str] = "prompt", of: str = "inside") -> pd.DataFrame:
    """Share of samples with ``of`` true in each group of ``by``: columns n, captured, low, high (Wilson, 95%)."""
    result = table.groupby(by, sort=False)[of].agg(n="size", captured="mean").reset_index()
    result["low"], result["high"] = wilson_interval(result["captured"] * result["n"], result["n"])
    return result


@dataclass(frozen=True)
class Attractor:
    """Definition 2 read off samples alone, without knowing the training set.

    Attributes:
        index: which sample is nearest to all others (the medoid).
        epsilon: the smallest radius around it that holds at least 1 - ``delta`` of the samples.
        delta: the probabilistic tolerance.
    """

    index: int
    epsilon: float
    delta: float


def estimate_attractor(pictures: Tensor, distance, delta: float = 0.1) -> Attractor:
    """The attractor of one prompt from its samples [B, 3, height, width] under CFG with many seeds."""
    pairs = distance.pairs(pictures, pictures)
    index = int(pairs.median(dim=1).values.argmin())
    inside = max(1, math.ceil((1 - delta) * len(pairs) - 1e-9))
    return Attractor(index, float(pairs[index].sort().values[inside - 1]), delta)


def dispersion(runs: Mapping[str, Trajectory], of: str = "latents") -> pd.DataFrame:
    """How far apart the seeds of one prompt are, step by step: the funnel's width as a number.

    Args:
        runs: name -> trajectories of several prompts with the same seeds.
        of: "latents", the states x_t, or "predicted", the clean latents predicted from them.

    Returns columns name, t, value (mean over prompts of `metrics.mean_pairwise_distance`), low and
    high (95% bootstrap interval over prompts).
    """
    tables = []
    for name, run in runs.items():
        states = run.latents[:, :-1] if of == "latents" else run.predicted
        prompts = list(dict.fromkeys(run.prompts))
        rows = [[i for i, p in enumerate(run.prompts) if p == prompt] for prompt in prompts]
        widths = torch.stack([mean_pairwise_distance(states[r]) for r in rows]).numpy()
        tables.append(_mean_curve(name, run.timesteps, widths))
    return pd.concat(tables, ignore_index=True)


def magnitude_curves(magnitudes: Mapping[str, Tensor], timesteps: Tensor) -> pd.DataFrame:
    """Mean guidance magnitude over t; columns name, t, value, low, high (95% bootstrap over samples).

    Args:
        magnitudes: name -> [B, S], such as `Trajectory.guidance_magnitude` of a measured run.
        timesteps: [S].
    """
    return pd.concat([_mean_curve(name, timesteps, m.numpy()) for name, m in magnitudes.items()], ignore_index=True)


def _mean_curve(name: str, timesteps: Tensor, values: np.ndarray) -> pd.DataFrame:
    """Mean over the rows of ``values`` [N, S] at each timestep, with its bootstrap interval."""
    low, high = zip(*[bootstrap_interval(column, resamples=500) for column in values.T], strict=True)
    return pd.DataFrame({"name": name, "t": timesteps, "value": values.mean(axis=0), "low": low, "high": high})


def first_local_minimum(magnitude: Tensor, timesteps: Tensor) -> Tensor:
    """Timestep of the first local minimum of the guidance magnitude (paper, dynamic transition point).

    Args:
        magnitude: [B, S] over falling ``timesteps`` [S].

    Returns [B], NaN where the magnitude has no interior local minimum.
    """
    if magnitude.shape[1] < 3:
        return torch.full((len(magnitude),), torch.nan)
    inner = (magnitude[:, 1:-1] < magnitude[:, :-2]) & (magnitude[:, 1:-1] <= magnitude[:, 2:])
    found = timesteps.float()[inner.float().argmax(dim=1) + 1]
    return torch.where(inner.any(dim=1), found, torch.nan)
