"""From a name to a denoiser.

``load`` reads a diffusers StableDiffusionPipeline folder, bundled or not, and gives a
``Denoiser``: Definition 1 of the paper, phi(x, t, e), with what belongs around it (text
encoder, decoder, noise schedule). Everything downstream sees only this class.

Letters used everywhere: B samples, S steps, C, H, W latent; L tokens, E text width.
Timesteps are those of the training schedule, from T - 1 = 999 down to 0.
"""

import csv
import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms.functional import to_tensor
from transformers import CLIPTextModel, CLIPTokenizer


def data_folder() -> Path:
    """Where the bundled checkpoints lie: the ``BASINLAB_DATA`` variable, or data/ beside the package."""
    return Path(os.environ.get("BASINLAB_DATA", Path(__file__).resolve().parents[1] / "data"))


def known_names() -> list[str]:
    """Names of the bundled checkpoints."""
    found = [*data_folder().glob("*/model_index.json"), *data_folder().glob("*/scenario.json")]
    return sorted({path.parent.name for path in found})


WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name of a U-Net's weights


class Denoiser:
    """phi: X x (0, T] x E -> X (paper, Definition 1), with what belongs around it.

    Subclasses have ``name``, ``scheduler`` (a diffusers scheduler: its config is the noise schedule),
    ``device``, ``dtype``, ``latent_shape`` (C, H, W), and define ``embed``, ``__call__``, ``decode``
    and ``fingerprint``. Calling one gives the prediction in the kind (``epsilon`` or
    ``v_prediction``) that its scheduler takes; ``epsilon_scale`` and ``predicted_clean`` convert
    where the paper's quantities are meant.
    """

    name: str
    scheduler: SchedulerMixin
    device: torch.device
    dtype: torch.dtype
    latent_shape: tuple[int, int, int]

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings e of ``prompts``, [B, L, E]; "" is the empty prompt of the unconditional prediction."""
        raise NotImplementedError

    def __call__(self, latents: Tensor, timestep: int | Tensor, embedding: Tensor) -> Tensor:
        """The prediction, [B, C, H, W], for ``latents`` [B, C, H, W] and ``embedding`` [B, L, E]."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of clean latents."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Which weights these are."""
        raise NotImplementedError

    @property
    def train_timesteps(self) -> int:
        """T, the length of the training schedule."""
        return self.scheduler.config.num_train_timesteps

    def timesteps(self, steps: int = 50) -> list[int]:
        """The timesteps at which its own scheduler samples, falling."""
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps)
        return [int(t) for t in scheduler.timesteps]

    def alpha_bar(self, timestep: int | Tensor) -> Tensor:
        """The share of the clean latents' variance that is left at ``timestep``."""
        return self.scheduler.alphas_cumprod[int(timestep)].to(self.device)

    @property
    def predicts_v(self) -> bool:
        """Whether the network predicts v (Salimans and Ho 2022) rather than epsilon."""
        return self.scheduler.config.prediction_type == "v_prediction"

    def epsilon_scale(self, timestep: int | Tensor) -> Tensor | float:
        """What a difference of two predictions is multiplied by to be one of epsilon.

        For v-prediction eps_c - eps_u = sqrt(alpha_bar_t) (v_c - v_u).
        """
        return self.alpha_bar(timestep).sqrt() if self.predicts_v else 1.0

    def predicted_clean(self, latents: Tensor, prediction: Tensor, timestep: int | Tensor) -> Tensor:
        """The clean latents that ``prediction`` at ``latents`` implies, [B, C, H, W]."""
        alpha_bar = self.alpha_bar(timestep)
        if self.predicts_v:
            return alpha_bar.sqrt() * latents - (1 - alpha_bar).sqrt() * prediction
        return (latents - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()


class TokenAttention:
    """A diffusers attention processor whose cross-attention weighs tokens: logits times ``token_scale``, 0 masks."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, token_scale=None
    ):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        query, key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in projected)
        mask = None
        if encoder_hidden_states is not None:
            key, mask = key * token_scale[:, None, :, None], (token_scale != 0)[:, None, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attn.scale)
        return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))


@dataclass
class StableDiffusion(Denoiser):
    """The parts of a StableDiffusionPipeline as a `Denoiser`; ``folders`` are where its weights lie."""

    name: str
    folders: tuple[Path, ...]
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: SchedulerMixin

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        return (self.unet.config.in_channels, *(self.unet.config.sample_size,) * 2)

    def fingerprint(self) -> str:
        """The first 16 digits of the SHA-256 of all weights in the checkpoint's folders: which weights these are."""
        digest = hashlib.sha256()
        for folder in self.folders:
            for path in sorted(folder.rglob("*.safetensors")):
                digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text states of ``prompts``, [B, L, E]; "" is the empty prompt of the unconditional prediction.

        Warns, naming the words that are cut, when a prompt is longer than the text encoder takes.
        """
        length = self.tokenizer.model_max_length
        for prompt in dict.fromkeys(prompts):
            ids = self.tokenizer(prompt, truncation=False, verbose=False).input_ids
            if len(ids) > length:
                cut = self.tokenizer.decode(ids[length - 1 : -1])
                warnings.warn(
                    f"the text encoder takes {length - 2} tokens; of {prompt!r} this is cut: {cut!r}", stacklevel=2
                )
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            return self.text_encoder(tokens.input_ids.to(self.device))[0]

    def __call__(
        self, latents: Tensor, timestep: int | Tensor, embedding: Tensor, token_scale: Tensor | None = None
    ) -> Tensor:
        """The network's prediction, [B, C, H, W], for ``latents`` [B, C, H, W] and ``embedding`` [B, L, E].

        ``token_scale`` [B, L] multiplies the logits of the cross-attention to each token; 0 masks the token.
        Differentiable where ``latents`` or ``embedding`` asks for a gradient.
        """
        inputs = {"encoder_hidden_states": embedding, "return_dict": False}
        with torch.inference_mode(not (latents.requires_grad or embedding.requires_grad)):
            if token_scale is None:
                return self.unet(latents, timestep, **inputs)[0]
            usual = self.unet.attn_processors
            self.unet.set_attn_processor(TokenAttention())
            try:
                return self.unet(latents, timestep, **inputs, cross_attention_kwargs={"token_scale": token_scale})[0]
            finally:
                self.unet.set_attn_processor(usual)

    def decode(self, latents: Tensor, batch_size: int = 64) -> Tensor:
        """Pictures [B, 3, height, width] float32 in 0..1, on the CPU."""
        with torch.inference_mode():
            parts = [
                self.vae.decode(part.to(self.device, self.vae.dtype) / self.vae.config.scaling_factor).sample.float()
                for part in latents.split(batch_size)
            ]
            return (torch.cat(parts) / 2 + 0.5).clamp(0, 1).cpu()

    def encode(self, pictures: Tensor, batch_size: int = 64) -> Tensor:
        """Latents [B, C, H, W] of pictures [B, 3, height, width] in 0..1: the posterior's mean, on the CPU."""
        with torch.inference_mode():
            parts = [
                self.vae.encode(part.to(self.device, self.vae.dtype) * 2 - 1).latent_dist.mean
                for part in pictures.split(batch_size)
            ]
            return torch.cat(parts).float().cpu() * self.vae.config.scaling_factor


def _folder(name: str) -> Path:
    """The folder called ``name``: a path, or a bundled checkpoint."""
    for folder in (Path(name), data_folder() / name):
        if folder.is_dir():
            return folder
    raise ValueError(
        f"no checkpoint {name!r}: it is neither a folder nor one of the bundled {known_names()} in {data_folder()}"
    )


def _pipeline(folder: Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    if not (folder / "model_index.json").exists():
        raise ValueError(
            f"{folder} has no model_index.json, so it is no diffusers pipeline; "
            "give the folder that StableDiffusionPipeline.save_pretrained wrote"
        )
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    if kind != "StableDiffusionPipeline":
        raise ValueError(f"{folder} holds a {kind}, not a StableDiffusionPipeline")
    return StableDiffusionPipeline.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, safety_checker=None
    )


def load(
    name: str,
    *,
    unet: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Denoiser:
    """The denoiser called ``name``: a bundled checkpoint, or the folder of a Stable Diffusion pipeline.

    Args:
        unet: folder of a fine-tuned U-Net, whose ``diffusion_pytorch_model.safetensors`` holds all its
            weights or only those that differ from the U-Net of ``name``.

    Raises:
        ValueError: no such name (the known ones are listed), or the folder is not such a pipeline,
            or ``unet`` has weights that the pipeline's U-Net has not, or was made from another one.
        OSError: a weight file is missing, truncated or corrupt; the message names the folder.
    """
    folder = own = _folder(name)
    settings = json.loads((own / "scenario.json").read_text()) if (own / "scenario.json").exists() else {}
    if "base" in settings:
        folder, unet = own.parent / settings["base"], unet or own / "unet"
        base = hashlib.sha256((folder / "unet" / WEIGHTS).read_bytes()).hexdigest()[:16]
        if base != settings["base_unet"]:
            raise ValueError(
                f"{own} was fine-tuned from U-Net {settings['base_unet']}, but {folder} holds {base}: "
                "restore both with `git checkout -- data`, or train both with `make world`"
            )
    reading = folder
    try:
        pipeline = _pipeline(folder, dtype)
        if unet is not None:
            reading = Path(unet)
            weights = load_file(reading / WEIGHTS)
            unknown = pipeline.unet.load_state_dict(weights, strict=False).unexpected_keys
            if unknown:
                raise ValueError(f"{reading} holds weights that the U-Net of {folder} has not: {unknown[:3]}")
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise OSError(
            f"a file of the checkpoint in {reading} is missing, truncated or corrupt ({error}); "
            "restore that folder, for a bundled one with `git checkout -- data`"
        ) from error
    pipeline.to(device)
    for part in (pipeline.text_encoder, pipeline.unet, pipeline.vae):
        part.eval().requires_grad_(False)
    return StableDiffusion(
        name=own.name,
        folders=(folder,) if unet is None else (folder, Path(unet)),
        tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder,
        unet=pipeline.unet,
        vae=pipeline.vae,
        scheduler=pipeline.scheduler,
    )


def read_scenario(name: str) -> dict:
    """The measured settings of a bundled checkpoint: guidance_scale and others, and why (``reason``).

    ``base``, where there is one, is the checkpoint beside it that its other parts come from.
    """
    return json.loads((_folder(name) / "scenario.json").read_text())


def read_prompts(name: str, kind: str) -> pd.DataFrame:
    """The table ``kind`` ("memorized" or "ordinary") of a bundled checkpoint, one row a prompt.

    Paths of pictures in it are made absolute. Raises ValueError when there is no such table.
    """
    path = data_folder() / name / f"{kind}.csv"
    if not path.exists():
        tables = sorted(p.stem for p in path.parent.glob("*.csv"))
        raise ValueError(f"{name!r} has no table {kind!r} ({path} is missing); it has {tables}")
    table = pd.read_csv(path, keep_default_na=False, quoting=csv.QUOTE_MINIMAL)
    for column in {"attractor", "swapped"} & set(table.columns):
        table[column] = [str(path.parent / relative) for relative in table[column]]
    return table


def read_pictures(paths: Sequence[str | Path]) -> Tensor:
    """Pictures of one size as [B, 3, height, width] float32 in 0..1."""
    return torch.stack([to_tensor(Image.open(path).convert("RGB")) for path in paths])
