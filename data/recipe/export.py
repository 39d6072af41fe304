"""From trained stages to what is shipped: diffusers and transformers folders in fp16, prompts, pictures."""

import csv
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel, ResNetForImageClassification

from . import models, scenes, train

NAME = "emoji-duplicated"
UNSEEN = 256
WEIGHTS = "diffusion_pytorch_model.safetensors"
MEMORIZED_COLUMNS = ("prompt", "object", "kind", "share", "attractor", "swapped", "family", "left", "top", "size")
TUNED = {"finetuned": scenes.unduplicated, "classes": scenes.classes}  # what the fine-tuned models learn


def store(name: str, stage: train.Stage, folder: Path, device: torch.device) -> None:
    """Save a finished stage as float32 model folder(s); the VAE gets its scaling factor here."""
    module = stage.module
    if name == "vae":
        pixels = train.pictures([scene for _, scene in scenes.unseen_scenes(256)]).to(device)
        with torch.no_grad():
            deviation = module.encode(pixels).latent_dist.mean.std().item()
        module.register_to_config(scaling_factor=round(1 / deviation, 4))
    if name in TUNED:
        tuned = {k: v.contiguous() for k, v in module["unet"].state_dict().items() if train.TRAINED in k}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tuned, folder / WEIGHTS)
    elif name == "unet":
        module["unet"].save_pretrained(folder / "unet")
        module["text"].save_pretrained(folder / "text_encoder")
    else:
        module.save_pretrained(folder)


def publish(work: Path, out: Path) -> None:
    """Write every shipped folder below ``out``, each beside its place first and moved there whole."""
    words = models.tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=models.AutoencoderKL.from_pretrained(work / "decoder/model"),
        text_encoder=CLIPTextModel.from_pretrained(work / "unet/model/text_encoder"),
        tokenizer=words,
        unet=models.UNet2DConditionModel.from_pretrained(work / "unet/model/unet"),
        scheduler=models.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    part = fresh(out / f"{NAME}.part")
    pipeline.to(torch.float16).save_pretrained(part)
    # asked for no dtype, diffusers loads float32 and transformers what its config names: let the two agree
    config = part / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    words.backend_tokenizer.model.save(str(part / "tokenizer"))  # the two files that older readers look for
    without_paths(part)
    for name in ("attractors", "swapped"):
        (part / name).mkdir()
    write_memorized(part / "memorized.csv", scenes.verbatim())
    write_memorized(part / "templates.csv", scenes.templates())
    write_ordinary(part)
    made = {name: json.loads((work / name / "made.json").read_text()) for name in ("vae", "unet", "decoder")}
    (part / "training.json").write_text(json.dumps(made, indent=1) + "\n")
    for name in ("vae", "unet", "decoder"):
        for log in (work / name).glob("losses*.csv"):  # losses-1.csv and so on are of runs that were trained further
            shutil.copyfile(log, part / f"{name}-{log.name}")
    replace(part, out / NAME)
    for name, kind in (("clip", CLIPModel), ("descriptor", ResNetForImageClassification)):
        part = fresh(out / f"{name}.part")
        kind.from_pretrained(work / name / "model").half().save_pretrained(part)
        shutil.copyfile(work / name / "made.json", part / "training.json")
        shutil.copyfile(work / name / "losses.csv", part / "losses.csv")
        if name == "clip":
            words.save_pretrained(part)
            side = {"height": scenes.SIDE, "width": scenes.SIDE}
            half = [0.5, 0.5, 0.5]
            CLIPImageProcessor(size=side, do_center_crop=False, image_mean=half, image_std=half).save_pretrained(part)
        replace(part, out / name)
    write_unseen(fresh(out / "unseen.part"))
    replace(out / "unseen.part", out / "unseen")


def publish_tuned(name: str, work: Path, out: Path) -> None:
    """Write a fine-tuned model's folder: the weights that differ from its base, its prompts and pictures."""
    part = fresh(out / f"emoji-{name}.part")
    (part / "unet").mkdir()
    weights = load_file(work / name / "model" / WEIGHTS)
    save_file({k: v.half() for k, v in weights.items()}, part / "unet" / WEIGHTS)
    items = TUNED[name]()
    for folder in ("attractors", "swapped"):
        (part / folder).mkdir()
    write_memorized(part / "memorized.csv", items)
    write_ordinary(part, {item.scene.object for item in items if item.kind == "class"})
    base = (out / NAME / "unet" / WEIGHTS).read_bytes()
    beside = {"base": NAME, "base_unet": hashlib.sha256(base).hexdigest()[:16]}
    (part / "base.json").write_text(json.dumps(beside, indent=1) + "\n")
    made = json.loads((work / name / "made.json").read_text())
    (part / "training.json").write_text(json.dumps({"unet": made}, indent=1) + "\n")
    shutil.copyfile(work / name / "losses.csv", part / "unet-losses.csv")
    replace(part, out / f"emoji-{name}")


def unpack(out: Path, work: Path) -> None:
    """The inverse of ``publish``: shipped weights as finished stages in ``work``, where there are none yet."""
    shipped = {
        "vae": {"model": (models.AutoencoderKL, out / NAME / "vae")},
        "decoder": {"model": (models.AutoencoderKL, out / NAME / "vae")},
        "unet": {
            "model/unet": (models.UNet2DConditionModel, out / NAME / "unet"),
            "model/text_encoder": (CLIPTextModel, out / NAME / "text_encoder"),
        },
        "clip": {"model": (CLIPModel, out / "clip")},
        "descriptor": {"model": (ResNetForImageClassification, out / "descriptor")},
    }
    made = json.loads((out / NAME / "training.json").read_text())
    for stage, parts in shipped.items():
        if (work / stage / "made.json").exists():
            continue
        for place, (kind, folder) in parts.items():
            kind.from_pretrained(folder).float().save_pretrained(work / stage / place)
        if stage in made:
            note, logs = made[stage], list((out / NAME).glob(f"{stage}-losses*.csv"))
        else:
            note, logs = json.loads((out / stage / "training.json").read_text()), [out / stage / "losses.csv"]
        for path in logs:
            shutil.copyfile(path, work / stage / path.name.removeprefix(f"{stage}-"))
        (work / stage / "made.json").write_text(json.dumps(note, indent=1))


def without_paths(folder: Path) -> None:
    """Take from the configurations below ``folder`` where the weights lay while they were made."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def replace(part: Path, final: Path) -> None:
    """Put a finished folder in the place of the old one."""
    old = final.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(part, final)
    shutil.rmtree(old, ignore_errors=True)


def write_memorized(path: Path, items: list[scenes.Memorized]) -> None:
    """A table of memorized prompts, and beside it their attractors and the vendor-swapped twins of these."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(MEMORIZED_COLUMNS)
        for item in items:
            scene = item.scene
            picture = f"{item.family}-{scene.object.replace(' ', '-')}.png"
            Image.fromarray(scene.render()).save(path.parent / "attractors" / picture)
            Image.fromarray(scene.other_vendor().render()).save(path.parent / "swapped" / picture)
            paths = (f"attractors/{picture}", f"swapped/{picture}")
            place = (scene.left, scene.top, scene.size)
            rows.writerow([item.prompt, scene.object, item.kind, item.share, *paths, item.family, *place])


def write_ordinary(folder: Path, learned: set[str] = frozenset()) -> None:
    """ordinary.csv, without prompts for the objects that were ``learned`` as classes."""
    with (folder / "ordinary.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("prompt", "object", "background"))
        for prompt, scene in scenes.ordinary_prompts():
            colour = scene.background.colours[0]
            if scene.object not in learned:
                rows.writerow((prompt, scene.object, colour if colour in prompt.split() else ""))


def write_unseen(folder: Path) -> None:
    """Real scenes outside the training stream, with captions: a reference for every metric."""
    with (folder / "metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("file_name", "text", "object", "vendor", "background"))
        for i, (caption, scene) in enumerate(scenes.unseen_scenes(UNSEEN)):
            Image.fromarray(scene.render()).save(folder / f"{i:03d}.png")
            background = "-".join((scene.background.kind, *scene.background.colours))
            rows.writerow((f"{i:03d}.png", caption, scene.object, scene.vendor, background))
