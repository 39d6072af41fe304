"""Training that goes on elsewhere: ``python -m recipe.milestone save`` before a machine is left, ``load`` on the next.

``save`` writes data/next: of each stage the finished weights, or the averaged ones of an unfinished one, as plain fp16
folders, with what made them, or the step reached, in training.json. ``load`` makes of them what lay in build/world, and
``make world`` goes on. The optimizer's moments are not kept; the rate warms up again instead.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import nn
from transformers import CLIPModel, CLIPTextModel, ResNetForImageClassification

from . import export, train
from .__main__ import BASE, DATA, build

WORK, NEXT = DATA.parent / "build" / "world", DATA / "next"
KINDS = {"vae": {"": AutoencoderKL}, "decoder": {"": AutoencoderKL}, "clip": {"": CLIPModel}}
KINDS |= {"descriptor": {"": ResNetForImageClassification}}
KINDS |= {"unet": {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}}


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    """The models of a stage, by the name of their folder."""
    return (
        {"unet": module["unet"], "text_encoder": module["text"]} if isinstance(module, nn.ModuleDict) else {"": module}
    )


def _averaged(name: str, work: Path) -> tuple[dict, dict]:
    """The models of an unfinished stage, and how far it is."""
    settings, state = train.SETTINGS[name], torch.load(work / name / "state.pt", map_location="cpu", weights_only=True)
    module = build(name, settings, work, False, False).module
    average = EMAModel(module.parameters())
    average.load_state_dict(state["average"])
    average.copy_to(module.parameters())
    reached = {key: state[key] for key in ("step", "seconds", "batch", "start")}
    return _parts(module), reached | {"rate": train.rate_at(state["step"], settings)}


def save(work: Path = WORK, out: Path = NEXT) -> None:
    """Write what is needed to go on from ``work`` into ``out``."""
    made = {}
    for name in [name for name in BASE if (work / name / "losses.csv").exists()]:
        if (work / name / "made.json").exists():
            models = {part: kind.from_pretrained(work / name / "model" / part) for part, kind in KINDS[name].items()}
            made[name] = json.loads((work / name / "made.json").read_text())
        else:
            models, made[name] = _averaged(name, work)
        for part, model in models.items():
            model.half().save_pretrained(out / name / part)
        export.without_paths(out / name)
        shutil.copyfile(work / name / "losses.csv", out / name / "losses.csv")
    export.without_paths(out)
    (out / "training.json").write_text(json.dumps(made, indent=1) + "\n")


def load(out: Path = NEXT, work: Path = WORK) -> None:
    """Make in ``work``, where there are none yet, the finished stages and checkpoints that `save` wrote."""
    if list(work.glob("*/state.pt")):
        sys.exit(f"{work} already holds a checkpoint: move it away first")
    made = json.loads((out / "training.json").read_text())
    for name, note in sorted(made.items(), key=lambda item: BASE.index(item[0])):
        models = {part: kind.from_pretrained(out / name / part).float() for part, kind in KINDS[name].items()}
        (work / name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / name / "losses.csv", work / name / "losses.csv")
        if "versions" in note:  # it was finished
            for part, model in models.items():
                model.save_pretrained(work / name / "model" / part)
            (work / name / "made.json").write_text(json.dumps(note, indent=1))
            continue
        module = build(name, train.SETTINGS[name], work, False, False).module
        for part, target in _parts(module).items():
            target.load_state_dict(models[part].state_dict())
        average = EMAModel(module.parameters(), decay=train.SETTINGS[name].average)
        average.optimization_step = note["step"]
        state = {key: note[key] for key in ("step", "seconds", "batch", "start")}
        state |= {"module": module.state_dict(), "average": average.state_dict(), "optimizer": None}
        train.save(state, work / name / "state.pt")


if __name__ == "__main__":
    {"save": save, "load": load}[sys.argv[1]]()
