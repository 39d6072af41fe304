import json
import shutil
import warnings

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

import basinlab
from basinlab import models
from recipe import scorecard


@pytest.fixture
def world(tmp_path, tiny_folder):
    """A copy of the tiny checkpoint, to be spoilt."""
    return shutil.copytree(tiny_folder, tmp_path / "world")


def test_bundled_checkpoints_are_found_by_name_and_listed_and_others_by_their_path(world, monkeypatch):
    monkeypatch.setenv("BASINLAB_DATA", str(world.parent))
    assert basinlab.load("world").latent_shape == (4, 12, 12)
    with pytest.raises(ValueError, match=r"no checkpoint 'wrold'.*none of the bundled \['world'\]"):
        basinlab.load("wrold")
    monkeypatch.setenv("BASINLAB_DATA", "elsewhere")
    folder = world.rename(world.with_name("emoji-duplicated"))  # what is not in the data folder is called by its path
    assert basinlab.load(folder).name == basinlab.load(str(folder)).name == str(folder)


def test_loading_shows_no_bars_and_leaves_the_libraries_theirs_when_it_fails_too(tiny_folder, tmp_path, capfd):
    basinlab.load(tiny_folder)
    basinlab.metrics.Alignment()
    assert "Loading" not in capfd.readouterr().err
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/model_index.json"):
        basinlab.load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    with pytest.raises(ValueError, match=r"DDPMPipeline, not one of .*StableDiffusionPipeline"):
        basinlab.load(tmp_path)
    assert diffusers_logging.is_progress_bar_enabled() and transformers_logging.is_progress_bar_enabled()


def test_the_fingerprint_is_of_the_weights_in_use(tiny, tiny_folder):
    again = basinlab.load(tiny_folder)
    assert again.fingerprint() == tiny.fingerprint()
    for part in (again.text_encoder, again.unet, again.vae):
        before = again.fingerprint()
        with torch.no_grad():
            next(part.parameters()).flatten()[0] += 1
        assert again.fingerprint() != before
    assert basinlab.load(tiny_folder, dtype=torch.bfloat16).fingerprint() != tiny.fingerprint()


WEIGHTS = [f"unet/{models.WEIGHTS}", f"vae/{models.WEIGHTS}", "text_encoder/model.safetensors"]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("what", ["cut", "gone", "a pickle", "a tensor gone"])
def test_weights_that_cannot_be_read_name_the_folder(world, weights, what):
    path = world / weights
    if what == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif what == "a tensor gone":
        save_file(dict(sorted(load_file(path).items())[1:]), path, {"format": "pt"})
    else:
        path.rename(path.with_suffix({"gone": ".gone", "a pickle": ".bin"}[what]))
    also = "is not read.*" if what == "a pickle" else ""
    with pytest.raises(OSError, match=f"(?s){world} is missing, truncated or corrupt.*{also}fetch or save it"):
        basinlab.load(world)


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_a_tokenizer_without_vocabulary_is_refused(world, file):
    for gone in ("tokenizer.json", file):
        (world / "tokenizer" / gone).unlink(missing_ok=True)
    with pytest.raises(OSError, match=f"{world / 'tokenizer'} has no vocabulary: tokenizer.json, or"):
        basinlab.load(world)


def changed(folder, file, **changes):
    """The folder with other settings in one configuration file."""
    config = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def with_scheduler(folder, kind, **changes):
    changed(folder, "model_index.json", scheduler=["diffusers", kind])
    return changed(folder, "scheduler/scheduler_config.json", _class_name=kind, **changes)


@pytest.mark.parametrize("kind, changes, message", [
    ("EDMDPMSolverMultistepScheduler", {"sigma_min": 0.002, "beta_schedule": None}, "not of|give epsilon"),
    ("FlowMatchEulerDiscreteScheduler", {}, "give epsilon or v_prediction on a discrete schedule"),
    ("DPMSolverMultistepScheduler", {"prediction_type": "sample"}, "prediction_type 'sample': give epsilon"),
    ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, "give epsilon"),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "give epsilon or v_prediction on a discrete"),
    ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}, "no signal left at T"),
])  # fmt: skip
def test_noise_schedules_that_would_be_misread_are_refused(world, kind, changes, message):
    with_scheduler(world, kind, **changes)
    with pytest.raises(ValueError, match=f"{world} has.*{message}"):
        basinlab.load(world)


def test_zero_terminal_snr_with_v_is_taken_over_and_latents_need_not_be_square_but_plain(world):
    denoiser = basinlab.load(with_scheduler(world, "DDIMScheduler", rescale_betas_zero_snr=True))
    own = DDIMScheduler.from_pretrained(world / "scheduler")
    torch.testing.assert_close(denoiser.scheduler.alphas_cumprod, own.alphas_cumprod, atol=1e-6, rtol=0)
    assert basinlab.sample(denoiser, "an owl", 0, steps=5, progress=False).latents.abs().max() < 100
    denoiser = basinlab.load(changed(world, "unet/config.json", sample_size=[8, 16]))
    assert denoiser.latent_shape == (4, 8, 16)
    assert basinlab.sample(denoiser, "an owl", 0, steps=2, progress=False).images().shape == (1, 3, 64, 128)
    changed(world, "vae/config.json", latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(ValueError, match=r"normalizes latents by \['latents_mean', 'latents_std'\]"):
        basinlab.load(world)


@pytest.mark.parametrize("options, message", [
    ({"device": "gpu"}, "device 'gpu' with dtype torch.float32 cannot be used here"),
    ({"dtype": "float16"}, "dtype 'float16' cannot be used here"),
    ({"dtype": torch.int32}, "dtype torch.int32"),
    ({"resolution": 64.0}, "resolution is 64.0: give a multiple of 32 pixels"),
    ({"resolution": 70}, "resolution is 70: give a multiple of 32 pixels"),
])  # fmt: skip
def test_wrong_options_are_said(tiny_folder, options, message):
    with pytest.raises(ValueError, match=message):
        basinlab.load(tiny_folder, **options)


def test_words_beyond_the_text_encoder_are_named(tiny):
    fits = " ".join(["tomato"] * 30)
    with pytest.warns(UserWarning, match="takes 30 tokens.*'owl frog' is cut"):
        cut = tiny.embed([f"{fits} owl frog"])
    with pytest.warns(UserWarning, match="'owl' is cut"):
        basinlab.sample(tiny, f"{fits} owl", 0, steps=1, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(cut, tiny.embed([fits]))
    with pytest.raises(TypeError, match="prompts is the text 'an owl': give a list"):
        tiny.embed("an owl")


def test_decode_and_the_scorecards_encoder_use_the_scaling_factor(tiny):
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = tiny.vae.encode(pictures * 2 - 1).latent_dist.mean * 0.8
        decoded = (tiny.vae.decode(latents / 0.8).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(scorecard.encoded(tiny, pictures), latents, atol=1e-4, rtol=0)
    torch.testing.assert_close(tiny.decode(latents), decoded, atol=1e-4, rtol=0)


def test_a_fine_tuned_unet_replaces_the_weights_that_it_has_or_is_refused(tiny, tiny_folder, tmp_path):
    name = "conv_out.bias"
    save_file({name: torch.full((4,), 7.0)}, tmp_path / models.WEIGHTS)
    tuned = basinlab.load(tiny_folder, unet=tmp_path)
    assert tuned.unet.state_dict()[name].eq(7).all()
    others = {k: v for k, v in tuned.unet.state_dict().items() if k != name}
    assert all(torch.equal(v, tiny.unet.state_dict()[k]) for k, v in others.items())
    assert tuned.fingerprint() != tiny.fingerprint()

    def refused(kind, message):
        with pytest.raises(kind, match=message):
            basinlab.load(tiny_folder, unet=tmp_path)

    save_file({"conv_extra": torch.zeros(1)}, path := tmp_path / models.WEIGHTS)
    refused(ValueError, f"{tmp_path} holds weights that the U-Net of {tiny_folder} has not.*conv_extra")
    path.write_bytes(path.read_bytes()[:50])
    refused(OSError, f"file in {tmp_path} is missing, truncated or corrupt")
    path.rename(tmp_path / "pytorch_lora_weights.safetensors")
    refused(ValueError, f"{tmp_path} holds a LoRA: fuse it")


def test_every_public_name_has_an_example_in_its_docstring_and_an_unknown_one_is_named():
    public = [getattr(basinlab, name) for name in basinlab.__all__]
    assert [x.__name__ for x in public if callable(x) and ">>>" not in x.__doc__] == []  # the doctests run them
    with pytest.raises(AttributeError, match="'basinlab' has no attribute 'smaple'"):
        basinlab.smaple()
