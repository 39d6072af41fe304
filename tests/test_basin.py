import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest

import basinlab
from basinlab import basin
from recipe import scorecard


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("rate", [0.0, 0.001, 0.05, 0.25])
def test_ball_is_the_largest_that_keeps_the_rate_on_every_set(seed, rate):
    rng = np.random.default_rng(seed)
    draw = (lambda n: rng.gamma(2.0, size=n)) if seed % 2 else (lambda n: rng.integers(1, 6, n) / 4)  # ties
    precision = (torch.float32, torch.float64)[seed // 2 % 2]
    negatives = {name: torch.tensor(draw(rng.integers(1, 3000)), dtype=precision) for name in "abc"}
    radius = scorecard.calibrate_radius(negatives, rate)
    larger = np.nextafter(np.float32(radius), np.float32(np.inf))

    def most_inside(radius):
        return max((d <= float(radius)).double().mean().item() for d in negatives.values())

    assert most_inside(radius) <= rate < most_inside(larger)


@pytest.mark.parametrize("bad", [[], [0.5, float("nan")], [float("inf")]])
def test_ball_refuses_negatives_it_cannot_calibrate_on(bad):
    with pytest.raises(ValueError, match=r"'swapped'.*at least one distance, all finite"):
        scorecard.calibrate_radius({"ordinary": torch.ones(3), "swapped": torch.tensor(bad)})


class Euclidean:
    """A distance with pictures for features."""

    def pairs(self, a, b):
        return torch.cdist(a.flatten(1), b.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")


def test_capture_probability_counts_each_group_with_its_interval():
    table = pd.DataFrame({"prompt": ["b"] * 4 + ["a"] * 2, "copied": [True, True, True, False, False, False]})
    result = basin.capture_probability(table).set_index("prompt")
    assert result.index.tolist() == ["b", "a"]
    assert result[["n", "value"]].values.tolist() == [[4, 0.75], [2, 0.0]]
    for prompt, successes, n in (("b", 3, 4), ("a", 0, 2)):
        expected = binomtest(successes, n).proportion_ci(method="wilson")
        assert tuple(result.loc[prompt, ["low", "high"]]) == pytest.approx((expected.low, expected.high), abs=1e-12)
    table = pd.DataFrame({"kind": list("xxyy"), "start": [1, 2, 1, 1], "escaped": [True, False, True, False]})
    result = basin.capture_probability(table, ["kind", "start"], of="escaped")
    rows = [["x", 1, 1, 1.0], ["x", 2, 1, 0.0], ["y", 1, 2, 0.5]]
    assert result[["kind", "start", "n", "value"]].values.tolist() == rows


@pytest.mark.parametrize("count", [4, 8, 10, 33])
@pytest.mark.parametrize("delta", [0.0, 0.1, 0.25])
def test_attractor_is_the_medoid_and_its_ball_the_smallest_that_holds_all_but_delta(count, delta):
    points = torch.tensor([0.0, 1.0, 1.5, 2.25, 9.0])[:, None, None, None]
    assert basin.estimate_attractor(points, Euclidean(), delta=0.2) == (2, 1.5)  # the stray is left out
    pictures = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(count))
    index, epsilon = basin.estimate_attractor(pictures, Euclidean(), delta)
    distances = Euclidean().pairs(pictures, pictures)[index]
    assert (distances <= epsilon).double().mean() >= 1 - delta - 1e-9
    assert (distances < epsilon).double().mean() < 1 - delta


TIMES = torch.tensor([900, 700, 500, 300, 100])


def test_first_local_minimum_is_found_per_sample():
    curves = [
        ([5, 3, 1, 2, 4], 500),
        ([5, 1, 2, 0, 4], 700),  # the first, not the deepest
        ([1, 5, 4, 3, 4], 300),  # the start is no interior minimum
        ([5, 2, 2, 3, 4], 700),  # a flat valley counts from its first step
        ([5, 4, 3, 2, 1], np.nan),
        ([1, 2, 3, 4, 5], np.nan),
        ([2, 2, 2, 2, 2], np.nan),
    ]
    found = basin.first_local_minimum(torch.tensor([curve for curve, _ in curves], dtype=torch.float32), TIMES)
    assert found.tolist() == pytest.approx([expected for _, expected in curves], nan_ok=True)
    for few in (1, 2):  # steps: too few for an interior minimum
        assert basin.first_local_minimum(torch.ones(3, few), TIMES[:few]).isnan().all()


def outcome_table(rows, starts=(900, 700, 500, 300)):
    """Outcomes of a sweep from strings such as "1100", one a seed, earliest start first."""
    return pd.DataFrame(
        {"prompt": "p", "seed": seed, "start": start, "copied": mark == "1"}
        for seed, row in enumerate(rows)
        for start, mark in zip(starts, row, strict=True)
    )


def test_transition_points_are_where_the_outcome_flips_and_medians_count_all():
    points = basin.transition_points(outcome_table(["1100", "1111", "0000", "1000"]))
    assert points["outcome"].tolist() == ["flips", "always", "never", "flips"]
    np.testing.assert_array_equal(points["captured_at"], [700, 300, np.nan, 900])
    np.testing.assert_array_equal(points["free_at"], [500, np.nan, 900, 700])
    np.testing.assert_array_equal(points["point"], [600, np.nan, np.nan, 800])
    assert points["monotone"].all()
    # outcomes that come back are reported
    with pytest.raises(ValueError, match="some samples lack some of the starts"):  # an unknown start is no copy
        basin.transition_points(outcome_table(["1100", "1111"]).iloc[1:])
    points = basin.transition_points(outcome_table(["1101", "0100", "1100"]).sample(frac=1, random_state=0))
    points = points.set_index("seed").sort_index()
    assert points[["monotone", "against"]].values.tolist() == [[False, 1], [False, 1], [True, 0]]
    assert points.loc[0, "point"] == 600  # one start disagrees with the flip after 700
    assert points.loc[1, "outcome"] == "never"  # as does one with never; ties go to the earliest start
    # median points count those that never flip at the ends
    points = basin.transition_points(outcome_table(["1100", "1111", "1111", "0000", "1000"]))
    found = basin.median_points(points.assign(group=["a", "a", "a", "b", "b"]), "group").set_index("level")
    assert found.loc["a", "point"] == 0 and found.loc["a", "n"] == 3  # two of three are captured at all starts
    assert found.loc["b", "point"] == 900  # of 1000 and 800
    assert (found["low"] <= found["point"]).all() and (found["point"] <= found["high"]).all()


def test_funnel_width_is_interpolated_between_radii():
    rows = [("p", seed, 500, radius, radius > edge) for seed, edge in enumerate([1, 1, 3, 3]) for radius in (0, 2, 4)]
    rows += [("p", seed, 300, radius, False) for seed in range(4) for radius in (0, 2, 4)]
    table = pd.DataFrame(rows, columns=["prompt", "seed", "t", "push", "escaped"])
    widths = basin.funnel_width(table).set_index("t")
    assert widths.loc[500, "value"] == 2 and widths.loc[500, "n"] == 4
    assert widths.loc[500, "low"] <= 2 <= widths.loc[500, "high"]
    assert np.isinf(widths.loc[300, "value"])


def test_aligned_magnitude_falls_at_each_trajectorys_own_point():
    times = torch.arange(1000, 0, -20)
    points = pd.DataFrame({"point": [700.0, 500.0, 300.0, float("nan")], "share": 0.8})
    inside = times[None] > torch.tensor(points["point"].fillna(0).to_numpy())[:, None]
    reference = torch.linspace(1, 5, len(times)).expand(2, -1)
    magnitudes = torch.where(inside, 3.0, 1.0) * reference[0]  # three times an ordinary one inside, equal outside
    table = basin.aligned_magnitude(magnitudes, times, points, reference).set_index("after")
    assert (table["share"] == 0.8).all() and table.index.min() == -240 and table.index.max() == 240
    assert table["value"][-80] == pytest.approx(3) and table["value"][80] == pytest.approx(1)
    assert (table["n"] == 3).sum() >= 8  # three samples that flip, whatever the steps a bin; the fourth is left out
    mean = magnitudes.mean(dim=0) / reference[0]
    assert mean[times == 600] < 2.5  # which a mean over trajectories hides


def test_a_run_lies_at_0_of_the_way_to_another_and_the_other_at_1():
    world, options = basinlab.MixtureDenoiser.with_duplicate(), {"progress": False}
    guidances = basinlab.ConstantGuidance(3.0), basinlab.ConstantGuidance(0)
    run, free = (basinlab.sample(world, "memorized", range(6), guidance, **options) for guidance in guidances)
    for of, share in ((run, 0.0), (free, 1.0)):
        way = basin.on_the_way(of, run, free)
        assert way[:, 0].isnan().all()  # they begin at the same noise
        torch.testing.assert_close(way[:, 1:], torch.full_like(way[:, 1:], share), atol=1e-4, rtol=0)
