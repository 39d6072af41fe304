"""From prompts, seeds and a guidance to trajectories.

``sample`` runs every prompt with every seed. Initial noise comes from one CPU generator per
seed, so that (prompt, seed) means the same picture on any device and in any batch; at each
step the predictions that the guidance needs go through the network in one call.
``sweep`` starts the guidance at many timesteps, ``bisect`` looks for the one at which the
outcome flips: both run the steps before once, and go on from there in forks.
``sample_from`` goes on from any states.
"""

import copy
import inspect
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.guiders import BaseGuidance
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from .guidance import ConstantGuidance, describe
from .models import Denoiser


@dataclass
class Trajectory:
    """B sampling runs of S steps, prompt-major: all seeds of the first prompt, then of the next.

    Attributes:
        prompts, seeds: B of each.
        timesteps: [S] of the training schedule, falling; ints, but for schedulers that stop between them.
        latents: [B, S+1, C, H, W], from the initial noise to the clean latents; [B, 1, C, H, W]
            (the last only) when made with ``record=False``.
        predicted: [B, S, C, H, W], the clean latents predicted at each step under the guidance
            in force; None with ``record=False``.
        guidance_magnitude: [B, S], ||eps_c - eps_u||_2; NaN where only one prediction was made.
        transition_point: [B], the first timestep at which the full guidance acted; NaN where the
            guidance has no such point, or a dynamic one found none.
        network_calls: [B], conditional plus unconditional predictions, those of perturbations included.
        gradient_passes: [B], how many of them were differentiated.

    >>> import basinlab
    >>> world = basinlab.MixtureDenoiser.with_duplicate()
    >>> run = sample(world, ["memorized", "ordinary"], [0, 1, 2], steps=10, progress=False)
    >>> run.latents.shape, run.of("ordinary").seeds
    (torch.Size([6, 11, 2, 1, 1]), [0, 1, 2])
    """

    prompts: list[str]
    seeds: list[int]
    timesteps: Tensor
    latents: Tensor
    predicted: Tensor | None
    guidance_magnitude: Tensor
    transition_point: Tensor
    network_calls: Tensor
    gradient_passes: Tensor
    denoiser: Denoiser = field(repr=False)

    def __repr__(self) -> str:
        prompts, shape = len(set(self.prompts)), list(self.latents.shape)
        return f"Trajectory({len(self)} samples of {prompts} prompts, {len(self.timesteps)} steps, latents {shape})"

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
        of = {name: getattr(self, name) for name in _OF_SAMPLES}
        chosen = {name: [v[i] for i in rows] if isinstance(v, list) else v[rows] for name, v in of.items()}
        return replace(self, **chosen, predicted=None if self.predicted is None else self.predicted[rows])


_OF_SAMPLES = (
    "prompts",
    "seeds",
    "latents",
    "guidance_magnitude",
    "transition_point",
    "network_calls",
    "gradient_passes",
)  # of a trajectory, what has an entry a sample, and so has predicted where it is


def initial_noise(denoiser: Denoiser, seeds: Sequence[int]) -> Tensor:
    """Unit Gaussian noise [B, C, H, W], one CPU generator per seed, as diffusers draws it."""
    return _noise(denoiser, _generators(seeds))


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def _noise(denoiser: Denoiser, generators: list[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(denoiser.latent_shape, generator=g) for g in generators])


def _checked(denoiser, prompts, seeds, guidances, steps) -> tuple[list[str], list[int]]:
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
    for t in [t for guidance in guidances for t in getattr(guidance, "timesteps_named", tuple)()]:
        if not 0 <= t < denoiser.train_timesteps or t != int(t):
            last = denoiser.train_timesteps - 1
            raise ValueError(f"timestep {t} is outside the schedule: give 0 to {last}, a whole number")
    return prompts, seeds


def new_scheduler(denoiser: Denoiser, name: str | None, steps: int):
    """A fresh scheduler, the denoiser's own or the diffusers class called ``name``, set to ``steps``."""
    kind = type(denoiser.scheduler) if name is None else getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"diffusers has no scheduler {name!r}; give a class name such as 'DDIMScheduler'")
    # some schedulers are made for pixels and by default clip to -1..1, which latents exceed
    scheduler = kind.from_config(denoiser.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(steps, device=denoiser.device)
    if len(scheduler.timesteps) != steps:  # some predict twice at a step, and so do not go step by step
        raise ValueError(f"{kind.__name__} makes {len(scheduler.timesteps)} predictions in {steps} steps: give another")
    own, found = denoiser.scheduler.alphas_cumprod, getattr(scheduler, "alphas_cumprod", torch.zeros(0))
    rising = steps > 1 and scheduler.timesteps[0] < scheduler.timesteps[-1]
    if rising or found.shape != own.shape or not torch.allclose(found.to(own), own, atol=1e-4):
        raise ValueError(f"{kind.__name__} does not go down the model's own noise schedule: give another")
    return scheduler


def _fresh(guidance: BaseGuidance) -> BaseGuidance:
    """A copy that has seen no step yet."""
    guidance = copy.deepcopy(guidance)
    guidance._step = None
    return guidance


def sample(
    denoiser: Denoiser,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int],
    guidance: BaseGuidance | None = None,
    *,
    perturbations: "Sequence[Perturbation]" = (),
    steps: int = 50,
    scheduler: str | None = None,
    batch_size: int = 32,
    record: bool = True,
    measure: bool = False,
    progress: bool = True,
) -> Trajectory:
    """Sample every prompt with every seed under ``guidance`` (default: CFG 7.5 from T on).

    Args:
        denoiser: from `load`.
        prompts, seeds: B = len(prompts) x len(seeds) runs.
        guidance: any diffusers guider with a conditional and an unconditional prediction.
        perturbations: what is done to prompt, embedding, attention and initial noise, in this order
            (see `perturbation`).
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

    >>> import basinlab
    >>> world = basinlab.MixtureDenoiser.with_duplicate()
    >>> run = sample(world, "memorized", range(4), basinlab.StaticTransitionPoint(500), progress=False)
    >>> run.images().shape, run.network_calls  # 25 steps with one prediction, 25 with two
    (torch.Size([4, 2, 1, 1]), tensor([75, 75, 75, 75]))
    """
    guidance = ConstantGuidance() if guidance is None else guidance
    job = _Job.of(denoiser, prompts, seeds, (guidance,), steps, scheduler, perturbations)
    options = {"record": record, "measure": measure}
    with tqdm(total=len(job) * steps, unit="step", disable=not progress) as bar:
        parts = [_run(job, rows, job.beginning(rows), 0, guidance, bar, **options) for rows in job.blocks(batch_size)]
    return _joined(parts)


def sample_from(
    denoiser: Denoiser,
    prompts: Sequence[str],
    latents: Tensor,
    timestep: int,
    guidance: BaseGuidance | None = None,
    *,
    seeds: Sequence[int] | None = None,
    steps: int = 50,
    scheduler: str | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Trajectory:
    """Go on from states x_t: sample the steps from ``timestep`` on. A multistep solver starts without history.

    Args:
        prompts: B, one for each state.
        latents: [B, C, H, W], the states.
        timestep: one of the timesteps that the scheduler has with ``steps``.
        seeds: B, of the noise that a stochastic scheduler adds; default 0.

    Raises ValueError as `sample` does, and for a timestep that the scheduler has not.

    >>> import basinlab
    >>> world = basinlab.MixtureDenoiser.with_duplicate()
    >>> run = sample_from(world, ["memorized"], torch.zeros(1, 2, 1, 1), world.timesteps()[25], progress=False)
    >>> run.latents.shape
    torch.Size([1, 26, 2, 1, 1])
    """
    guidance = ConstantGuidance() if guidance is None else guidance
    if isinstance(prompts, str):
        raise ValueError("prompts is one text: give a list, one prompt for each state")
    for what, given in (("prompts", prompts), ("seeds", latents if seeds is None else seeds)):
        if len(given) != len(latents):
            raise ValueError(f"{len(given)} {what} for {len(latents)} states: give one for each")
    job = _Job.of(denoiser, prompts, [0], (guidance,), steps, scheduler)
    job.seeds = [0] * len(prompts) if seeds is None else list(seeds)
    timesteps = job.scheduler().timesteps.tolist()
    if timestep not in timesteps:
        near = sorted(timesteps, key=lambda t: abs(t - timestep))[:2]
        raise ValueError(f"{timestep} is no timestep of this scheduler with {steps} steps; the nearest are {near}")
    first, parts = timesteps.index(timestep), []
    with tqdm(total=len(job) * (steps - first), unit="step", disable=not progress) as bar:
        for rows in job.blocks(batch_size):
            state = job.state(rows, latents[rows])
            if hasattr(state.scheduler, "set_begin_index"):  # one without counts by the timestep
                state.scheduler.set_begin_index(first)
            parts.append(_run(job, rows, state, first, guidance, bar))
    return _joined(parts)


def _joined(parts: list[Trajectory]) -> Trajectory:
    """One trajectory of several with the same steps."""
    of = {name: [getattr(part, name) for part in parts] for name in _OF_SAMPLES}
    whole = {name: [*chain.from_iterable(v)] if isinstance(v[0], list) else torch.cat(v) for name, v in of.items()}
    predicted = None if parts[0].predicted is None else torch.cat([part.predicted for part in parts])
    return replace(parts[0], **whole, predicted=predicted)


@dataclass
class _Job:
    """What stays the same while B samples are made; ``rows`` are indices into them."""

    denoiser: Denoiser
    prompts: list[str]  # B
    seeds: list[int]  # B
    texts: list[str]  # B, what is embedded: the prompts, as perturbations left them
    empty: Tensor  # [1, L, E]
    steps: int
    scheduler_name: str | None
    perturbations: "Sequence[Perturbation]" = ()

    @classmethod
    def of(cls, denoiser, prompts, seeds, guidances, steps, scheduler, perturbations=()) -> "_Job":
        prompts, seeds = _checked(denoiser, prompts, seeds, guidances, steps)
        pairs = [(p, s) for p in prompts for s in seeds]
        texts = [p for p, _ in pairs]
        for perturbation in perturbations:
            texts = [perturbation.text(text, seed, denoiser) for text, (_, seed) in zip(texts, pairs, strict=True)]
        prompts, seeds = [p for p, _ in pairs], [s for _, s in pairs]
        return cls(denoiser, prompts, seeds, texts, denoiser.embed([""]), steps, scheduler, tuple(perturbations))

    def __len__(self) -> int:
        return len(self.prompts)

    def blocks(self, size: int) -> list[list[int]]:
        if size < 1:
            raise ValueError(f"batch_size is {size}: give at least 1")
        return [list(range(i, min(i + size, len(self)))) for i in range(0, len(self), size)]

    def scheduler(self) -> SchedulerMixin:
        return new_scheduler(self.denoiser, self.scheduler_name, self.steps)

    def state(self, rows: list[int], latents: Tensor | None = None) -> "State":
        """The samples at ``latents``, or at their initial noise, before any step is taken."""
        scheduler, generators = self.scheduler(), _generators([self.seeds[i] for i in rows])
        if latents is None:
            latents = _noise(self.denoiser, generators) * scheduler.init_noise_sigma
        texts = [self.texts[i] for i in rows]
        distinct = list(dict.fromkeys(texts))
        embeddings = dict(zip(distinct, self.denoiser.embed(distinct), strict=True))
        return State(
            latents.to(self.denoiser.device, self.denoiser.dtype),
            torch.stack([embeddings[text] for text in texts]),
            self.empty,
            texts,
            [self.seeds[i] for i in rows],
            scheduler,
            generators,
        )

    def beginning(self, rows: list[int]) -> "State":
        """The samples before their first step, as the perturbations leave them."""
        state = self.state(rows)
        for perturbation in self.perturbations:
            perturbation.begin(state, self.denoiser)
        return state


@dataclass
class State:
    """B samples before one step, as a `Perturbation` sees and changes them.

    Attributes:
        latents: [B, C, H, W].
        conditional: [B, L, E], the embeddings of their texts.
        unconditional: [1, L, E].
        texts, seeds: B of each.
        scheduler: the solver with the samples' history.
        generators: B, of the noise that a stochastic scheduler adds.
        token_scale: [B, L], what the logits of the cross-attention to each token are multiplied by;
            0 masks the token; None leaves attention alone.
        calls, gradient_passes: predictions made before the first step, and how many were differentiated; [B].
    """

    latents: Tensor
    conditional: Tensor
    unconditional: Tensor
    texts: list[str]
    seeds: list[int]
    scheduler: SchedulerMixin
    generators: list[torch.Generator]
    token_scale: Tensor | None = None
    calls: Tensor | None = None
    gradient_passes: Tensor | None = None

    def __post_init__(self):
        if self.calls is None:
            self.calls, self.gradient_passes = torch.zeros(2, len(self.latents), dtype=torch.long)

    @staticmethod
    def merged(states: "Sequence[State]", rows: Sequence[Sequence[int]]) -> "State":
        """A copy of ``rows[i]`` of each ``states[i]``, one after the other; all are before the same step."""
        shape, first = states[0].latents.shape[1:], states[0].scheduler
        scheduler = copy.copy(first)
        for name in vars(first):
            setattr(scheduler, name, _merged_value([vars(s.scheduler)[name] for s in states], rows, shape))
        parts = [(s, list(r)) for s, r in zip(states, rows, strict=True)]
        return State(
            torch.cat([s.latents[r] for s, r in parts]),
            torch.cat([s.conditional[r] for s, r in parts]),
            states[0].unconditional,
            [s.texts[i] for s, r in parts for i in r],
            [s.seeds[i] for s, r in parts for i in r],
            scheduler,
            [s.generators[i].clone_state() for s, r in parts for i in r],
        )


class Perturbation:
    """What a mitigation does to samples beside the guidance. Each method here leaves them as they are."""

    def text(self, prompt: str, seed: int, denoiser: Denoiser) -> str:
        """The prompt that is embedded in the place of ``prompt``."""
        return prompt

    def begin(self, state: State, denoiser: Denoiser) -> None:
        """Change embedding, attention or initial noise of samples before their first step, in place."""

    def condition(self, conditional: Tensor, state: State, timestep: int) -> Tensor:
        """The embedding [B, L, E] that is used at ``timestep``."""
        return conditional

    def most_predictions(self) -> int:
        """At most so many predictions a sample before the first step, a differentiated one counted as three."""
        return 0


def _merged_value(values: list, rows: Sequence[Sequence[int]], shape: torch.Size):
    """An attribute of several schedulers as one: tensors that hold one entry a sample are joined."""
    first = values[0]
    if isinstance(first, list):
        return [_merged_value(list(entries), rows, shape) for entries in zip(*values, strict=True)]
    if isinstance(first, Tensor) and first.shape[1:] == shape:
        return torch.cat([value[list(r)] for value, r in zip(values, rows, strict=True)])
    return first


@dataclass
class _Step:
    """What was seen at a step: its timestep, the clean latents predicted, magnitude [B], predictions a sample."""

    timestep: Tensor
    predicted: Tensor
    magnitude: Tensor
    calls: int


def _advance(
    job: _Job, rows: list[int], state: State, step: int, guidance: BaseGuidance, measure: bool = False
) -> _Step:
    """Take all samples of ``state`` over one step, with one call of the network."""
    t, denoiser = state.scheduler.timesteps[step], job.denoiser
    conditional = state.conditional
    for perturbation in job.perturbations:
        conditional = perturbation.condition(conditional, state, int(t))
    states = {"pred_cond": conditional, "pred_uncond": state.unconditional.expand(len(rows), -1, -1)}
    guidance.set_state(step, job.steps, t)
    batches = guidance.prepare_inputs({"embedding": tuple(states.values())})
    wanted = [batch.__dict__[BaseGuidance._identifier_key] for batch in batches]
    asked = list(states) if measure else wanted
    scaled = state.scheduler.scale_model_input(state.latents, t)
    attention = {}
    if state.token_scale is not None:  # what is masked is masked for both, what is raised for the prompt only
        scales = {"pred_cond": state.token_scale, "pred_uncond": state.token_scale.clamp(max=1)}
        attention = {"token_scale": torch.cat([scales[name] for name in asked])}
    inputs = scaled.repeat(len(asked), 1, 1, 1)
    outputs = denoiser(inputs, t, torch.cat([states[name] for name in asked]), **attention)
    # guidance sees differences of epsilon, whatever the network predicts
    unit = denoiser.epsilon_scale(t)
    predictions = dict(zip(asked, (outputs * unit).chunk(len(asked)), strict=True))
    combined = guidance.forward(**{name: predictions[name] for name in wanted})[0] / unit
    magnitude = torch.full((len(rows),), torch.nan, device=scaled.device)
    if len(predictions) == 2:
        magnitude = (predictions["pred_cond"] - predictions["pred_uncond"]).flatten(1).float().norm(dim=1)
    seen = _Step(t, denoiser.predicted_clean(scaled, combined, t), magnitude, len(asked))
    # a scheduler that adds noise on the way goes on with the sample's own generator
    takes_noise = "generator" in inspect.signature(state.scheduler.step).parameters
    noise_source = {"generator": state.generators} if takes_noise else {}
    state.latents = state.scheduler.step(combined, t, state.latents, **noise_source, return_dict=False)[0]
    bad = (~torch.isfinite(state.latents)).flatten(1).any(dim=1).nonzero()
    if len(bad):
        i = rows[int(bad[0])]
        raise FloatingPointError(
            f"latents of {job.prompts[i]!r}, seed {job.seeds[i]}, are not finite after step {step} (t = {int(t)}): "
            "use float32, a smaller guidance scale or more steps"
        )
    return seen


def _run(
    job: _Job,
    rows: list[int],
    state: State,
    first: int,
    guidance: BaseGuidance,
    bar: tqdm,
    record: bool = True,
    measure: bool = False,
) -> Trajectory:
    """All steps from ``first`` on for one batch."""
    guidance = _fresh(guidance)
    kept, seen = [state.latents], []
    for step in range(first, job.steps):
        seen.append(_advance(job, rows, state, step, guidance, measure))
        if not record:
            seen[-1].predicted = None
        kept = [*kept, state.latents] if record else [state.latents]
        bar.update(len(rows))
    point = getattr(guidance, "transition_point", None)
    return Trajectory(
        [job.prompts[i] for i in rows],
        [job.seeds[i] for i in rows],
        state.scheduler.timesteps[first:].cpu(),
        torch.stack(kept, 1).float().cpu(),
        torch.stack([s.predicted for s in seen], 1).float().cpu() if record else None,
        torch.stack([s.magnitude for s in seen], 1).float().cpu(),
        torch.as_tensor(torch.nan if point is None else point).float().cpu().expand(len(rows)).clone(),
        sum(s.calls for s in seen) + state.calls,
        state.gradient_passes,
        job.denoiser,
    )


@dataclass
class Sweep:
    """B samples, the guidance of each started at F timesteps; prompt-major as a `Trajectory`.

    Attributes:
        prompts, seeds: B of each.
        starts: [F] timesteps of the scheduler, falling; 0 stands for never, but see `start_steps`.
        timesteps: [S].
        latents: [B, F, C, H, W], the clean latents of each start.
        guidance_magnitude: [B, S] before the guidance starts, NaN where it was not measured.
        network_calls: [B], predictions made for all starts together.
        network_calls_apart: [B], what one run for each start would have taken.

    >>> import basinlab
    >>> world = basinlab.MixtureDenoiser.with_duplicate()
    >>> swept = sweep(world, "memorized", [0, 1], starts=[999, 500, 0], steps=10, progress=False)
    >>> swept.images().shape, swept.network_calls, swept.network_calls_apart
    (torch.Size([2, 3, 2, 1, 1]), tensor([40, 40]), tensor([45, 45]))
    """

    prompts: list[str]
    seeds: list[int]
    starts: list[int]
    timesteps: Tensor
    latents: Tensor
    guidance_magnitude: Tensor
    network_calls: Tensor
    network_calls_apart: Tensor
    denoiser: Denoiser = field(repr=False)

    def __repr__(self) -> str:
        prompts, shape = len(set(self.prompts)), list(self.latents.shape)
        return f"Sweep({len(self)} samples of {prompts} prompts, {len(self.starts)} starts, latents {shape})"

    def __len__(self) -> int:
        return len(self.prompts)

    def images(self) -> Tensor:
        """The pictures of every start, [B, F, 3, height, width] in 0..1, decoded at the first call."""
        if not hasattr(self, "_images"):
            self._images = self.denoiser.decode(self.latents.flatten(0, 1)).unflatten(0, self.latents.shape[:2])
        return self._images


@dataclass
class Bisection:
    """What `bisect` found: of each sample, how many of the ``starts`` [F], from the earliest on, it is captured at.

    ``captured`` is [B] ints from 0 (at none) to F (at all); the rest is as in `Sweep`.
    """

    prompts: list[str]
    seeds: list[int]
    starts: list[int]
    captured: Tensor
    network_calls: Tensor


def start_steps(starts: Sequence[int] | None, timesteps: Tensor, train_timesteps: int = 1000) -> dict[int, int]:
    """Start times as timesteps of a scheduler, falling, each with the step at which guidance begins.

    A start between two timesteps begins at the later one, which is warned of; one below the last
    timestep is never and becomes 0, with the step after the last. (Some schedulers have 0 as their last timestep:
    there 0 is guidance at that one step.) Equal ones are taken once.
    ``None`` is every fourth timestep and never. Raises ValueError for a start outside the schedule.
    """
    times = [int(t) for t in timesteps]
    if starts is None:
        starts = [*times[::4], 0]
    asked = sorted({int(t) for t in starts}, reverse=True)
    if not asked:
        raise ValueError("no start times: give at least one, or None for every fourth timestep")
    for t in asked:
        if not 0 <= t < train_timesteps:
            raise ValueError(f"start {t} is outside the schedule: give 0 to {train_timesteps - 1}")
    steps = {t: next((k for k, time in enumerate(times) if time <= t), len(times)) for t in asked}
    snapped = {t: times[k] if k < len(times) else 0 for t, k in steps.items()}
    if moved := {t: s for t, s in snapped.items() if t != s}:
        warnings.warn(
            "guidance starts at timesteps of the scheduler only: "
            + ", ".join(f"{t} becomes {s or 'never'}" for t, s in moved.items()),
            stacklevel=3,
        )
    return {snapped[t]: k for t, k in steps.items()}


def sweep(
    denoiser: Denoiser,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int],
    starts: Sequence[int] | None = None,
    *,
    before: BaseGuidance | None = None,
    after: BaseGuidance | None = None,
    steps: int = 50,
    scheduler: str | None = None,
    batch_size: int = 32,
    measure: bool = False,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Sweep:
    """Sample every prompt and seed with the guidance started at each of ``starts`` (paper, figure 2).

    The steps before are run once a sample; at each start a fork goes on with the solver's history,
    and all forks of a step are in one network call. The result is that of one `sample` for each start.

    Args:
        starts: timesteps; see `start_steps` for None and for ones that the scheduler has not.
        before, after: guidance before and from the start on; default none (scale 0) and CFG 7.5.
        batch_size: forks that go through the network together; bounds memory, not results.
        measure: make both predictions before the start, so that the guidance magnitude is known.
        folder: keeps finished blocks of ``batch_size`` samples, so that a killed sweep goes on.

    Raises as `sample`; and ValueError or OSError when ``folder`` holds another sweep or a damaged file.

    >>> import basinlab
    >>> world = basinlab.MixtureDenoiser.with_duplicate()
    >>> sweep(world, "memorized", [0], progress=False).starts
    [999, 919, 839, 759, 679, 599, 519, 440, 360, 280, 200, 120, 40, 0]
    """
    forks = _Forks.of(denoiser, prompts, seeds, starts, before, after, steps, scheduler, batch_size, measure)
    job, ks = forks.job, list(forks.starts.values())
    passes_before, passes = (_passes(guidance, job.scheduler().timesteps) for guidance in (forks.before, forks.after))
    calls = sum(sum(passes[k:]) for k in ks)

    def block(rows: list[int], bar: tqdm) -> dict[str, Tensor]:
        prefix = forks.prefix(rows, bar)
        chosen = [(i, k) for i in range(len(rows)) for k in ks]
        latents = forks.ends(rows, prefix, chosen, bar).unflatten(0, (len(rows), len(ks)))
        return {"latents": latents, "magnitude": prefix.magnitude, "calls": prefix.calls + calls}

    parts = forks.parts(block, len(job) * sum(steps - k for k in (0, *ks)), folder, progress)
    apart = sum(sum(passes_before[:k]) for k in ks) + calls
    return Sweep(
        job.prompts,
        job.seeds,
        list(forks.starts),
        job.scheduler().timesteps.cpu(),
        torch.cat([p["latents"] for p in parts]),
        torch.cat([p["magnitude"] for p in parts]),
        torch.cat([p["calls"].expand(len(p["latents"])) for p in parts]),
        torch.full((len(job),), apart),
        denoiser,
    )


def bisect(
    denoiser: Denoiser,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int],
    captured: Callable[[Tensor, list[int]], Tensor],
    starts: Sequence[int] | None = None,
    *,
    before: BaseGuidance | None = None,
    after: BaseGuidance | None = None,
    steps: int = 50,
    scheduler: str | None = None,
    batch_size: int = 32,
    folder: str | Path | None = None,
    judged_by: str = "",
    progress: bool = True,
) -> Bisection:
    """Between which of ``starts`` the outcome of each sample flips, by halving: log2(F + 1) forks instead of F.

    Right wherever the outcome is monotone in the start, as `sweep` would show it.

    Args:
        captured: of pictures [N, 3, height, width] and the samples they are of (N indices, prompt-major),
            which are captured, [N] bool.
        judged_by: what ``captured`` goes by, in words; noted in ``folder``, and another one is not mixed in.

    The other arguments and errors are those of `sweep`.

    >>> import basinlab
    >>> world = basinlab.MixtureDenoiser.with_duplicate()
    >>> near = lambda points, samples: basinlab.PlaneDistance().pairs(points, world.duplicate[None])[:, 0] < 1
    >>> found = bisect(world, "memorized", [0, 1], near, progress=False)
    >>> [found.starts[n] for n in found.captured]  # the first start at which each is free
    [440, 360]
    """
    forks = _Forks.of(denoiser, prompts, seeds, starts, before, after, steps, scheduler, batch_size, False)
    job, ks = forks.job, list(forks.starts.values())
    passes = _passes(forks.after, job.scheduler().timesteps)

    def block(rows: list[int], bar: tqdm) -> dict[str, Tensor]:
        prefix, calls = forks.prefix(rows, bar), torch.zeros(len(rows), dtype=torch.long)
        # starts before low are known, or taken, to capture; those from high on not to
        low, high = torch.zeros(len(rows), dtype=torch.long), torch.full((len(rows),), len(ks))
        while (open_ := (low < high).nonzero().flatten()).numel():
            middle = (low + high) // 2
            chosen = [(int(i), ks[middle[i]]) for i in open_]
            pictures = denoiser.decode(forks.ends(rows, prefix, chosen, bar))
            inside = torch.as_tensor(captured(pictures, [rows[i] for i in open_]), dtype=torch.bool)
            low[open_[inside]] = middle[open_[inside]] + 1
            high[open_[~inside]] = middle[open_[~inside]]
            calls[open_] += torch.tensor([sum(passes[k:]) for _, k in chosen])
        return {"captured": low, "calls": prefix.calls + calls}

    most = len(job) * (max(ks) + len(ks).bit_length() * (steps - min(ks)))
    parts = forks.parts(block, most, folder, progress, bisection=True, judged_by=judged_by)
    found, calls = (torch.cat([p[name] for p in parts]) for name in ("captured", "calls"))
    return Bisection(job.prompts, job.seeds, list(forks.starts), found, calls)


@dataclass
class _Prefix:
    """The shared steps of one block: the state before each step at which a fork may begin."""

    snapshots: dict[int, State]
    magnitude: Tensor  # [B, S]
    calls: Tensor  # [], predictions a sample


@dataclass
class _Forks:
    """Samples that go on, from recorded states before some step, under another guidance."""

    job: _Job
    starts: dict[int, int]
    before: BaseGuidance
    after: BaseGuidance
    batch_size: int
    measure: bool

    @classmethod
    def of(cls, denoiser, prompts, seeds, starts, before, after, steps, scheduler, batch_size, measure) -> "_Forks":
        before = ConstantGuidance(0.0) if before is None else before
        after = ConstantGuidance() if after is None else after
        job = _Job.of(denoiser, prompts, seeds, (before, after), steps, scheduler)
        found = start_steps(starts, job.scheduler().timesteps, denoiser.train_timesteps)
        return cls(job, found, before, after, batch_size, measure)

    @cached_property
    def denoiser_settings(self) -> dict:
        """Weights are hashed once a job, and only where something is kept."""
        return self.job.denoiser.settings()

    def settings(self, rows: list[int]) -> dict:
        """What a kept block must have been made with."""
        return {
            **self.denoiser_settings,
            "prompts": [self.job.prompts[i] for i in rows],
            "seeds": [self.job.seeds[i] for i in rows],
            "starts": list(self.starts),
            "before": describe(self.before),
            "after": describe(self.after),
            "steps": self.job.steps,
            "scheduler": self.job.scheduler_name,
            "measure": self.measure,
        }

    def parts(
        self,
        block: Callable[[list[int], tqdm], dict[str, Tensor]],
        most: int,
        folder: str | Path | None,
        progress: bool,
        **settings,
    ) -> list[dict[str, Tensor]]:
        """What ``block`` makes of all samples, ``batch_size`` at a time; finished blocks are kept in ``folder``.

        ``most`` is how many steps all of it takes at most, for the bar; ``settings`` are noted beside the others.
        """
        parts = []
        with tqdm(total=most, unit="step", disable=not progress) as bar:
            for number, rows in enumerate(self.job.blocks(self.batch_size)):
                made_with = lambda rows=rows: {**self.settings(rows), **settings}  # noqa: E731
                parts.append(_kept(folder, number, made_with, lambda rows=rows: block(rows, bar)))
                bar.update(most * (rows[-1] + 1) // len(self.job) - bar.n)  # whatever was there already, or not needed
        return parts

    def prefix(self, rows: list[int], bar: tqdm) -> _Prefix:
        """Run the steps before any guidance, to the last start."""
        state, guidance, ks = self.job.beginning(rows), _fresh(self.before), set(self.starts.values())
        everyone, snapshots, calls = range(len(rows)), {}, 0
        magnitude = torch.full((len(rows), self.job.steps), torch.nan)
        for step in range(self.job.steps + 1):
            if step in ks:
                snapshots[step] = State.merged([state], [everyone])
            if step == (self.job.steps if self.measure else max(ks)):
                break
            seen = _advance(self.job, rows, state, step, guidance, self.measure)
            magnitude[:, step], calls = seen.magnitude.cpu(), calls + seen.calls
            bar.update(len(rows))
        return _Prefix(snapshots, magnitude, torch.tensor(calls))

    def ends(self, rows: list[int], prefix: _Prefix, chosen: list[tuple[int, int]], bar: tqdm) -> Tensor:
        """Clean latents [N, C, H, W] of forks, each (index into ``rows``, step at which it begins)."""
        latents = torch.empty(len(chosen), *self.job.denoiser.latent_shape)
        order = sorted(range(len(chosen)), key=lambda n: chosen[n][1])
        # a guidance that remembers the steps before can take no forks in on the way
        alone = getattr(self.after, "remembers", True)
        for _, group in groupby(order, key=lambda n: chosen[n][1] if alone else None):
            group = list(group)
            for part in (group[i : i + self.batch_size] for i in range(0, len(group), self.batch_size)):
                latents[part] = self._ends_together(rows, prefix, [chosen[n] for n in part], bar)
        return latents

    def _ends_together(self, rows, prefix: _Prefix, chosen: list[tuple[int, int]], bar: tqdm) -> Tensor:
        """`ends` of forks that fit into one network call, in the order of their first step."""
        guidance, running, state = _fresh(self.after), [], None
        for step in range(chosen[0][1], self.job.steps + 1):
            if joining := [i for i, k in chosen if k == step]:
                old = [] if state is None else [(state, range(len(running)))]
                state = State.merged(*zip(*old, (prefix.snapshots[step], joining), strict=True))
                running += [rows[i] for i in joining]
            if step < self.job.steps:
                _advance(self.job, running, state, step, guidance)
                bar.update(len(running))
        return state.latents.float().cpu()


def _passes(guidance: BaseGuidance, timesteps: Tensor) -> list[int]:
    """How many predictions ``guidance`` asks for at each step."""
    guidance, counts = _fresh(guidance), []
    for step, t in enumerate(timesteps):
        guidance.set_state(step, len(timesteps), t)
        counts.append(guidance.num_conditions)
    return counts


def predictions(guidance: BaseGuidance, denoiser: Denoiser, steps: int = 50) -> int:
    """How many predictions a sample takes under ``guidance``."""
    return sum(_passes(guidance, new_scheduler(denoiser, None, steps).timesteps))


def _kept(
    folder: str | Path | None, number: int, settings: Callable[[], dict], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What ``make`` gives, from ``folder`` if it is there already, and kept there, whole or not at all."""
    if folder is None:
        return make()
    path, wanted = Path(folder) / f"{number:03d}.safetensors", settings()
    if path.exists():
        try:
            with safe_open(path, "pt") as file:
                if json.loads((file.metadata() or {}).get("settings", "{}")) != json.loads(json.dumps(wanted)):
                    raise ValueError(f"{path} was made with other settings: delete {folder}, or give another folder")
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise OSError(f"{path} is damaged ({error}): delete it, and the next run makes it again") from error
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    noted = {"settings": json.dumps(wanted)}
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, part, noted)
    os.replace(part, path)
    return made
