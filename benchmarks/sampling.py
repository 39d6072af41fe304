"""`sample` against diffusers' own pipeline, one picture a call and as many as ours at once, in one run.

Both sides have the same weights, steps and guidance scale, pictures decoded, in alternating rounds; the figures that
count are ratios of images a second. Also told: the share of our time inside the U-Net's forward, and the peak memory.

    python benchmarks/sampling.py                                          # the bundled checkpoint
    python benchmarks/sampling.py --random --device cuda --dtype bfloat16  # Stable Diffusion 1.4's sizes
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from common import RESULTS, clocked, peak_gib, seconds_of, write

import basinlab
from basinlab.models import StableDiffusion


def random_weights(device: str, dtype: torch.dtype, tiny: bool) -> StableDiffusion:
    """Stable Diffusion 1.4 with random weights, and the bundled checkpoint's words and noise schedule."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    bundled = basinlab.load("emoji-duplicated").pipeline
    channels, coder = ((32,) * 4, (8,) * 4) if tiny else ((320, 640, 1280, 1280), (128, 256, 512, 512))
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae = AutoencoderKL(block_out_channels=coder, layers_per_block=2, down_block_types=down, up_block_types=up,
                        norm_num_groups=8, scaling_factor=0.18215)  # fmt: skip
    unet = UNet2DConditionModel(sample_size=8 if tiny else 64, cross_attention_dim=768, block_out_channels=channels)
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(bundled.tokenizer), **text, eos_token_id=1))
    parts = {"vae": vae, "unet": unet, "text_encoder": text, "tokenizer": bundled.tokenizer}
    pipeline = StableDiffusionPipeline(**parts, scheduler=bundled.scheduler, **basinlab.models.UNCHECKED)
    shape, pipeline = (4, *[unet.config.sample_size] * 2), pipeline.to(device, dtype)
    return StableDiffusion("random", bundled.scheduler, torch.device(device), shape, pipeline)


def measured(ways: dict, rounds: int, inside: list[float], device: str) -> dict[str, list[float]]:
    """Images a second of each way, our ratios to the pipeline, and the share of our time in the U-Net."""
    rates, shares = {name: [] for name in ways}, []
    for number in range(rounds + 1):  # the first warms up
        for name, (work, images) in ways.items():
            inside.clear()
            seconds = seconds_of(work, device)
            if number:
                rates[name].append(images / seconds)
                shares += [sum(inside) / seconds] if name == "basinlab, CFG" else []
    columns = {f"{name}, images/s": values for name, values in rates.items()}
    for mine, other in [(mine, other) for mine in [*ways][2:] for other in [*ways][:2]]:
        columns[f"{mine} / {other}"] = [a / b for a, b in zip(rates[mine], rates[other], strict=True)]
    return columns | {"share of our time in the U-Net": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", action="store_true", help="random weights in Stable Diffusion 1.4's sizes")
    parser.add_argument("--tiny", action="store_true", help="the same in sizes whose figures mean nothing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table")
    options = parser.parse_args()
    device, dtype, few = options.device, getattr(torch, options.dtype), min(options.batch, 4)
    if options.random or options.tiny:
        denoiser = random_weights(device, dtype, options.tiny)
    else:
        denoiser = basinlab.load("emoji-duplicated", device=device, dtype=dtype)
    pipeline = denoiser.pipeline
    pipeline.set_progress_bar_config(disable=True)
    common = {"steps": options.steps, "batch_size": options.batch, "record": False, "progress": False}

    def theirs(calls: int, batch: int) -> None:
        for seed in range(calls):
            noise = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
            pipeline(["an owl"] * batch, num_inference_steps=options.steps, generator=noise, output_type="pt")

    def ours(guidance) -> None:
        basinlab.sample(denoiser, "an owl", range(options.batch), guidance, **common).images()

    ways = {
        "pipeline, same batch": (partial(theirs, 1, options.batch), options.batch),
        "pipeline, one a call": (partial(theirs, few, 1), few),
        "basinlab, CFG": (partial(ours, basinlab.ConstantGuidance(7.5)), options.batch),
        "basinlab, STP at 500": (partial(ours, basinlab.StaticTransitionPoint(500, 7.5)), options.batch),
    }
    columns = measured(ways, options.rounds, clocked(denoiser.unet, device), device)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else peak_gib()
    columns["peak memory GiB"] = [peak]
    size = "a rehearsal at tiny size" if options.tiny else denoiser.name
    note = f"{size}, batches of {options.batch}, {options.steps} steps, {options.dtype}, {options.device}"
    write("sampling" if denoiser.name != "random" else "random", columns, note, options.out)


if __name__ == "__main__":
    main()
