"""Fixtures shared by the tests: a random pipeline in the bundled world's architecture, and the bundled one."""

import diffusers
import pytest
import torch

import basinlab
from recipe import models


def bound(expected, share=1e-4):
    """How far latents that should be equal may lie apart: ``share`` of the largest number in ``expected``.

    float32 keeps 7 digits (1.2e-7). Which kernels sum a layer, and in which order, depends on the batch's size and on
    the CPU, so that one pass through the network is known to about 1e-6 of its largest number. Classifier-free
    guidance multiplies that by up to 2 x 7.5, and it adds up over the steps: 2e-5 was seen on a CPU without bfloat16
    units, under every solver. A wrong prompt or seed at a single step moves latents by more than a hundred times the
    bound (`test_a_wrong_neighbour_is_far_outside_the_bound`).
    """
    return share * float(expected.abs().max())


def close(found, expected, share=1e-4):
    """Assert that ``found`` is ``expected`` as far as float32 goes, see `bound`."""
    torch.testing.assert_close(found, expected, atol=bound(expected, share), rtol=0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A StableDiffusionPipeline folder: a small U-Net, random weights, predictions of unit size."""
    torch.manual_seed(0)
    words, vae = models.tokenizer(), models.vae()
    small = {"block_out_channels": (16, 32, 32), "norm_num_groups": 8}
    unet = diffusers.UNet2DConditionModel.from_config({**models.unet().config, **small})
    with torch.no_grad():
        unet.conv_out.weight.mul_(3)
    vae.register_to_config(scaling_factor=0.8)
    folder = tmp_path_factory.mktemp("tiny")
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=models.text_encoder(words),
        tokenizer=words,
        unet=unet,
        scheduler=models.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    return basinlab.load(str(tiny_folder))


@pytest.fixture(scope="session")
def bundled():
    return basinlab.load("emoji-duplicated")
