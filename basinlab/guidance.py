"""Guidance strategies as diffusers guiders.

The contract: at each step every sample has one weight w, and its combined prediction is
eps_u + w (eps_c - eps_u). Where w is 0 for all only the unconditional prediction is asked for,
where it is 1 only the conditional one. Timesteps are those of the training schedule, 999 to 0.
The objects are `diffusers.guiders.BaseGuidance`, so they are saved, loaded and plugged into
diffusers' modular pipelines as any other guider; a step that is not after the last one begins a
new batch.

A strategy that has a transition point tells it, once it is reached, as ``transition_point``: the
first timestep at which the full guidance acts.
"""

import logging
import math
from typing import ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor


def describe(guidance: BaseGuidance) -> dict:
    """The class and the settings of a guider, for a record of what was done."""
    config = {k: v for k, v in guidance.config.items() if not k.startswith("_")}
    plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in config.items()}
    return {"guider": type(guidance).__name__, **plain}


class _WeightedGuidance(BaseGuidance):
    """Classifier-free guidance (Ho and Salimans 2022) with a weight that depends on the timestep."""

    _input_predictions: ClassVar[list[str]] = ["pred_cond", "pred_uncond"]
    remembers = False  # whether what it does at a step depends on the steps before

    def __init__(self):
        # diffusers warns at each construction that guiders are experimental; once is a reader's fill
        logger = logging.getLogger("diffusers.guiders.guider_utils")
        level = logger.level
        logger.setLevel(logging.ERROR)
        super().__init__()
        logger.setLevel(level)
        self._begin()

    def _begin(self) -> None:
        """Forget the batch before: called whenever steps start again."""

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        if self._step is None or step <= self._step:
            self._begin()
        super().set_state(step, num_inference_steps, timestep)

    def weight(self, timestep: int) -> float:
        """w at ``timestep``."""
        raise NotImplementedError

    def timesteps_named(self) -> tuple[int, ...]:
        """The timesteps that this guidance was given, for a sampler to check against its schedule."""
        return ()

    def new(self, **changes) -> "_WeightedGuidance":
        """A copy with ``changes``; diffusers' own forgets arguments that were given by position."""
        return type(self)(**{k: v for k, v in self.config.items() if not k.startswith("_")} | changes)

    def _needed(self) -> list[str]:
        if self._timestep is None:  # a pipeline that asks before the first step has to be ready for both
            return list(self._input_predictions)
        weight = self.weight(int(self._timestep))
        return [name for name, idle in zip(self._input_predictions, (0.0, 1.0), strict=True) if weight != idle]

    def prepare_inputs(self, data: dict) -> list:
        return [self._prepare_batch(data, self._input_predictions.index(name), name) for name in self._needed()]

    def prepare_inputs_from_block_state(self, data, input_fields: dict) -> list:
        return [
            self._prepare_batch_from_block_state(input_fields, data, self._input_predictions.index(name), name)
            for name in self._needed()
        ]

    def __call__(self, data: list) -> GuiderOutput:
        output = super().__call__(data)
        if self._step + 1 == self._num_inference_steps:
            self._timestep = None  # the run is over: a pipeline that asks now asks for the next one
        return output

    def forward(self, pred_cond: Tensor | None = None, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """eps_u + w (eps_c - eps_u); a prediction with weight 0 may be None."""
        weight = self.weight(int(self._timestep))
        if weight == 0:
            combined = pred_uncond
        elif weight == 1:
            combined = pred_cond
        else:
            combined = pred_uncond + weight * (pred_cond - pred_uncond)
        return GuiderOutput(pred=combined, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        return self._needed()[self._count_prepared - 1] == "pred_cond"

    @property
    def num_conditions(self) -> int:
        return len(self._needed())


class ConstantGuidance(_WeightedGuidance):
    """The same guidance scale at every step: 0 unconditional, 1 conditional, 7.5 the paper's CFG.

    >>> ConstantGuidance(3.0).weight(500)
    3.0
    """

    @register_to_config
    def __init__(self, guidance_scale: float = 7.5):
        super().__init__()
        self.guidance_scale = guidance_scale

    def weight(self, timestep: int) -> float:
        return self.guidance_scale


class StaticTransitionPoint(_WeightedGuidance):
    """CFG from one timestep on (paper, STP): ``before`` while t > ``start``, then ``guidance_scale``.

    ``start`` 999 is CFG from T on, 0 is CFG at the last timestep at most. Between two timesteps of
    the sampler CFG starts at the later one; ``transition_point`` says at which.

    >>> late = StaticTransitionPoint(start=500, guidance_scale=7.5)
    >>> late.weight(501), late.weight(500)
    (0.0, 7.5)
    """

    @register_to_config
    def __init__(self, start: int, guidance_scale: float = 7.5, before: float = 0.0):
        super().__init__()
        self.start = start
        self.guidance_scale = guidance_scale
        self.before = before

    def _begin(self) -> None:
        self.transition_point: Tensor | None = None

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        super().set_state(step, num_inference_steps, timestep)
        if self.transition_point is None and int(timestep) <= self.start:
            self.transition_point = torch.tensor(float(timestep))

    def weight(self, timestep: int) -> float:
        return self.before if timestep > self.start else self.guidance_scale

    def timesteps_named(self) -> tuple[int, ...]:
        return (self.start,)


class DynamicTransitionPoint(_WeightedGuidance):
    """CFG, per sample, once the guidance magnitude has passed its first local minimum (paper, DTP).

    The magnitude ||eps_c - eps_u|| is watched along the way. As in the official script the point is
    the first timestep at which it has risen after a fall, one step after the minimum itself; CFG
    acts from that step on. A sample that shows no minimum gets CFG at ``latest`` all the same, and
    its ``transition_point`` stays NaN.

    Args:
        guidance_scale: after the point.
        before: scale before the point: 0 as in the paper, 1 as in the official script, or negative
            (see `OppositeGuidance`).
        latest: timestep from which every sample is guided; 500 is the paper's static point of SD 2.1.

    In a modular pipeline the predictions are taken as they come; `sample` gives them in units of
    epsilon, also for a network that predicts v.

    >>> import basinlab
    >>> world = basinlab.MixtureDenoiser.with_duplicate()
    >>> run = basinlab.sample(world, "memorized", [0, 1, 2], DynamicTransitionPoint(3.0), progress=False)
    >>> run.transition_point.tolist()  # seeds 0 and 1 showed no minimum before t = 500
    [nan, nan, 599.0]
    """

    remembers = True

    @register_to_config
    def __init__(self, guidance_scale: float = 7.5, before: float = 0.0, latest: int = 500):
        super().__init__()
        self.guidance_scale = guidance_scale
        self.before = before
        self.latest = latest

    def _begin(self) -> None:
        self._previous: list[Tensor] = []  # magnitudes of the last two steps, [B] each
        self._guided: Tensor | None = None  # [B] bool
        self.transition_point: Tensor | None = None  # [B], NaN where no minimum was seen

    def weight(self, timestep: int) -> float:
        """The scale of a sample that shows no local minimum."""
        return self.before if timestep > self.latest else self.guidance_scale

    def timesteps_named(self) -> tuple[int, ...]:
        return (self.latest,)

    def _needed(self) -> list[str]:
        return list(self._input_predictions)  # the magnitude takes both

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor) -> GuiderOutput:
        """eps_u + w (eps_c - eps_u), w per sample. Raises ValueError for a batch of another size than at step 0."""
        difference = pred_cond - pred_uncond
        magnitude = difference.flatten(1).float().norm(dim=1)
        if self._guided is None:
            self._guided = torch.zeros_like(magnitude, dtype=torch.bool)
            self.transition_point = torch.full_like(magnitude, torch.nan)
        if len(magnitude) != len(self._guided):
            raise ValueError(
                f"{len(magnitude)} samples, but {len(self._guided)} at the first step: "
                "a new batch begins at an earlier step (set_state)"
            )
        if len(self._previous) == 2:
            earlier, last = self._previous
            found = (magnitude > last) & (last < earlier) & ~self._guided & (int(self._timestep) > self.latest)
            self.transition_point[found] = float(self._timestep)
            self._guided = self._guided | found
        self._previous = [*self._previous[-1:], magnitude]
        self._guided = self._guided | (int(self._timestep) <= self.latest)
        shape = (-1, *[1] * (difference.ndim - 1))
        weight = torch.where(self._guided, self.guidance_scale, self.before).to(difference).view(shape)
        return GuiderOutput(pred=pred_uncond + weight * difference, pred_cond=pred_cond, pred_uncond=pred_uncond)


class OppositeGuidance(_WeightedGuidance):
    """Push away from the prompt before the transition point, then CFG (paper, OG).

    eps_u - ``opposite_scale`` (eps_c - eps_u) before the point: the pull is turned round, and the
    trajectory leaves the basin sooner. One pass: a dynamic point is found on the way, by the rule
    of `DynamicTransitionPoint`; the official script finds it on a run of its own.

    Args:
        start: the static point (OG + STP; 650 in the official script), or None for the dynamic one (OG + DTP).
        guidance_scale: after the point.
        opposite_scale: before it; at least 0.
        latest: of a dynamic point.

    >>> rule = OppositeGuidance(start=650, guidance_scale=7.5, opposite_scale=2.0)
    >>> rule.weight(651), rule.weight(650)
    (-2.0, 7.5)
    """

    @register_to_config
    def __init__(
        self,
        start: int | None = None,
        guidance_scale: float = 7.5,
        opposite_scale: float = 2.0,
        latest: int = 500,
    ):
        super().__init__()
        if opposite_scale < 0:
            raise ValueError(f"opposite_scale is {opposite_scale}: give at least 0, it is subtracted")
        if start is None:
            self._rule = DynamicTransitionPoint(guidance_scale, -opposite_scale, latest)
        else:
            self._rule = StaticTransitionPoint(start, guidance_scale, -opposite_scale)

    @property
    def remembers(self) -> bool:
        return self._rule.remembers

    @property
    def transition_point(self) -> Tensor | None:
        return self._rule.transition_point

    def _begin(self) -> None:
        if hasattr(self, "_rule"):
            self._rule._step = None

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        super().set_state(step, num_inference_steps, timestep)
        self._rule.set_state(step, num_inference_steps, timestep)

    def weight(self, timestep: int) -> float:
        return self._rule.weight(timestep)

    def timesteps_named(self) -> tuple[int, ...]:
        return self._rule.timesteps_named()

    def _needed(self) -> list[str]:
        return super()._needed() if self._timestep is None else self._rule._needed()

    def forward(self, pred_cond: Tensor | None = None, pred_uncond: Tensor | None = None) -> GuiderOutput:
        return self._rule.forward(pred_cond, pred_uncond)


class GuidanceInterval(_WeightedGuidance):
    """CFG inside an interval of timesteps, ``outside`` elsewhere (Kynkäänniemi et al. 2024, eq. 5).

    Args:
        first, last: guided while first >= t >= last.
        guidance_scale: inside.
        outside: 1, the conditional model alone, in their paper.

    >>> [GuidanceInterval(700, 300).weight(t) for t in (701, 700, 300, 299)]
    [1.0, 7.5, 7.5, 1.0]
    """

    @register_to_config
    def __init__(self, first: int, last: int, guidance_scale: float = 7.5, outside: float = 1.0):
        super().__init__()
        if first < last:
            raise ValueError(f"the interval runs from {first} down to {last}: sampling goes from high to low timesteps")
        self.first, self.last = first, last
        self.guidance_scale = guidance_scale
        self.outside = outside

    def weight(self, timestep: int) -> float:
        return self.guidance_scale if self.first >= timestep >= self.last else self.outside

    def timesteps_named(self) -> tuple[int, ...]:
        return (self.first, self.last)


# Shapes over u = t / T, from 1 at the start of sampling to 0, each with a mean of 1.
_SHAPES = {
    "linear": lambda u: 2 * (1 - u),
    "inverse_linear": lambda u: 2 * u,
    "cosine": lambda u: 1 + math.cos(math.pi * u),
    "sine": lambda u: 1 - math.cos(math.pi * u),  # sin(pi u - pi / 2) + 1
    "v": lambda u: 4 / 3 * max(u, 1 - u),
    "a": lambda u: 4 * min(u, 1 - u),
}


class ScheduledGuidance(_WeightedGuidance):
    """A guidance scale that changes over t (Wang et al. 2024, "Analysis of CFG weight schedulers").

    "linear" and "cosine" rise while sampling goes on, "inverse_linear" and "sine" fall, "v" is low
    in the middle, "a" high (the official script has these two the other way round). Each has the
    mean ``guidance_scale`` over the schedule of ``length`` timesteps, so that schedules can be compared.

    >>> ScheduledGuidance("linear", 7.5).weight(500)
    7.5
    """

    @register_to_config
    def __init__(self, schedule: str, guidance_scale: float = 7.5, length: int = 1000):
        super().__init__()
        if schedule not in _SHAPES:
            raise ValueError(f"no schedule {schedule!r}: give one of {sorted(_SHAPES)}")
        self.schedule = schedule
        self.guidance_scale = guidance_scale
        self.length = length

    def weight(self, timestep: int) -> float:
        return self.guidance_scale * _SHAPES[self.schedule](timestep / self.length)
