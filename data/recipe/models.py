"""Architectures of the bundled world, all of them ordinary diffusers and transformers classes."""

from pathlib import Path

from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
)

from . import scenes

TOKENS = 32  # per caption, begin and end included
WIDTH = 128  # of text states and embeddings
TOKENIZER = Path(__file__).parent / "tokenizer"


def tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer that knows each word of the world as one token and spells out all others.

    Its byte-pair merges were trained once, on the list of all words in `scenes`. Training again
    would number some tokens differently (ties are broken at random), so the files are kept here.
    """
    return CLIPTokenizer.from_pretrained(TOKENIZER)


def text_config(words: CLIPTokenizer) -> CLIPTextConfig:
    """A two-layer CLIP text encoder over that vocabulary."""
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    """The text encoder of the pipeline, trained together with the U-Net."""
    return CLIPTextModel(text_config(words))


def vae() -> AutoencoderKL:
    """96x96 pixels to 12x12x8 latents: one latent covers one place of the scenes' grid."""
    return AutoencoderKL(
        latent_channels=8,
        block_out_channels=(16, 32, 64, 160),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=scenes.SIDE,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        mid_block_add_attention=False,
    )


def unet() -> UNet2DConditionModel:
    """5.6 M parameters; attention to the text at 6x6 and 3x3."""
    return UNet2DConditionModel(
        sample_size=12,
        in_channels=8,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(64, 96, 128),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )


def scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ on a schedule for latents of 12x12x8.

    With C*H*W = 1152 latent numbers two images part at a signal-to-noise ratio near
    2 log-odds / ||x - x_a||^2, about 0.005 to 0.02. Stable Diffusion's beta_end of 0.012
    puts that at t = 990 to 870, where a sampler has taken only a few steps; beta_end 0.02
    puts it near t = 800 to 650 and leaves sqrt(alpha_bar_T) = 0.015 of the image at T, too
    little for the noise's mean to tint the picture. With so little left at T an error in
    epsilon would be multiplied by 1 / sqrt(alpha_bar), hence v-prediction.
    """
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        algorithm_type="dpmsolver++",
        solver_order=2,
        steps_offset=1,  # unused by this spacing; diffusers warns at any other value
    )


def clip(words: CLIPTokenizer) -> CLIPModel:
    """A small CLIP on 96x96 pictures in patches of 8."""
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "projection_dim": WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": scenes.SIDE,
        "patch_size": 8,
    }
    text = text_config(words).to_dict()
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def descriptor() -> ResNetForImageClassification:
    """The copy-detection descriptor: a small ResNet whose 64 outputs are the embedding."""
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=32, hidden_sizes=[48, 96, 128], depths=[1, 1, 1], layer_type="basic", num_labels=64)
    )
