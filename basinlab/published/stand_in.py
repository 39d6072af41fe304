"""Stable Diffusion without its weights: random ones in the real layouts, to rehearse and to count.

``save`` writes a pipeline folder of a generation ("sd1", "sd2" with v-prediction, "sdxl"), tiny or in
its real size, with the same files and classes as the real one, which `models.load` reads. ``count``
says what a prediction of the real U-Net takes, on torch's "meta" device, where it needs no memory.
What a stand-in paints is noise: it shows that code runs, and nothing about memorization.
"""

import json
import math
import time
import weakref
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..models import UNCHECKED, Denoiser, data_folder

GENERATIONS = ("sd1", "sd2", "sdxl")
TOKENS = 77

_DOWN, _CROSS = "DownBlock2D", "CrossAttnDownBlock2D"
_UNETS = {
    "sd1": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (_CROSS, _CROSS, _CROSS, _DOWN),
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "sd2": {
        "sample_size": 96,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (_CROSS, _CROSS, _CROSS, _DOWN),
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": (_DOWN, _CROSS, _CROSS),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 1280 + 6 * 256,
    },
}
_TINY = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 2}
_WIDTHS = {"sd1": (768,), "sd2": (1024,), "sdxl": (768, 1280)}  # of the text encoders
_TINY_TEXT = 16  # width of each of them
_TINY_XL = {
    "transformer_layers_per_block": (1, 1, 2),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": _TINY_TEXT + 6 * 8,
}
_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def _known(generation: str) -> str:
    if generation not in GENERATIONS:
        raise ValueError(f"no stand-in for {generation!r}: give one of {GENERATIONS}")
    return generation


def unet(generation: str, *, tiny: bool = False) -> UNet2DConditionModel:
    """The U-Net of ``generation`` with random weights, in its real size (0.9 to 2.6 billion parameters) or tiny."""
    settings = dict(_UNETS[_known(generation)])
    if tiny:
        settings |= _TINY | {"block_out_channels": tuple(8 * (c // 320) for c in settings["block_out_channels"])}
        settings["cross_attention_dim"] = _TINY_TEXT * (2 if generation == "sdxl" else 1)
        settings |= _TINY_XL if generation == "sdxl" else {}
    up = tuple(name.replace("Down", "Up") for name in reversed(settings["down_block_types"]))
    return UNet2DConditionModel(up_block_types=up, **settings)


def vae(*, tiny: bool = False) -> AutoencoderKL:
    """The autoencoder of Stable Diffusion, 8 pixels to a latent, with random weights."""
    return AutoencoderKL(
        block_out_channels=(8,) * 4 if tiny else (128, 256, 512, 512),
        layers_per_block=1 if tiny else 2,
        norm_num_groups=4 if tiny else 32,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.18215,
    )


def _scheduler(generation: str):
    if generation == "sd1":
        return PNDMScheduler(**_NOISE, skip_prk_steps=True)
    if generation == "sd2":
        return DDIMScheduler(**_NOISE, clip_sample=False, prediction_type="v_prediction")
    return EulerDiscreteScheduler(**_NOISE, timestep_spacing="leading")


def _text(words: CLIPTokenizer, kind: type, width: int):
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return kind(config)


def save(generation: str, folder: str | Path, seed: int = 0, *, tiny: bool = True) -> Path:
    """Write a pipeline of ``generation`` with random weights into ``folder``, and give it back.

    A tiny one makes pictures of 64 x 64 pixels from latents of 4 x 8 x 8. Its words are those of the
    bundled world, and its text encoders have two layers. Like a folder fetched from the hub it lacks
    the safety checker that model_index.json lists.

    Raises ValueError for an unknown generation.
    """
    words = CLIPTokenizer.from_pretrained(data_folder() / "emoji-duplicated/tokenizer", model_max_length=TOKENS)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = {"vae": vae(tiny=tiny), "unet": unet(generation, tiny=tiny), "tokenizer": words}
        with torch.no_grad():
            parts["unet"].conv_out.weight.mul_(3)  # predictions of about unit size, as a trained one's
        widths = [_TINY_TEXT if tiny else width for width in _WIDTHS[generation]]
        parts |= {"text_encoder": _text(words, CLIPTextModel, widths[0]), "scheduler": _scheduler(generation)}
        if generation == "sdxl":
            second = _text(words, CLIPTextModelWithProjection, widths[1])
            pipeline = StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=words)
        else:
            pipeline = StableDiffusionPipeline(**parts, **UNCHECKED)
    pipeline.save_pretrained(folder)
    if generation != "sdxl":
        index = Path(folder, "model_index.json")
        listed = json.loads(index.read_text())
        listed["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        listed["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
        index.write_text(json.dumps(listed, indent=2) + "\n")
    return Path(folder)


class Count(NamedTuple):
    """What one prediction takes: floating-point operations, the U-Net's parameters, and the bytes that live at once."""

    flops: int
    parameters: int
    activations: int


class _Live(TorchDispatchMode):
    """The most bytes of results that are alive at once."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.seen = weakref.WeakSet()

    def _gone(self, size: int) -> None:
        self.bytes -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.seen:
                self.seen.add(storage)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result


def count(model: str | Denoiser, resolution: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Count:
    """Count one prediction of a U-Net: of a denoiser's, or of the real one of a generation at ``resolution`` pixels.

    Activations are those of one sample in ``dtype``, with attention written out: fused kernels need less.
    """
    with torch.device("meta"):
        if isinstance(model, str):
            network, tokens = unet(model), TOKENS
            side = resolution // 8 if resolution else network.config.sample_size
        else:
            network, side = UNet2DConditionModel.from_config(model.unet.config), model.latent_shape[-1]
            tokens = model.tokenizer.model_max_length
        inputs = {"encoder_hidden_states": torch.empty(1, tokens, network.config.cross_attention_dim)}
        if pooled := network.config.projection_class_embeddings_input_dim:
            pooled -= 6 * network.config.addition_time_embed_dim
            inputs["added_cond_kwargs"] = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        latents = torch.empty(1, 4, side, side)
        with FlopCounterMode(display=False) as counter, _Live() as live, torch.no_grad():
            network(latents, torch.tensor(0), **inputs)
    parameters = sum(p.numel() for p in network.parameters())
    return Count(counter.get_total_flops(), parameters, live.peak * dtype.itemsize // 4)


def machine_rate(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, side: int = 2048) -> float:
    """Floating-point operations a second of a product of square matrices, the best of five: what can be had here."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best
