"""Training that goes on elsewhere: ``python -m recipe.milestone save`` before a machine is left, ``load`` on the next.

``save`` writes data/next: the finished ones of VAE, decoder, CLIP and descriptor, and the averaged weights of U-Net and
text encoder, as plain fp16 folders, with the step and settings in training.json. ``load`` makes checkpoints of them in
build/world, from which ``make world`` goes on. The optimizer's moments are not kept; the rate warms up again instead.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from transformers import CLIPModel, CLIPTextModel, ResNetForImageClassification

from . import export, train

DATA = Path(__file__).resolve().parents[1]
WORK, NEXT = DATA.parent / "build" / "world", DATA / "next"
PARTS = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
FINISHED = {
    "vae": AutoencoderKL,
    "decoder": AutoencoderKL,
    "clip": CLIPModel,
    "descriptor": ResNetForImageClassification,
}


def save(work: Path = WORK, out: Path = NEXT) -> None:
    """Write what is needed to go on from ``work`` into ``out``."""
    state = torch.load(work / "unet" / "state.pt", map_location="cpu", weights_only=True)
    stage = train.UNetStage(train.SETTINGS["unet"], work / "vae" / "model")
    average = EMAModel(stage.module.parameters())
    average.load_state_dict(state["average"])
    average.copy_to(stage.module.parameters())
    for part, module in zip(PARTS, (stage.module["unet"], stage.module["text"]), strict=True):
        module.half().save_pretrained(out / part)
    made = {}
    for name, kind in FINISHED.items():
        if (work / name / "made.json").exists():
            kind.from_pretrained(work / name / "model").half().save_pretrained(out / name)
            made[name] = json.loads((work / name / "made.json").read_text())
    export.without_paths(out)
    for name in (*made, "unet"):
        shutil.copyfile(work / name / "losses.csv", out / f"{name}-losses.csv")
    reached = {key: state[key] for key in ("step", "seconds", "batch", "start")}
    reached["rate"] = train.rate_at(state["step"], train.SETTINGS["unet"])
    (out / "training.json").write_text(json.dumps({**made, "unet": reached}, indent=1) + "\n")


def load(out: Path = NEXT, work: Path = WORK) -> None:
    """Make checkpoints in ``work``, where there are none yet, of what `save` wrote."""
    if (work / "unet" / "state.pt").exists():
        sys.exit(f"{work} already holds a checkpoint: move it away first")
    made = json.loads((out / "training.json").read_text())
    for name in FINISHED.keys() & made.keys():
        FINISHED[name].from_pretrained(out / name).float().save_pretrained(work / name / "model")
        (work / name / "made.json").write_text(json.dumps(made[name], indent=1))
    (work / "unet").mkdir(parents=True, exist_ok=True)
    for name in made:
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
