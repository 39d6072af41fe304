"""Stable Diffusion 1.4's architecture with random weights: `sample` against diffusers' pipeline at the same batch.

On a GPU: 512 pixels, bfloat16, batches of 16. Alternating rounds; the figures that count are ratios
of images per second, for CFG and for a static transition point at 500, which saves half of the
predictions before it. Without a GPU it rehearses at tiny size, and its figures mean nothing.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --tiny --steps 4 --batch 2 --rounds 1     # anywhere, seconds
"""

import argparse
import json
import platform
import shutil
import tempfile
from pathlib import Path

import torch
from common import RESULTS, ForwardClock, seconds_of, write

import basinlab


def write_pipeline(folder: str, tiny: bool) -> None:
    """The bundled pipeline with a random U-Net and autoencoder of Stable Diffusion's size; as it is if ``tiny``."""
    from diffusers import AutoencoderKL, UNet2DConditionModel  # basinlab, imported before, mends torchvision

    shutil.copytree(basinlab.data_folder() / "emoji-duplicated", folder, dirs_exist_ok=True)
    if tiny:
        return
    width = json.loads(Path(folder, "text_encoder/config.json").read_text())["hidden_size"]
    blocks, channels = ["CrossAttnDownBlock2D"] * 3, (320, 640, 1280, 1280)
    UNet2DConditionModel(
        sample_size=64,
        block_out_channels=channels,
        down_block_types=(*blocks, "DownBlock2D"),
        up_block_types=("UpBlock2D", *(name.replace("Down", "Up") for name in blocks)),
        attention_head_dim=8,
        cross_attention_dim=width,  # theirs is 768: a difference in 1% of the work
    ).save_pretrained(Path(folder, "unet"))
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(Path(folder, "vae"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.accelerator.is_available()
    parser.add_argument("--device", default=str(torch.accelerator.current_accelerator()) if gpu else "cpu")
    parser.add_argument("--tiny", action="store_true", default=not gpu, help="the default where there is no GPU")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--start", type=int, default=500, help="the static transition point")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table")
    options = parser.parse_args()

    from diffusers import StableDiffusionPipeline

    device, seeds = options.device, range(options.batch)

    with tempfile.TemporaryDirectory() as folder:
        write_pipeline(folder, options.tiny)
        denoiser = basinlab.load(folder, device=device, dtype=getattr(torch, options.dtype))
    # the same modules, so that memory and weights are the same
    pipeline = StableDiffusionPipeline(
        denoiser.vae, denoiser.text_encoder, denoiser.tokenizer, denoiser.unet, denoiser.scheduler, None, None
    )
    pipeline.set_progress_bar_config(disable=True)
    common = {"steps": options.steps, "batch_size": options.batch, "record": False, "progress": False}

    def theirs() -> None:
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        pipeline(["an owl"] * options.batch, num_inference_steps=options.steps, generator=noise, output_type="pt")

    def ours(guidance) -> None:
        basinlab.sample(denoiser, "an owl", seeds, guidance, **common).images()

    ways = {
        "pipeline, CFG": theirs,
        "basinlab, CFG": lambda: ours(basinlab.ConstantGuidance(7.5)),
        f"basinlab, STP at {options.start}": lambda: ours(basinlab.StaticTransitionPoint(options.start, 7.5)),
    }
    for work in ways.values():  # warm up
        work()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    rates = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, work in ways.items():
            rates[name].append(options.batch / seconds_of(work, device))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else float("nan")
    first, *others = rates
    columns = {f"{name}, images/s": values for name, values in rates.items()}
    for name in others:
        columns[f"{name} / {first}"] = [a / b for a, b in zip(rates[name], rates[first], strict=True)]
    clock = ForwardClock(denoiser.unet, device)
    whole = seconds_of(ways["basinlab, CFG"], device)
    clock.remove()
    columns |= {"share of time in the U-Net": [clock.seconds / whole], "peak memory GiB": [peak]}
    machine = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    size = "a rehearsal at tiny size" if options.tiny else "SD 1.4's architecture, random weights, 512 px"
    note = f"{size}, batch {options.batch}, {options.steps} steps, {options.dtype}, on {machine}"
    write("gpu", columns, note, options.out)


if __name__ == "__main__":
    main()
