import copy
from dataclasses import replace

import diffusers
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import bound, close
from diffusers import StableDiffusionPipeline
from diffusers.guiders import AdaptiveProjectedGuidance, AutoGuidance, ClassifierFreeGuidance
from scipy.signal import argrelmin

import basinlab
from basinlab import ConstantGuidance, DynamicTransitionPoint, StaticTransitionPoint
from basinlab.mitigations import EmbeddingNoise, RandomNumbers
from basinlab.sampling import every_pair

PROMPTS = ["a picture of a tomato", "dream second top hat found first"]
SEEDS = [0, 1, 7]
STEPS = 8


def sample(denoiser, prompts=PROMPTS, seeds=SEEDS, mitigations=None, steps=STEPS, **options):
    return basinlab.sample(denoiser, prompts, seeds, mitigations, steps=steps, progress=False, **options)


@pytest.fixture(scope="module")
def cfg(tiny):
    return sample(tiny, measure=True)


def predicting(denoiser, prediction_type):
    """The denoiser with its network's output taken for ``prediction_type``."""
    kind, config = type(denoiser.scheduler), denoiser.scheduler.config
    return replace(denoiser, scheduler=kind.from_config(config, prediction_type=prediction_type))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("scheduler", "DPMSolverMultistep DDIM EulerDiscrete EulerAncestralDiscrete".split())
def test_latents_are_those_of_diffusers_pipeline(tiny, tiny_folder, prediction_type, scheduler):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    kind, changed = getattr(diffusers, f"{scheduler}Scheduler"), {"prediction_type": prediction_type}
    pipeline.scheduler = kind.from_config({**tiny.scheduler.config, **changed, "clip_sample": False})  # no pixels
    prompts, seeds = np.repeat(PROMPTS, 2).tolist(), [3, 4, 3, 4]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    theirs = pipeline(prompts, generator=generators, num_inference_steps=STEPS, output_type="latent").images
    ours = sample(predicting(tiny, prediction_type), seeds=[3, 4], scheduler=kind.__name__)
    assert ours.prompts == prompts and ours.seeds == seeds and len(ours) == 4
    assert ours.latents.shape == (4, STEPS + 1, 4, 12, 12) and ours.predicted.shape == (4, STEPS, 4, 12, 12)
    assert ours.timesteps.tolist() == pipeline.scheduler.timesteps.tolist()
    close(ours.latents[:, -1], theirs)


def test_batch_size_changes_no_result(tiny, cfg):
    for batch_size in (1, 4):
        parts = sample(tiny, measure=True, batch_size=batch_size)
        assert (parts.prompts, parts.seeds) == (cfg.prompts, cfg.seeds)
        close(parts.latents, cfg.latents)
        close(parts.predicted, cfg.predicted)
        torch.testing.assert_close(parts.guidance_magnitude, cfg.guidance_magnitude, rtol=1e-4, atol=0)
        assert parts.network_calls.tolist() == cfg.network_calls.tolist()
    for scheduler in ("EulerAncestralDiscreteScheduler", "DDPMScheduler"):  # noise drawn on the way is by the seed
        torch.manual_seed(1)
        together = sample(tiny, scheduler=scheduler)
        torch.manual_seed(2)
        close(together.latents, sample(tiny, scheduler=scheduler, batch_size=4).latents)


@pytest.mark.parametrize("fault", ["another prompt's embedding", "another seed's noise"])
def test_a_wrong_neighbour_is_far_outside_the_bound(tiny, cfg, monkeypatch, fault):
    """What `close` must catch: at one of the steps, one of the rows has what belongs to its neighbour."""
    calls, right = [], type(tiny).__call__

    def wrong(self, latents, timestep, embedding):
        calls.append(timestep)
        if len(calls) == 3:
            latents, embedding = latents.clone(), embedding.clone()
            if fault == "another prompt's embedding":
                embedding[0] = embedding[3]
            else:
                latents[0] = latents[1]
        return right(self, latents, timestep, embedding)

    monkeypatch.setattr(type(tiny), "__call__", wrong)
    run = sample(tiny)
    assert (run.latents - cfg.latents)[0].abs().max() > 100 * bound(cfg.latents)
    close(run.latents[1:], cfg.latents[1:])


def test_each_step_is_one_call_of_the_network_with_no_idle_rows(tiny, cfg, rows):
    run = sample(tiny, mitigations=StaticTransitionPoint(500))
    assert rows == [6 if t > 500 else 12 for t in run.timesteps.tolist()]
    assert run.network_calls.tolist() == [sum(rows) / 6] * 6
    assert run.transition_point.tolist() == [max(t for t in run.timesteps.tolist() if t <= 500)] * 6
    assert cfg.transition_point.isnan().all() and cfg.network_calls.tolist() == [2 * STEPS] * 6


def test_measuring_leaves_the_trajectory_alone_and_fills_the_magnitude(tiny):
    guidance = StaticTransitionPoint(500)
    plain, measured = (sample(tiny, mitigations=guidance, measure=measure) for measure in (False, True))
    close(plain.latents, measured.latents)
    assert torch.equal(plain.guidance_magnitude.isnan(), (plain.timesteps > 500).expand(6, -1))
    assert measured.guidance_magnitude.isfinite().all() and (measured.guidance_magnitude > 0).all()
    both = ~plain.guidance_magnitude.isnan()
    torch.testing.assert_close(plain.guidance_magnitude[both], measured.guidance_magnitude[both])
    assert measured.network_calls.tolist() == [2 * STEPS] * 6


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_magnitude_is_that_of_the_difference_of_epsilons(tiny, prediction_type):
    denoiser = predicting(tiny, prediction_type)
    run = sample(denoiser, PROMPTS[0], SEEDS)
    states, empty = denoiser.embed(PROMPTS[:1]), denoiser.embed([""])
    alpha_bars = np.cumprod(1 - np.linspace(0.00085**0.5, 0.02**0.5, 1000) ** 2)  # apart from diffusers
    for i, t in enumerate(run.timesteps.tolist()):
        x, alpha_bar = run.latents[:, i].double(), torch.tensor(alpha_bars[t])
        epsilons = []
        for embedding in (states, empty):
            output = denoiser(x.float(), t, embedding.expand(3, -1, -1)).double()
            as_epsilon = alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * x
            epsilons.append(as_epsilon if prediction_type == "v_prediction" else output)
        expected = (epsilons[0] - epsilons[1]).flatten(1).norm(dim=1).float()
        torch.testing.assert_close(run.guidance_magnitude[:, i], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("predicts", ["v", "epsilon"])
def test_dynamic_point_is_that_of_the_epsilon_magnitude(tiny, predicts):
    """Found on the way, per sample, as scipy finds the minimum in the magnitude of an unguided run."""
    denoiser, what = tiny, {"steps": 25}
    if predicts == "epsilon":
        denoiser = basinlab.MixtureDenoiser.with_duplicate()
        what = {"prompts": "memorized", "seeds": range(40), "steps": 50}
    unguided = sample(denoiser, mitigations=ConstantGuidance(0), measure=True, **what)
    run = sample(denoiser, mitigations=DynamicTransitionPoint(5.0, latest=0), **what)
    found, changed, steps = 0, 0, len(run.timesteps)
    for b in range(len(run)):
        minima = argrelmin(unguided.guidance_magnitude[b].numpy())[0]
        if not len(minima) or minima[0] + 1 >= steps:
            assert run.transition_point[b].isnan()
            continue
        found += 1
        point = minima[0] + 1
        assert run.transition_point[b] == run.timesteps[point]
        close(run.latents[b, : point + 1], unguided.latents[b, : point + 1])
        changed += not torch.equal(run.latents[b, point + 1], unguided.latents[b, point + 1])
    assert found and changed >= found / 2  # in the plane two predictions may be one to all digits
    alone = sample(denoiser, mitigations=DynamicTransitionPoint(5.0, latest=0), batch_size=4, **what)
    assert torch.equal(alone.transition_point.nan_to_num(), run.transition_point.nan_to_num())
    close(alone.latents, run.latents)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_predicted_clean_latents_are_the_schedulers_own(tiny, scheduler, prediction_type):
    config = {**tiny.scheduler.config, "prediction_type": prediction_type, "clip_sample": False}
    denoiser = predicting(tiny, prediction_type)
    own = getattr(diffusers, scheduler).from_config(config)
    # 10 steps of 999 / 9 = 111 fall on whole timesteps, where every scheduler has the same schedule
    own.set_timesteps(10)
    run = sample(denoiser, PROMPTS[0], SEEDS, ConstantGuidance(1), steps=10, scheduler=scheduler)
    states = denoiser.embed(PROMPTS[:1]).expand(3, -1, -1)
    for i, t in enumerate(own.timesteps):
        output = denoiser(own.scale_model_input(run.latents[:, i], t), t, states)
        clean = own.step(output, t, run.latents[:, i]).pred_original_sample
        torch.testing.assert_close(run.predicted[:, i], clean, rtol=1e-3, atol=1e-2)


def test_rows_are_picked_out_whole_pictures_decoded_and_without_record_only_the_last_latents_kept(tiny, cfg):
    light = sample(tiny, record=False)
    assert light.latents.shape == (6, 1, 4, 12, 12) and light.predicted is None
    close(light.latents[:, -1], cfg.latents[:, -1])
    close(light.images(), cfg.images())
    with pytest.raises(ValueError, match="record=True"):
        light.predicted_images([0])
    picked = cfg[[4, 0]]
    close(cfg.predicted[:, -1], cfg.latents[:, -1], share=2e-3)
    assert (picked.prompts, picked.seeds) == (PROMPTS[::-1], [1, 0])
    for name in ("latents", "predicted", "guidance_magnitude", "network_calls"):
        assert torch.equal(getattr(picked, name), getattr(cfg, name)[[4, 0]])
    assert torch.equal(cfg.of(PROMPTS[1]).latents, cfg.latents[3:]) and cfg.images().shape == (6, 3, 96, 96)
    torch.testing.assert_close(cfg.images(), tiny.decode(cfg.latents[:, -1]))
    expected = torch.stack([tiny.decode(cfg.predicted[:, s]) for s in (0, -1)], dim=1)
    close(cfg.predicted_images([0, STEPS - 1]), expected)


@pytest.mark.parametrize("prompts, seeds, message", [
    ([], [0], r"0 prompts, seeds \[0\]: give one of each at least, seeds from 0 on"),
    (["an owl", " \n"], [0], r"is no text; .*ConstantGuidance\(0\)"),
    ("", [0], "the prompt '' is no text"),
    (pd.DataFrame({"prompt": PROMPTS}), [0], r"prompts is a DataFrame: give its texts, such as table\['prompt'\]"),
    (["an owl", np.nan], [0], "the prompt nan is no text"),
    ([PROMPTS], [0], "is no text"),
    (["an owl", "a null", "an owl"], [0], "'an owl' is given twice"),
    (PROMPTS, [0, 7, 0], "0 is given twice"),
    *[(PROMPTS, seeds, "2 prompts, seeds .* from 0 on") for seeds in ([], [0.5], 1.0, "0", [3, -1])],
])  # fmt: skip
def test_prompts_and_seeds_that_would_be_misread_are_refused(tiny, prompts, seeds, message):
    for function in (basinlab.sample, basinlab.sweep):
        with pytest.raises(ValueError, match=message):
            function(tiny, prompts, seeds)


def test_prompts_and_seeds_are_lists_of_any_kind():
    expected = every_pair(["a", "b"], [0, 1])
    assert expected == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    kinds = [(pd.Series(["a", "b"]), pd.Series([0, 1])), (np.array(["a", "b"]), np.arange(2)), (("a", "b"), range(2))]
    for prompts, seeds in [*kinds, (["a", "b"], torch.arange(2))]:
        assert every_pair(prompts, seeds) == expected
    assert every_pair("ab", 3) == every_pair("ab", np.int64(3)) == every_pair("ab", torch.tensor(3)) == [("ab", 3)]


@pytest.mark.parametrize("option, value, message", [
    ("mitigations", 7.5, "7.5 is no guidance and no mitigation: give an object such as"),
    ("mitigations", StaticTransitionPoint, "StaticTransitionPoint.* is no guidance"),
    ("mitigations", [EmbeddingNoise(0.1), RandomNumbers], "RandomNumbers.* is no guidance"),
    ("mitigations", [ConstantGuidance(), EmbeddingNoise(), StaticTransitionPoint(500)], "several guidances: give one"),
    ("mitigations", AutoGuidance(3.0, auto_guidance_layers=0, dropout=0.5), "AutoGuidance changes the network"),
    *[("steps", steps, f"steps is {steps}: give 1 to 999") for steps in (0, 1000)],
    *[("scheduler", x, f"no scheduler '{x}'.*'DDIMScheduler'") for x in ("NoSuchScheduler", "AutoencoderKL", "utils")],
    ("scheduler", diffusers.DDIMScheduler, "no scheduler .*DDIMScheduler.*'DDIMScheduler'"),
    ("scheduler", "HeunDiscreteScheduler", "HeunDiscreteScheduler makes 15 predictions in 8 steps"),
    *[("scheduler", f"{name}Scheduler", "does not go down the model's own noise schedule")
      for name in ("IPNDM", "EDMEuler", "DDIMInverse", "CogVideoXDDIM")],
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(option, value, message):
    with pytest.raises(ValueError, match=message):
        sample(basinlab.MixtureDenoiser.with_duplicate(), "memorized", **{option: value})


def test_a_mitigation_alone_and_lists_of_any_order_are_the_same_and_diffusers_own_guider_is_cfg(tiny, cfg):
    noise, rule = EmbeddingNoise(0.1), ConstantGuidance(7.5)
    runs = [sample(tiny, PROMPTS[0], 0, m, steps=3) for m in (noise, [noise], [rule, noise], (noise, rule))]
    assert all(torch.equal(run.latents, runs[0].latents) for run in runs)
    run = sample(tiny, mitigations=ClassifierFreeGuidance(7.5))
    close(run.latents, cfg.latents)
    assert run.network_calls.tolist() == cfg.network_calls.tolist()
    apg = AdaptiveProjectedGuidance(7.5, adaptive_projected_guidance_momentum=-0.5)  # remembers steps, in its inputs
    assert sample(tiny, mitigations=basinlab.Gated(0.0, apg)).latents.equal(sample(tiny, mitigations=apg).latents)


def test_latents_that_are_not_finite_name_the_step_the_prompt_and_the_seed(tiny):
    step, t = next((step, t) for step, t in enumerate(tiny.timesteps(STEPS)) if t <= 500)
    message = f"'{PROMPTS[1]}', seed 5, are not finite after step {step} .t = {t}.*float32"
    poisoned = copy.copy(tiny)
    poisoned.text_encoder = copy.deepcopy(tiny.text_encoder)
    with torch.no_grad():  # NaN for the meaning of a word, so that only prompts with it go wrong
        poisoned.text_encoder.get_input_embeddings().weight[tiny.tokenizer("hat").input_ids[1]] = torch.nan
    for batch_size in (64, 2):
        with pytest.raises(FloatingPointError, match=message):
            sample(poisoned, PROMPTS, [5, 6], StaticTransitionPoint(500), batch_size=batch_size)


def test_a_guidance_is_left_as_it_was_and_what_it_saw_before_leaves_no_trace():
    world, rule = basinlab.MixtureDenoiser.with_duplicate(), DynamicTransitionPoint(3.0)
    for step, t in enumerate(world.timesteps()[:3]):
        rule.set_state(step, 50, torch.tensor(t))
        rule.forward(*torch.randn(2, 4, 2, 1, 1, generator=torch.Generator().manual_seed(step)))
    before, given = repr(vars(rule)), (["memorized"] * 4, torch.full((4, 2, 1, 1), 2.0), world.timesteps()[20])
    rules = (rule, DynamicTransitionPoint(3.0))
    used, new = (basinlab.sample_from(world, *given, of, progress=False) for of in rules)
    assert torch.equal(used.latents, new.latents) and repr(vars(rule)) == before
    assert torch.equal(used.transition_point.isnan(), new.transition_point.isnan())
    with pytest.raises(ValueError, match="decides at the first step"):  # which these states have behind them
        basinlab.sample_from(world, *given, basinlab.Gated(0.5, rule), progress=False)


def test_no_more_texts_are_embedded_at_once_than_samples_go_through_together(tiny, monkeypatch):
    counts, embed = [], type(tiny).embed
    monkeypatch.setattr(type(tiny), "embed", lambda self, prompts: counts.append(len(prompts)) or embed(self, prompts))
    sample(tiny, PROMPTS, range(6), steps=1, batch_size=3, mitigations=[RandomNumbers(2)])  # each has its own text
    assert max(counts) == 3 and sum(counts) == 12 + counts.count(1)
