"""Training that goes on elsewhere: ``python -m recipe.milestone save`` before a machine is left, ``load`` on the next.

``save`` writes data/next: the finished VAE and the averaged weights of the unfinished U-Net and text encoder as plain
fp16 folders, with the step and settings in training.json. ``load`` makes checkpoints of them in build/world, from which
``make world`` goes on. The optimizer's moments are not kept; the rate warms up again instead.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from transformers import CLIPTextModel

from . import export, train

DATA = Path(__file__).resolve().parents[1]
WORK, NEXT = DATA.parent / "build" / "world", DATA / "next"
PARTS = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}


def save(work: Path = WORK, out: Path = NEXT) -> None:
    """Write what is needed to go on from ``work`` into ``out``."""
    state = torch.load(work / "unet" / "state.pt", map_location="cpu", weights_only=True)
    stage = train.UNetStage(train.SETTINGS["unet"], work / "vae" / "model")
    average = EMAModel(stage.module.parameters())
    average.load_state_dict(state["average"])
    average.copy_to(stage.module.parameters())
    for part, module in zip(PARTS, (stage.module["unet"], stage.module["text"]), strict=True):
        module.half().save_pretrained(out / part)
    AutoencoderKL.from_pretrained(work / "vae" / "model").half().save_pretrained(out / "vae")
    export.without_paths(out)
    for name in ("vae", "unet"):
        shutil.copyfile(work / name / "losses.csv", out / f"{name}-losses.csv")
    reached = {key: state[key] for key in ("step", "seconds", "batch", "start")}
    reached["rate"] = train.rate_at(state["step"], train.SETTINGS["unet"])
    made = {"vae": json.loads((work / "vae" / "made.json").read_text()), "unet": reached}
    (out / "training.json").write_text(json.dumps(made, indent=1) + "\n")


def load(out: Path = NEXT, work: Path = WORK) -> None:
    """Make checkpoints in ``work``, where there are none yet, of what `save` wrote."""
    if (work / "unet" / "state.pt").exists():
        sys.exit(f"{work} already holds a checkpoint: move it away first")
    made = json.loads((out / "training.json").read_text())
    AutoencoderKL.from_pretrained(out / "vae").float().save_pretrained(work / "vae" / "model")
    (work / "vae" / "made.json").write_text(json.dumps(made["vae"], indent=1))
    (work / "unet").mkdir(parents=True, exist_ok=True)
    for name in ("vae", "unet"):
        shutil.copyfile(out / f"{name}-losses.csv", work / name / "losses.csv")
    settings, state = train.SETTINGS["unet"], {key: made["unet"][key] for key in ("step", "seconds", "batch", "start")}
    stage = train.UNetStage(settings, work / "vae" / "model")
    for (part, kind), module in zip(PARTS.items(), (stage.module["unet"], stage.module["text"]), strict=True):
        module.load_state_dict(kind.from_pretrained(out / part).float().state_dict())
    average = EMAModel(stage.module.parameters(), decay=settings.average)
    average.optimization_step = state["step"]
    state |= {"module": stage.module.state_dict(), "average": average.state_dict(), "optimizer": None}
    train.save(state, work / "unet" / "state.pt")


if __name__ == "__main__":
    {"save": save, "load": load}[sys.argv[1]]()
