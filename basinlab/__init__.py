"""basinlab: classifier-free guidance inside the attraction basin, step by step.

A reproduction of Jain et al., "Classifier-Free Guidance inside the Attraction Basin May Cause Memorization", CVPR 2025
(arXiv 2411.16738). A name gives a `Denoiser`; prompts, seeds and mitigations give a `Trajectory`.

    denoiser = basinlab.load("emoji-duplicated")
    run = basinlab.sample(denoiser, prompts, seeds, basinlab.ConstantGuidance(7.5))
    run.images()
"""

import importlib
import warnings

with warnings.catch_warnings(action="ignore"):  # in a notebook tqdm.auto, which diffusers imports, asks for ipywidgets
    importlib.import_module("tqdm.auto")

from . import _torchvision  # noqa: F401

_HOMES = {
    "models": "Denoiser load read_pictures data_folder",
    "mixture": "MixtureDenoiser PlaneDistance",
    "guidance": "ConstantGuidance StaticTransitionPoint DynamicTransitionPoint OppositeGuidance GuidanceInterval "
    "ScheduledGuidance AttractRepel Gated",
    "sampling": "Mitigation Trajectory sample sample_from",
    "forks": "Sweep sweep bisect",
}
_WHERE = {name: module for module, names in _HOMES.items() for name in names.split()}
_FURTHER = "basin mitigations detection metrics statistics store projection plotting scenarios comparison".split()
__all__ = [*_WHERE, *_HOMES, *_FURTHER]


def __getattr__(name: str):
    """Import a module when it is first asked for: a cell pays only for what it uses."""
    if name in _WHERE:
        return getattr(importlib.import_module(f"basinlab.{_WHERE[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"basinlab.{name}")
    raise AttributeError(f"module 'basinlab' has no attribute {name!r}")
