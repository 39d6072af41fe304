"""Stable Diffusion 1.x, 2.x and XL in their real layouts: every notebook's calls run on tiny random ones."""

import shutil

import checkpoints
import pytest
import torch
from checkpoints import GENERATIONS
from conftest import close
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import constants

import basinlab
from basinlab import basin, guidance, mitigations

PROMPTS, SEEDS = ["an owl", "true pretzel sun"], [0, 1]
OPTIONS = {"steps": 5, "progress": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {g: checkpoints.save(g, tmp_path_factory.mktemp(g)) for g in GENERATIONS}


@pytest.fixture(scope="module")
def denoisers(folders):
    return {g: basinlab.load(str(folder)) for g, folder in folders.items()}


@pytest.fixture(params=GENERATIONS)
def denoiser(request, denoisers):
    return denoisers[request.param]


@pytest.mark.parametrize("generation", GENERATIONS)
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
        close(ours.latents[i, -1:], theirs)


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


def test_calls_of_the_observation_and_the_sweep(denoiser):
    run = basinlab.sample(denoiser, PROMPTS, SEEDS, basinlab.ConstantGuidance(3.0), measure=True, **OPTIONS)
    assert run.images().shape == (4, 3, 64, 64)
    assert run.predicted_images([0, 4]).shape == (4, 2, 3, 64, 64)
    assert len(basin.dispersion({"cfg": run.of(PROMPTS[0])})) == 5
    assert run.guidance_magnitude.isfinite().all()
    attractors, radius, starts, distance = run.images(), 0.1, [999, 599, 0], basinlab.PlaneDistance()
    options = {"after": basinlab.ConstantGuidance(3.0), **OPTIONS}
    sweep = basinlab.sweep(denoiser, PROMPTS, SEEDS, starts, **options)
    distances = distance(sweep.images().flatten(0, 1), attractors.repeat_interleave(len(starts), 0))
    table = sweep.table().assign(distance=distances, copied=distances <= radius)
    assert table.query("start == 999")["distance"].max() < 0.01
    assert len(basin.transition_points(table)) == 4
    rest = (attractors, distance, radius, starts)
    assert len(basin.transition_points_by_bisection(denoiser, PROMPTS, SEEDS, *rest, **options)[0]) == 4


CFG = guidance.ConstantGuidance(3.0)
MITIGATIONS = [
    [mitigations.EmbeddingNoise(0.1), CFG],
    [mitigations.ConditionAnnealing(), CFG],
    [mitigations.CrossAttentionMask(), CFG],
    [mitigations.PromptOptimization(0.0, iterations=2), CFG],
    [mitigations.SharpnessAwareNoise(0.0, iterations=2), CFG],
    [guidance.DynamicTransitionPoint(3.0)],
    [guidance.OppositeGuidance(650, 3.0)],
]


@pytest.mark.parametrize("setting", MITIGATIONS, ids=lambda setting: type(setting[0]).__name__)
def test_every_kind_of_mitigation_runs_and_does_not_depend_on_the_batch(setting, denoiser):
    together = basinlab.sample(denoiser, PROMPTS, SEEDS, setting, record=False, **OPTIONS)
    alone = basinlab.sample(denoiser, PROMPTS[1], SEEDS[1], setting, record=False, **OPTIONS)
    close(together.latents[3:], alone.latents)
    cfg = basinlab.sample(denoiser, PROMPTS, SEEDS, CFG, **OPTIONS)
    assert (together.latents[:, -1] - cfg.latents[:, -1]).abs().amax() > 1e-4


def test_bfloat16_and_another_resolution(folders):
    denoiser = basinlab.load(str(folders["sd1"]), dtype=torch.bfloat16, resolution=128)
    assert (denoiser.dtype, denoiser.latent_shape) == (torch.bfloat16, (4, 16, 16))
    assert basinlab.sample(denoiser, PROMPTS[0], 0, **OPTIONS).images().shape == (1, 3, 128, 128)
    with pytest.raises(ValueError, match="resolution is 100: give a multiple of 64 pixels"):
        basinlab.load(str(folders["sd1"]), resolution=100)


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
    with pytest.raises(ValueError, match=f"Face cache {tmp_path}; `hf download {NAME} --include.*licence"):
        basinlab.load(NAME)


@pytest.mark.parametrize("kind", ["variant", "shards", "both"])
def test_variants_and_shards_are_loaded_as_diffusers_does(folders, denoisers, tmp_path, kind):
    pipeline = StableDiffusionPipeline.from_pretrained(folders["sd1"], safety_checker=None, feature_extractor=None)
    options = {"variant": {"variant": "fp16"}, "shards": {"max_shard_size": "100KB"}}
    pipeline.save_pretrained(tmp_path, **(options.get(kind) or options["variant"] | options["shards"]))
    assert not (tmp_path / "unet/diffusion_pytorch_model.safetensors").exists()
    assert basinlab.load(tmp_path).fingerprint() == denoisers["sd1"].fingerprint()
    tuned = basinlab.load(folders["sd1"], unet=tmp_path / "unet")
    assert tuned.fingerprint() == denoisers["sd1"].fingerprint()


def test_a_fine_tuned_unet_beside_a_hub_name(cache, denoisers, tmp_path):
    unet = checkpoints.unet("sd1")
    unet.save_pretrained(tmp_path / "tuned")
    tuned = basinlab.load(NAME, unet=tmp_path / "tuned")
    assert torch.equal(tuned.unet.conv_in.weight, unet.conv_in.weight)
    assert tuned.fingerprint() != denoisers["sd1"].fingerprint()
    checkpoints.unet("sdxl").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds weights that the U-Net of .* has not, or of another shape"):
        basinlab.load(NAME, unet=tmp_path / "other")


def test_the_second_tokenizer_of_xl_needs_its_vocabulary_too(folders, tmp_path):
    folder = shutil.copytree(folders["sdxl"], tmp_path / "xl")
    for name in ("tokenizer.json", "vocab.json"):
        (folder / "tokenizer_2" / name).unlink(missing_ok=True)
    with pytest.raises(OSError, match=f"{folder / 'tokenizer_2'} has no vocabulary"):
        basinlab.load(folder)
