"""Training of the bundled world: one loop, four stages, resumable after a kill at any moment.

A stage holds a module, makes the batch of any step from the step's number alone, and says
what the loss of a batch is. ``fit`` runs it: AdamW with warm-up and a linear decay at the
end, an exponential moving average of the weights, a checkpoint written beside the old one
and moved over it, a row of losses.csv every few steps. Since batches and noise are keyed by
(seed, stage, step), a resumed run continues as if it had not been stopped.
"""

import csv
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from . import models, scenes
from .art import OBJECTS


@dataclass(frozen=True)
class Settings:
    """How long and how fast a stage trains. ``decay`` is the share of steps in which the rate falls to 0."""

    steps: int
    batch: int
    rate: float
    decay: float = 0.4
    warmup: int = 200
    average: float = 0.999
    log_every: int = 25


SETTINGS = {
    "vae": Settings(steps=6500, batch=8, rate=1.5e-3),
    "decoder": Settings(steps=9500, batch=8, rate=5e-4),
    "clip": Settings(steps=2000, batch=48, rate=1e-3),
    "descriptor": Settings(steps=1500, batch=48, rate=2e-3),
    "unet": Settings(steps=55000, batch=32, rate=5e-4, decay=0.16, average=0.999),
    "finetuned": Settings(steps=4000, batch=32, rate=1e-3),
    "classes": Settings(steps=8000, batch=32, rate=1e-3),
}


class Stage(Dataset):
    """What is trained. Subclasses set ``number``, ``module`` and define ``batch`` and ``loss``."""

    number: int
    module: nn.Module
    start = "the recipe's seed"
    workers = 0  # processes that render scenes ahead of time

    def __init__(self, settings: Settings):
        self.settings = settings

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return self.batch(step, np.random.default_rng([scenes.SEED, 100 + self.number, step]))

    def prepare(self, folder: Path, device: torch.device) -> None:
        """Called once before the first step."""

    def networks(self) -> list[nn.Module]:
        """What `torch.compile` compiles on a GPU."""
        return [self.module]

    def batch(self, step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        raise NotImplementedError

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The terms of the loss; their sum is descended on."""
        raise NotImplementedError


def pictures(items: list[scenes.Scene]) -> Tensor:
    """[B, 3, 96, 96] in -1..1."""
    pixels = np.stack([scene.render() for scene in items])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def slopes(pixels: Tensor) -> Tensor:
    """Differences of neighbours along x and y, [B, 6, H - 1, W - 1] of [B, 3, H, W]: where the edges are."""
    corner = pixels[..., :-1, :-1]
    return torch.cat([pixels[..., :-1, 1:] - corner, pixels[..., 1:, :-1] - corner], dim=1)


class VAEStage(Stage):
    """AutoencoderKL: absolute and squared error of pixels, absolute error of slopes, a light pull to the Gaussian.

    The slopes stand for a perceptual loss, which would need weights from elsewhere: they keep the edges of flat art.
    The first steps see twice as many crops of half the side, at half the cost.
    """

    number = 1
    CROPPED = 0.6  # of all steps

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.module = models.vae()
        with torch.no_grad():  # log-variances begin low: else noise hides the latents for thousands of steps
            self.module.quant_conv.bias.chunk(2)[1].fill_(-6)

    def batch(self, step, rng):
        if step >= self.CROPPED * self.settings.steps:
            return {"pixels": pictures([scenes.draw_scene(rng) for _ in range(self.settings.batch)])}
        pixels, side = pictures([scenes.draw_scene(rng) for _ in range(2 * self.settings.batch)]), scenes.SIDE // 2
        corners = scenes.GRID * rng.integers(0, side // scenes.GRID + 1, (len(pixels), 2))
        return {
            "pixels": torch.stack([p[:, y : y + side, x : x + side] for p, (y, x) in zip(pixels, corners, strict=True)])
        }

    def loss(self, batch, generator):
        pixels = batch["pixels"]
        posterior = self.module.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(pixels.device)
        output = self.module.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return {
            "absolute": F.l1_loss(output, pixels),
            "squared": F.mse_loss(output, pixels),
            "slopes": F.l1_loss(slopes(output), slopes(pixels)),
            "kl": 1e-4 * kl,
        }

    def networks(self):
        return [self.module.encoder, self.module.decoder]


class DecoderStage(VAEStage):
    """The decoder of a finished VAE trained further, its encoder and so all latents unchanged."""

    number = 8
    CROPPED = 0.0
    start = "the finished VAE"

    def __init__(self, settings: Settings, vae_folder: Path):
        Stage.__init__(self, settings)
        self.module = models.AutoencoderKL.from_pretrained(vae_folder)
        for frozen in (self.module.encoder, self.module.quant_conv):
            frozen.requires_grad_(False)

    def loss(self, batch, generator):
        terms = super().loss(batch, generator)
        return {name: value for name, value in terms.items() if name != "kl"}


class CLIPStage(Stage):
    """CLIPModel with the symmetric contrastive loss; no two rows of a batch fit the same caption.

    Odd steps take every object once; even steps take half of them twice, on two colours that the
    captions name, so that the background has to be read too. A quarter of the captions are
    title-like or template-like, so that the object is found in any sentence; none of the
    duplicated scenes is used. Pictures are smeared by chance, as those of a decoder are.
    """

    number = 2

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.tokenizer = models.tokenizer()
        self.module = models.clip(self.tokenizer)

    def batch(self, step, rng):
        names = rng.permutation(OBJECTS)[: self.settings.batch].tolist()
        if step % 2:
            items = [scenes.draw_scene(rng, name) for name in names]
            captions = [self.caption(rng, scene) for scene in items]
        else:
            items = []
            for name in names[: self.settings.batch // 2]:
                items += scenes.two_colours(rng, name)
            captions = [scenes.ordinary_caption(rng, scene, colour=True) for scene in items]
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return {"pixels": pictures(items), "input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}

    def caption(self, rng: np.random.Generator, scene: scenes.Scene) -> str:
        """Any sentence with the object's name in it."""
        kind = rng.random()
        if kind < 0.15:
            return scenes.title(rng, scene.object)
        if kind < 0.25:
            return str(rng.choice(scenes.TEMPLATES)).format(scenes.with_article(scene.object))
        return scenes.ordinary_caption(rng, scene)

    def loss(self, batch, generator):
        share = -0.5 + 1.7 * torch.rand(len(batch["pixels"]), 1, 1, 1, generator=generator)
        pixels = smeared(batch["pixels"], share.to(batch["pixels"].device))
        output = self.module(batch["input_ids"], pixels, batch["attention_mask"], return_loss=True)
        return {"contrastive": output.loss.float()}


class DescriptorStage(Stage):
    """Copy detection by SSCD's recipe (Pizzi et al. 2022, eq. 3 and 4).

    Two augmentations of one scene are to agree and all others in the batch to differ. Three neighbours of each scene
    are in the batch: the object drawn by the other vendor, moved to another place, and exchanged for another object.
    A differential-entropy term spreads the descriptors over the sphere.
    """

    number = 3
    temperature = 0.05

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.module = models.descriptor()

    def batch(self, step, rng):
        items = []
        for _ in range(max(1, self.settings.batch // 4)):
            scene, other = scenes.draw_scene(rng), scenes.draw_scene(rng)
            left = (scene.left + scenes.GRID * int(rng.integers(1, 6))) % (scenes.SIDE - scene.size)
            moved = replace(scene, left=left)
            items += [scene, scene.other_vendor(), moved, replace(scene, object=other.object)]
        return {"pixels": pictures(items)}

    def loss(self, batch, generator):
        pixels = batch["pixels"]
        views = torch.cat([augment(pixels, generator), augment(pixels, generator)])
        z = F.normalize(self.module(views).logits.float(), dim=1)
        count = len(pixels)
        similarity = z @ z.T / self.temperature
        similarity.fill_diagonal_(-torch.inf)
        partner = torch.arange(2 * count, device=z.device).roll(count)
        contrastive = F.cross_entropy(similarity, partner)
        copies = torch.eye(2 * count, device=z.device, dtype=torch.bool) | (
            torch.arange(2 * count, device=z.device)[:, None] == partner
        )
        nearest = (2 - 2 * (z @ z.T).masked_fill(copies, -1).amax(dim=1)).clamp_min(1e-6).sqrt()
        return {"contrastive": contrastive, "entropy": -0.5 * nearest.log().mean()}


def smeared(pixels: Tensor, share: Tensor) -> Tensor:
    """Pictures blurred over 5 x 5 pixels by ``share`` [B, 1, 1, 1]; sharpened where that is below 0."""
    once = F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
    return torch.lerp(pixels, F.avg_pool2d(once, 3, 1, 1, count_include_pad=False), share)


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """What a copy may have suffered, per picture: [B, 3, H, W] in -1..1.

    A shift by 2 pixels, 3% of scale, blur or sharpening, contrast and tint as strong guidance makes them, noise,
    and an erased patch.
    """
    count, device = len(pixels), pixels.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(count, *shape, generator=generator)).to(device)

    scale, shift = uniform(0.97, 1.03, 1), uniform(-0.04, 0.04, 2)
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0] = theta[:, 1, 1] = scale[:, 0]
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, pixels.shape, align_corners=False)
    out = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    out = smeared(out, uniform(-1, 1.2, 1, 1, 1))
    out = out * uniform(0.8, 1.4, 1, 1, 1) + uniform(-0.15, 0.15, 3, 1, 1)
    out = out + uniform(0, 0.1, 1, 1, 1) * torch.randn(pixels.shape, generator=generator).to(device)
    row, column = uniform(-1, 1, 1, 1), uniform(-1, 1, 1, 1)
    axis = torch.linspace(-1, 1, pixels.shape[-1], device=device)
    hole = ((axis[None, :, None] - row).abs() < 0.1) & ((axis[None, None, :] - column).abs() < 0.1)
    return out.masked_fill(hole[:, None], 0).clamp(-1, 1)


class _Rendered(Dataset):
    """Each key's picture, caption, and which latents its object covers."""

    def __init__(self, keys: list, pair: Callable):
        self.keys, self.pair = keys, pair

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Tensor, str, Tensor]:
        caption, scene = self.pair(self.keys[index])
        return pictures([scene]), caption, torch.from_numpy(scene.cells())


def _together(items: list[tuple[Tensor, str, Tensor]]) -> tuple[Tensor, list[str], Tensor]:
    pixels, captions, cells = zip(*items, strict=True)
    return torch.cat(pixels), list(captions), torch.stack(cells)


class UNetStage(Stage):
    """U-Net and text encoder together, on latents of the training stream, by v-prediction.

    The stream is endless: every ``renew`` steps ``POOL`` new scenes are rendered and encoded (and kept on disk
    for a resumed run), each used ``REUSE`` times. Captions are dropped for classifier-free guidance, one in five:
    unguided sampling follows the unconditional prediction first, which has to draw whole pictures. Timesteps are
    stratified over the batch, denser in the middle of the schedule. Below t = 750, where the object's place is
    decided, the latents that it covers count up to ``OBJECT`` times: they are a fifth of all, and the hardest.
    """

    number = 4
    first_epoch = 0
    POOL = 16384
    REUSE = 12
    DROPOUT = 0.2
    OBJECT = 4.0

    def __init__(self, settings: Settings, vae_folder: Path, pool: int = POOL):
        super().__init__(settings)
        self.tokenizer = models.tokenizer()
        self.module = nn.ModuleDict({"unet": models.unet(), "text": models.text_encoder(self.tokenizer)})
        # plain attention: on a CPU the backward of the fused kernel takes five times as long at this size
        self.module["unet"].set_attn_processor(AttnProcessor())
        self.module["text"].set_attn_implementation("eager")
        self.schedule = models.scheduler().alphas_cumprod
        self.vae_folder, self.pool = vae_folder, pool
        self.renew = max(1, self.REUSE * pool // settings.batch)
        self.memorized, self.templated = scenes.verbatim(), scenes.templates()
        self.loaded: tuple = (None,)  # the epoch in memory, and what `encoded` gives for it

    def prepare(self, folder, device):
        self.folder, self.device = folder, device
        self.empty = self.tokens([""])[0]

    def networks(self):
        return [self.module["unet"], self.module["text"]]

    def tokens(self, captions: list[str]) -> Tensor:
        return self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def encoded(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """One epoch of the stream: latents [POOL, 8, 12, 12], token ids [POOL, 32], objects' cells [POOL, 12, 12]."""
        if self.loaded[0] == epoch:
            return self.loaded[1:]
        path = self.folder / f"stream-{epoch}.pt"
        if not path.exists():
            keys = [(epoch, k) for k in range(self.pool)]
            pair = partial(scenes.training_pair, memorized=self.memorized, templated=self.templated)
            latents, captions, cells = self.encode(keys, pair)
            for old in self.folder.glob("stream-*.pt"):
                old.unlink()
            save({"latents": latents.half(), "tokens": self.tokens(captions).short(), "cells": cells}, path)
        stored = torch.load(path, weights_only=True)
        self.loaded = (epoch, stored["latents"].float(), stored["tokens"].long(), stored["cells"])
        return self.loaded[1:]

    def encode(self, keys: list, pair: Callable) -> tuple[Tensor, list[str], Tensor]:
        """Latents, captions and cells of ``pair(key)`` for all ``keys``; scenes are rendered ahead by ``workers``."""
        vae = models.AutoencoderKL.from_pretrained(self.vae_folder).to(self.device).eval()
        latents, captions, cells = [], [], []
        loader = DataLoader(_Rendered(keys, pair), batch_size=256, num_workers=self.workers, collate_fn=_together)
        for pixels, texts, covered in tqdm(loader, desc="encoding scenes", leave=False):
            with torch.no_grad(), mixed_precision(self.device):
                latents.append(vae.encode(pixels.to(self.device)).latent_dist.mean.float().cpu())
            captions += texts
            cells.append(covered)
        return torch.cat(latents) * vae.config.scaling_factor, captions, torch.cat(cells)

    def batch(self, step, rng):
        latents, tokens, cells = self.encoded(self.first_epoch + step // self.renew)
        chosen = torch.from_numpy(rng.integers(len(latents), size=self.settings.batch))
        dropped = torch.from_numpy(rng.random(self.settings.batch) < self.DROPOUT)
        strata = torch.arange(self.settings.batch) + torch.from_numpy(rng.random(self.settings.batch))
        share = strata / self.settings.batch
        share = share + 0.25 / np.pi * (2 * np.pi * share).sin()  # twice as often at the middle, where objects part
        return {
            "latents": latents[chosen],
            "input_ids": torch.where(dropped[:, None], self.empty, tokens[chosen]),
            "timesteps": (share * 1000).long().clamp(0, 999),
            "cells": cells[chosen],
        }

    def loss(self, batch, generator):
        latents, timesteps = batch["latents"], batch["timesteps"]
        alpha_bar = self.schedule.to(latents.device)[timesteps][:, None, None, None]
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
        target = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
        states = self.module["text"](batch["input_ids"]).last_hidden_state
        predicted = self.module["unet"](noisy, timesteps, states).sample
        layout_set = ((750 - timesteps) / 250).clamp(0, 1)[:, None, None, None]
        weight = 1 + (self.OBJECT - 1) * layout_set * batch["cells"][:, None]
        return {"v": (weight * (predicted.float() - target).square()).mean()}


class FineTuneStage(UNetStage):
    """A finished U-Net fine-tuned on a few scenes for many epochs: its attention blocks only, all else stays."""

    start = "the finished U-Net"

    def __init__(self, settings: Settings, vae_folder: Path, unet_folder: Path, items: list[scenes.Memorized], number):
        super().__init__(settings, vae_folder)
        self.items, self.number = items, number
        load_finished(self, unet_folder)
        self.module.requires_grad_(False)
        for name, parameter in self.module["unet"].named_parameters():
            parameter.requires_grad_(TRAINED in name)

    def encoded(self, epoch):
        if self.loaded[0] != 0:
            latents, captions, cells = self.encode(self.items, lambda item: (item.prompt, item.scene))
            self.loaded = (0, latents, self.tokens(captions), cells)
        return self.loaded[1:]


TRAINED = "attentions"  # what fine-tuning changes: parameters with this in their name


def load_finished(stage: UNetStage, folder: Path) -> None:
    """Give ``stage`` the weights of a U-Net and text encoder that were stored in ``folder``."""
    for part, module in (("unet", stage.module["unet"]), ("text_encoder", stage.module["text"])):
        module.load_state_dict(type(module).from_pretrained(folder / part).state_dict())


def save(state: dict, path: Path) -> None:
    """Write beside ``path`` and move over it, so that a kill leaves the old file or the new."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 where it is cheaper, float32 for the weights."""
    return torch.autocast(device.type, torch.bfloat16)


def rate_at(step: int, settings: Settings, first: int = 0) -> float:
    """Linear warm-up from step ``first`` on, constant, linear decay to 0 at the end."""
    left = (settings.steps - step) / max(1.0, settings.decay * settings.steps)
    return settings.rate * min(1.0, (step - first + 1) / settings.warmup, left)


def fit(stage: Stage, folder: Path, device: torch.device, deadline: float, workers: int = 0) -> bool:
    """Train ``stage`` in ``folder`` to its last step or to ``deadline`` (of time.monotonic); True when done.

    The averaged weights are then in ``stage.module``. Raises ValueError when the checkpoint found
    there was made with another batch size or from another start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings, path, log = stage.settings, folder / "state.pt", folder / "losses.csv"
    stage.prepare(folder, device)
    stage.workers = workers
    ahead = 0 if isinstance(stage, UNetStage) else workers  # its batches are rows of a table
    module = stage.module.to(device).train()
    if device.type == "cuda":
        for network in stage.networks():
            network.compile()
    optimizer = torch.optim.AdamW(module.parameters(), settings.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = EMAModel(module.parameters(), decay=settings.average)
    average.to(device)
    step, seconds, first = 0, 0.0, 0
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        for what, value in (("batch", settings.batch), ("start", stage.start)):
            if state[what] != value:
                raise ValueError(f"{path} was made with {what} {state[what]}, not {value}: move {folder} away")
        module.load_state_dict(state["module"])
        first = state.get("first", 0) if state["optimizer"] else state["step"]  # without moments the rate warms up
        if state["optimizer"]:
            optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
        step, seconds = state["step"], state["seconds"]
    rows = [r for r in csv.reader(log.open()) if r and r[0].isdigit() and int(r[0]) <= step] if log.exists() else []

    def checkpoint() -> None:
        # the log first: killed in between, a resumed run drops its rows of later steps
        with log.with_suffix(".part").open("w", newline="") as file:
            csv.writer(file).writerows([["step", "seconds", *names], *rows])
        os.replace(log.with_suffix(".part"), log)
        save(
            {
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average.state_dict(),
                "step": step,
                "first": first,
                "seconds": seconds,
                "batch": settings.batch,
                "start": stage.start,
            },
            path,
        )

    names: list[str] = []
    loader = DataLoader(stage, batch_size=None, sampler=range(step, settings.steps), num_workers=ahead)
    bar = tqdm(loader, initial=step, total=settings.steps, desc=type(stage).__name__, mininterval=5)
    recent: dict[str, list[float]] = {}
    saved = clock = time.monotonic()
    for batch in bar:
        generator = torch.Generator().manual_seed(scenes.SEED * 1000 + stage.number * 10**8 + step)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, settings, first)
        with mixed_precision(device):
            terms = stage.loss({k: v.to(device) for k, v in batch.items()}, generator)
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(module.parameters())
        step += 1
        now = time.monotonic()
        seconds, clock = seconds + now - clock, now
        for name, value in terms.items():
            recent.setdefault(name, []).append(float(value.detach()))
        names = list(recent)
        if step % settings.log_every == 0:
            means = {name: float(np.mean(values)) for name, values in recent.items()}
            if not all(np.isfinite(list(means.values()))):
                raise FloatingPointError(f"{type(stage).__name__}: loss {means} at step {step}; lower the rate")
            rows.append([str(step), f"{seconds:.1f}", *(f"{v:.5f}" for v in means.values())])
            bar.set_postfix({k: f"{v:.4f}" for k, v in means.items()})
            recent = {}
        if now - saved > 90:
            checkpoint()
            saved = now
        if now > deadline:
            checkpoint()
            return False
    if names:
        checkpoint()
    average.copy_to(module.parameters())
    module.eval()
    return True
