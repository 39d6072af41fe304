"""From a name to a denoiser.

``load`` reads a Stable Diffusion pipeline (1.x, 2.x or XL), bundled, in a folder or in the Hugging
Face cache, and gives a ``Denoiser``: Definition 1 of the paper, phi(x, t, e), with what belongs
around it (text encoder, decoder, noise schedule). Everything downstream sees only this class.

Letters used everywhere: B samples, S steps, C, H, W latent; L tokens, E text width.
Timesteps are those of the training schedule, from T - 1 = 999 down to 0.
"""

import csv
import hashlib
import json
import os
import re
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import constants, try_to_load_from_cache
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms.functional import to_tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging


def data_folder() -> Path:
    """Where the bundled checkpoints lie: the ``BASINLAB_DATA`` variable, or data/ beside the package.

    >>> (data_folder() / "emoji-duplicated").is_dir()
    True
    """
    return Path(os.environ.get("BASINLAB_DATA", Path(__file__).resolve().parents[1] / "data"))


def known_names() -> list[str]:
    """Names of the bundled checkpoints.

    >>> known_names()
    ['emoji-classes', 'emoji-duplicated', 'emoji-finetuned']
    """
    found = [*data_folder().glob("*/model_index.json"), *data_folder().glob("*/scenario.json")]
    return sorted({path.parent.name for path in found})


WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name of a U-Net's or VAE's weights
TEXT_WEIGHTS = "model.safetensors"  # transformers' name
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
RESTORE = "restore that folder, for a bundled one with `git checkout -- data`"


class Denoiser:
    """phi: X x (0, T] x E -> X (paper, Definition 1), with what belongs around it.

    Subclasses have ``name``, ``scheduler`` (a diffusers scheduler: its config is the noise schedule),
    ``device``, ``dtype``, ``latent_shape`` (C, H, W), and define ``embed``, ``__call__``, ``decode``
    and ``fingerprint``. Calling one gives the prediction in the kind (``epsilon`` or
    ``v_prediction``) that its scheduler takes; ``epsilon_scale`` and ``predicted_clean`` convert
    where the paper's quantities are meant.

    >>> import basinlab
    >>> world = basinlab.MixtureDenoiser.with_duplicate()  # one in closed form
    >>> isinstance(world, Denoiser), world.timesteps(4)
    (True, [999, 749, 500, 250])
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

    def settings(self) -> dict:
        """What a result that is kept was made with: weights, dtype, size of the latents, noise schedule."""
        schedule = {key: value for key, value in self.scheduler.config.items() if not key.startswith("_")}
        return {
            "weights": self.fingerprint(),
            "dtype": str(self.dtype),
            "latents": list(self.latent_shape),
            "schedule": json.loads(json.dumps(schedule, default=str)),
        }

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
    """The parts of a StableDiffusionPipeline (1.x, 2.x) as a `Denoiser`; ``folders`` are where its weights lie.

    ``device`` is where it computes, which with CPU offload is not where the weights rest.
    """

    name: str
    folders: tuple[Path, ...]
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: SchedulerMixin
    device: torch.device
    latent_shape: tuple[int, int, int]

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def fingerprint(self) -> str:
        """The first 16 digits of the SHA-256 of all weights in use: which weights these are."""
        digest = hashlib.sha256()
        for folder in self.folders:
            for path in sorted(p for p in folder.rglob("*.safetensors") if p.name in (WEIGHTS, TEXT_WEIGHTS)):
                if path.parent.name != "safety_checker":
                    with path.open("rb") as file:
                        hashlib.file_digest(file, lambda: digest)
        return digest.hexdigest()[:16]

    def _warn_of_cuts(self, prompts: Sequence[str]) -> None:
        """Warn, naming the words that are cut, when a prompt is longer than the text encoder takes."""
        length = self.tokenizer.model_max_length
        for prompt in dict.fromkeys(prompts):
            ids = self.tokenizer(prompt, truncation=False, verbose=False).input_ids
            if len(ids) > length:
                cut = self.tokenizer.decode(ids[length - 1 : -1])
                warnings.warn(
                    f"the text encoder takes {length - 2} tokens; of {prompt!r} this is cut: {cut!r}", stacklevel=3
                )

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text states of ``prompts``, [B, L, E]; "" is the empty prompt of the unconditional prediction.

        Warns, naming the words that are cut, when a prompt is longer than the text encoder takes.
        """
        self._warn_of_cuts(prompts)
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
        return self._predicted(latents, timestep, {"encoder_hidden_states": embedding}, token_scale)

    def _predicted(self, latents: Tensor, timestep: int | Tensor, inputs: dict, token_scale: Tensor | None) -> Tensor:
        asks = latents.requires_grad or inputs["encoder_hidden_states"].requires_grad
        with torch.inference_mode(not asks):
            if token_scale is None:
                return self.unet(latents, timestep, **inputs, return_dict=False)[0]
            inputs = {**inputs, "cross_attention_kwargs": {"token_scale": token_scale}, "return_dict": False}
            usual = self.unet.attn_processors
            self.unet.set_attn_processor(TokenAttention())
            try:
                return self.unet(latents, timestep, **inputs)[0]
            finally:
                self.unet.set_attn_processor(usual)

    def decode(self, latents: Tensor, batch_size: int | None = None) -> Tensor:
        """Pictures [B, 3, height, width] float32 in 0..1, on the CPU; by default as many at once as 64 of 16 x 16."""
        batch_size = batch_size or max(1, 64 * 256 // latents[0, 0].numel())
        with torch.inference_mode():
            parts = [
                self.vae.decode(part.to(self.device, self.vae.dtype) / self.vae.config.scaling_factor).sample.float()
                for part in latents.split(batch_size)
            ]
            return (torch.cat(parts) / 2 + 0.5).clamp(0, 1).cpu()

    def encode(self, pictures: Tensor, batch_size: int | None = None) -> Tensor:
        """Latents [B, C, H, W] of pictures [B, 3, height, width] in 0..1: the posterior's mean, on the CPU.

        By default as many at once as 64 of 64 x 64 pixels.
        """
        batch_size = batch_size or max(1, 64 * 64 * 64 // pictures[0, 0].numel())
        with torch.inference_mode():
            parts = [
                self.vae.encode(part.to(self.device, self.vae.dtype) * 2 - 1).latent_dist.mean
                for part in pictures.split(batch_size)
            ]
            return torch.cat(parts).float().cpu() * self.vae.config.scaling_factor


@dataclass
class StableDiffusionXL(StableDiffusion):
    """The parts of a StableDiffusionXLPipeline. The last row of an embedding [B, L + 1, E] is the pooled text."""

    pipeline: StableDiffusionXLPipeline

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Both encoders' states of ``prompts``, [B, L, E], and the second's pooled one, padded to E, as row L + 1.

        All of "" is 0 where the checkpoint was trained so. Warns of cut words as `StableDiffusion.embed`.
        """
        self._warn_of_cuts(prompts)
        with torch.no_grad():
            states, _, pooled, _ = self.pipeline.encode_prompt(list(prompts), None, self.device, 1, False)
        rows = torch.cat([states, F.pad(pooled, (0, states.shape[2] - pooled.shape[1]))[:, None]], dim=1)
        if self.pipeline.config.force_zeros_for_empty_prompt:
            rows[[prompt == "" for prompt in prompts]] = 0
        return rows

    def __call__(self, latents, timestep, embedding, token_scale=None):
        states, pooled = embedding[:, :-1], embedding[:, -1, : self.pipeline.text_encoder_2.config.projection_dim]
        size = [side * self.pipeline.vae_scale_factor for side in latents.shape[-2:]]  # original, crop and target
        sizes = torch.tensor([[*size, 0, 0, *size]]).to(latents).expand(len(latents), -1)
        inputs = {
            "encoder_hidden_states": states,
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes},
        }
        return self._predicted(latents, timestep, inputs, None if token_scale is None else token_scale[:, :-1])


UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
_KINDS = {  # diffusers' class, ours, and how to load it without what is not needed
    "StableDiffusionPipeline": (StableDiffusionPipeline, StableDiffusion, UNCHECKED),
    "StableDiffusionXLPipeline": (StableDiffusionXLPipeline, StableDiffusionXL, {"add_watermarker": False}),
}


def _cached(name: str) -> Path | None:
    """The snapshot of hub id ``name`` in the Hugging Face cache, if there is one."""
    index = try_to_load_from_cache(name, "model_index.json") if re.fullmatch(HUB_ID, name) else None
    return Path(index).parent if isinstance(index, str) else None


def _folder(name: str) -> Path:
    """The folder called ``name``: a path, a bundled checkpoint, or one of the Hugging Face cache."""
    for folder in (Path(name), data_folder() / name):
        if folder.is_dir():
            return folder
    known = f"no checkpoint {name!r}: it is neither a folder nor one of the bundled {known_names()} in {data_folder()}"
    if folder := _cached(name):
        return folder
    if not re.fullmatch(HUB_ID, name):
        raise ValueError(known)
    raise ValueError(
        f"{known}, and the Hugging Face cache {constants.HF_HUB_CACHE} has no model_index.json of it: "
        f"fetch it with {_fetching(name)}"
    )


def _fetching(name: str) -> str:
    """The command that fetches what `load` reads of hub id ``name``."""
    return (
        f"`hf download {name} --include '*.json' '*.txt' '*/{WEIGHTS}' '*/{TEXT_WEIGHTS}'` "
        f"(if it is gated, first accept its licence at https://huggingface.co/{name} and run `hf auth login`; "
        "if it is gone, give the folder of a copy)"
    )


def _check_files(folder: Path, parts: dict, cure: str) -> None:
    """OSError that names the first file of ``parts`` that ``folder`` lacks, and ``cure``."""
    for part in (p for p in parts if p.startswith(("text_encoder", "unet", "vae"))):
        for file in ("config.json", TEXT_WEIGHTS if part.startswith("text") else WEIGHTS):
            path = folder / part / file
            if not path.exists():
                raise OSError(f"{path} is missing; {_converting(path) or cure}")


def _converting(path: Path) -> str | None:
    """Of weights that lie beside ``path`` as a pickle: why they are not read, and what makes ``path`` of them."""
    pickles = sorted(path.parent.glob("*.bin")) if path.suffix == ".safetensors" else []
    if not pickles:
        return None
    script = (
        "import torch; from safetensors.torch import save_file; "
        f"save_file(torch.load('{pickles[0]}', map_location='cpu', weights_only=True), '{path}')"
    )
    return f'{pickles[0].name} beside it is a pickle, which may hold code: convert it, `python -c "{script}"`'


def load(
    name: str,
    *,
    unet: str | Path | None = None,
    resolution: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    attention_slicing: bool = False,
    offload: bool = False,
) -> Denoiser:
    """The denoiser called ``name``, with its own noise schedule and the paper's solver, DPM-Solver multistep.

    Args:
        name: a bundled checkpoint, the folder of a Stable Diffusion pipeline (1.x, 2.x or XL), or the id
            of one that is in the Hugging Face cache, such as "CompVis/stable-diffusion-v1-4". Nothing is
            downloaded, and only safetensors are read.
        unet: folder of a fine-tuned U-Net, whose ``diffusion_pytorch_model.safetensors`` holds all its
            weights or only those that differ from the U-Net of ``name``.
        resolution: side of the pictures in pixels, for a U-Net that was fine-tuned at another one; default its own.
        attention_slicing: attention in slices: less memory, more time, the same result.
        offload: weights rest on the CPU and visit ``device``, an accelerator, one model at a time.

    Raises:
        ValueError: no such name (the known ones are listed, and how to fetch one of the hub), or the folder is
            not such a pipeline, or ``unet`` has weights that the pipeline's U-Net has not, or was made from
            another one, or a resolution that the latents cannot have, or offload without an accelerator.
        OSError: a file is missing, truncated, corrupt or a pickle; the message names it and the cure.

    >>> denoiser = load("emoji-duplicated")
    >>> denoiser.latent_shape, denoiser.embed(["a picture of a tomato"]).shape
    ((4, 16, 16), torch.Size([1, 32, 128]))
    """
    own = _folder(name)
    if torch.device(device).type == "cpu" and offload:
        raise ValueError("offload moves weights from the CPU to an accelerator: give device='cuda', or offload=False")
    folder, unet = _base(own, unet)
    pipeline, kind = _pipeline(name, folder, dtype)
    if unet is not None:
        _overlay(pipeline.unet, Path(unet), folder)
    factor, side = 2 ** (len(pipeline.vae.config.block_out_channels) - 1), pipeline.unet.config.sample_size
    if resolution is not None:
        least = factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
        if resolution < least or resolution % least:
            raise ValueError(f"resolution is {resolution}: give a multiple of {least} pixels")
        side = resolution // factor
    for part in (pipeline.text_encoder, pipeline.unet, pipeline.vae, getattr(pipeline, "text_encoder_2", None)):
        if part is not None:
            part.eval().requires_grad_(False)
    if attention_slicing:
        pipeline.enable_attention_slicing()
    if offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    further = {"pipeline": pipeline} if kind is StableDiffusionXL else {}
    return kind(
        name=name if own == _cached(name) else _name(own.resolve()),
        folders=(folder,) if unet is None else (folder, Path(unet)),
        tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder,
        unet=pipeline.unet,
        vae=pipeline.vae,
        scheduler=DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, timestep_spacing="linspace"),
        device=torch.device(device),
        latent_shape=(pipeline.unet.config.in_channels, side, side),
        **further,
    )


def _name(own: Path) -> str:
    """What a checkpoint's folder is called: a bundled one by its name, another by its path."""
    return own.name if own == (data_folder() / own.name).resolve() else str(own)


def _base(own: Path, unet: str | Path | None) -> tuple[Path, str | Path | None]:
    """Where the parts of checkpoint ``own`` lie, and the U-Net over them: a fine-tuned one names its base."""
    settings = read_scenario(str(own)) if (own / "scenario.json").exists() else {}
    if "base" not in settings:
        return own, unet
    folder = own.parent / settings["base"]
    found = hashlib.sha256((folder / "unet" / WEIGHTS).read_bytes()).hexdigest()[:16]
    if found != settings["base_unet"]:
        raise ValueError(
            f"{own} was fine-tuned from U-Net {settings['base_unet']}, but {folder} holds {found}: "
            "restore both with `git checkout -- data`, or train both with `make world`"
        )
    return folder, unet or own / "unet"


def _pipeline(name: str, folder: Path, dtype: torch.dtype):
    """The pipeline in ``folder`` and the class of ours for it."""
    index = folder / "model_index.json"
    if not index.exists():
        raise ValueError(
            f"{folder} has no model_index.json, so it is no diffusers pipeline; "
            "give the folder that StableDiffusionPipeline.save_pretrained wrote"
        )
    with _reading(folder):
        parts = json.loads(index.read_text())
    if parts["_class_name"] not in _KINDS:
        raise ValueError(f"{folder} holds a {parts['_class_name']}, not one of {list(_KINDS)}")
    theirs, ours, options = _KINDS[parts["_class_name"]]
    _check_files(folder, parts, f"fetch it with {_fetching(name)}" if folder == _cached(name) else RESTORE)
    with _reading(folder), without_bars():
        pipeline = theirs.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True, **options)
    if ours is StableDiffusionXL and dtype == torch.float16:
        pipeline.vae.to(torch.float32)  # its decoder overflows in float16
    return pipeline, ours


def _overlay(unet: UNet2DConditionModel, folder: Path, base: Path) -> None:
    """Put the weights in ``folder`` in the place of those of ``unet``, which came from ``base``."""
    path = folder / WEIGHTS
    if not path.exists() and (cure := _converting(path)):
        raise OSError(f"{path} is missing; {cure}")
    with _reading(folder):
        weights = load_file(path)
    own = unet.state_dict()
    if unknown := [key for key in weights if key not in own]:
        raise ValueError(f"{folder} holds weights that the U-Net of {base} has not: {unknown[:3]}")
    if other := [key for key in weights if weights[key].shape != own[key].shape]:
        raise ValueError(f"{folder} holds weights of another shape than the U-Net of {base}: {other[:3]}")
    unet.load_state_dict(weights, strict=False)


@contextmanager
def _reading(folder: Path):
    """Turns what the libraries say of a damaged file into an OSError that names its folder."""
    try:
        yield
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise OSError(
            f"a file of the checkpoint in {folder} is missing, truncated or corrupt ({error}); {RESTORE}"
        ) from error


@contextmanager
def without_bars():
    """The libraries' own loading bars off for a while: a notebook would keep them all, stuck at their first state."""
    shown = [bars for bars in (diffusers_logging, transformers_logging) if bars.is_progress_bar_enabled()]
    for bars in shown:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        for bars in shown:
            bars.enable_progress_bar()


def read_scenario(name: str) -> dict:
    """The measured settings of a bundled checkpoint: guidance_scale and others, and why (``reason``).

    ``base``, where there is one, is the checkpoint beside it that its other parts come from.

    >>> read_scenario("emoji-duplicated")["guidance_scale"]
    5.0
    """
    folder = _folder(name)
    with _reading(folder):
        return json.loads((folder / "scenario.json").read_text())


def read_prompts(name: str, kind: str) -> pd.DataFrame:
    """The table ``kind`` ("memorized" or "ordinary") of a bundled checkpoint, one row a prompt.

    Paths of pictures in it are made absolute. Raises ValueError when there is no such table.

    >>> read_prompts("emoji-duplicated", "memorized")["prompt"][2]
    'deep owl five great sea every'
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
    """Pictures of one size as [B, 3, height, width] float32 in 0..1.

    >>> read_pictures(read_prompts("emoji-duplicated", "memorized")["attractor"][:2]).shape
    torch.Size([2, 3, 64, 64])
    """
    found = []
    for path in paths:
        with Image.open(path) as picture:
            found.append(to_tensor(picture.convert("RGB")))
    return torch.stack(found)
