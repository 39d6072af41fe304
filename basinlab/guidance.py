"""Guidance strategies as diffusers guiders.

The contract: at each step a guidance has one weight w, and the combined prediction is
eps_u + w (eps_c - eps_u). With w = 0 only the unconditional prediction is asked for, with
w = 1 only the conditional one. A subclass says what w is at a timestep of the training
schedule; nothing else. The objects are `diffusers.guiders.BaseGuidance`, so they are saved,
loaded and plugged into diffusers' modular pipelines as any other guider.
"""

import logging
from typing import ClassVar

from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor


class _WeightedGuidance(BaseGuidance):
    """Classifier-free guidance (Ho and Salimans 2022) with a weight that depends on the timestep."""

    _input_predictions: ClassVar[list[str]] = ["pred_cond", "pred_uncond"]

    def __init__(self):
        # diffusers warns at each construction that guiders are experimental; once is a reader's fill
        logger = logging.getLogger("diffusers.guiders.guider_utils")
        level = logger.level
        logger.setLevel(logging.ERROR)
        super().__init__()
        logger.setLevel(level)

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

    ``start`` is in units of the training schedule, so that 999 is CFG from T on.

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

    def weight(self, timestep: int) -> float:
        return self.before if timestep > self.start else self.guidance_scale

    def timesteps_named(self) -> tuple[int, ...]:
        return (self.start,)
