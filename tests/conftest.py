"""Fixtures shared by the tests: a random pipeline in the bundled world's architecture, and the bundled one."""

import os
import shutil
import subprocess

import diffusers
import pytest
import torch

import basinlab
from recipe import models

os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # UMAP of a few points takes less time than its compiling
torch.set_num_threads(1)  # as in `make test`: more sum in another order, and the last digits differ


def bound(expected, share=1e-4):
    """How far latents that should be equal may lie apart: ``share`` of the largest number in ``expected``.

    float32 keeps 7 digits. Which kernels sum a layer, and how, depends on the batch's size and on the CPU, so
    that one pass through the network is known to about 1e-6 of its largest number. Classifier-free guidance multiplies
    that by up to 2 x 7.5, and it adds up over the steps: 2e-5 was seen on a CPU without bfloat16 units. A wrong prompt
    or seed at a single step moves latents a hundred times further (`test_a_wrong_neighbour_is_far_outside_the_bound`).
    """
    return share * float(expected.abs().max())


def close(found, expected, share=1e-4):
    """Assert that ``found`` is ``expected`` as far as float32 goes, see `bound`."""
    torch.testing.assert_close(found, expected, atol=bound(expected, share), rtol=0)


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


def shown(address: str, profile) -> str:
    """The page at ``address`` after its scripts have run, as Chromium has it."""
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    flags += f" --disable-component-update --window-size=1400,1000 --virtual-time-budget=8000 --user-data-dir={profile}"
    done = subprocess.run([BROWSER, *flags.split(), "--dump-dom", address], capture_output=True, text=True, timeout=120)
    return done.stdout


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A StableDiffusionPipeline folder: a small U-Net, random weights, predictions of unit size."""
    torch.manual_seed(0)
    words = models.tokenizer()
    coder = {"latent_channels": 4, "block_out_channels": (16, 24, 48, 64), "scaling_factor": 0.8}
    coder |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = diffusers.AutoencoderKL(**coder, norm_num_groups=8, sample_size=96, mid_block_add_attention=False)
    small = {"block_out_channels": (16, 32, 32), "sample_size": 12, "in_channels": 4, "out_channels": 4}
    unet = diffusers.UNet2DConditionModel.from_config({**models.unet().config, **small})
    with torch.no_grad():
        unet.conv_out.weight.mul_(3)
    folder = tmp_path_factory.mktemp("tiny")
    parts = {"vae": vae, "text_encoder": models.text_encoder(words), "tokenizer": words, "unet": unet}
    pipeline = diffusers.StableDiffusionPipeline(**parts, scheduler=models.scheduler(), **basinlab.models.UNCHECKED)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    return basinlab.load(str(tiny_folder))


@pytest.fixture
def rows(tiny):
    """A list that fills with the rows of every network call of ``tiny``."""
    seen = []
    hook = tiny.unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    yield seen
    hook.remove()


@pytest.fixture(scope="session")
def bundled():
    return basinlab.load("emoji-duplicated")
