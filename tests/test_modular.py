"""The guiders drive diffusers' modular pipelines unchanged: SDXL's blocks on a tiny random model."""

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from basinlab import (
    ConstantGuidance,
    DynamicTransitionPoint,
    GuidanceInterval,
    OppositeGuidance,
    ScheduledGuidance,
    StaticTransitionPoint,
)
from recipe import models

STEPS = 10
PROMPTS = ["a picture of a tomato", "a drawing of an owl"]


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    words = models.tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=37,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=models.TOKENS,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 8 + 32,
        cross_attention_dim=64,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        norm_num_groups=8,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    made = StableDiffusionXLAutoBlocks().init_pipeline()
    made.update_components(
        text_encoder=CLIPTextModel(text).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text).eval(),
        tokenizer=words,
        tokenizer_2=words,
        unet=unet.eval(),
        vae=vae.eval(),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )
    made.set_progress_bar_config(disable=True)
    return made


def latents(pipeline, guider):
    """What the pipeline ends with, and how many predictions each step made."""
    calls = []
    pipeline.update_components(guider=guider)
    hook = pipeline.unet.register_forward_pre_hook(lambda module, inputs: calls.append(float(inputs[1])))
    try:
        found = pipeline(
            prompt=PROMPTS,
            num_inference_steps=STEPS,
            generator=[torch.Generator().manual_seed(s) for s in (0, 1)],
            height=16,
            width=16,
            output="latents",
        )
    finally:
        hook.remove()
    return found, [calls.count(t) for t in dict.fromkeys(calls)]


def test_constant_guidance_is_diffusers_own(pipeline):
    ours, calls = latents(pipeline, ConstantGuidance(5.0))
    theirs, _ = latents(pipeline, ClassifierFreeGuidance(5.0))
    torch.testing.assert_close(ours, theirs)
    assert calls == [2] * STEPS


def test_static_point_makes_one_prediction_before_it(pipeline):
    guider = StaticTransitionPoint(500, 5.0)
    found, calls = latents(pipeline, guider)
    times = [int(t) for t in pipeline.scheduler.timesteps]
    assert calls == [1 if t > 500 else 2 for t in times]
    assert guider.transition_point == max(t for t in times if t <= 500)
    # the same again: a guider that was used is as good as new
    torch.testing.assert_close(latents(pipeline, guider)[0], found)


def test_dynamic_and_opposite_points_are_found_per_sample(pipeline):
    seen = []
    for guider in (DynamicTransitionPoint(5.0, latest=0), OppositeGuidance(None, 5.0, latest=0)):
        found, calls = latents(pipeline, guider)
        assert calls == [2] * STEPS and found.isfinite().all()
        assert guider.transition_point.shape == (2,)
        seen.append(found)
    assert (seen[0] - seen[1]).abs().max() > 1e-3
    # one that switches at once is plain CFG, whatever came before in this object
    guider = DynamicTransitionPoint(5.0, latest=999)
    torch.testing.assert_close(latents(pipeline, guider)[0], latents(pipeline, ClassifierFreeGuidance(5.0))[0])


@pytest.mark.parametrize("guider", [GuidanceInterval(800, 300, 5.0), ScheduledGuidance("v", 5.0)])
def test_guiders_can_be_used_twice(pipeline, guider):
    first, _ = latents(pipeline, guider)
    torch.testing.assert_close(latents(pipeline, guider)[0], first)
