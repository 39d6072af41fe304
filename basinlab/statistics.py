"""Intervals, error rates and verdicts: what a number from a few samples may be said to show."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import norm
from torch import Tensor


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
    values, statistic: Callable = np.mean, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of ``statistic`` over the first axis of ``values``."""
    values, rng = np.asarray(values), np.random.default_rng(seed)
    rows = rng.integers(len(values), size=(resamples, len(values)))
    means = statistic is np.mean and values.ndim == 1  # all at once
    drawn = values[rows].mean(axis=1) if means else [statistic(values[chosen]) for chosen in rows]
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], method="inverted_cdf")  # may be infinite: nothing to interpolate
    return float(low), float(high)


def mean_interval(part: pd.DataFrame, name: str) -> tuple[float, float, float]:
    """The mean of column ``name`` and its 95% interval: a bootstrap over prompts.

    Where all samples of a yes-or-no column agree, the bootstrap has no width, and Wilson's interval is given.
    """
    means = part.groupby("prompt")[name].mean().to_numpy(float)
    low, high = bootstrap_interval(means, resamples=1000)
    if part[name].dtype == bool and low == high:
        low, high = wilson_interval(part[name].sum(), len(part))
    return means.mean(), float(low), float(high)


def quantile_interval(values: Sequence[np.ndarray], q: float = 0.95) -> tuple[float, float, float]:
    """The q-quantile of all ``values`` (one array a prompt) and its 95% interval: a bootstrap over prompts."""

    def quantile(prompts: np.ndarray) -> float:
        return np.quantile(np.concatenate([values[i] for i in prompts]), q)

    prompts = np.arange(len(values))
    return quantile(prompts), *bootstrap_interval(prompts, quantile, resamples=500)


def verdict(low: float, high: float, goal: float, kind: str) -> str:
    """Whether a number with the interval ``low`` to ``high`` is "at least" or "at most" ``goal``: yes, no or undecided.

    >>> verdict(0.6, 0.8, 0.5, "at least"), verdict(0.4, 0.8, 0.5, "at least"), verdict(0.6, 0.8, 0.5, "at most")
    ('yes', 'undecided', 'no')
    """
    if kind not in ("at least", "at most"):
        raise ValueError(f"kind is {kind!r}: give 'at least' or 'at most'")
    above, below = (low >= goal, high < goal) if kind == "at least" else (high <= goal, low > goal)
    return "yes" if above else "no" if below else "undecided"


def roc(positives: Tensor, negatives: Tensor) -> pd.DataFrame:
    """Receiver operating characteristic of "distance <= radius": columns radius, false_positive, true_positive."""
    positives, negatives = positives.flatten().double(), negatives.flatten().double()
    radii = torch.cat([positives, negatives]).unique()
    false, true = (torch.searchsorted(d.sort().values, radii, right=True) / len(d) for d in (negatives, positives))
    return pd.DataFrame({"radius": radii, "false_positive": false, "true_positive": true})


def auc(positives: Tensor, negatives: Tensor) -> float:
    """Probability that a positive is larger than a negative, where ties count half (Mann-Whitney).

    >>> auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    p, n = positives.flatten()[:, None].double(), negatives.flatten()[None].double()
    return float(((p > n).double() + 0.5 * (p == n).double()).mean())
