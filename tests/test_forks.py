"""Forks from a shared prefix: a sweep over start times, and halving for the one that matters."""

import copy
import re
import warnings

import pytest
import torch
from conftest import close
from diffusers.guiders import AdaptiveProjectedGuidance

import basinlab
from basinlab import ConstantGuidance, MixtureDenoiser, PlaneDistance, StaticTransitionPoint, basin
from basinlab.forks import start_steps
from basinlab.mitigations import EmbeddingNoise
from basinlab.sampling import new_scheduler

PROMPTS = ["a picture of a tomato", "dream second top hat found first"]
SEEDS = [0, 7]
STEPS = 8


def sweep(denoiser, starts=None, prompts=PROMPTS, seeds=SEEDS, steps=STEPS, **options):
    return basinlab.sweep(denoiser, prompts, seeds, starts, steps=steps, progress=False, **options)


def sample(denoiser, guidance, steps=STEPS, **options):
    return basinlab.sample(denoiser, PROMPTS, SEEDS, guidance, steps=steps, progress=False, **options)


SOLVERS = "DPMSolverMultistep UniPCMultistep DEISMultistep DDIM EulerAncestralDiscrete".split()


@pytest.mark.parametrize("solver, before", [*[(name, 0.0) for name in SOLVERS], (SOLVERS[0], -2.0)])
def test_every_fork_is_the_run_with_that_start(tiny, solver, before):
    options = {"scheduler": f"{solver}Scheduler", "steps": 6}
    times = [int(t) for t in new_scheduler(tiny, options["scheduler"], 6).timesteps]
    found = sweep(tiny, [*times, 0], before=ConstantGuidance(before), **options)
    assert found.starts == sorted({*times, 0}, reverse=True)  # 0 is never, or the last timestep where that is 0
    assert found.latents.shape == (4, len(found.starts), 4, 12, 12)
    for i, start in enumerate(found.starts):
        apart = sample(tiny, StaticTransitionPoint(start, before=before), **options).latents[:, -1]
        close(found.latents[:, i], apart)


def test_batch_size_changes_no_result(tiny):
    whole, *others = (sweep(tiny, batch_size=size) for size in (64, 1, 3))
    for parts in others:
        assert (parts.prompts, parts.seeds, parts.starts) == (whole.prompts, whole.seeds, whole.starts)
        close(parts.latents, whole.latents)
        assert torch.equal(parts.network_calls, whole.network_calls)


def test_network_calls_are_counted_and_bounded_by_the_batch(tiny, rows):
    times = tiny.timesteps(STEPS)
    found = sweep(tiny, times, batch_size=5)
    # to the last start 7 unguided steps, then both predictions of forks from steps 0, 1, ..., 7
    assert found.network_calls.tolist() == [7 + 2 * sum(range(1, 9))] * 4
    assert sum(rows) == found.network_calls.sum() and max(rows) <= 2 * 5
    rows.clear()
    sweep(tiny, times)
    assert rows == [4] * 7 + [2 * 4 * (k + 1) for k in range(8)]  # all forks of a step are one call
    apart = sum(int(sample(tiny, StaticTransitionPoint(t)).network_calls[0]) for t in times)
    assert found.network_calls_apart.tolist() == [apart] * 4


def test_magnitude_before_the_start_is_measured_on_request(tiny):
    unguided = sample(tiny, ConstantGuidance(0), measure=True)
    found = sweep(tiny, [500, 0], measure=True)
    torch.testing.assert_close(found.guidance_magnitude, unguided.guidance_magnitude, rtol=1e-4, atol=1e-5)
    assert sweep(tiny, [500]).guidance_magnitude.isnan().all() and found.images().shape == (4, 2, 3, 96, 96)
    torch.testing.assert_close(found.images()[1, 1], tiny.decode(found.latents[1, 1:])[0])


def test_start_times_are_sorted_snapped_and_taken_once_and_refused_outside_the_schedule():
    times = torch.tensor([999, 749, 500, 250])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert start_steps([500, 999, 500], times) == {999: 0, 500: 2}
        assert start_steps(None, times) == {999: 0, 0: 4}
    with pytest.warns(UserWarning, match="600 becomes 500, 499 becomes 250, 3 becomes never"):
        assert start_steps([3, 499, 600, 500], times) == {500: 2, 250: 3, 0: 4}
    for starts in ([1000, 500], [-1], []):
        with pytest.raises(ValueError, match=f"starts are {re.escape(str(starts))}: give .* one, all from 0 to 999"):
            sweep(MixtureDenoiser.with_duplicate(), starts, "memorized")


@pytest.mark.parametrize("guidance, message", [
    (basinlab.DynamicTransitionPoint(3.0), "DynamicTransitionPoint remembers steps"),
    (AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5), "AdaptiveProjectedGuidance remembers"),
    ([EmbeddingNoise(0.1)], "EmbeddingNoise acts on samples from their initial noise on"),
    (7.5, "7.5 is no guidance"),
])  # fmt: skip
def test_guidance_that_forks_cannot_share_is_refused(tiny, guidance, message):
    with pytest.raises(ValueError, match=message):
        sweep(tiny, after=guidance)
    with pytest.raises(ValueError, match=message):
        basinlab.bisect(tiny, PROMPTS, SEEDS, None, after=guidance)


def test_a_sweep_goes_on_where_it_was(tiny, rows, tmp_path):
    options = {"batch_size": 2, "folder": tmp_path, "measure": True}
    whole = sweep(tiny, **options)
    first, second = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    second.unlink()
    for made in (whole.network_calls[2:].sum(), 0):  # the second block, and then nothing
        rows.clear()
        again = sweep(tiny, **options)
        assert sum(rows) == made and first.exists()
        for name in ("latents", "guidance_magnitude", "network_calls"):
            torch.testing.assert_close(getattr(again, name), getattr(whole, name), atol=0, rtol=0)


def test_what_is_kept_is_of_one_sweep_its_weights_and_one_ball_alone(tiny, tmp_path):
    world = MixtureDenoiser.with_duplicate()
    config = {**world.scheduler.config, "beta_end": 0.012}
    other = MixtureDenoiser.with_duplicate(scheduler=type(world.scheduler).from_config(config))
    sweep(world, [500], "memorized", folder=tmp_path)
    for denoiser, changes in ((world, {"after": ConstantGuidance(3.0)}), (world, {"seeds": [3, 4]}), (other, {})):
        kept = sweep(denoiser, [500], "memorized", folder=tmp_path, **changes)
        assert torch.equal(kept.latents, sweep(denoiser, [500], "memorized", **changes).latents)
    assert len(list(tmp_path.iterdir())) == 4
    changed = copy.copy(tiny)  # weights in memory, of the same folder
    changed.unet = copy.deepcopy(tiny.unet)
    with torch.no_grad():
        changed.unet.conv_out.bias += 1
    first, second = (sweep(d, [0], PROMPTS[0], 0, steps=2, folder=tmp_path) for d in (tiny, changed))
    assert not torch.equal(first.latents, second.latents)
    # and kept flips are of one ball alone
    attractors = world.duplicate.expand(2, -1, -1, -1)
    options = {"steps": STEPS, "folder": tmp_path / "flips", "progress": False}
    for radius, files in ((1.0, 1), (1.0, 1), (0.5, 2)):
        rest = (attractors, PlaneDistance(), radius)
        basin.transition_points_by_bisection(world, ["memorized"], [0, 1], *rest, **options)
        assert len(list((tmp_path / "flips").iterdir())) == files
    with pytest.raises(ValueError, match="say by judged_by"):
        basinlab.bisect(world, "memorized", 0, None, folder=tmp_path)


def test_halving_finds_what_the_sweep_shows(tmp_path):
    plane = MixtureDenoiser.with_duplicate(0.6)
    seeds, radius, options = range(150), 0.5, {"after": ConstantGuidance(3.0), "batch_size": 5000}
    attractors, starts = plane.duplicate.expand(150, 2, 1, 1), [*plane.timesteps(50)[::2], 0]
    whole = sweep(plane, starts, ["memorized"], seeds, steps=50, **options)
    copied = PlaneDistance()(whole.images().flatten(0, 1), plane.duplicate) <= radius
    expected = basin.transition_points(whole.table().assign(copied=copied))
    rest = (plane, ["memorized"], seeds, attractors, PlaneDistance(), radius, starts)
    points = basin.transition_points_by_bisection(*rest, progress=False, folder=tmp_path, **options)
    monotone = expected["monotone"]
    assert 0.5 < monotone.mean() < 1 and set(expected["outcome"]) == {"flips", "always", "never"}
    assert points[monotone].drop(columns="calls").equals(expected.loc[monotone, points.columns.drop("calls")])
    assert whole.network_calls.sum() > 3 * points["calls"].sum()
    again = basin.transition_points_by_bisection(*rest, progress=False, folder=tmp_path, **options)
    assert again.equals(points)


def test_sampling_from_a_state_of_a_run_ends_where_the_run_does_or_says_what_is_wrong(tiny, step=3):
    run = sample(tiny, ConstantGuidance(3.0), scheduler="DDIMScheduler")
    t = int(run.timesteps[step])
    options = {"steps": STEPS, "scheduler": "DDIMScheduler", "progress": False}
    resumed = basinlab.sample_from(tiny, run.prompts, run.latents[:, step], t, ConstantGuidance(3.0), **options)
    assert resumed.timesteps.tolist() == run.timesteps[step:].tolist()
    close(resumed.latents, run.latents[:, step:])
    # a stochastic scheduler's later noise is not the initial noise once more, and each state has its own
    options["scheduler"] = "EulerAncestralDiscreteScheduler"
    run = basinlab.sample(tiny, "an owl", [0, 1], ConstantGuidance(3.0), **options)
    given = tiny, ["an owl"] * 2, run.latents[:, 0], int(run.timesteps[0]), ConstantGuidance(3.0)
    close(basinlab.sample_from(*given, **options).latents, run.latents)
    states = torch.zeros(2, 4, 12, 12)
    with pytest.raises(ValueError, match="3 prompts and 2 seeds for 2 states"):
        basinlab.sample_from(tiny, ["an owl"] * 3, states, 999)
    with pytest.raises(ValueError, match=r"501 is no timestep of this scheduler with 50 steps; they are \["):
        basinlab.sample_from(tiny, ["an owl"] * 2, states, 501, steps=50)
