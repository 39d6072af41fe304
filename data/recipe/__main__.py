"""Train and export the bundled world: ``python -m recipe``, or ``make world``.

Every stage resumes where it was stopped or killed. ``--minutes`` ends a run at a checkpoint;
run the same command again to go on. ``--smoke`` does all of it at toy size, elsewhere.
"""

import argparse
import dataclasses
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from . import export, train

DATA = Path(__file__).resolve().parents[1]
BASE = ("vae", "unet", "decoder", "clip", "descriptor")
STAGES = (*BASE, *export.TUNED)
VERSIONS = ("torch", "diffusers", "transformers", "numpy", "pillow")


def settings_for(name: str, smoke: bool, steps: int | None, device: str) -> train.Settings:
    """The settings of a stage: a handful of steps for a smoke run, other ``steps``, or larger batches for a GPU."""
    chosen = train.SETTINGS[name]
    if device == "cuda" and name in ("vae", "decoder", "unet"):
        # twice as many pictures in an eighth of the steps, at a rate that grows about as the batch's root
        larger = {"batch": 16 * chosen.batch, "rate": 2 * chosen.rate, "average": 1 - 8 * (1 - chosen.average)}
        chosen = dataclasses.replace(chosen, steps=max(500, chosen.steps // 8), **larger)
    if smoke:
        return dataclasses.replace(chosen, steps=4, batch=min(chosen.batch, 16), warmup=1, log_every=1)
    return dataclasses.replace(chosen, steps=steps or chosen.steps)


def build(name: str, settings: train.Settings, work: Path, smoke: bool, further: bool) -> train.Stage:
    """The stage called ``name``, its weights from the recipe's seed or, to go ``further``, the shipped ones."""
    torch.manual_seed(train.scenes.SEED)
    if name == "vae":
        return train.VAEStage(settings)
    if name == "clip":
        return train.CLIPStage(settings)
    if name == "descriptor":
        return train.DescriptorStage(settings)
    if not (work / "vae" / "model" / "config.json").exists():
        sys.exit(f"the U-Net trains on latents of the VAE, and {work / 'vae'} holds none yet: run stage vae first")
    if name == "decoder":
        return train.DecoderStage(settings, work / "vae" / "model")
    if name in export.TUNED:
        if not (work / "unet" / "made.json").exists():
            sys.exit(
                f"{name} is the finished U-Net trained on, and {work / 'unet'} holds none yet: run stage unet first"
            )
        items, number = export.TUNED[name](), STAGES.index(name) + 1
        return train.FineTuneStage(settings, work / "vae" / "model", work / "unet" / "model", items, number)
    stage = train.UNetStage(settings, work / "vae" / "model", **({"pool": 64} if smoke else {}))
    if further:
        stage.start = "the shipped weights"
        stage.first_epoch = json.loads((work / "unet" / "made.json").read_text())["epochs"]  # no scene comes again
        train.load_finished(stage, work / "unet" / "model")
    return stage


def record(name: str, stage: train.Stage, work: Path, device: torch.device, further: bool) -> None:
    """Note beside the weights what made them; ``export`` gathers these into training.json."""
    settings, rows = stage.settings, (work / name / "losses.csv").read_text().splitlines()
    header, last = rows[0].split(","), rows[-1].split(",")
    before = {"started_from": json.loads((work / name / "made.json").read_text())} if further else {}
    made = {
        "command": f"python -m recipe --stages {name} --steps {settings.steps}{' --further' * further}",
        "seed": train.scenes.SEED,
        **dataclasses.asdict(settings),
        "hours": round(float(last[1]) / 3600, 2),
        "pictures_a_second": round(float(last[0]) * settings.batch / float(last[1]), 1),
        **({"epochs": stage.first_epoch + settings.steps // stage.renew + 1} if name == "unet" else {}),
        "last_losses": dict(zip(header[2:], map(float, last[2:]), strict=True)),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        **before,
        "versions": {package: version(package) for package in VERSIONS},
    }
    (work / name / "made.json").write_text(json.dumps(made, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipe", description=__doc__)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="which to train (default: all)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop at a checkpoint after this long")
    parser.add_argument("--steps", type=int, help="steps of the given stage, instead of the shipped number")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ahead = 8 if torch.cuda.is_available() else 0
    parser.add_argument("--workers", type=int, default=ahead, help="processes that render scenes")
    parser.add_argument("--work", type=Path, default=DATA.parent / "build" / "world", help="checkpoints and logs")
    parser.add_argument("--out", type=Path, default=DATA, help="where the finished folders go")
    parser.add_argument("--smoke", action="store_true", help="four steps of everything, to see that it runs")
    parser.add_argument("--draft", action="store_true", help="export unfinished stages too, to look at them")
    parser.add_argument("--further", action="store_true", help="start the U-Net from the shipped weights; give --steps")
    options = parser.parse_args()
    device, deadline = torch.device(options.device), time.monotonic() + options.minutes * 60
    if options.smoke and options.out == DATA:
        sys.exit("a smoke run would replace the shipped weights: give it another --out")
    if not {*BASE} & {*options.stages} and (options.out / export.NAME / "training.json").exists():
        export.unpack(options.out, options.work)  # fine-tune the shipped weights where none were trained here
    if options.further:
        if options.stages != ["unet"] or not options.steps:
            sys.exit("--further trains the shipped U-Net on: give it --stages unet and --steps")
        export.unpack(options.out, options.work)
        if not (options.work / "unet" / "state.pt").exists():  # a fresh start: keep the log of what came before
            log = options.work / "unet" / "losses.csv"
            log.rename(log.with_name(f"losses-{len(list(log.parent.glob('losses*.csv')))}.csv"))
    for name in options.stages:
        made, state = (options.work / name / file for file in ("made.json", "state.pt"))
        if made.exists() and not state.exists() and not options.further:
            print(f"{name}: finished before, in {options.work / name / 'model'}")  # shipped, or on another machine
            continue
        settings = settings_for(name, options.smoke, options.steps, device.type)
        stage = build(name, settings, options.work, options.smoke, options.further)
        done = train.fit(stage, options.work / name, device, deadline, options.workers)
        if not done and not options.draft:
            print(f"{name}: stopped at a checkpoint in {options.work / name}; run the same command again to go on")
            return
        record(name, stage, options.work, device, options.further)
        export.store(name, stage, options.work / name / "model", device)
        print(f"{name}: done, in {options.work / name / 'model'}")
    if {*BASE} & {*options.stages} and all((options.work / name / "made.json").exists() for name in BASE):
        export.publish(options.work, options.out)
    for name in [name for name in options.stages if name in export.TUNED]:
        export.publish_tuned(name, options.work, options.out)
    print(f"the world is in {options.out}")


if __name__ == "__main__":
    main()
