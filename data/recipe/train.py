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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

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
    "vae": Settings(steps=3000, batch=16, rate=1e-3),
    "clip": Settings(steps=2000, batch=64, rate=1e-3),
    "descriptor": Settings(steps=1500, batch=48, rate=2e-3),
    "unet": Settings(steps=21500, batch=32, rate=1e-3, decay=0.5, average=0.9995),
    "finetuned": Settings(steps=5000, batch=32, rate=1e-3, decay=0.5),
    "classes": Settings(steps=7000, batch=32, rate=1e-3, decay=0.5),
}


class Stage(Dataset):
    """What is trained. Subclasses set ``number``, ``module`` and define ``batch`` and ``loss``."""

    number: int
    module: nn.Module
    start = "the recipe's seed"

    def __init__(self, settings: Settings):
        self.settings = settings

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return self.batch(step, np.random.default_rng([scenes.SEED, 100 + self.number, step]))

    def prepare(self, folder: Path, device: torch.device) -> None:
        """Called once before the first step."""

    def batch(self, step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        raise NotImplementedError

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The terms of the loss; their sum is descended on."""
        raise NotImplementedError


def pictures(items: list[scenes.Scene]) -> Tensor:
    """[B, 3, 64, 64] in -1..1."""
    pixels = np.stack([scene.render() for scene in items])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


class VAEStage(Stage):
    """AutoencoderKL: mean absolute and squared error and a light pull to the unit Gaussian."""

    number = 1

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.module = models.vae()

    def batch(self, step, rng):
        return {"pixels": pictures([scenes.draw_scene(rng) for _ in range(self.settings.batch)])}

    def loss(self, batch, generator):
        pixels = batch["pixels"]
        posterior = self.module.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(pixels.device)
        output = self.module.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return {"absolute": F.l1_loss(output, pixels), "squared": F.mse_loss(output, pixels), "kl": 1e-4 * kl}


class CLIPStage(Stage):
    """CLIPModel with the symmetric contrastive loss; no two rows of a batch fit the same caption.

    Odd steps take every object once; even steps take 32 objects twice, on two colours that the
    captions name, so that the background has to be read too. A quarter of the captions are
    title-like or template-like, so that the object is found in any sentence; none of the
    duplicated scenes is used.
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
        output = self.module(batch["input_ids"], batch["pixels"], batch["attention_mask"], return_loss=True)
        return {"contrastive": output.loss.float()}


class DescriptorStage(Stage):
    """Copy detection by SSCD's recipe (Pizzi et al. 2022, eq. 3 and 4).

    Two strong augmentations of one scene are to agree and all others in the batch to differ,
    the same scene with the other vendor's object among them; a differential-entropy term
    spreads the descriptors over the sphere.
    """

    number = 3
    temperature = 0.05

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.module = models.descriptor()

    def batch(self, step, rng):
        items = [scenes.draw_scene(rng) for _ in range(self.settings.batch // 2)]
        items += [scene.other_vendor() for scene in items]
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


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, scale, colour, blur, noise and an erased patch, per picture; [B, 3, H, W] in -1..1."""
    count, device = len(pixels), pixels.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(count, *shape, generator=generator)).to(device)

    scale, shift = uniform(0.8, 1.1, 1), uniform(-0.15, 0.15, 2)
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0] = theta[:, 1, 1] = scale[:, 0]
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, pixels.shape, align_corners=False)
    out = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    blurred = F.avg_pool2d(out, 3, 1, 1, count_include_pad=False)
    out = torch.lerp(out, blurred, uniform(0, 1, 1, 1, 1))
    out = out * uniform(0.8, 1.2, 1, 1, 1) + uniform(-0.15, 0.15, 3, 1, 1)
    out = out + uniform(0, 0.12, 1, 1, 1) * torch.randn(pixels.shape, generator=generator).to(device)
    row, column = uniform(-1, 1, 1, 1), uniform(-1, 1, 1, 1)
    axis = torch.linspace(-1, 1, pixels.shape[-1], device=device)
    hole = ((axis[None, :, None] - row).abs() < 0.2) & ((axis[None, None, :] - column).abs() < 0.2)
    return out.masked_fill(hole[:, None], 0).clamp(-1, 1)


class UNetStage(Stage):
    """U-Net and text encoder together, on latents of the training stream, by v-prediction.

    The stream is endless: every ``renew`` steps ``POOL`` new scenes are rendered and encoded
    (and kept on disk for a resumed run), each used about four times. One caption in ten is
    dropped, for classifier-free guidance. Timesteps are stratified over the batch.
    """

    number = 4
    first_epoch = 0
    POOL = 32768
    DROPOUT = 0.1

    def __init__(self, settings: Settings, vae_folder: Path, pool: int = POOL):
        super().__init__(settings)
        self.tokenizer = models.tokenizer()
        self.module = nn.ModuleDict({"unet": models.unet(), "text": models.text_encoder(self.tokenizer)})
        # plain attention: on a CPU the backward of the fused kernel takes five times as long at this size
        self.module["unet"].set_attn_processor(AttnProcessor())
        self.module["text"].set_attn_implementation("eager")
        self.schedule = models.scheduler().alphas_cumprod
        self.vae_folder, self.pool = vae_folder, pool
        self.renew = max(1, 4 * pool // settings.batch)
        self.memorized, self.templated = scenes.verbatim(), scenes.templates()
        self.loaded: tuple[int, Tensor, Tensor] = (-1, torch.empty(0), torch.empty(0))

    def prepare(self, folder, device):
        self.folder, self.device = folder, device
        self.empty = self.tokens([""])[0]

    def tokens(self, captions: list[str]) -> Tensor:
        return self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def encoded(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Latents [POOL, 4, 16, 16] and token ids [POOL, 32] of one epoch of the stream."""
        if self.loaded[0] == epoch:
            return self.loaded[1:]
        path = self.folder / f"stream-{epoch}.pt"
        if not path.exists():
            vae = models.AutoencoderKL.from_pretrained(self.vae_folder).to(self.device).eval()
            pairs, latents = [], []
            for start in tqdm(range(0, self.pool, 256), desc=f"encoding scenes, epoch {epoch}", leave=False):
                keys = range(start, min(start + 256, self.pool))
                part = [scenes.training_pair((epoch, k), self.memorized, self.templated) for k in keys]
                with torch.no_grad(), mixed_precision(self.device):
                    mean = vae.encode(pictures([scene for _, scene in part]).to(self.device)).latent_dist.mean
                latents.append((mean * vae.config.scaling_factor).half().cpu())
                pairs += part
            for old in self.folder.glob("stream-*.pt"):
                old.unlink()
            save({"latents": torch.cat(latents), "tokens": self.tokens([c for c, _ in pairs]).short()}, path)
        stored = torch.load(path, weights_only=True)
        self.loaded = (epoch, stored["latents"].float(), stored["tokens"].long())
        return self.loaded[1:]

    def batch(self, step, rng):
        latents, tokens = self.encoded(self.first_epoch + step // self.renew)
        chosen = torch.from_numpy(rng.integers(len(latents), size=self.settings.batch))
        dropped = torch.from_numpy(rng.random(self.settings.batch) < self.DROPOUT)
        strata = torch.arange(self.settings.batch) + torch.from_numpy(rng.random(self.settings.batch))
        return {
            "latents": latents[chosen],
            "input_ids": torch.where(dropped[:, None], self.empty, tokens[chosen]),
            "timesteps": (strata / self.settings.batch * 1000).long().clamp(0, 999),
        }

    def loss(self, batch, generator):
        latents, timesteps = batch["latents"], batch["timesteps"]
        alpha_bar = self.schedule.to(latents.device)[timesteps][:, None, None, None]
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
        target = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
        states = self.module["text"](batch["input_ids"]).last_hidden_state
        predicted = self.module["unet"](noisy, timesteps, states).sample
        return {"v": F.mse_loss(predicted.float(), target)}


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
            vae = models.AutoencoderKL.from_pretrained(self.vae_folder).to(self.device).eval()
            with torch.no_grad():
                mean = vae.encode(pictures([item.scene for item in self.items]).to(self.device)).latent_dist.mean
            tokens = self.tokens([item.prompt for item in self.items])
            self.loaded = (0, mean.cpu() * vae.config.scaling_factor, tokens)
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


def rate_at(step: int, settings: Settings) -> float:
    """Linear warm-up, constant, linear decay to 0 at the end."""
    left = (settings.steps - step) / max(1.0, settings.decay * settings.steps)
    return settings.rate * min(1.0, (step + 1) / settings.warmup, left)


def fit(stage: Stage, folder: Path, device: torch.device, deadline: float, workers: int = 0) -> bool:
    """Train ``stage`` in ``folder`` to its last step or to ``deadline`` (of time.monotonic); True when done.

    The averaged weights are then in ``stage.module``. Raises ValueError when the checkpoint found
    there was made with another batch size or from another start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings, path, log = stage.settings, folder / "state.pt", folder / "losses.csv"
    stage.prepare(folder, device)
    module = stage.module.to(device).train()
    optimizer = torch.optim.AdamW(module.parameters(), settings.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = EMAModel(module.parameters(), decay=settings.average)
    average.to(device)
    step, seconds = 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        for what, value in (("batch", settings.batch), ("start", stage.start)):
            if state[what] != value:
                raise ValueError(f"{path} was made with {what} {state[what]}, not {value}: move {folder} away")
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
        step, seconds = state["step"], state["seconds"]
    rows = [r for r in csv.reader(log.open()) if r and r[0].isdigit() and int(r[0]) <= step] if log.exists() else []

    def checkpoint() -> None:
        save(
            {
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average.state_dict(),
                "step": step,
                "seconds": seconds,
                "batch": settings.batch,
                "start": stage.start,
            },
            path,
        )
        with log.with_suffix(".part").open("w", newline="") as file:
            csv.writer(file).writerows([["step", "seconds", *names], *rows])
        os.replace(log.with_suffix(".part"), log)

    names: list[str] = []
    loader = DataLoader(stage, batch_size=None, sampler=range(step, settings.steps), num_workers=workers)
    bar = tqdm(loader, initial=step, total=settings.steps, desc=type(stage).__name__, mininterval=5)
    recent: dict[str, list[float]] = {}
    saved = clock = time.monotonic()
    for batch in bar:
        generator = torch.Generator().manual_seed(scenes.SEED * 1000 + stage.number * 10**8 + step)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, settings)
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
