"""From prompts, seeds and mitigations to trajectories.

`sampling_steps` is the loop: one call of the network, one combination of its predictions, one step of the scheduler.
Initial noise comes from one CPU generator a seed, so that (prompt, seed) is the same picture on any device.
"""

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import diffusers
import numpy as np
import pandas as pd
import torch
from diffusers import SchedulerMixin
from diffusers.guiders import BaseGuidance
from torch import Tensor
from tqdm import tqdm

from .guidance import ConstantGuidance
from .models import Denoiser


class Samples:
    """What a trajectory and a sweep share: B samples, prompt-major: all seeds of the first prompt, then of the next."""

    def __repr__(self) -> str:
        prompts = len(set(self.prompts))
        return f"{type(self).__name__}({len(self)} samples of {prompts} prompts, latents {list(self.latents.shape)})"

    def __len__(self) -> int:
        return len(self.prompts)

    def images(self) -> Tensor:
        """The final pictures, [B, 3, height, width] in 0..1, of a sweep [B, F, ...]; decoded once."""
        if not hasattr(self, "_images"):
            self._images = self._decoded(self.latents if hasattr(self, "starts") else self.latents[:, -1])
        return self._images

    def _decoded(self, latents: Tensor) -> Tensor:  # [..., C, H, W] -> [..., 3, height, width]
        return self.denoiser.decode(latents.flatten(0, -4)).unflatten(0, latents.shape[:-3])

    def table(self) -> pd.DataFrame:
        """One row a sample, of a sweep one a sample and start: prompt, seed, (start,) calls, gradient_passes."""
        table = pd.DataFrame({"prompt": self.prompts, "seed": self.seeds, "calls": self.network_calls})
        table["gradient_passes"] = getattr(self, "gradient_passes", 0 * self.network_calls)
        return table.merge(pd.DataFrame({"start": self.starts}), how="cross") if hasattr(self, "starts") else table


@dataclass(repr=False)
class Trajectory(Samples):
    """B sampling runs of S steps.

    >>> import basinlab
    >>> run = sample(basinlab.MixtureDenoiser.with_duplicate(), ["memorized", "ordinary"], [0, 1, 2], progress=False)
    >>> run.of("ordinary")
    Trajectory(3 samples of 1 prompts, latents [3, 51, 2, 1, 1])
    """

    prompts: list[str]
    seeds: list[int]
    timesteps: Tensor  # [S], falling; ints, but for schedulers that stop between them
    latents: Tensor  # [B, S+1, C, H, W], from the initial noise to the clean latents; without ``record`` the last only
    predicted: Tensor | None  # [B, S, C, H, W], clean latents predicted under guidance; None without ``record``
    guidance_magnitude: Tensor  # [B, S], ||eps_c - eps_u||_2; NaN where only one prediction was made
    transition_point: Tensor  # [B], the timestep at which a rule began the full guidance; NaN where none did
    network_calls: Tensor  # [B], predictions made: two a step under CFG; those of mitigations included
    gradient_passes: Tensor  # [B], how many of them were differentiated
    denoiser: Denoiser

    def predicted_images(self, steps: Sequence[int]) -> Tensor:
        """The clean pictures predicted at ``steps``, indices into ``timesteps``: [B, len(steps), 3, h, w]."""
        return self._decoded(self.recorded("predicted")[:, list(steps)])

    def recorded(self, name: str) -> Tensor:
        """``latents`` or ``predicted`` of all steps."""
        if self.predicted is None:
            raise ValueError("this trajectory kept its last latents only: sample again with record=True")
        return getattr(self, name)

    def of(self, prompt: str) -> "Trajectory":
        """The runs of one prompt."""
        if prompt not in self.prompts:
            raise KeyError(f"no run of {prompt!r}; the prompts are {list(dict.fromkeys(self.prompts))}")
        return self[[i for i, p in enumerate(self.prompts) if p == prompt]]

    def __getitem__(self, rows: int | slice | Sequence[int]) -> "Trajectory":
        return _of_samples([self], np.atleast_1d(np.arange(len(self))[rows]).tolist())


def _of_samples(items: Sequence, rows: Sequence[int] | None = None):
    """The samples of several dataclasses ``items`` as one, or ``rows`` of the first one's samples."""

    def changed(values: list):
        if rows is not None:
            return [values[0][i] for i in rows] if isinstance(values[0], list) else values[0][rows]
        return [x for entries in values for x in entries] if isinstance(values[0], list) else torch.cat(values)

    shared = ("timesteps", "denoiser", "norms", "scheduler", "mitigations")  # the others have an entry a sample
    values = {f.name: [getattr(item, f.name) for item in items] for f in fields(items[0]) if f.name not in shared}
    return replace(items[0], **{name: changed(found) for name, found in values.items() if found[0] is not None})


@dataclass
class State:
    """B samples before one step, as a `Mitigation` sees and changes them."""

    denoiser: Denoiser
    prompts: list[str]
    seeds: list[int]
    texts: list[str]  # which are embedded: the prompts as mitigations left them
    latents: Tensor  # [B, C, H, W]
    conditional: Tensor  # [B, L, E], the embeddings of the texts
    unconditional: Tensor  # [B, L, E], of "", or of what a mitigation guides away from
    generators: list[torch.Generator]  # of the noise that a stochastic scheduler adds
    calls: Tensor  # [B], predictions made so far
    gradient_passes: Tensor  # [B], how many of them were differentiated
    scheduler: SchedulerMixin  # the solver with the samples' history
    mitigations: "Sequence[Mitigation]" = ()
    token_scale: Tensor | None = None  # [B, L], factors of the cross-attention's logits to each token; 0 masks it
    spikes: Tensor | None = None  # [B, 2], factor and limit of the spike tokens' logits in ``pred_positive``
    norms: Tensor | None = None  # [2, S, 3], mean and deviation of the norms at ordinary prompts

    def pick(self, rows: Sequence[int]) -> "State":
        """A copy of some of the samples, with their history."""
        picked = _of_samples([self], rows := list(rows))
        picked.generators = [generator.clone_state() for generator in picked.generators]
        picked.scheduler = _scheduler_of([self], lambda values: values[0][rows])
        return picked

    def join(self, other: "State") -> None:
        """Append the samples of ``other``, which are before the same step."""
        scheduler = _scheduler_of([self, other], torch.cat)
        vars(self).update(vars(_of_samples([self, other])), scheduler=scheduler)


def _scheduler_of(states: Sequence[State], change: Callable) -> SchedulerMixin:
    """A scheduler with the history of ``states``: ``change`` makes each tensor that has one entry a sample."""
    shape = states[0].latents.shape[1:]

    def changed(values: list):
        if isinstance(values[0], list):
            return [changed(list(entries)) for entries in zip(*values, strict=True)]
        return change(values) if isinstance(values[0], Tensor) and values[0].shape[1:] == shape else values[0]

    scheduler = copy.copy(states[0].scheduler)
    vars(scheduler).update({key: changed([vars(state.scheduler)[key] for state in states]) for key in vars(scheduler)})
    return scheduler


class Mitigation:
    """What a mitigation does to samples beside guidance. Each method here leaves them as they are.

    >>> Mitigation().text("an owl", seed=0, denoiser=None)
    'an owl'
    """

    calls = 0  # predictions of a sample that one of its ``iterations`` makes before the first step

    def text(self, prompt: str, seed: int, denoiser: Denoiser) -> str:
        """The text that is embedded in the place of ``prompt``."""
        return prompt

    def begin(self, state: State) -> None:
        """Change embedding, attention or initial noise of samples before their first step, in place."""

    def condition(self, conditional: Tensor, state: State, timestep: int) -> Tensor:
        """The embedding [B, L, E] that is used at ``timestep``."""
        return conditional

    def settle(self, x: Tensor, state: State, step: int, kind: int) -> Tensor:
        """What takes the place of ``x`` at ``step``: the prediction (kind 0), the update (1) or the latents (2)."""
        return x

    def most_predictions(self) -> int:
        """At most so many predictions a sample before the first step, a differentiated one counted as three."""
        return self.calls * getattr(self, "iterations", 1)


Mitigations = BaseGuidance | Mitigation | Sequence[BaseGuidance | Mitigation] | None
BOTH = ("pred_cond", "pred_uncond")  # diffusers' names of the two predictions


def sampling_steps(state: State, guidance: BaseGuidance, first: int = 0, measure: bool = False) -> Iterator:
    """Take the samples of ``state``, in place, from step ``first`` to the last.

    ``guidance`` gets the predictions that it needs, as epsilon whatever the network predicts; with ``measure`` both are
    made. Yields after each step the clean latents predicted [B, C, H, W] and the guidance magnitude [B].
    """
    denoiser, timesteps = state.denoiser, state.scheduler.timesteps
    if state.spikes is not None and "pred_positive" not in guidance._input_predictions:
        raise ValueError(f"{type(guidance).__name__} asks for no prediction with damped spikes: give AttractRepel")
    takes_noise = "generator" in inspect.signature(state.scheduler.step).parameters
    for step in range(first, len(timesteps)):
        t = timesteps[step]
        guidance.set_state(step, len(timesteps), t)
        needed = [getattr(part, BaseGuidance._identifier_key) for part in guidance.prepare_inputs({"x": BOTH})]
        predictions = predict(state, t, [*dict.fromkeys([*(BOTH if measure else ()), *needed])])  # one network call
        prediction = guidance.forward(**{name: predictions[name] for name in needed})[0] / denoiser.epsilon_scale(t)
        for mitigation in state.mitigations:
            prediction = mitigation.settle(prediction, state, step, 0)
        clean = denoiser.predicted_clean(state.scheduler.scale_model_input(state.latents, t), prediction, t)
        noise = {"generator": state.generators} if takes_noise else {}
        latents = state.scheduler.step(prediction, t, state.latents, **noise, return_dict=False)[0]
        for mitigation in state.mitigations:
            update = latents - state.latents
            latents = latents + (mitigation.settle(update, state, step, 1) - update)  # exactly itself if unchanged
            latents = mitigation.settle(latents, state, step, 2)
        state.latents = latents
        if len(bad := (~state.latents.isfinite()).flatten(1).any(dim=1).nonzero()):
            which = f"{state.prompts[bad[0]]!r}, seed {state.seeds[bad[0]]}, are not finite after step {step}"
            raise FloatingPointError(f"latents of {which} (t = {int(t)}): use float32, a smaller scale or more steps")
        conditional, unconditional = (predictions.get(name, torch.full_like(clean, torch.nan)) for name in BOTH)
        yield clean, (conditional - unconditional).flatten(1).float().norm(dim=1).cpu()


def predict(state: State, t: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The predictions called ``names`` at ``t``, [B, C, H, W] each, in units of epsilon, from one network call."""
    conditional = state.conditional
    for mitigation in state.mitigations:
        conditional = mitigation.condition(conditional, state, int(t))
    embeddings = {"pred_cond": conditional, "pred_uncond": state.unconditional, "pred_positive": conditional}
    attention = {}
    if state.token_scale is not None:  # a mask is for both predictions, a larger weight for the prompt's only
        scales = [state.token_scale.clamp(max=1) if name == "pred_uncond" else state.token_scale for name in names]
        attention["token_scale"] = torch.cat(scales)
    if state.spikes is not None and "pred_positive" in names:  # a factor of 1 changes nothing
        spikes = [state.spikes if name == "pred_positive" else torch.ones_like(state.spikes) for name in names]
        attention["spikes"] = torch.cat(spikes)
    inputs = state.scheduler.scale_model_input(state.latents, t).repeat(len(names), 1, 1, 1)
    outputs = state.denoiser(inputs, t, torch.cat([embeddings[name] for name in names]), **attention)
    state.calls = state.calls + len(names)
    return dict(zip(names, (outputs * state.denoiser.epsilon_scale(t)).chunk(len(names)), strict=True))


def run_steps(state: State, guidance: BaseGuidance, first: int, bar: tqdm, record=True, measure=False) -> Trajectory:
    guidance, latents, predicted, magnitudes = fresh(guidance), [state.latents], [], []
    for clean, magnitude in sampling_steps(state, guidance, first, measure):
        magnitudes.append(magnitude)
        predicted = [*predicted, clean] if record else None
        latents = [*latents, state.latents] if record else [state.latents]
        bar.update(len(state.seeds))
    point = getattr(guidance, "transition_point", None)
    point = torch.as_tensor(torch.nan if point is None else point).float().cpu().expand(len(state.seeds)).clone()
    latents, predicted = (x and torch.stack(x, 1).float().cpu() for x in (latents, predicted))
    rest = (torch.stack(magnitudes, 1), point, state.calls, state.gradient_passes, state.denoiser)
    return Trajectory(state.prompts, state.seeds, state.scheduler.timesteps[first:].cpu(), latents, predicted, *rest)


def fresh(guidance: BaseGuidance) -> BaseGuidance:
    """A copy of a guider that has seen no step yet."""
    guidance = copy.deepcopy(guidance)
    guidance._step = None
    return guidance


def new_scheduler(denoiser: Denoiser, name: str | None, steps: int) -> SchedulerMixin:
    """The denoiser's own scheduler, or the diffusers class called ``name``, set to ``steps``."""
    kind = type(denoiser.scheduler) if name is None else getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"diffusers has no scheduler {name!r}; give the name of a class, such as 'DDIMScheduler'")
    if steps not in range(1, denoiser.scheduler.config.num_train_timesteps):  # as many would be one timestep too many
        raise ValueError(f"steps is {steps}: give 1 to {denoiser.scheduler.config.num_train_timesteps - 1}")
    # some schedulers are made for pixels and by default clip to -1..1, which latents exceed
    scheduler = kind.from_config(denoiser.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(steps, device=denoiser.device)
    if len(scheduler.timesteps) != steps:  # some predict twice at a step, and so do not go step by step
        raise ValueError(f"{kind.__name__} makes {len(scheduler.timesteps)} predictions in {steps} steps: give another")
    own, found = denoiser.scheduler.alphas_cumprod, getattr(scheduler, "alphas_cumprod", torch.zeros(0))
    rising = scheduler.timesteps[0] < scheduler.timesteps[-1]
    if rising or found.shape != own.shape or not torch.allclose(found.to(own), own, atol=1e-4):
        raise ValueError(f"{kind.__name__} does not go down the model's own noise schedule: give another")
    return scheduler


def initial_noise(denoiser: Denoiser, generators: Sequence[torch.Generator | int]) -> Tensor:
    """Unit Gaussian noise [B, C, H, W], one CPU generator or seed a sample, as diffusers draws it."""
    own = [g if isinstance(g, torch.Generator) else torch.Generator().manual_seed(int(g)) for g in generators]
    return torch.stack([torch.randn(denoiser.latent_shape, generator=generator) for generator in own])


def every_pair(prompts: str | Sequence[str], seeds: int | Sequence[int]) -> list[tuple[str, int]]:
    """Every prompt with every seed, prompt-major. Raises ValueError for what Python would misread."""
    if isinstance(prompts, pd.DataFrame | dict):
        raise ValueError(f"prompts is a {type(prompts).__name__}: give its texts, such as table['prompt']")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    try:
        whole = [operator.index(seed) for seed in np.atleast_1d(np.asarray(seeds, object))]
    except TypeError:
        whole = []
    if not prompts or not whole or min(whole) < 0:
        raise ValueError(f"{len(prompts)} prompts, seeds {seeds!r}: give one of each at least, seeds from 0 on")
    if wrong := [prompt for prompt in prompts if not isinstance(prompt, str) or not prompt.strip()]:
        raise ValueError(f"the prompt {wrong[0]!r} is no text; for unconditional sampling use ConstantGuidance(0)")
    if again := [x for x, count in Counter([*prompts, *whole]).items() if count > 1]:
        raise ValueError(f"{again[0]!r} is given twice: equal samples would count as several")
    return [(prompt, seed) for prompt in prompts for seed in whole]


def split(mitigations: Mitigations) -> tuple[BaseGuidance, list[Mitigation]]:
    """The guidance among ``mitigations``, CFG 7.5 where there is none, and the others in their order."""
    if not isinstance(mitigations, list | tuple):
        mitigations = [] if mitigations is None else [mitigations]
    if wrong := [m for m in mitigations if not isinstance(m, BaseGuidance | Mitigation)]:
        raise ValueError(f"{wrong[0]!r} is no guidance and no mitigation: give an object such as ConstantGuidance(7.5)")
    guidances = [m for m in mitigations if isinstance(m, BaseGuidance)] or [ConstantGuidance()]
    if len(guidances) > 1:
        raise ValueError(f"{[type(g).__name__ for g in guidances]} are several guidances: give one at most")
    if type(guidances[0]).prepare_models is not BaseGuidance.prepare_models:
        raise ValueError(f"{type(guidances[0]).__name__} changes the network as it goes: use diffusers' pipelines")
    return guidances[0], [m for m in mitigations if isinstance(m, Mitigation)]


def only_guidance(guidance: BaseGuidance | None) -> BaseGuidance:
    """A fresh copy of ``guidance``, or CFG 7.5. Another mitigation, which acts on whole runs, is refused."""
    found, others = split(guidance)
    if others:
        raise ValueError(f"{type(others[0]).__name__} acts on samples from their initial noise on: give a guidance")
    return fresh(found)


def begin(denoiser: Denoiser, pairs, steps: int, scheduler: str | None, mitigations=(), latents=None) -> State:
    """The samples of ``pairs`` at ``latents``, or at their initial noise, as the mitigations leave them."""
    solver, (prompts, seeds) = new_scheduler(denoiser, scheduler, steps), map(list, zip(*pairs, strict=True))
    texts, generators = prompts, [torch.Generator().manual_seed(seed) for seed in seeds]
    for mitigation in mitigations:
        texts = [mitigation.text(text, seed, denoiser) for text, seed in zip(texts, seeds, strict=True)]
    noise = initial_noise(denoiser, generators)  # drawn in any case: what a scheduler draws later is other noise
    latents = noise * solver.init_noise_sigma if latents is None else latents
    latents, distinct = latents.to(denoiser.device, denoiser.dtype), list(dict.fromkeys(texts))
    conditional = denoiser.embed(distinct)[[distinct.index(text) for text in texts]]
    embeddings = (conditional, denoiser.embed([""]).expand_as(conditional))
    counts = torch.zeros(2, len(texts), dtype=torch.long)
    state = State(denoiser, prompts, seeds, texts, latents, *embeddings, generators, *counts, solver, mitigations)
    for mitigation in mitigations:
        mitigation.begin(state)
    return state


def blocks(items: Sequence, size: int) -> list[Sequence]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def sample(
    denoiser: Denoiser, prompts: str | Sequence[str], seeds: int | Sequence[int], mitigations: Mitigations = None, *,
    steps=50, scheduler: str | None = None, batch_size=32, record=True, measure=False, progress=True,
) -> Trajectory:  # fmt: skip
    """Sample every prompt with every seed.

    ``mitigations`` is one guidance, one `Mitigation`, or a list of them, which act in this order. A guidance is any
    diffusers guider with the two predictions, by default CFG 7.5. ``scheduler`` names a diffusers class; DDIM drifts
    beyond 200 steps. ``batch_size`` bounds memory, not results. Without ``record`` only the last latents are kept.
    ``measure`` makes both predictions at every step, so that the guidance magnitude is known everywhere.

    >>> import basinlab
    >>> world = basinlab.MixtureDenoiser.with_duplicate()
    >>> sample(world, "memorized", [0, 1], basinlab.StaticTransitionPoint(500), progress=False).network_calls
    tensor([75, 75])
    """
    guidance, others = split(mitigations)
    pairs, parts = every_pair(prompts, seeds), []
    with tqdm(total=len(pairs) * steps, unit="step", disable=not progress) as bar:
        for block in blocks(pairs, batch_size):
            state = begin(denoiser, block, steps, scheduler, others)
            parts.append(run_steps(state, guidance, 0, bar, record, measure))
    return _of_samples(parts)


def sample_from(
    denoiser: Denoiser, prompts: Sequence[str], latents: Tensor, timestep: int, guidance: BaseGuidance | None = None, *,
    seeds: Sequence[int] | None = None, steps=50, scheduler: str | None = None, batch_size=32, progress=True,
) -> Trajectory:  # fmt: skip
    """Go on from states x_t [B, C, H, W] at ``timestep``, one prompt each. A multistep solver starts without history.

    ``seeds``, by default 0 to B - 1, are of the noise that a stochastic scheduler adds.

    >>> from basinlab import MixtureDenoiser
    >>> sample_from(MixtureDenoiser.with_duplicate(), ["memorized"], torch.zeros(1, 2, 1, 1), 500, progress=False)
    Trajectory(1 samples of 1 prompts, latents [1, 26, 2, 1, 1])
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    seeds = range(len(latents)) if seeds is None else [*map(int, seeds)]
    if not len(prompts) == len(seeds) == len(latents):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds for {len(latents)} states: give one for each")
    pairs, guidance, parts = list(zip(prompts, seeds, strict=True)), only_guidance(guidance), []
    timesteps = new_scheduler(denoiser, scheduler, steps).timesteps.tolist()
    if timestep not in timesteps:
        raise ValueError(f"{timestep} is no timestep of this scheduler with {steps} steps; they are {timesteps}")
    first = timesteps.index(timestep)
    with tqdm(total=len(pairs) * (steps - first), unit="step", disable=not progress) as bar:
        for block, states in zip(blocks(pairs, batch_size), latents.split(batch_size), strict=True):
            state = begin(denoiser, block, steps, scheduler, latents=states)
            if hasattr(state.scheduler, "set_begin_index"):  # one without counts by the timestep
                state.scheduler.set_begin_index(first)
            parts.append(run_steps(state, guidance, first, bar))
    return _of_samples(parts)


def network_calls(guidance: BaseGuidance, timesteps: Tensor) -> list[int]:
    """The number of predictions that ``guidance`` needs at each step."""
    guidance, counts = fresh(guidance), []
    for step, t in enumerate(timesteps):
        guidance.set_state(step, len(timesteps), t)
        counts.append(guidance.num_conditions)
    return counts


def most_predictions(denoiser: Denoiser, mitigations: Mitigations, steps: int = 50) -> int:
    """The most predictions that a sample takes, a differentiated one counted as three."""
    guidance, others = split(mitigations)
    own = sum(network_calls(guidance, new_scheduler(denoiser, None, steps).timesteps))
    return own + sum(mitigation.most_predictions() for mitigation in others)
