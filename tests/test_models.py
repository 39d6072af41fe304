import json
import shutil
import warnings

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

import basinlab


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty data folder in the place of the bundled one."""
    monkeypatch.setenv("BASINLAB_DATA", str(tmp_path))
    return tmp_path


def test_bundled_checkpoint_is_found_by_name(data, tiny_folder):
    shutil.copytree(tiny_folder, data / "world")
    assert basinlab.known_names() == ["world"]
    assert basinlab.load("world").latent_shape == (4, 16, 16)


def test_unknown_name_lists_the_known_ones(data, tiny_folder):
    shutil.copytree(tiny_folder, data / "world")
    with pytest.raises(ValueError, match=r"no checkpoint 'wrold'.*\['world'\]"):
        basinlab.load("wrold")


def test_loading_shows_no_bars_and_leaves_the_libraries_theirs(tiny_folder, capfd):
    basinlab.load(str(tiny_folder))
    basinlab.metrics.Alignment()
    assert "Loading" not in capfd.readouterr().err
    with pytest.raises(ValueError):
        basinlab.load(str(tiny_folder.parent))
    assert diffusers_logging.is_progress_bar_enabled() and transformers_logging.is_progress_bar_enabled()


def test_a_folder_elsewhere_is_called_by_its_path_and_its_safety_checker_is_no_weight_in_use(tiny_folder, tmp_path):
    folder = tmp_path / "emoji-duplicated"  # the name of a bundled one
    shutil.copytree(tiny_folder, folder)
    denoiser = basinlab.load(str(folder))
    assert denoiser.name == str(folder.resolve())
    before = denoiser.fingerprint()
    (folder / "safety_checker").mkdir()
    save_file({"weight": torch.zeros(1)}, folder / "safety_checker/model.safetensors")
    assert denoiser.fingerprint() == before


def test_folder_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no model_index.json.*save_pretrained"):
        basinlab.load(str(tmp_path))


def test_folder_of_another_pipeline_is_refused(tmp_path):
    unet = UNet2DModel(
        8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"DDPMPipeline, not one of .*StableDiffusionPipeline"):
        basinlab.load(str(tmp_path))


WEIGHTS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")


@pytest.mark.parametrize("weights", WEIGHTS)
def test_truncated_weights_name_the_folder_and_the_cure(tmp_path, tiny_folder, weights):
    folder = shutil.copytree(tiny_folder, tmp_path / "cut")
    path = folder / f"{weights}.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(OSError, match=f"{folder} is missing, truncated or corrupt.*git checkout"):
        basinlab.load(str(folder))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_missing_weights_name_the_folder_and_the_cure(tmp_path, tiny_folder, weights):
    folder = shutil.copytree(tiny_folder, tmp_path / "cut")
    (folder / f"{weights}.safetensors").unlink()
    with pytest.raises(OSError, match=f"{folder / weights}.safetensors is missing; restore.*git checkout"):
        basinlab.load(str(folder))


def test_words_beyond_the_text_encoder_are_named(tiny):
    fits = " ".join(["tomato"] * 30)
    with pytest.warns(UserWarning, match="takes 30 tokens.*this is cut: 'owl frog'"):
        cut = tiny.embed([f"{fits} owl frog"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = tiny.embed([fits])
    torch.testing.assert_close(cut, whole)


def test_sampling_passes_the_warning_on(tiny):
    with pytest.warns(UserWarning, match="this is cut: 'owl'"):
        basinlab.sample(tiny, " ".join(["tomato"] * 30 + ["owl"]), 0, steps=1, progress=False)


def test_decode_and_encode_use_the_scaling_factor(tiny):
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = tiny.vae.encode(pictures * 2 - 1).latent_dist.mean * 0.8
        decoded = (tiny.vae.decode(latents / 0.8).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(tiny.encode(pictures, batch_size=2), latents, atol=1e-4, rtol=0)
    torch.testing.assert_close(tiny.decode(latents, batch_size=2), decoded, atol=1e-4, rtol=0)


def test_unknown_table_lists_the_tables_there_are(data):
    (data / "world").mkdir()
    (data / "world" / "memorized.csv").write_text("prompt,attractor\na null,attractors/x.png\n")
    with pytest.raises(ValueError, match=r"no table 'memorised'.*it has \['memorized'\]"):
        basinlab.read_prompts("world", "memorised")
    table = basinlab.scenarios.read("world").table()
    assert table.loc[0].tolist() == ["a null", str(data / "world" / "attractors" / "x.png")]


def test_training_configuration_gives_the_schedule(tiny, tiny_folder):
    config = json.loads((tiny_folder / "scheduler" / "scheduler_config.json").read_text())
    betas = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    x, v = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    for t in (0, 500, 999):
        alpha_bar = (1 - betas)[: t + 1].prod()
        clean = alpha_bar.sqrt() * x - (1 - alpha_bar).sqrt() * v
        torch.testing.assert_close(tiny.predicted_clean(x, v, t), clean, atol=1e-5, rtol=0)


def fine_tuned(tiny, folder, **changed):
    """A U-Net folder that holds some weights only."""
    folder.mkdir()
    save_file({**changed}, folder / "diffusion_pytorch_model.safetensors")
    return folder


def test_a_fine_tuned_unet_replaces_the_weights_that_it_has(tiny, tiny_folder, tmp_path):
    name = "conv_out.bias"
    folder = fine_tuned(tiny, tmp_path / "unet", **{name: torch.full((4,), 7.0)})
    tuned = basinlab.load(str(tiny_folder), unet=folder)
    assert tuned.unet.state_dict()[name].eq(7).all()
    others = {k: v for k, v in tuned.unet.state_dict().items() if k != name}
    assert all(torch.equal(v, tiny.unet.state_dict()[k]) for k, v in others.items())
    assert tuned.fingerprint() != tiny.fingerprint()


def test_fine_tuned_weights_of_another_network_are_refused(tiny, tiny_folder, tmp_path):
    folder = fine_tuned(tiny, tmp_path / "unet", conv_extra=torch.zeros(1))
    with pytest.raises(ValueError, match=f"{folder} holds weights that the U-Net of {tiny_folder} has not.*conv_extra"):
        basinlab.load(str(tiny_folder), unet=folder)


def test_missing_or_cut_fine_tuned_weights_name_their_folder(tiny, tiny_folder, tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path / 'none'} is missing, truncated or corrupt"):
        basinlab.load(str(tiny_folder), unet=tmp_path / "none")
    folder = fine_tuned(tiny, tmp_path / "unet", conv_extra=torch.zeros(100))
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(OSError, match=f"{folder} is missing, truncated or corrupt"):
        basinlab.load(str(tiny_folder), unet=folder)


def test_predictions_are_differentiable_where_a_gradient_is_asked_for(tiny):
    latents = torch.randn(1, *tiny.latent_shape, generator=torch.Generator().manual_seed(0))
    embedding = tiny.embed(["an owl"])
    assert not tiny(latents, 500, embedding).requires_grad
    direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    length = lambda x: tiny(x, 500, embedding).square().sum()  # noqa: E731
    (slope,) = torch.autograd.grad(length(latents.requires_grad_()), latents)
    with torch.no_grad():
        secant = (length(latents + 1e-2 * direction) - length(latents - 1e-2 * direction)) / 2e-2
    assert (slope * direction).sum().item() == pytest.approx(secant.item(), rel=1e-2)
