import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import roc_curve

from basinlab import statistics


@pytest.mark.parametrize("successes, trials", [(0, 1), (1, 1), (0, 8), (3, 8), (8, 8), (384, 768), (1, 1000)])
def test_wilson_interval_agrees_with_scipy(successes, trials):
    for confidence in (0.9, 0.95):
        expected = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
        found = statistics.wilson_interval(successes, trials, confidence)
        assert found == pytest.approx((expected.low, expected.high), abs=1e-12) and 0 <= found[0] <= found[1] <= 1


@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says(statistic):
    rng = np.random.default_rng(0)
    intervals = [statistics.bootstrap_interval(rng.normal(5, 2, 40), statistic, resamples=200) for _ in range(200)]
    assert 0.88 <= np.mean([low <= 5 <= high for low, high in intervals]) <= 0.99
    rows = np.array([[0.0, 10.0], [1.0, 11.0], [2.0, 12.0]])  # it resamples rows, the same every time
    assert statistics.bootstrap_interval(rows, lambda x: (x[:, 1] - x[:, 0]).mean()) == (10.0, 10.0)
    low, high = statistics.bootstrap_interval(values := np.random.default_rng(0).normal(size=30))
    assert statistics.bootstrap_interval(values) == (low, high)
    assert statistics.bootstrap_interval(-values) == (-high, -low)  # as many are left out below as above


def test_roc_agrees_with_sklearn_with_and_without_ties():
    rng = np.random.default_rng(3)
    for decimals in (0, 16):
        near, far = rng.gamma(2, size=60).round(decimals), rng.gamma(4, size=90).round(decimals)
        false, true, _ = roc_curve([1] * 60 + [0] * 90, -np.r_[near, far], drop_intermediate=False)
        table = statistics.roc(torch.tensor(near), torch.tensor(far))
        np.testing.assert_allclose(table[["false_positive", "true_positive"]], np.c_[false, true][1:])


def test_mean_and_quantile_intervals_are_over_prompts_and_wilsons_where_all_agree():
    table = pd.DataFrame({"prompt": list("aabb"), "copied": pd.array([True] * 4), "distance": [0.0, 2.0, 4.0, 6.0]})
    assert statistics.mean_interval(table, "distance") == (3.0, 1.0, 5.0)  # of the prompts' means 1 and 5
    expected = binomtest(2, 2).proportion_ci(method="wilson")  # two prompts
    assert statistics.mean_interval(table, "copied") == pytest.approx((1.0, expected.low, expected.high))
    assert statistics.quantile_interval([np.zeros(10), np.ones(10), np.full(10, 2.0)]) == (2.0, 0.0, 2.0)


@pytest.mark.parametrize("low, high, at_least, at_most, between", [
    (0.6, 0.7, "yes", "no", "yes"),
    (0.5, 0.9, "yes", "undecided", "undecided"),
    (0.4, 0.6, "undecided", "undecided", "undecided"),
    (0.3, 0.5, "undecided", "yes", "undecided"),
    (0.3, 0.4, "no", "yes", "no"),
    (0.9, 1.0, "yes", "no", "no"),
    (float("nan"), float("nan"), "undecided", "undecided", "undecided"),
])  # fmt: skip
def test_a_verdict_is_of_the_whole_interval(low, high, at_least, at_most, between):
    goals = {"least": 0.5}, {"most": 0.5}, {"least": 0.5, "most": 0.8}
    assert [statistics.verdict(low, high, **goal) for goal in goals] == [at_least, at_most, between]


def test_claims_carry_their_interval_goal_and_verdict():
    claims = statistics.Claims()
    claims.share("heads", [True] * 60 + [False] * 40, least=0.5)
    claims.number("a length", 3.0, 2.5, 3.5, 7, least=1, most=3)
    claims.number("told only", 1.0, 0.0, 2.0, 1)
    claims.share("one is not known", pd.Series([True, None, True]), least=0.5)
    table = claims.table().set_index("claim")
    assert table["verdict"].tolist() == ["yes", "undecided", "reported", "undecided"]
    assert table["goal"].tolist() == ["at least 0.5", "at least 1, at most 3", "", "at least 0.5"]
    expected = binomtest(60, 100).proportion_ci(method="wilson")
    assert tuple(table.loc["heads", ["low", "high"]]) == pytest.approx((expected.low, expected.high))
