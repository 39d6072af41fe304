"""Forks: steps before the guidance are run once; a copy, with the solver's history, goes on from every start."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers.guiders import BaseGuidance
from torch import Tensor
from tqdm import tqdm

from . import sampling
from .guidance import ConstantGuidance, describe
from .models import Denoiser
from .sampling import Samples, State, begin, blocks, network_calls, only_guidance, sampling_steps
from .store import kept


@dataclass(repr=False)
class Sweep(Samples):
    """B samples, the guidance of each started at F timesteps.

    >>> from basinlab import MixtureDenoiser
    >>> swept = sweep(MixtureDenoiser.with_duplicate(), "memorized", [0, 1], [999, 500, 0], steps=10, progress=False)
    >>> swept.images().shape, swept.network_calls, swept.network_calls_apart
    (torch.Size([2, 3, 2, 1, 1]), tensor([40, 40]), tensor([45, 45]))
    """

    prompts: list[str]
    seeds: list[int]
    starts: list[int]  # F timesteps of the scheduler, falling; 0: never guided (`start_steps`)
    timesteps: Tensor  # [S]
    latents: Tensor  # [B, F, C, H, W], the clean latents of each start
    guidance_magnitude: Tensor  # [B, S] before the guidance starts, NaN where it was not measured
    network_calls: Tensor  # [B], predictions made for all starts together
    network_calls_apart: Tensor  # [B], predictions that one run for each start would have made
    denoiser: Denoiser


def start_steps(starts: Sequence[int] | None, timesteps: Tensor, train_timesteps: int = 1000) -> dict[int, int]:
    """Start times as timesteps of a scheduler, falling, each with the step at which guidance begins.

    A start between two timesteps begins at the later one, with a warning; one below the last becomes 0, never (where 0
    is a timestep: guidance at that one step). ``None`` is every fourth timestep and never.
    """
    times = [int(t) for t in timesteps]
    given = sorted({int(t) for t in ([*times[::4], 0] if starts is None else starts)}, reverse=True)
    if not given or given[0] >= train_timesteps or given[-1] < 0:
        raise ValueError(f"starts are {given}: give at least one, all from 0 to {train_timesteps - 1}")
    steps = {t: next((k for k, time in enumerate(times) if time <= t), len(times)) for t in given}
    snapped = {t: times[k] if k < len(times) else 0 for t, k in steps.items()}
    if moved := [f"{t} becomes {s or 'never'}" for t, s in snapped.items() if t != s]:
        warnings.warn(f"guidance starts at timesteps of the scheduler only: {', '.join(moved)}", stacklevel=3)
    return {snapped[t]: k for t, k in steps.items()}


class _Forks:
    """The samples of one sweep or bisection, in blocks. The options are those of `sweep`."""

    def __init__(self, denoiser, prompts, seeds, starts, before=None, after=None, steps=50, scheduler=None,
                 batch_size=32, measure=False, folder=None, progress=True):  # fmt: skip
        self.denoiser, self.steps, self.scheduler, self.measure = denoiser, steps, scheduler, measure
        self.pairs, self.batch_size, self.folder = sampling.every_pair(prompts, seeds), batch_size, folder
        self.before, self.after = only_guidance(before or ConstantGuidance(0.0)), only_guidance(after)
        if getattr(self.after, "remembers", hasattr(self.after, "momentum_buffer")):
            raise ValueError(f"{type(self.after).__name__} remembers steps, which forks do not share: use `sample`")
        self.timesteps = sampling.new_scheduler(denoiser, scheduler, steps).timesteps.cpu()
        self.starts = start_steps(starts, self.timesteps, denoiser.scheduler.config.num_train_timesteps)
        self.first_steps, self.bar = list(self.starts.values()), tqdm(unit="step", disable=not progress)
        calls = network_calls(self.after, self.timesteps)
        self.calls = [sum(calls[step:]) for step in range(steps + 1)]  # of a fork that begins at a step

    def results(self, name: str, block: Callable, **settings) -> tuple[list, dict[str, Tensor]]:
        """Prompts, seeds and starts; and what ``block`` makes of each ``batch_size`` samples, kept once it is made."""
        if self.folder is not None:
            settings |= {"starts": list(self.starts), "before": describe(self.before), "after": describe(self.after)}
            settings |= {"steps": self.steps, "scheduler": self.scheduler, "measure": self.measure}
            settings |= self.denoiser.settings()
        parts = []
        for rows in blocks(range(len(self.pairs)), self.batch_size):
            pairs = [self.pairs[i] for i in rows]
            parts.append(kept(self.folder, name, settings | {"pairs": pairs}, partial(block, rows), ".safetensors"))
        self.bar.close()
        whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        return [*map(list, zip(*self.pairs, strict=True)), list(self.starts)], whole

    def prefix(self, rows: Sequence[int]) -> tuple[dict[int, State], Tensor, Tensor]:
        """The steps before guidance starts: the state at each start, the magnitude [B, S], the predictions made [B]."""
        state = begin(self.denoiser, [self.pairs[i] for i in rows], self.steps, self.scheduler)
        magnitude, everyone = torch.full((len(rows), self.steps), torch.nan), range(len(rows))
        snapshots, last = {0: state.pick(everyone)}, self.steps if self.measure else max(self.first_steps)
        walk = sampling_steps(state, self.before, measure=self.measure)
        for step, (_, seen) in zip(range(last), walk, strict=False):
            magnitude[:, step] = seen
            if step + 1 in self.first_steps:
                snapshots[step + 1] = state.pick(everyone)
            self.bar.update(len(rows))
        return snapshots, magnitude, state.calls

    def ends(self, snapshots: dict[int, State], forks: Sequence[tuple[int, int]]) -> Tensor:
        """Clean latents [N, C, H, W] of ``forks``, (row, step) each, which join one batch at their own steps."""
        ends = torch.empty(len(forks), *self.denoiser.latent_shape)
        for part in blocks(sorted(range(len(forks)), key=lambda n: forks[n][1]), self.batch_size):
            rows = {step: [row for row, k in (forks[n] for n in part) if k == step] for step in self.first_steps}
            first = forks[part[0]][1]
            state = snapshots[first].pick(rows[first])
            for step, _ in enumerate(sampling_steps(state, self.after, first), first):
                self.bar.update(len(state.seeds))
                if rows.get(step + 1):
                    state.join(snapshots[step + 1].pick(rows[step + 1]))
            ends[part] = state.latents.float().cpu()
        return ends


def sweep(
    denoiser: Denoiser, prompts: str | Sequence[str], seeds: int | Sequence[int], starts: Sequence[int] | None = None,
    *, before: BaseGuidance | None = None, after: BaseGuidance | None = None, steps=50, batch_size=32,
    scheduler: str | None = None, measure=False, folder: str | Path | None = None, progress=True,
) -> Sweep:  # fmt: skip
    """Sample every prompt and seed with the guidance started at each of ``starts`` (paper, figure 2).

    ``starts`` are timesteps, see `start_steps`. ``before`` and ``after`` are the guidance before the start and from it
    on, by default none (scale 0) and CFG 7.5; ``after`` may not remember steps, as a dynamic transition point does.
    ``measure`` is that of `sample`. A killed sweep goes on from the blocks of ``batch_size`` samples in ``folder``.

    >>> from basinlab import MixtureDenoiser
    >>> sweep(MixtureDenoiser.with_duplicate(), "memorized", [0], progress=False).starts
    [999, 919, 839, 759, 679, 599, 519, 440, 360, 280, 200, 120, 40, 0]
    """
    options = (before, after, steps, scheduler, batch_size, measure, folder, progress)
    forks = _Forks(denoiser, prompts, seeds, starts, *options)
    calls = sum(forks.calls[step] for step in forks.first_steps)

    def block(rows: Sequence[int]) -> dict[str, Tensor]:
        snapshots, magnitude, made = forks.prefix(rows)
        latents = forks.ends(snapshots, [(i, step) for i in range(len(rows)) for step in forks.first_steps])
        return {"latents": latents.unflatten(0, (len(rows), -1)), "magnitude": magnitude, "calls": made + calls}

    samples, found = forks.results("sweep", block)
    first = network_calls(forks.before, forks.timesteps)
    apart = torch.full_like(found["calls"], sum(sum(first[:step]) for step in forks.first_steps) + calls)
    return Sweep(*samples, forks.timesteps, found["latents"], found["magnitude"], found["calls"], apart, denoiser)


def bisect(denoiser, prompts, seeds, captured: Callable, starts=None, *, judged_by="", **options) -> pd.DataFrame:
    """Find between which of ``starts`` the outcome of each sample flips, by halving: log2(F + 1) forks instead of F.

    Right wherever the outcome is monotone in the start. ``captured(pictures, samples)`` tells which of the pictures
    [N, 3, height, width], of the samples with these N indices, are captured, [N] bool, and ``judged_by`` by what, on
    which files in ``folder`` depend. Options are those of `sweep`. Gives the columns of `flip_table`, and calls.

    >>> from basinlab import MixtureDenoiser
    >>> bisect(MixtureDenoiser.with_duplicate(), "memorized", 0, lambda x, _: x[:, 0, 0, 0] > 9, progress=0).outcome[0]
    'never'
    """
    forks = _Forks(denoiser, prompts, seeds, starts, **options)
    if forks.folder is not None and not judged_by:
        raise ValueError("folder keeps outcomes: say by judged_by what they were judged by")

    def block(rows: Sequence[int]) -> dict[str, Tensor]:
        (snapshots, _, calls), count = forks.prefix(rows), len(rows)
        # starts before low are known, or taken, to capture; those from high on not to
        low, high = torch.zeros(count, dtype=torch.long), torch.full((count,), len(forks.starts))
        while len(rest := (low < high).nonzero().flatten()):
            middle = (low + high) // 2
            chosen = [(int(i), forks.first_steps[middle[i]]) for i in rest]
            pictures = denoiser.decode(forks.ends(snapshots, chosen))
            inside = torch.as_tensor(captured(pictures, [rows[i] for i in rest]), dtype=torch.bool)
            low[rest[inside]] = middle[rest[inside]] + 1
            high[rest[~inside]] = middle[rest[~inside]]
            calls[rest] += torch.tensor([forks.calls[step] for _, step in chosen])
        return {"captured": low, "calls": calls}

    (prompts, seeds, starts), found = forks.results("bisection", block, judged_by=judged_by)
    samples = pd.DataFrame({"prompt": prompts, "seed": seeds})
    return flip_table(samples, found["captured"].numpy(), starts).assign(calls=found["calls"])


def flip_table(samples: pd.DataFrame, flip: np.ndarray, starts: Sequence[int]) -> pd.DataFrame:
    """``samples`` with outcome to point of `basin.transition_points`; the first ``flip`` of ``starts`` capture."""
    edges = np.array([np.nan, *starts, np.nan])
    captured_at, free_at = edges[flip], edges[flip + 1]
    outcome = np.select([flip == 0, flip == len(starts)], ["never", "always"], "flips")
    return samples.assign(outcome=outcome, captured_at=captured_at, free_at=free_at, point=(captured_at + free_at) / 2)
