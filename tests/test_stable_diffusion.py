"""Stable Diffusion 1.x, 2.x and XL in their real layouts, tiny and random."""

import shutil

import checkpoints
import pytest
import torch
from checkpoints import GENERATIONS
from conftest import close
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks
from huggingface_hub import constants

import basinlab
from basinlab import guidance, mitigations

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
            close(ours.latents[i, -1:], pipeline(prompt, **common).images)
    # the paper's figure 2: guidance from 779 on is memorized, from 759 on it is not; both are among the 50 steps
    assert denoisers[generation].timesteps(50)[:13] == [*range(999, 758, -20)]


def test_every_fork_is_the_run_with_that_start(denoiser):
    sweep = basinlab.sweep(denoiser, PROMPTS, SEEDS, [999, 599, 0], after=basinlab.ConstantGuidance(3.0), **OPTIONS)
    for i, start in enumerate(sweep.starts):
        run = basinlab.sample(denoiser, PROMPTS, SEEDS, basinlab.StaticTransitionPoint(start, 3.0), **OPTIONS)
        close(sweep.latents[:, i], run.latents[:, -1])
    assert run.images().shape == (4, 3, 64, 64) and run.predicted_images([0, 4]).shape == (4, 2, 3, 64, 64)


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
    options = {"steps": 3, "record": False, "progress": False}
    together = basinlab.sample(denoiser, PROMPTS, SEEDS, setting, **options)
    alone, cfg = (basinlab.sample(denoiser, PROMPTS[1], SEEDS[1], given, **options) for given in (setting, CFG))
    close(together.latents[3:], alone.latents)
    assert (alone.latents - cfg.latents).abs().amax() > 1e-4


@pytest.mark.parametrize("kind", ["variant", "shards", "both"])
def test_variants_and_shards_are_loaded_as_diffusers_does(folders, denoisers, tmp_path, kind):
    pipeline = StableDiffusionPipeline.from_pretrained(folders["sd1"], safety_checker=None, feature_extractor=None)
    options = {"variant": {"variant": "fp16"}, "shards": {"max_shard_size": "100KB"}}
    pipeline.save_pretrained(tmp_path, **(options.get(kind) or options["variant"] | options["shards"]))
    assert not (tmp_path / "unet/diffusion_pytorch_model.safetensors").exists()
    assert basinlab.load(tmp_path).fingerprint() == denoisers["sd1"].fingerprint()
    assert basinlab.load(folders["sd1"], unet=tmp_path / "unet").fingerprint() == denoisers["sd1"].fingerprint()


def test_a_hub_name_is_read_from_the_cache_or_the_command_is_said(folders, denoisers, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    name, stored = "CompVis/sd-v1", tmp_path / "models--CompVis--sd-v1"  # as the hub's client would have stored it
    shutil.copytree(folders["sd1"], stored / "snapshots/0123")
    (stored / "refs").mkdir()
    (stored / "refs/main").write_text("0123")
    unet = checkpoints.unet("sd1")
    unet.save_pretrained(tmp_path / "tuned")
    found, tuned = basinlab.load(name), basinlab.load(name, unet=tmp_path / "tuned")
    assert found.name == name and found.fingerprint() == denoisers["sd1"].fingerprint() != tuned.fingerprint()
    assert torch.equal(tuned.unet.conv_in.weight, unet.conv_in.weight)
    checkpoints.unet("sdxl").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds weights that the U-Net of .* has not, or of another shape"):
        basinlab.load(name, unet=tmp_path / "other")
    with pytest.raises(ValueError, match=f"Face cache {tmp_path}; `hf download other/model --include.*licence"):
        basinlab.load("other/model")


def test_the_second_tokenizer_of_xl_needs_its_vocabulary_too(folders, tmp_path):
    folder = shutil.copytree(folders["sdxl"], tmp_path / "xl")
    for name in ("tokenizer.json", "vocab.json"):
        (folder / "tokenizer_2" / name).unlink(missing_ok=True)
    with pytest.raises(OSError, match=f"{folder / 'tokenizer_2'} has no vocabulary"):
        basinlab.load(folder)


@pytest.fixture(scope="module")
def modular(folders):
    """diffusers' modular blocks of XL, which the guiders drive unchanged."""
    parts = StableDiffusionXLPipeline.from_pretrained(folders["sdxl"]).components
    made = StableDiffusionXLAutoBlocks().init_pipeline()
    made.update_components(**{name: part for name, part in parts.items() if part is not None})
    made.set_progress_bar_config(disable=True)
    return made


def latents(modular, guider):
    """What the pipeline ends with, and how many predictions each step made."""
    calls = []
    modular.update_components(guider=guider)
    hook = modular.unet.register_forward_pre_hook(lambda module, inputs: calls.append(float(inputs[1])))
    generators, options = [torch.Generator().manual_seed(s) for s in (0, 1)], {"height": 64, "width": 64}
    found = modular(prompt=PROMPTS, num_inference_steps=10, generator=generators, **options, output="latents")
    hook.remove()
    return found, [calls.count(t) for t in dict.fromkeys(calls)]


def test_static_point_makes_one_prediction_before_it(modular):
    guider = guidance.StaticTransitionPoint(500, 5.0)
    found, calls = latents(modular, guider)
    times = [int(t) for t in modular.scheduler.timesteps]
    assert calls == [1 if t > 500 else 2 for t in times]
    assert guider.transition_point == max(t for t in times if t <= 500)
    # the same again: a guider that was used is as good as new
    torch.testing.assert_close(latents(modular, guider)[0], found)


def test_dynamic_and_opposite_points_are_found_per_sample(modular):
    seen = []
    for guider in (guidance.DynamicTransitionPoint(5.0, latest=0), guidance.OppositeGuidance(None, 5.0, latest=0)):
        found, calls = latents(modular, guider)
        assert calls == [2] * 10 and found.isfinite().all()
        assert guider.transition_point.shape == (2,)
        seen.append(found)
    assert (seen[0] - seen[1]).abs().max() > 1e-3
    # one that switches at once is plain CFG, and so is diffusers' own guider
    theirs, _ = latents(modular, ClassifierFreeGuidance(5.0))
    for guider in (guidance.DynamicTransitionPoint(5.0, latest=999), guidance.ConstantGuidance(5.0)):
        ours, calls = latents(modular, guider)
        torch.testing.assert_close(ours, theirs)
        assert calls == [2] * 10
