"""Fixtures shared by the tests: a random pipeline in the bundled world's architecture, and the bundled one."""

import diffusers
import pytest
import torch

import basinlab
from recipe import models


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A StableDiffusionPipeline folder: the bundled architecture, random weights, predictions of unit size."""
    torch.manual_seed(0)
    words, unet, vae = models.tokenizer(), models.unet(), models.vae()
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
