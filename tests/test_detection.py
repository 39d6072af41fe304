"""Detectors against their definitions, and against other implementations."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from sklearn.metrics import roc_auc_score

import basinlab
from basinlab import detection, mitigations

PROMPTS = ["a picture of a tomato", "dream second top hat found first"]


@pytest.fixture(scope="module")
def run(tiny):
    return basinlab.sample(tiny, PROMPTS, [0, 1], basinlab.ConstantGuidance(2.0), steps=6, progress=False)


def both(run, step, t):
    """The two predictions of the network itself at the states of ``step``."""
    denoiser, x = run.denoiser, run.latents[:, step]
    with torch.no_grad():
        return [denoiser.unet(x, t, denoiser.embed(texts)).sample for texts in (run.prompts, [""] * len(run))]


def norm(x):
    return x.flatten(1).norm(dim=1)


def test_first_step_detectors_are_their_formulas(tiny, run):
    c, u = both(run, 0, run.timesteps[0])
    alpha_bar = tiny.scheduler.alphas_cumprod[run.timesteps[0]]
    ahead = replace(run, latents=run.latents + 0.25 * ((c - u) / norm(c - u).view(-1, 1, 1, 1))[:, None])
    c2, u2 = both(ahead, 0, run.timesteps[0])
    assert run.latents[0, 0].numel() == 2**10  # so that a radius of 1 is 0.25 here
    torch.testing.assert_close(detection.sharpness(run), alpha_bar.sqrt() * norm(c2 - u2), atol=1e-5, rtol=1e-4)
    c, u = both(run, 0, run.timesteps[-3])
    cosine = torch.cosine_similarity(u, c - u, dim=1).mean((1, 2))
    expected = run.guidance_magnitude[:, 0] + 2 * 0.25 * (alpha_bar / 0.0047).sqrt() * cosine
    torch.testing.assert_close(detection.anisotropy(run), expected, atol=1e-5, rtol=1e-4)


def test_end_attention_looks_where_diffusers_own_attention_does(tiny, run):
    layer = next(part for name, part in tiny.unet.named_modules() if name.endswith("attn2"))
    before, seen = layer.processor, []
    scores = layer.get_attention_scores
    layer.get_attention_scores = lambda *given: seen.append(scores(*given)) or seen[-1]
    layer.set_processor(AttnProcessor())
    both(run, -2, run.timesteps[-1])
    layer.set_processor(before)
    del layer.get_attention_scores
    ends = [len(ids) - 1 for ids in tiny.tokenizer(run.prompts).input_ids]
    heads = seen[0].unflatten(0, (4, -1)).mean(1)
    side = int(heads.shape[1] ** 0.5)
    small = torch.stack([heads[i, :, end].view(side, side) for i, end in enumerate(ends)])
    mask = torch.kron(small, torch.ones(16 // side, 16 // side))[:, None]
    c, u = both(run, 0, run.timesteps[0])
    expected = tiny.scheduler.alphas_cumprod[run.timesteps[0]].sqrt() * norm((c - u) * mask) / mask.mean((1, 2, 3))
    torch.testing.assert_close(detection.end_attention(run), expected, atol=1e-5, rtol=1e-4)
    assert layer.processor is before and not layer.to_q._forward_hooks


def test_the_pictures_weight_is_that_of_a_mixed_trajectory_and_stability_a_z_score(tiny, run):
    w = torch.linspace(0, 1, 7)[None, :, None, None, None]
    x, noise = run.latents[:, -1:], run.latents[:, :1]
    mixed = replace(run, latents=w * x + (1 - w) * noise)
    expected = w.flatten()[1] / run.denoiser.scheduler.alphas_cumprod[run.timesteps[1]].sqrt()
    torch.testing.assert_close(detection.picture_weight(mixed), expected.expand(4), atol=1e-3, rtol=1e-3)
    # and stability is the largest z-score of an update
    norms = mitigations.ordinary_norms(tiny, ["an owl", "here is a tomato"], basinlab.ConstantGuidance(2.0), steps=6)
    updates = norm(run.latents.diff(dim=1).flatten(0, 1)).view(4, 6)
    z = (updates - norms[0, :, 1]) / norms[1, :, 1]
    torch.testing.assert_close(detection.stability(run, norms), z.max(dim=1).values)


def test_the_critical_scale_is_the_width_of_the_basin_where_that_is_known():
    """A Gaussian of deviation 1 takes x to x / (1 + sigma^2): a step that may be a quarter of x at most."""
    centre, wide = torch.tensor([3.0, 0.0]), basinlab.MixtureDenoiser([(0.0, 0.0)], [1.0], {"": [1.0], "point": [1.0]})
    run = basinlab.sample(wide, "point", [0, 1], basinlab.ConstantGuidance(1.0), progress=False)
    run.latents[:, -1] = centre.view(2, 1, 1)
    found = detection.critical_scale(run, scales=50, iterations=1)
    sigmas = (1 / wide.scheduler.alphas_cumprod[run.timesteps] - 1).sqrt()
    allowed = sigmas[1 - 1 / (1 + sigmas**2) <= 0.25].max()
    torch.testing.assert_close(found, allowed.expand(2))
    world = basinlab.MixtureDenoiser.with_duplicate()
    run = basinlab.sample(world, "memorized", [0, 1], basinlab.ConstantGuidance(1.0), progress=False)
    run.latents[0, -1], run.latents[1, -1] = world.duplicate, torch.tensor([-5.0, 3.0]).view(2, 1, 1)
    duplicate, elsewhere = detection.critical_scale(run)
    assert duplicate > 1 > elsewhere


def test_a_detectors_scores_do_not_depend_on_the_batch(tiny, run):
    of = "sharpness anisotropy picture_weight end_attention critical_scale"
    for score in (getattr(detection, name) for name in of.split()):
        torch.testing.assert_close(score(run)[2:3], score(run[2]), atol=1e-4, rtol=1e-4)


def test_separation_is_that_of_scikit_learn_and_of_counting():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"prompt": np.repeat(np.arange(40), 5), "truth": np.repeat(np.arange(40) < 20, 5)})
    table["score"] = (rng.normal(size=200) + table["truth"]).round(1)  # with ties
    area, found = detection.separation(table, "score", "truth").itertuples()
    assert area.value == pytest.approx(roc_auc_score(table["truth"], table["score"]))
    assert area.low < area.value < area.high and (area.n, area.prompts) == (200, 40)
    limit = table.loc[~table["truth"], "score"].sort_values().iloc[-2]  # above it lies one of 100
    assert found.value == pytest.approx((table.loc[table["truth"], "score"] > limit).mean())
    perfect = detection.separation(table.assign(score=table["truth"] * 1.0), "score", "truth")
    assert perfect["value"].eq(1).all() and perfect["low"].between(0.8, 0.9).all()  # 20 prompts without exception
    alone = detection.separation(table[table["truth"]], "score", "truth")
    assert alone[["value", "low", "high"]].isna().all(axis=None)
