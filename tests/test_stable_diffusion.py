"""Stable Diffusion 1.x, 2.x and XL in their real layouts: every notebook's calls run on tiny random ones."""

import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import constants

import basinlab
from basinlab import basin, experiment, guidance, metrics, perturbation, projection
from basinlab.published import stand_in

PROMPTS, SEEDS = ["an owl", "true pretzel sun"], [0, 1]
OPTIONS = {"steps": 5, "progress": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {g: stand_in.save(g, tmp_path_factory.mktemp(g)) for g in stand_in.GENERATIONS}


@pytest.fixture(scope="module")
def denoisers(folders):
    return {g: basinlab.load(str(folder)) for g, folder in folders.items()}


@pytest.fixture(params=stand_in.GENERATIONS)
def denoiser(request, denoisers):
    return denoisers[request.param]


@pytest.mark.parametrize("generation", stand_in.GENERATIONS)
def test_samples_are_those_of_diffusers_own_pipeline(generation, folders, denoisers):
    kind = StableDiffusionXLPipeline if generation == "sdxl" else StableDiffusionPipeline
    options = {} if generation == "sdxl" else {"safety_checker": None, "feature_extractor": None}
    pipeline = kind.from_pretrained(folders[generation], **options)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, timestep_spacing="linspace")
    ours = basinlab.sample(denoisers[generation], PROMPTS, SEEDS, basinlab.ConstantGuidance(3.0), **OPTIONS)
    for i, prompt in enumerate(ours.prompts):
        generator = torch.Generator().manual_seed(ours.seeds[i])
        common = {"guidance_scale": 3.0, "num_inference_steps": 5, "generator": generator, "output_type": "latent"}
        with torch.no_grad():
            theirs = pipeline(prompt, **common).images
        torch.testing.assert_close(ours.latents[i, -1:], theirs, atol=1e-4, rtol=1e-4)  # they reach 10


def test_the_timesteps_are_the_papers(denoiser):
    """Figure 2: guidance from 779 on is memorized, from 759 on it is not; both are among the 50 steps."""
    assert denoiser.timesteps(50)[:13] == [999, 979, 959, 939, 919, 899, 879, 859, 839, 819, 799, 779, 759]


def test_magnitude_is_of_epsilon_whatever_is_predicted(denoisers):
    v = basinlab.sample(denoisers["sd2"], PROMPTS[0], 0, basinlab.ConstantGuidance(1.5), **OPTIONS)
    x, t = v.latents[:, 0], int(v.timesteps[0])
    embedding = denoisers["sd2"].embed([PROMPTS[0], ""])
    a, b = denoisers["sd2"].unet(x.expand(2, -1, -1, -1), t, encoder_hidden_states=embedding).sample
    expected = denoisers["sd2"].alpha_bar(t).sqrt() * (a - b).norm()
    assert v.guidance_magnitude[0, 0].item() == pytest.approx(expected.item(), rel=1e-4)


class Colours:
    """A distance on mean colours, for pictures that show nothing."""

    name = "mean colour"

    def features(self, pictures):
        return torch.nn.functional.normalize(pictures.mean(dim=(2, 3)), dim=1)

    def pairs(self, a, b):
        return 1 - self.features(a) @ self.features(b).T

    def __call__(self, a, b):
        return 1 - (self.features(a) * self.features(b)).sum(dim=1)


def test_calls_of_the_observation_and_the_sweep(denoiser):
    run = basinlab.sample(denoiser, PROMPTS, SEEDS, basinlab.ConstantGuidance(3.0), measure=True, **OPTIONS)
    assert run.images().shape == (4, 3, 64, 64)
    assert run.predicted_images([0, 4]).shape == (4, 2, 3, 64, 64)
    assert len(basin.dispersion({"cfg": run.of(PROMPTS[0])})) == 5
    assert run.guidance_magnitude.isfinite().all()
    states = projection.project(run.predicted, run.timesteps, neighbours=5)
    assert states.table()[["x", "y"]].notna().all(None)
    attractors, ball = run.images(), basin.Ball(0.1, 0.0, {})
    starts = [999, 599, 0]
    sweep = basinlab.sweep(denoiser, PROMPTS, SEEDS, starts, after=basinlab.ConstantGuidance(3.0), **OPTIONS)
    table = basin.outcomes(sweep, attractors, Colours(), ball)
    assert table.query("start == 999")["distance"].tolist() == pytest.approx([0] * 4, abs=1e-4)
    assert len(basin.transition_points(table)) == 4
    bisected, _ = basin.transition_points_by_bisection(
        denoiser, PROMPTS, SEEDS, attractors, Colours(), ball, starts, after=basinlab.ConstantGuidance(3.0), **OPTIONS
    )
    assert len(bisected) == 4


CFG = guidance.ConstantGuidance(3.0)
MITIGATIONS = {
    "a word more": (CFG, perturbation.RandomNumbers(1)),
    "noise on the embedding": (CFG, perturbation.EmbeddingNoise(0.1)),
    "noise that fades": (CFG, perturbation.ConditionAnnealing()),
    "attention": (CFG, perturbation.CrossAttentionMask()),
    "the embedding moved": (CFG, perturbation.PromptOptimization(0.0, iterations=2)),
    "the noise moved": (CFG, perturbation.NoiseDescent(0.0, iterations=2)),
    "flat noise": (CFG, perturbation.SharpnessAwareNoise(0.0, iterations=2)),
    "dynamic": (guidance.DynamicTransitionPoint(3.0),),
    "opposite": (guidance.OppositeGuidance(650, 3.0),),
}


@pytest.mark.parametrize("kind", MITIGATIONS)
def test_every_kind_of_mitigation_runs_and_does_not_depend_on_the_batch(kind, denoiser):
    rule, *perturbations = MITIGATIONS[kind]
    options = {**OPTIONS, "perturbations": perturbations, "record": False}
    together = basinlab.sample(denoiser, PROMPTS, SEEDS, rule, **options)
    alone = basinlab.sample(denoiser, PROMPTS[1], SEEDS[1], rule, **options)
    torch.testing.assert_close(together.latents[3:], alone.latents, atol=2e-3, rtol=0)
    cfg = basinlab.sample(denoiser, PROMPTS, SEEDS, CFG, **OPTIONS)
    assert (together.latents[:, -1] - cfg.latents[:, -1]).abs().amax() > 1e-4


def test_grid_runs_on_it(denoiser, tmp_path):
    prompts = pd.DataFrame({"prompt": PROMPTS})
    judge = lambda run, rows: rows.assign(seed=run.seeds, colour=metrics.background_colour(run.images()).tolist())  # noqa: E731
    strategies = {"CFG": guidance.ConstantGuidance(3.0), "STP": guidance.StaticTransitionPoint(500, 3.0)}
    table = experiment.run_grid(denoiser, prompts, SEEDS, strategies, judge, tmp_path, steps=5)
    assert len(table) == 8


def test_slicing_attention_changes_no_sample(folders, denoisers):
    sliced = basinlab.load(str(folders["sd1"]), attention_slicing=True)
    one, other = (basinlab.sample(d, PROMPTS, SEEDS, **OPTIONS).latents for d in (sliced, denoisers["sd1"]))
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)  # they reach 20, and sums are taken in parts


def test_offload_without_an_accelerator_is_refused(folders):
    with pytest.raises(ValueError, match="give device='cuda', or offload=False"):
        basinlab.load(str(folders["sd1"]), offload=True)


def test_bfloat16_and_another_resolution(folders):
    denoiser = basinlab.load(str(folders["sd1"]), dtype=torch.bfloat16, resolution=128)
    assert (denoiser.dtype, denoiser.latent_shape) == (torch.bfloat16, (4, 16, 16))
    assert basinlab.sample(denoiser, PROMPTS[0], 0, **OPTIONS).images().shape == (1, 3, 128, 128)
    with pytest.raises(ValueError, match="resolution is 100: give a multiple of 64 pixels"):
        basinlab.load(str(folders["sd1"]), resolution=100)


def test_scheduler_that_predicts_twice_a_step_is_refused(denoisers):
    with pytest.raises(ValueError, match="HeunDiscreteScheduler makes 9 predictions in 5 steps"):
        basinlab.sample(denoisers["sd1"], PROMPTS[0], 0, scheduler="HeunDiscreteScheduler", **OPTIONS)


NAME = "CompVis/stable-diffusion-v1-4"


@pytest.fixture
def cache(folders, tmp_path, monkeypatch):
    """A Hugging Face cache that holds ``NAME`` as the hub's client would have stored it; gives the snapshot."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / f"models--{NAME.replace('/', '--')}" / "snapshots" / "0123"
    shutil.copytree(folders["sd1"], snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    return snapshot


def test_a_hub_name_is_read_from_the_cache(cache, denoisers):
    found = basinlab.load(NAME)
    assert found.name == NAME
    assert found.fingerprint() == denoisers["sd1"].fingerprint()


def test_what_is_not_in_the_cache_is_said_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=f"{tmp_path} has no model_index.json.*hf download {NAME} --include.*licence"):
        basinlab.load(NAME)


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_a_file_missing_from_the_cache_is_named_with_the_command(cache, file):
    (cache / file).unlink()
    with pytest.raises(OSError, match=f"{cache / file} is missing; fetch it with `hf download {NAME}"):
        basinlab.load(NAME)


def test_a_pickle_is_not_read_and_the_conversion_named_for_it_works(cache, denoisers):
    path = cache / "unet/diffusion_pytorch_model.safetensors"
    torch.save(denoisers["sd1"].unet.state_dict(), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(OSError, match="is a pickle, which may hold code: convert it") as refused:
        basinlab.load(NAME)
    script = str(refused.value).split('python -c "')[1].split('"`')[0]
    subprocess.run([sys.executable, "-c", script], check=True)
    assert torch.equal(basinlab.load(NAME).unet.conv_in.weight, denoisers["sd1"].unet.conv_in.weight)


def test_the_command_fetches_all_that_is_read(folders):
    """The patterns of the command match every file that a load opens."""
    from fnmatch import fnmatch

    from basinlab.models import _fetching

    patterns = _fetching(NAME).split("--include ")[1].split("`")[0].replace("'", "").split()
    for folder in folders.values():
        files = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
        assert [f for f in files if not any(fnmatch(f, p) for p in patterns)] == []


def test_a_fine_tuned_unet_beside_a_hub_name(cache, denoisers, tmp_path):
    unet = denoisers["sd1"].unet
    tuned = tmp_path / "tuned"
    unet.save_pretrained(tuned)
    assert basinlab.load(NAME, unet=tuned).fingerprint() != denoisers["sd1"].fingerprint()
    other = tmp_path / "other"
    stand_in.unet("sdxl", tiny=True).save_pretrained(other)
    with pytest.raises(ValueError, match=r"holds weights that the U-Net of .* has not|of another shape"):
        basinlab.load(NAME, unet=other)


@pytest.mark.parametrize(("generation", "billions"), [("sd1", 0.8595), ("sd2", 0.8659), ("sdxl", 2.5675)])
def test_the_real_sizes_are_counted_without_memory(generation, billions):
    assert stand_in.count(generation).parameters / 1e9 == pytest.approx(billions, abs=1e-4)


def test_operations_grow_with_the_resolution():
    small, large = stand_in.count("sd1", 256).flops, stand_in.count("sd1", 512).flops
    assert 4 < large / small < 5  # four times the places, and attention grows with their square


def test_no_stand_in_of_another_generation(tmp_path):
    with pytest.raises(ValueError, match="no stand-in for 'sd3': give one of"):
        stand_in.save("sd3", tmp_path)
