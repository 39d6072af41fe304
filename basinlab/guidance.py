"""Guidance strategies as diffusers guiders.

At each step every sample has one weight w, and its prediction is eps_u + w (eps_c - eps_u). Where w is 0 for all
samples only the unconditional prediction is made, where it is 1 only the conditional one. A new guidance is a class
with an ``__init__`` under ``@register_to_config``, which records its settings, and ``weight(timestep)``, 999 down to 0.
Modular pipelines give it what the network predicts, `sampling.sample` always epsilon.
"""

import logging
import marshal
import math
from typing import ClassVar

import torch
from diffusers import guiders
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

logging.getLogger("diffusers.guiders.guider_utils").setLevel(logging.ERROR)  # warns at each guider that it is new


def describe(mitigation) -> dict:
    """The class of a mitigation, its settings, numbers as they are now, and the code of a class from elsewhere."""
    made = mitigation.config if isinstance(mitigation, guiders.BaseGuidance) else vars(mitigation)
    now = {k: vars(mitigation).get(k, vars(mitigation).get(f"_{k}")) for k in made}  # diffusers has _enabled
    now |= {k: describe(v) for k, v in now.items() if isinstance(v, guiders.BaseGuidance)}
    settings = {k: now[k] if isinstance(now[k], int | float | dict) else v for k, v in made.items() if k[0] != "_"}
    own = () if type(mitigation).__module__.startswith(("basinlab.", "diffusers.")) else vars(type(mitigation)).values()
    code = [marshal.dumps(of.__code__.replace(co_filename=""), 2).hex() for of in own if hasattr(of, "__code__")]
    return {"name": type(mitigation).__name__} | ({"code": code} if code else {}) | settings


class WeightedGuidance(guiders.BaseGuidance):
    """Classifier-free guidance (Ho and Salimans 2022) with a weight that depends on the timestep."""

    _input_predictions: ClassVar[list[str]] = ["pred_cond", "pred_uncond"]
    remembers = False  # whether what it does at a step depends on the steps before, and so takes all predictions
    transition_point: Tensor | None = None  # the first timestep, [] or [B], at which the full guidance acts; NaN: none

    def _begin(self) -> None:
        """Forget the batch before: steps start again."""
        self.transition_point = None

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        if self._step is None or step <= self._step:
            self._begin()
        super().set_state(step, num_inference_steps, timestep)

    def new(self, **changes) -> "WeightedGuidance":
        """A copy, as it is now, with ``changes``; diffusers' own forgets arguments given by position."""
        return type(self)(**{k: getattr(self, k, v) for k, v in self.config.items() if k[0] != "_"} | changes)

    def forward(self, pred_cond: Tensor | None = None, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """eps_u + w (eps_c - eps_u); a prediction with weight 0 may be None."""
        weight, alone = self.weight(int(self._timestep)), {0: pred_uncond, 1: pred_cond}
        combined = alone[weight] if weight in alone else pred_uncond + weight * (pred_cond - pred_uncond)
        return GuiderOutput(pred=combined, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _needed(self) -> list[str]:
        """Names of the predictions at this step."""
        weight = None if self.remembers else self.weight(int(self._timestep))
        return [name for name, idle in zip(self._input_predictions, (0.0, 1.0), strict=True) if weight != idle]

    def prepare_inputs(self, data: dict) -> list:
        return [self._prepare_batch(data, name == "pred_uncond", name) for name in self._needed()]

    def prepare_inputs_from_block_state(self, data, input_fields: dict) -> list:
        return [self._prepare_batch_from_block_state(input_fields, data, x == "pred_uncond", x) for x in self._needed()]

    def __call__(self, data: list) -> GuiderOutput:
        return self.forward(**{getattr(part, self._identifier_key): part.noise_pred for part in data})

    @property
    def is_conditional(self) -> bool:
        return self._needed()[self._count_prepared - 1] != "pred_uncond"

    @property
    def num_conditions(self) -> int:
        """The number of predictions at this step; of all before a run, also where one was broken off within a step."""
        return len(self._needed() if self._step is not None and not self._count_prepared else self._input_predictions)


class ConstantGuidance(WeightedGuidance):
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


class StaticTransitionPoint(WeightedGuidance):
    """CFG from one timestep on (paper, STP): ``before`` while t > ``start`` (no NaN), then ``guidance_scale``.

    >>> late = StaticTransitionPoint(start=500, guidance_scale=7.5)
    >>> late.weight(501), late.weight(500)
    (0.0, 7.5)
    """

    @register_to_config
    def __init__(self, start: int, guidance_scale: float = 7.5, before: float = 0.0):
        super().__init__()
        self.start, self.guidance_scale, self.before = start if start == start else int(start), guidance_scale, before

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        super().set_state(step, num_inference_steps, timestep)
        if self.transition_point is None and int(timestep) <= self.start:
            self.transition_point = torch.tensor(float(timestep))

    def weight(self, timestep: int) -> float:
        return self.before if timestep > self.start else self.guidance_scale


class DynamicTransitionPoint(WeightedGuidance):
    """CFG, per sample, once the guidance magnitude has passed its first local minimum (paper, DTP).

    As in the official script the point is the first timestep at which ||eps_c - eps_u|| has risen after a fall. A
    sample without a minimum gets CFG at ``latest`` (500: the paper's static point of SD 2.1), and its transition point
    stays NaN. The scale ``before`` is 0 in the paper, 1 in the official script.

    >>> import basinlab
    >>> world = basinlab.MixtureDenoiser.with_duplicate()
    >>> basinlab.sample(world, "memorized", [0, 2], DynamicTransitionPoint(3.0), progress=False).transition_point
    tensor([ nan, 599.])
    """

    remembers = True

    @register_to_config
    def __init__(self, guidance_scale: float = 7.5, before: float = 0.0, latest: int = 500):
        super().__init__()
        self.guidance_scale, self.before, self.latest = guidance_scale, before, latest

    def _begin(self) -> None:
        super()._begin()
        self._magnitudes: list[Tensor] = []  # of the steps so far, [B] each

    def weight(self, timestep: int) -> float:  # of a sample that shows no minimum
        return self.before if timestep > self.latest else self.guidance_scale

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor) -> GuiderOutput:
        difference, t = pred_cond - pred_uncond, int(self._timestep)
        self._magnitudes.append(difference.flatten(1).float().norm(dim=1))
        if self.transition_point is None:
            self.transition_point = torch.full_like(self._magnitudes[0], torch.nan)
        if len(self._magnitudes) >= 3 and t > self.latest:
            earlier, last, now = self._magnitudes[-3:]
            self.transition_point[(now > last) & (last < earlier) & self.transition_point.isnan()] = float(t)
        weight = torch.where(~self.transition_point.isnan() | (t <= self.latest), self.guidance_scale, self.before)
        combined = pred_uncond + weight.to(difference).view(-1, *[1] * (difference.ndim - 1)) * difference
        return GuiderOutput(pred=combined, pred_cond=pred_cond, pred_uncond=pred_uncond)


def OppositeGuidance(start: int | None = None, guidance_scale=7.5, opposite_scale=2.0, latest=500) -> WeightedGuidance:
    """Push away from the prompt before the transition point, then CFG (paper, OG).

    The scale is -``opposite_scale`` before the static point ``start`` (OG + STP; 650 in the official script) or the
    dynamic one (OG + DTP), which the official script finds on a run of its own.

    >>> OppositeGuidance(start=650).weight(651)
    -2.0
    """
    if opposite_scale < 0:
        raise ValueError(f"opposite_scale is {opposite_scale}: give at least 0, it is subtracted")
    if start is None:
        return DynamicTransitionPoint(guidance_scale, before=-opposite_scale, latest=latest)
    return StaticTransitionPoint(start, guidance_scale, before=-opposite_scale)


class GuidanceInterval(WeightedGuidance):
    """CFG while ``first`` >= t >= ``last``, the conditional model alone elsewhere (Kynkäänniemi et al. 2024, eq. 5).

    >>> [GuidanceInterval(700, 300).weight(t) for t in (701, 700, 300, 299)]
    [1.0, 7.5, 7.5, 1.0]
    """

    @register_to_config
    def __init__(self, first: int, last: int, guidance_scale: float = 7.5):
        super().__init__()
        if first < last:
            raise ValueError(f"the interval runs from {first} down to {last}: sampling goes from high to low timesteps")
        self.first, self.last, self.guidance_scale = first, last, guidance_scale

    def weight(self, timestep: int) -> float:
        return self.guidance_scale if self.first >= timestep >= self.last else 1.0


_SHAPES = {  # over u = t / T, from 1 at the start of sampling to 0, each with a mean of 1
    "linear": lambda u: 2 * (1 - u),
    "cosine": lambda u: 1 + math.cos(math.pi * u),
    "v": lambda u: 4 / 3 * max(u, 1 - u),
    "a": lambda u: 4 * min(u, 1 - u),
}


class ScheduledGuidance(WeightedGuidance):
    """A scale that changes over t, with mean ``guidance_scale`` (Wang et al. 2024, "CFG weight schedulers").

    "linear" and "cosine" rise as sampling goes on, "v" is low in the middle, "a" high (the official script swaps them).

    >>> ScheduledGuidance("linear", 7.5).weight(500)
    7.5
    """

    @register_to_config
    def __init__(self, schedule: str, guidance_scale: float = 7.5):
        super().__init__()
        self.schedule, self.guidance_scale, self._shape = schedule, guidance_scale, _SHAPES[schedule]

    def weight(self, timestep: int) -> float:
        return self.guidance_scale * self._shape(timestep / 1000)


class AttractRepel(WeightedGuidance):
    """Towards one phrasing and away from another: u + s (p - u) - r (n - u) (GUARD; Zhao et al., ICML 2026).

    u is unconditional, n the prompt's, p the prompt's with what `mitigations.SpikeDamping` leaves of its attention.
    s is ``guidance_scale``; r is ``repel_scale``, if ``fading`` times cos(pi / 2 progress), progress 1 - t / 1000.

    >>> AttractRepel(7.5, 2.0).weight(1000), AttractRepel(7.5, 2.0).weight(0)
    (5.5, 7.5)
    """

    _input_predictions: ClassVar[list[str]] = ["pred_positive", "pred_cond", "pred_uncond"]

    @register_to_config
    def __init__(self, guidance_scale: float = 7.5, repel_scale: float = 2.0, fading: bool = True):
        super().__init__()
        self.guidance_scale, self.repel_scale, self.fading = guidance_scale, repel_scale, fading

    def _repel(self, timestep: int) -> float:
        return self.repel_scale * (math.sin(math.pi / 2 * timestep / 1000) if self.fading else 1.0)

    def weight(self, timestep: int) -> float:  # of the prompt, where p is n
        return self.guidance_scale - self._repel(timestep)

    def _needed(self) -> list[str]:
        s, r = self.guidance_scale, self._repel(int(self._timestep))
        return [name for name, w in zip(self._input_predictions, (s, r, not math.isclose(1 + r, s)), strict=True) if w]

    def forward(self, pred_positive=None, pred_cond=None, pred_uncond=None) -> GuiderOutput:
        s, r = self.guidance_scale, self._repel(int(self._timestep))
        origin = pred_cond if pred_uncond is None else pred_uncond
        combined = pred_positive if origin is None else origin + s * (pred_positive - origin) if s else origin
        if r and pred_uncond is not None:
            combined = combined - r * (pred_cond - pred_uncond)
        return GuiderOutput(pred=combined, pred_cond=pred_cond, pred_uncond=pred_uncond)


class Gated(ConstantGuidance):
    """CFG, but ``remedy`` for samples whose magnitude at T, known at no cost, is above ``limit`` (Wen et al. 2024).

    >>> describe(Gated(3.0, OppositeGuidance(start=650)))["remedy"]["before"]
    -2.0
    """

    remembers = True

    @register_to_config
    def __init__(self, limit: float, remedy: guiders.BaseGuidance | dict, guidance_scale: float = 7.5):
        super().__init__(guidance_scale)
        if isinstance(remedy, dict):  # as a saved configuration has it
            remedy = {**vars(guiders), **globals()}[remedy["name"]](**{k: v for k, v in remedy.items() if k != "name"})
        if remedy._input_predictions != self._input_predictions or type(remedy).prepare_models != Gated.prepare_models:
            raise ValueError(f"{type(remedy).__name__} needs other predictions than CFG: it can't be gated for nothing")
        self.register_to_config(remedy=describe(remedy))
        self.limit, self.remedy = limit, remedy

    def _begin(self) -> None:
        super()._begin()
        self._fired: Tensor | None = None  # [B] bool

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        super().set_state(step, num_inference_steps, timestep)
        self.remedy.set_state(step, num_inference_steps, timestep)
        self.remedy.prepare_inputs({})  # where diffusers' APG forgets the run before

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor) -> GuiderOutput:
        plain, remedied = (guide(pred_cond, pred_uncond) for guide in (super().forward, self.remedy.forward))
        if self._fired is None:
            if self._step:
                raise ValueError("a gate decides at the first step: sample from the noise")
            self._fired = (pred_cond - pred_uncond).flatten(1).float().norm(dim=1) > self.limit
        point = getattr(self.remedy, "transition_point", None)  # a guider of diffusers has none
        self.transition_point = None if point is None else point.where(self._fired, torch.nan)
        chosen = torch.where(self._fired.view(-1, *[1] * (pred_cond.ndim - 1)), remedied[0], plain[0])
        return GuiderOutput(pred=chosen, pred_cond=pred_cond, pred_uncond=pred_uncond)
