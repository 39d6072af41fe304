"""Stable Diffusion 1.x, 2.x and XL with tiny random weights, in the layout of the real folders."""

import json
from pathlib import Path

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from basinlab.models import UNCHECKED
from recipe.models import TOKENIZER

GENERATIONS = ("sd1", "sd2", "sdxl")
DOWN, CROSS, WIDTH = "DownBlock2D", "CrossAttnDownBlock2D", 16
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SMALL = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 2}
FOUR = {"down_block_types": (CROSS, CROSS, CROSS, DOWN), "block_out_channels": (8, 16, 32, 32)}
THREE = {"down_block_types": (DOWN, CROSS, CROSS), "block_out_channels": (8, 16, 32)}
TEXT_TIME = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
TEXT_TIME |= {"projection_class_embeddings_input_dim": WIDTH + 6 * 8, "transformer_layers_per_block": (1, 1, 2)}
UNETS = {
    "sd1": {**FOUR, "cross_attention_dim": WIDTH},
    "sd2": {**FOUR, "cross_attention_dim": WIDTH, "use_linear_projection": True},
    "sdxl": {**THREE, **TEXT_TIME, "cross_attention_dim": 2 * WIDTH, "use_linear_projection": True},
}
SCHEDULERS = {
    "sd1": diffusers.PNDMScheduler(**NOISE, skip_prk_steps=True),
    "sd2": diffusers.DDIMScheduler(**NOISE, clip_sample=False, prediction_type="v_prediction"),
    "sdxl": diffusers.EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
}


def unet(generation: str) -> diffusers.UNet2DConditionModel:
    up = tuple(name.replace("Down", "Up") for name in reversed(UNETS[generation]["down_block_types"]))
    return diffusers.UNet2DConditionModel(up_block_types=up, **SMALL, **UNETS[generation])


def text_encoder(words: CLIPTokenizer, kind: type):
    special = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "projection_dim": WIDTH, "num_hidden_layers": 2}
    return kind(CLIPTextConfig(vocab_size=len(words), num_attention_heads=2, **sizes, **special))


def save(generation: str, folder: Path) -> Path:
    """Write a pipeline of pictures of 64 x 64 pixels, latents of 4 x 8 x 8, and the words of the bundled world."""
    torch.manual_seed(0)
    words = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "scaling_factor": 0.18215, **blocks}
    parts = {"vae": diffusers.AutoencoderKL(**vae), "unet": unet(generation), "scheduler": SCHEDULERS[generation]}
    parts |= {"tokenizer": words, "text_encoder": text_encoder(words, CLIPTextModel)}
    with torch.no_grad():
        parts["unet"].conv_out.weight.mul_(3)  # predictions of about unit size, as a trained one's
    if generation == "sdxl":
        parts |= {"tokenizer_2": words, "text_encoder_2": text_encoder(words, CLIPTextModelWithProjection)}
        diffusers.StableDiffusionXLPipeline(**parts).save_pretrained(folder)
        return folder
    diffusers.StableDiffusionPipeline(**parts, **UNCHECKED).save_pretrained(folder)
    index = folder / "model_index.json"  # as in a folder from the hub, the safety checker is listed and not there
    listed = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    listed["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index.write_text(json.dumps(json.loads(index.read_text()) | listed))
    return folder
