"""Intervals, error rates and verdicts: what a number from a few samples may be said to show."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import norm
from torch import Tensor


def wilson_interval(successes, trials, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's score interval of a proportion (Wilson 1927, eq. 4), elementwise."""
    z, n = norm.ppf(0.5 + confidence / 2), np.asarray(trials, float)
    p = np.asarray(successes, float) / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return np.maximum(centre - half, 0), np.minimum(centre + half, 1)  # rounding may leave it


def bootstrap_interval(values, statistic: Callable = np.mean, resamples: int = 2000) -> tuple[float, float]:
    """95% percentile bootstrap interval of ``statistic`` over the first axis of ``values``; the same every time."""
    values = np.asarray(values)
    rows = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    means = statistic is np.mean and values.ndim == 1  # all at once
    drawn = values[rows].mean(axis=1) if means else [statistic(values[chosen]) for chosen in rows]
    tail = (1 - 0.95) / 2  # by rounding just over 0.025, so that as many fall out below as above
    return tuple(np.quantile(drawn, [tail, 1 - tail], method="inverted_cdf").tolist())  # as bounds may be infinite


def mean_interval(part: pd.DataFrame, name: str) -> tuple[float, float, float]:
    """Mean of column ``name`` and its interval, a bootstrap over prompts, or Wilson's of them where all agree."""
    means = part.groupby("prompt")[name].mean().to_numpy(float)
    low, high = bootstrap_interval(means, resamples=1000)
    if pd.api.types.is_bool_dtype(part[name]) and low == high:
        low, high = wilson_interval(means.sum(), len(means))
    return means.mean(), float(low), float(high)


def quantile_interval(values: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """95th percentile of all ``values`` (one array a prompt) and its interval, a bootstrap over prompts."""

    def quantile(prompts: Sequence[int]) -> float:
        return np.quantile(np.concatenate([values[i] for i in prompts]), 0.95)

    return quantile(range(len(values))), *bootstrap_interval(range(len(values)), quantile, resamples=500)


def told(value, low=None, high=None, n: int | None = None, form: str = ".0%", bold=True) -> str:
    """A value, or a table's row with one, with its 95% interval and number of samples, as text (``bold``: Markdown)."""
    if hasattr(value, "value"):
        value, low, high, n = value.value, value.low, value.high, value.n
    return f"{'**' * bold}{value:{form}}{'**' * bold} ({low:{form}} to {high:{form}}, n = {n:.0f})"


def verdict(low: float, high: float, least: float = -np.inf, most: float = np.inf) -> str:
    """Whether a number with this interval lies within ``least`` and ``most``: yes, no or undecided."""
    return "yes" if least <= low and high <= most else "no" if high < least or low > most else "undecided"


class Claims:
    """Claims with what was found: value, 95% interval, n, the goal that was set before, and the verdict."""

    def __init__(self):
        self.rows = []

    def number(self, claim: str, value: float, low: float, high: float, n: int, least=-np.inf, most=np.inf) -> None:
        """A claim that a number is at ``least`` or at ``most`` so much; without a goal it is reported."""
        goals = [f"at {word} {goal:.3g}" for word, goal in (("least", least), ("most", most)) if np.isfinite(goal)]
        found = verdict(low, high, least, most) if goals else "reported"
        self.rows.append((claim, float(value), float(low), float(high), int(n), ", ".join(goals), found))

    def share(self, claim: str, truth, least: float = -np.inf, most: float = np.inf) -> None:
        """A claim about the share of ``truth`` [n] bool, with Wilson's interval; undecided if a NaN is among them."""
        truth = np.asarray(truth, float)
        self.number(claim, truth.mean(), *wilson_interval(truth.sum(), len(truth)), len(truth), least, most)

    def table(self) -> pd.DataFrame:
        """One row a claim."""
        return pd.DataFrame(self.rows, columns=["claim", "value", "low", "high", "n", "goal", "verdict"])


def roc(positives: Tensor, negatives: Tensor) -> pd.DataFrame:
    """Receiver operating characteristic of "distance <= radius": columns radius, false_positive, true_positive."""
    positives, negatives = positives.flatten().double(), negatives.flatten().double()
    radii = torch.cat([positives, negatives]).unique()
    false, true = (torch.searchsorted(d.sort().values, radii, right=True) / len(d) for d in (negatives, positives))
    return pd.DataFrame({"radius": radii, "false_positive": false, "true_positive": true})
