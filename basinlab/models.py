"""From a name to a denoiser: ``load`` gives Definition 1 of the paper, phi(x, t, e).

Letters everywhere: B samples, S steps, C, H, W latent; L tokens, E text width. Timesteps are of training: 999 to 0.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, SchedulerMixin
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import constants, try_to_load_from_cache
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms.functional import to_tensor
from transformers.utils import logging as transformers_logging

WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name of a U-Net's or VAE's weights


def data_folder() -> Path:
    """Where the bundled checkpoints lie: the ``BASINLAB_DATA`` variable, or data/ beside the package.

    >>> (data_folder() / "emoji-duplicated").is_dir()
    True
    """
    return Path(os.environ.get("BASINLAB_DATA", Path(__file__).resolve().parents[1] / "data"))


@dataclass(eq=False)
class Denoiser:
    """phi: X x (0, T] x E -> X (paper, Definition 1).

    A subclass has ``embed(prompts)`` -> [B, L, E], ``self(latents, timestep, embedding)`` -> prediction [B, C, H, W],
    ``decode(latents)`` -> pictures, and ``fingerprint()``, a digest of the weights in use.

    >>> load("emoji-duplicated").timesteps(4)
    [999, 749, 500, 250]
    """

    name: str
    scheduler: SchedulerMixin  # its config is the noise schedule, and says whether epsilon or v is predicted
    device: torch.device
    latent_shape: tuple[int, int, int]
    dtype: torch.dtype = field(init=False)

    def settings(self) -> dict:
        """What a kept result was made with: weights, dtype, size of the latents, noise schedule."""
        shared = {"weights": self.fingerprint(), "dtype": str(self.dtype), "latents": list(self.latent_shape)}
        return shared | {"schedule": {k: str(v) for k, v in self.scheduler.config.items() if not k.startswith("_")}}

    def timesteps(self, steps: int = 50) -> list[int]:
        """The timesteps at which its own scheduler samples, falling."""
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps)
        return [int(t) for t in scheduler.timesteps]

    def alpha_bar(self, timestep: int | Tensor) -> Tensor:
        """The share of the clean latents' variance that is left at ``timestep``."""
        return self.scheduler.alphas_cumprod[int(timestep)].to(self.device)

    def epsilon_scale(self, timestep: int | Tensor) -> Tensor | float:
        """What makes a difference of predictions one of epsilon: sqrt(alpha_bar_t) for v (Salimans and Ho 2022)."""
        return self.alpha_bar(timestep).sqrt() if self.scheduler.config.prediction_type == "v_prediction" else 1.0

    def predicted_clean(self, latents: Tensor, prediction: Tensor, timestep: int | Tensor) -> Tensor:
        """The clean latents that ``prediction`` at ``latents`` implies, [B, C, H, W]."""
        alpha_bar = self.alpha_bar(timestep)
        if self.scheduler.config.prediction_type == "v_prediction":
            return alpha_bar.sqrt() * latents - (1 - alpha_bar).sqrt() * prediction
        return (latents - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()


class TokenAttention:
    """A diffusers attention processor whose cross-attention weighs tokens: logits times ``token_scale``, 0 masks.

    ``spikes`` [B, 2] are a factor and a limit. In ``early`` blocks the factor multiplies, per head, the logits of spike
    tokens: their largest logit over the queries has a z-score above the limit among all but the begin token's.
    """

    def __init__(self, early: bool):
        self.early = early

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *, token_scale=None, spikes=None, **unused):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        query, key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in projected)
        mask, cross = None, encoder_hidden_states is not None
        if cross and token_scale is not None:
            scale = token_scale[:, : key.shape[2]]  # XL's embedding has one row more, which is not attended to
            key, mask = key * scale[:, None, :, None], (scale != 0)[:, None, None]
        if cross and spikes is not None and self.early:
            highest = (query @ key.mT).amax(dim=2) * attn.scale  # [B, heads, L]
            deviation, mean = torch.std_mean(highest[..., 1:], dim=2, keepdim=True)
            found = (highest - mean) / (deviation + 1e-6) > spikes[:, None, 1:]
            found[..., 0] = False
            key = key * torch.where(found, spikes[:, None, :1], 1)[..., None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attn.scale)
        return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))


@dataclass(eq=False)
class StableDiffusion(Denoiser):
    """A StableDiffusionPipeline (1.x, 2.x) as a `Denoiser`."""

    pipeline: DiffusionPipeline

    def __post_init__(self):
        self.tokenizer, self.text_encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        self.unet, self.vae, self.dtype = self.pipeline.unet, self.pipeline.vae, self.pipeline.unet.dtype

    def fingerprint(self) -> str:
        """16 digits of the SHA-256 of all weights in use; takes seconds for a large model."""
        digest = hashlib.sha256()
        for part in (self.text_encoder, getattr(self.pipeline, "text_encoder_2", None), self.unet, self.vae):
            for name, weight in part.state_dict().items() if part is not None else ():
                digest.update(name.encode())
                digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text states of ``prompts``, [B, L, E]. Warns of words that are cut."""
        self._warn_of_cuts(prompts)
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            return self.text_encoder(tokens.input_ids.to(self.device))[0]

    def _warn_of_cuts(self, prompts: Sequence[str]) -> None:
        if isinstance(prompts, str):  # its letters would be embedded
            raise TypeError(f"prompts is the text {prompts!r}: give a list of texts")
        length = self.tokenizer.model_max_length
        for prompt in dict.fromkeys(prompts):
            ids = self.tokenizer(prompt, truncation=False, verbose=False).input_ids
            if cut := self.tokenizer.decode(ids[length - 1 : -1]):
                warnings.warn(f"the text encoder takes {length - 2} tokens; of {prompt!r} {cut!r} is cut", stacklevel=3)

    def __call__(self, latents, timestep, embedding, **attention) -> Tensor:
        """The prediction [B, C, H, W], differentiable where an input is. ``attention`` is for `TokenAttention`."""
        inputs = self._inputs(latents, embedding)
        with ExitStack() as stack:
            if attention:
                inputs["cross_attention_kwargs"], before = attention, self.unet.attn_processors
                stack.callback(self.unet.set_attn_processor, before)
                self.unet.set_attn_processor({at: TokenAttention(not at.startswith("up_blocks")) for at in before})
            stack.enter_context(torch.inference_mode(not (latents.requires_grad or embedding.requires_grad)))
            return self.unet(latents, timestep, **inputs, return_dict=False)[0]

    def _inputs(self, latents: Tensor, embedding: Tensor) -> dict:
        return {"encoder_hidden_states": embedding}

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, height, width] float32 in 0..1, on the CPU, made as many at once as 64 of 16 x 16 latents."""
        parts = [x.to(self.device, self.vae.dtype) for x in latents.split(max(1, 2**14 // latents[0, 0].numel()))]
        pixels = [self.vae.decode(part / self.vae.config.scaling_factor).sample.float() for part in parts]
        return (torch.cat(pixels) / 2 + 0.5).clamp(0, 1).cpu()


class StableDiffusionXL(StableDiffusion):
    """A StableDiffusionXLPipeline. The last row of an embedding [B, L + 1, E] is the pooled text."""

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Both encoders' states of ``prompts``, [B, L, E], and the second's pooled one, padded to E, as row L + 1."""
        self._warn_of_cuts(prompts)
        with torch.no_grad():
            states, _, pooled, _ = self.pipeline.encode_prompt(list(prompts), None, self.device, 1, False)
        rows = torch.cat([states, F.pad(pooled, (0, states.shape[2] - pooled.shape[1]))[:, None]], dim=1)
        if self.pipeline.config.force_zeros_for_empty_prompt:  # as the checkpoint was trained
            rows[[prompt == "" for prompt in prompts]] = 0
        return rows

    def _inputs(self, latents: Tensor, embedding: Tensor) -> dict:
        text = embedding[:, -1, : self.pipeline.text_encoder_2.config.projection_dim]
        size = [side * self.pipeline.vae_scale_factor for side in latents.shape[-2:]]  # original, crop and target
        ids = torch.tensor([[*size, 0, 0, *size]]).to(latents).expand(len(latents), -1)
        return {"encoder_hidden_states": embedding[:, :-1], "added_cond_kwargs": {"text_embeds": text, "time_ids": ids}}


UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
_KINDS = {"StableDiffusionPipeline": StableDiffusion, "StableDiffusionXLPipeline": StableDiffusionXL}


def load(name: str | Path, *, unet=None, resolution=None, device="cpu", dtype=torch.float32) -> StableDiffusion:
    """The denoiser called ``name``, with its own noise schedule and the paper's solver, DPM-Solver multistep.

    ``name`` is a bundled checkpoint, the folder of a Stable Diffusion pipeline (1.x, 2.x or XL), or its id in the
    Hugging Face cache. Nothing is downloaded, and only safetensors are read. ``unet`` is the folder of a fine-tuned
    U-Net: all its weights, or those that changed. ``resolution`` is the pictures' side in pixels.

    >>> load("emoji-duplicated").embed(["a picture of a tomato", "an owl"]).shape[0]
    2
    """
    try:
        torch.empty(0, device=device, dtype=dtype).sin_()
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"device {device!r} with dtype {dtype!r} cannot be used here: {error}") from error
    own = folder = _folder(str(name))
    if (own / "base.json").exists():  # a fine-tuned U-Net, and the bundled checkpoint that it belongs to
        base = json.loads((own / "base.json").read_text())
        folder, unet = own.parent / base["base"], unet or own / "unet"
        found = hashlib.sha256((folder / "unet" / WEIGHTS).read_bytes()).hexdigest()[:16]
        if found != base["base_unet"]:
            raise ValueError(f"{own} was fine-tuned from U-Net {base['base_unet']}, but {folder} holds {found}")
    kind, pipeline = _pipeline(folder, dtype)
    scheduler, shape = _scheduler(pipeline, folder), _latent_shape(pipeline, resolution)
    if unet is not None:
        _overlay(pipeline.unet, Path(unet), folder)
    called = own.name if own.resolve() == (data_folder() / own.name).resolve() else str(name)
    return kind(called, scheduler, torch.device(device), shape, pipeline.to(device))


def _folder(name: str) -> Path:
    for folder in (Path(name), data_folder() / name):
        if folder.is_dir():
            return folder
    with suppress(ValueError):  # of what cannot be the name of a repository
        if isinstance(index := try_to_load_from_cache(name, "model_index.json"), str):
            return Path(index).parent
    bundled = sorted({path.parent.name for path in data_folder().glob("*/unet")})
    raise ValueError(
        f"no checkpoint {name!r}: no folder, none of the bundled {bundled} in {data_folder()}, and not in the Hugging "
        f"Face cache {constants.HF_HUB_CACHE}; `hf download {name} --include '*.json' '*.txt' '*.safetensors'` fetches "
        f"it (a gated one after its licence is accepted at https://huggingface.co/{name}, and `hf auth login`)"
    )


def _pipeline(folder: Path, dtype: torch.dtype) -> tuple[type, DiffusionPipeline]:
    parts = json.loads((folder / "model_index.json").read_text())
    if (ours := _KINDS.get(parts["_class_name"])) is None:
        raise ValueError(f"{folder} holds a {parts['_class_name']}, not one of {list(_KINDS)}")
    for part in (folder / name for name in parts if name.startswith("tokenizer")):
        files = {path.name for path in part.glob("*")}
        if not (files >= {"tokenizer.json"} or files >= {"vocab.json", "merges.txt"}):  # all prompts would embed alike
            raise OSError(f"{part} has no vocabulary: tokenizer.json, or vocab.json and merges.txt, is missing")
    halves = {path.parent for path in folder.glob("*/*.fp16*.safetensors")}
    whole = {path.parent for path in folder.glob("*/*.safetensors") if ".fp16" not in path.name}
    options = {"add_watermarker": False} if ours is StableDiffusionXL else UNCHECKED
    options = {**options, "variant": "fp16" if halves - whole else None, "use_safetensors": True}
    with _reading(folder), without_bars():
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, **options)
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module):
                files = (folder / name).glob("*.safetensors")
                held = _keys(key for path in files for key in safe_open(path, "pt").keys())  # noqa: SIM118
                if missing := _keys(part.state_dict()) - held:  # the libraries leave these random
                    raise ValueError(f"{name} lacks {sorted(missing)[:3]}")
                part.eval().requires_grad_(False)
    if ours is StableDiffusionXL and dtype == torch.float16:
        pipeline.vae.to(torch.float32)  # its decoder overflows in float16
    return ours, pipeline


def _keys(names: Iterable[str]) -> set[str]:
    """``names`` as the libraries have them now."""
    old = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0.", "text_model.": ""}
    return {reduce(lambda name, change: name.replace(*change), old.items(), name) for name in names}


def _scheduler(pipeline: DiffusionPipeline, folder: Path) -> SchedulerMixin:
    """The paper's solver on the pipeline's noise schedule."""
    theirs, vae = pipeline.scheduler, pipeline.vae.config
    config, kind = theirs.config, theirs.config.get("prediction_type", "epsilon")
    discrete = hasattr(theirs, "alphas_cumprod") and config.get("timestep_type", "discrete") == "discrete"
    if not discrete or kind not in ("epsilon", "v_prediction") or config.get("use_flow_sigmas"):
        found = f"{type(theirs).__name__} with prediction_type {kind!r}"
        raise ValueError(f"{folder} has a {found}: give epsilon or v_prediction on a discrete schedule of betas")
    solver = DPMSolverMultistepScheduler.from_config({**config, "prediction_type": kind}, timestep_spacing="linspace")
    if not torch.allclose(solver.alphas_cumprod, theirs.alphas_cumprod, atol=1e-4):
        raise ValueError(f"{folder} has a noise schedule that DPMSolverMultistepScheduler does not take over")
    if kind == "epsilon" and theirs.alphas_cumprod[-1] < 1e-6:
        raise ValueError(f"{folder} has no signal left at T, where a prediction of epsilon says nothing: it needs v")
    if changed := [key for key in ("latents_mean", "latents_std", "shift_factor") if vae.get(key) is not None]:
        raise ValueError(f"{folder} has a VAE that normalizes latents by {changed}, which is not supported")
    return solver


def _overlay(unet: torch.nn.Module, folder: Path, base: Path) -> None:
    """Put the weights in ``folder`` in the place of those of the U-Net of ``base``."""
    paths = sorted(folder.glob(WEIGHTS.replace(".", "*.")))
    if not paths and (folder / "pytorch_lora_weights.safetensors").exists():
        raise ValueError(f"{folder} holds a LoRA: fuse it into a U-Net with diffusers, and give that U-Net's folder")
    with _reading(folder):
        files = [path for path in paths if ".fp16" not in path.name] or paths or [folder / WEIGHTS]
        weights = {key: value for path in files for key, value in load_file(path).items()}
    own = unet.state_dict()
    if other := [key for key in weights if key not in own or weights[key].shape != own[key].shape]:
        raise ValueError(f"{folder} holds weights that the U-Net of {base} has not, or of another shape: {other[:3]}")
    unet.load_state_dict(weights, strict=False)


def _latent_shape(pipeline: DiffusionPipeline, resolution: int | None) -> tuple[int, int, int]:
    config, factor = pipeline.unet.config, pipeline.vae_scale_factor
    least = factor * 2 ** (len(config.block_out_channels) - 1)
    if resolution is not None and (not isinstance(resolution, int) or resolution < least or resolution % least):
        raise ValueError(f"resolution is {resolution!r}: give a multiple of {least} pixels")
    side = config.sample_size if resolution is None else resolution // factor
    return config.in_channels, *(side if isinstance(side, list | tuple) else (side, side))


@contextmanager
def _reading(folder: Path):  # says of a damaged file where it is, and what helps
    try:
        yield
    except (OSError, ValueError, NotImplementedError, SafetensorError) as error:  # the third: some are missing
        cure = "restore it with `git checkout -- data`" if data_folder() in folder.parents else "fetch or save it again"
        pickles = " (a pickle, *.bin, may hold code and is not read)" if any(folder.rglob("*.bin")) else ""
        raise OSError(f"a file in {folder} is missing, truncated or corrupt ({error}){pickles}: {cure}") from error


@contextmanager
def without_bars():
    """The libraries' loading bars off for a while: a notebook would keep them all, stuck at their first state."""
    with ExitStack() as stack:
        for bars in (diffusers_logging, transformers_logging):
            if bars.is_progress_bar_enabled():
                bars.disable_progress_bar()
                stack.callback(bars.enable_progress_bar)
        yield


def read_pictures(paths: Sequence[str | Path]) -> Tensor:
    """Pictures of one size as [B, 3, height, width] float32 in 0..1.

    >>> read_pictures([data_folder() / "unseen" / "000.png"]).shape[:2]
    torch.Size([1, 3])
    """
    return torch.stack([to_tensor(Image.open(path).convert("RGB")) for path in paths])
