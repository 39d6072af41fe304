"""The world in the plane against an oracle of its own: the probability-flow ODE of the exact score, in numpy."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import basinlab
from basinlab import ConstantGuidance, MixtureDenoiser, PlaneDistance, basin
from basinlab.statistics import wilson_interval

SCALE = 3.0
RADIUS = 0.5
ANGLES = np.arange(6) * np.pi / 3
CENTRES = np.array([*(6 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)), (2.0, -2.5)])
DEVIATIONS = np.array([0.9] * 6 + [0.05])
WEIGHTS = {"": np.array([0.165] * 6 + [0.01]), "memorized": np.array([0.2, 0, 0, 0, 0, 0, 0.8])}
BETAS = np.linspace(0.00085**0.5, 0.02**0.5, 1000) ** 2
ALPHA_BARS = np.cumprod(1 - BETAS)


def noise_over_signal(t):
    return np.sqrt((1 - ALPHA_BARS[t]) / ALPHA_BARS[t])


def slope(y, s, weight):
    """dy/ds for y = x / sqrt(alpha_bar), s = noise over signal: epsilon of the guided mixture; y [B, 2]."""
    epsilon = {}
    for prompt, weights in WEIGHTS.items():
        variance = DEVIATIONS**2 + s**2
        away = CENTRES - y[:, None]
        with np.errstate(divide="ignore"):
            log_share = np.log(weights) - np.log(variance) - (away**2).sum(2) / (2 * variance)
        share = np.exp(log_share - log_share.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        epsilon[prompt] = -s * ((share / variance)[..., None] * away).sum(1)
    return epsilon[""] + weight * (epsilon["memorized"] - epsilon[""])


def flow(y, start, end, weight):
    """Along the probability flow of all rows of ``y`` between two noise levels, in the logarithm of the level."""

    def field(level, flat):
        return np.exp(level) * slope(flat.reshape(-1, 2), np.exp(level), weight).ravel()

    return solve_ivp(field, np.log([start, end]), y.ravel(), rtol=1e-5, atol=1e-6).y[:, -1].reshape(-1, 2)


def ends(x, t, weight=SCALE):
    """Where states x_t [B, 2] go under guidance."""
    return flow(x / np.sqrt(ALPHA_BARS[t]), noise_over_signal(t), 1e-3, weight)


def captured(points):
    return np.linalg.norm(points - CENTRES[-1], axis=1) <= RADIUS


@pytest.fixture(scope="module")
def exact():
    return MixtureDenoiser.with_duplicate(0.8, dtype=torch.float64)


@pytest.mark.parametrize("prompt, t", [("", 999), ("memorized", 500), ("ordinary", 500), ("memorized", 20)])
def test_epsilon_is_the_score_of_the_noised_mixture(exact, prompt, t):
    x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(3).requires_grad_()
    alpha_bar = ALPHA_BARS[t]
    weights = exact.embed([prompt])[0, 0]
    used = weights > 0
    spread = torch.tensor(np.sqrt(alpha_bar * DEVIATIONS**2 + 1 - alpha_bar))[used, None].expand(-1, 2)
    centres = torch.tensor(CENTRES)[used] * alpha_bar**0.5
    density = MixtureSameFamily(Categorical(weights[used]), Independent(Normal(centres, spread), 1))
    known = exact.log_density(x.detach().view(50, 2, 1, 1), t, prompt) - density.log_prob(x.detach())
    torch.testing.assert_close(known, known[:1].expand(50), atol=1e-3, rtol=0)  # equal but for a constant
    (score,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    found = exact(x.detach().view(50, 2, 1, 1), t, exact.embed([prompt]).expand(50, -1, -1)).flatten(1)
    # diffusers keeps alpha_bar in float32
    torch.testing.assert_close(found, -((1 - alpha_bar) ** 0.5) * score, atol=1e-4, rtol=1e-3)


def test_clean_points_are_drawn_in_the_captions_shares(exact):
    points = exact.draw(4000, "memorized").flatten(1)
    copies = captured(points.numpy()).mean()
    low, high = wilson_interval(3200, 4000, confidence=0.999)
    assert low < copies < high
    rest = points[~captured(points.numpy())].numpy()
    assert np.abs(rest.mean(0) - CENTRES[0]).max() < 0.1 and np.abs(rest.std(0) - 0.9).max() < 0.1


@pytest.mark.parametrize("weight", [0.0, SCALE])
def test_sampling_follows_the_probability_flow(exact, weight):
    options = {"steps": 250, "batch_size": 200, "progress": False}
    run = basinlab.sample(exact, "memorized", range(200), ConstantGuidance(weight), **options)
    x = run.latents[:, 0].flatten(1).double().numpy()
    error = np.linalg.norm(run.images().flatten(1).numpy() - ends(x, 999, weight), axis=1)
    # the sampler's last step goes to the mean of what is possible, inside a point that is 0.05 wide
    assert np.median(error) < 0.03 and np.quantile(error, 0.97) < 0.1  # near a watershed paths part


def test_basin_is_the_set_from_which_the_flow_is_captured(exact):
    grid = np.stack(np.meshgrid(*[np.linspace(-5, 5, 31)] * 2), -1).reshape(-1, 2)
    states = torch.tensor(grid).view(-1, 2, 1, 1)
    options = {"guidance": ConstantGuidance(SCALE), "steps": 200, "batch_size": 1000}
    run = basinlab.sample(exact, "memorized", 0, steps=200, progress=False)
    for t in run.timesteps[[20, 100, 150]].tolist():
        found = basin.membership(exact, "memorized", states, t, exact.duplicate, PlaneDistance(), RADIUS, **options)
        expected = captured(ends(grid, t))
        assert 0.02 < expected.mean() < 0.98
        assert (found.numpy() == expected).mean() > 0.98


def test_transition_points_are_those_of_the_flow(exact):
    seeds, options = range(100), {"steps": 50, "batch_size": 2000, "progress": False}
    sweep = basinlab.sweep(exact, "memorized", seeds, after=ConstantGuidance(SCALE), **options)
    copied = PlaneDistance()(sweep.images().flatten(0, 1), exact.duplicate) <= RADIUS
    points = basin.transition_points(sweep.table().assign(copied=copied))
    x = basinlab.sampling.initial_noise(exact, seeds).flatten(1).double().numpy()
    y, before, inside = x / np.sqrt(ALPHA_BARS[999]), noise_over_signal(999), []
    for start in sweep.starts[:-1]:
        y, before = flow(y, before, noise_over_signal(start), 0.0), noise_over_signal(start)
        inside.append(captured(flow(y, before, 1e-3, SCALE)))
    count = np.sum(inside, axis=0)  # captured at this many start times
    expected = np.array([np.nan, *sweep.starts])[count]
    assert points["monotone"].mean() > 0.95
    flips = points["outcome"].eq("flips").to_numpy() & (count > 0)
    assert flips.mean() > 0.8
    gap, off = sweep.starts[0] - sweep.starts[1], np.abs(points["captured_at"].to_numpy()[flips] - expected[flips])
    assert (off == 0).mean() > 0.8 and (off <= gap + 1).mean() > 0.97


def test_funnel_width_is_that_of_the_basin(exact):
    guidance, quiet = ConstantGuidance(SCALE), {"steps": 100, "batch_size": 500, "progress": False}
    run, free = (basinlab.sample(exact, "memorized", range(40), g, **quiet) for g in (guidance, ConstantGuidance(0)))
    inside = np.flatnonzero(captured(run.images().flatten(1).numpy()))
    run, free = run[inside], free[inside]
    times, places = run.timesteps[[65, 75, 85]].tolist(), [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    attractors = exact.duplicate.expand(len(run), 2, 1, 1)
    quiet.pop("steps")
    table = basin.escapes(run, free, attractors, PlaneDistance(), RADIUS, times, places, guidance, **quiet)
    widths = basin.funnel_width(table).set_index("t")
    for t in times:
        start, end = (of.latents[:, of.timesteps.tolist().index(t)].flatten(1).double().numpy() for of in (run, free))
        escaped = [1 - captured(ends(start + r * (end - start), t)).mean() for r in places]
        assert escaped[0] == 0 and table.query("push == 0 and t == @t")["escaped"].mean() == 0
        above = next(k for k, share in enumerate(escaped) if share >= 0.5)
        expected = np.interp(0.5, escaped[above - 1 : above + 1], places[above - 1 : above + 1])
        assert widths.loc[t, "low"] - 0.05 <= expected <= widths.loc[t, "high"] + 0.05


def test_what_the_world_has_not_is_named():
    with pytest.raises(ValueError, match="no prompt 'owl' in this world; it has"):
        MixtureDenoiser.with_duplicate().embed(["owl"])
    with pytest.raises(ValueError, match="have no ''"):
        MixtureDenoiser([(0, 0)], [1], {"a": [1]})
    with pytest.raises(ValueError, match=r"weights of 'a' are .*give 1, of sum 1"):
        MixtureDenoiser([(0, 0)], [1], {"": [1], "a": [0.5]})
