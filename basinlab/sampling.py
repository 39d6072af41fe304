"""From prompts, seeds and a guidance to trajectories.

``sample`` runs every prompt with every seed. Initial noise comes from one CPU generator per
seed, so that (prompt, seed) means the same picture on any device and in any batch; at each
step the predictions that the guidance needs go through the network in one call.
"""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field

import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.guiders import BaseGuidance
from torch import Tensor
from tqdm.auto import tqdm

from .guidance import ConstantGuidance
from .models import Denoiser


@dataclass
class Trajectory:
    """B sampling runs of S steps, prompt-major: all seeds of the first prompt, then of the next.

    Attributes:
        prompts, seeds: B of each.
        timesteps: [S] ints of the training schedule, falling.
        latents: [B, S+1, C, H, W], from the initial noise to the clean latents; [B, 1, C, H, W]
            (the last only) when made with ``record=False``.
        predicted: [B, S, C, H, W], the clean latents predicted at each step under the guidance
            in force; None with ``record=False``.
        guidance_magnitude: [B, S], ||eps_c - eps_u||_2; NaN where only one prediction was made.
        network_calls: [B], conditional plus unconditional predictions.
    """

    prompts: list[str]
    seeds: list[int]
    timesteps: Tensor
    latents: Tensor
    predicted: Tensor | None
    guidance_magnitude: Tensor
    network_calls: Tensor
    denoiser: Denoiser = field(repr=False)

    def __len__(self) -> int:
        return len(self.prompts)

    def images(self) -> Tensor:
        """The final pictures, [B, 3, height, width] in 0..1, decoded at the first call."""
        if not hasattr(self, "_images"):
            self._images = self.denoiser.decode(self.latents[:, -1])
        return self._images

    def predicted_images(self, steps: Sequence[int]) -> Tensor:
        """The clean pictures predicted at ``steps`` (indices into ``timesteps``), [B, len(steps), 3, h, w]."""
        if self.predicted is None:
            raise ValueError("this trajectory kept its last latents only: sample again with record=True")
        chosen = self.predicted[:, list(steps)]
        pictures = self.denoiser.decode(chosen.flatten(0, 1))
        return pictures.unflatten(0, chosen.shape[:2])

    def of(self, prompt: str) -> "Trajectory":
        """The runs of one prompt. Raises KeyError when there are none."""
        rows = [i for i, p in enumerate(self.prompts) if p == prompt]
        if not rows:
            raise KeyError(f"no run of {prompt!r}; the prompts are {list(dict.fromkeys(self.prompts))}")
        return self[rows]

    def __getitem__(self, rows: int | slice | Sequence[int]) -> "Trajectory":
        """Some of the runs: by index, slice or a list of indices."""
        rows = np.atleast_1d(np.arange(len(self))[rows]).tolist()
        return Trajectory(
            [self.prompts[i] for i in rows],
            [self.seeds[i] for i in rows],
            self.timesteps,
            self.latents[rows],
            None if self.predicted is None else self.predicted[rows],
            self.guidance_magnitude[rows],
            self.network_calls[rows],
            self.denoiser,
        )


def initial_noise(denoiser: Denoiser, seeds: Sequence[int]) -> Tensor:
    """Unit Gaussian noise [B, C, H, W], one CPU generator per seed, as diffusers draws it."""
    return _noise(denoiser, _generators(seeds))


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def _noise(denoiser: Denoiser, generators: list[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(denoiser.latent_shape, generator=g) for g in generators])


def _checked(denoiser, prompts, seeds, guidance, steps) -> tuple[list[str], list[int]]:
    """Prompts and seeds as lists, after saying what is wrong with any argument."""
    if isinstance(prompts, str):
        prompts = [prompts]
    prompts, seeds = list(prompts), [int(s) for s in np.atleast_1d(seeds)]
    if not prompts or not seeds:
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give at least one of each")
    blank = [i for i, prompt in enumerate(prompts) if not prompt.strip()]
    if blank:
        raise ValueError(f"prompt {blank[0]} is empty; for unconditional sampling use ConstantGuidance(0)")
    if not 1 <= steps <= denoiser.train_timesteps:
        raise ValueError(f"steps is {steps}: give 1 to {denoiser.train_timesteps}")
    for t in getattr(guidance, "timesteps_named", tuple)():
        if not 0 <= t < denoiser.train_timesteps:
            raise ValueError(f"timestep {t} is outside the schedule: give 0 to {denoiser.train_timesteps - 1}")
    return prompts, seeds


def _scheduler(denoiser: Denoiser, name: str | None, steps: int):
    """A fresh scheduler, the denoiser's own or the diffusers class called ``name``, set to ``steps``."""
    kind = type(denoiser.scheduler) if name is None else getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"diffusers has no scheduler {name!r}; give a class name such as 'DDIMScheduler'")
    # some schedulers are made for pixels and by default clip to -1..1, which latents exceed
    scheduler = kind.from_config(denoiser.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(steps, device=denoiser.device)
    return scheduler


def sample(
    denoiser: Denoiser,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int],
    guidance: BaseGuidance | None = None,
    *,
    steps: int = 50,
    scheduler: str | None = None,
    batch_size: int = 64,
    record: bool = True,
    measure: bool = False,
    progress: bool = True,
) -> Trajectory:
    """Sample every prompt with every seed under ``guidance`` (default: CFG 7.5 from T on).

    Args:
        denoiser: from `load`.
        prompts, seeds: B = len(prompts) x len(seeds) runs.
        guidance: any diffusers guider with a conditional and an unconditional prediction.
        steps: S, of the scheduler.
        scheduler: name of a diffusers scheduler class; default the checkpoint's own.
        batch_size: runs that go through the network together; bounds memory, not results.
        record: keep all latents and predictions, not the last latents only.
        measure: make both predictions at every step, needed or not, so that the guidance
            magnitude is known everywhere; the trajectory is the same.
        progress: show a bar.

    Raises:
        ValueError: no prompt, an empty prompt, no seed, ``steps`` or a guidance's timestep
            outside the schedule, an unknown scheduler.
        FloatingPointError: latents became NaN or infinite; says at which step of which prompt.
    """
    guidance = ConstantGuidance() if guidance is None else guidance
    prompts, seeds = _checked(denoiser, prompts, seeds, guidance, steps)
    states, empty = denoiser.embed(prompts), denoiser.embed([""])
    which = [(p, s) for p in range(len(prompts)) for s in seeds]
    parts = []
    with tqdm(total=len(which) * steps, unit="step", disable=not progress) as bar:
        for start in range(0, len(which), batch_size):
            rows, row_seeds = zip(*which[start : start + batch_size], strict=True)
            run = _Run(denoiser, copy.deepcopy(guidance), states[list(rows)], empty, record, measure, bar)
            names = [prompts[p] for p in rows]
            parts.append(run(names, list(row_seeds), _scheduler(denoiser, scheduler, steps)))
    return _joined(parts)


def _joined(parts: list[Trajectory]) -> Trajectory:
    """One trajectory of several with the same steps."""
    first = parts[0]
    return Trajectory(
        [prompt for p in parts for prompt in p.prompts],
        [seed for p in parts for seed in p.seeds],
        first.timesteps,
        torch.cat([p.latents for p in parts]),
        None if first.predicted is None else torch.cat([p.predicted for p in parts]),
        torch.cat([p.guidance_magnitude for p in parts]),
        torch.cat([p.network_calls for p in parts]),
        first.denoiser,
    )


@dataclass
class _Run:
    """The loop over steps for one batch."""

    denoiser: Denoiser
    guidance: BaseGuidance
    states: Tensor  # [B, L, E]
    empty: Tensor  # [1, L, E]
    record: bool
    measure: bool
    bar: tqdm

    def __call__(self, prompts: list[str], seeds: list[int], scheduler) -> Trajectory:
        generators = _generators(seeds)
        latents = _noise(self.denoiser, generators).to(self.denoiser.device, self.denoiser.dtype)
        latents = latents * scheduler.init_noise_sigma
        # a scheduler that adds noise on the way goes on with the sample's own generator
        takes_noise = "generator" in inspect.signature(scheduler.step).parameters
        noise_source = {"generator": generators} if takes_noise else {}
        kept, predicted, magnitudes, calls = [latents], [], [], 0
        for step, t in enumerate(scheduler.timesteps):
            self.guidance.set_state(step, len(scheduler.timesteps), t)
            batches = self.guidance.prepare_inputs({"embedding": (self.states, self.empty.expand_as(self.states))})
            wanted = [b.__dict__[BaseGuidance._identifier_key] for b in batches]
            asked = ["pred_cond", "pred_uncond"] if self.measure else wanted
            scaled = scheduler.scale_model_input(latents, t)
            outputs = self.predict(scaled, t, asked)
            calls += len(asked)
            combined = self.guidance.forward(**{name: outputs[name] for name in wanted})[0]
            if len(outputs) == 2:
                magnitudes.append(self.denoiser.guidance_magnitude(outputs["pred_cond"], outputs["pred_uncond"], t))
            else:
                magnitudes.append(torch.full((len(prompts),), torch.nan, device=latents.device))
            if self.record:
                predicted.append(self.denoiser.predicted_clean(scaled, combined, t))
            latents = scheduler.step(combined, t, latents, **noise_source, return_dict=False)[0]
            self.check(latents, prompts, seeds, step, int(t))
            kept = [*kept, latents] if self.record else [latents]
            self.bar.update(len(prompts))
        return Trajectory(
            prompts,
            seeds,
            scheduler.timesteps.cpu(),
            torch.stack(kept, 1).float().cpu(),
            torch.stack(predicted, 1).float().cpu() if self.record else None,
            torch.stack(magnitudes, 1).float().cpu(),
            torch.full((len(prompts),), calls),
            self.denoiser,
        )

    def predict(self, latents: Tensor, t: Tensor, asked: list[str]) -> dict[str, Tensor]:
        """The predictions ``asked`` for, in one network call."""
        states = {"pred_cond": self.states, "pred_uncond": self.empty.expand_as(self.states)}
        stacked = torch.cat([states[name] for name in asked])
        outputs = self.denoiser(latents.repeat(len(asked), 1, 1, 1), t, stacked).chunk(len(asked))
        return dict(zip(asked, outputs, strict=True))

    @staticmethod
    def check(latents: Tensor, prompts: list[str], seeds: list[int], step: int, t: int) -> None:
        bad = (~torch.isfinite(latents)).flatten(1).any(dim=1).nonzero()
        if len(bad):
            i = int(bad[0])
            raise FloatingPointError(
                f"latents of {prompts[i]!r}, seed {seeds[i]}, are not finite after step {step} (t = {t}): "
                "use float32, a smaller guidance scale or more steps"
            )
