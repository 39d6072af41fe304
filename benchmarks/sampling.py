"""Sampling against diffusers' own pipeline, one picture a call and as many as ours, in one run.

Both draw the same (prompt, seed) pairs with the same steps and guidance scale, decoded pictures
included, in alternating rounds; the figure that counts is the ratio of images per second. Also
reported: the share of our time inside the U-Net's forward, and the process's peak memory.

    python benchmarks/sampling.py --prompts 48 --seeds 8
"""

import argparse
import time

import torch
from common import ForwardClock, by_column, peak_gib, write

import basinlab
from basinlab.models import Denoiser


def ours(denoiser: Denoiser, prompts: list[str], seeds: range, scale: float, steps: int) -> float:
    """Images per second of `basinlab.sample`, decoding included."""
    began = time.perf_counter()
    guidance = basinlab.ConstantGuidance(scale)
    basinlab.sample(denoiser, prompts, seeds, guidance, steps=steps, record=False, progress=False).images()
    return len(prompts) * len(seeds) / (time.perf_counter() - began)


def batched(pipeline, prompt: str, count: int, scale: float, steps: int) -> float:
    """Images per second of the pipeline, called once for ``count`` of them."""
    began = time.perf_counter()
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    options = {"num_inference_steps": steps, "guidance_scale": scale, "generator": generators, "output_type": "np"}
    pipeline([prompt] * count, **options)
    return count / (time.perf_counter() - began)


def loop(pipeline, pairs: list[tuple[str, int]], scale: float, steps: int) -> float:
    """Images per second of the pipeline, called once an image."""
    began = time.perf_counter()
    for prompt, seed in pairs:
        generator = torch.Generator().manual_seed(seed)
        pipeline(prompt, num_inference_steps=steps, guidance_scale=scale, generator=generator, output_type="np")
    return len(pairs) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="emoji-duplicated", help="checkpoint")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loop-images", type=int, default=8, help="images a round of the slower side")
    parser.add_argument("--scale", type=float, default=7.5)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()

    from diffusers import StableDiffusionPipeline

    denoiser = basinlab.load(options.name)
    pipeline = StableDiffusionPipeline.from_pretrained(denoiser.folders[0], torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = basinlab.scenarios.read(denoiser.name).table()["prompt"].tolist()[: options.prompts]
    pairs = [(prompts[i % len(prompts)], i) for i in range(options.loop_images)]
    loop(pipeline, pairs[:1], options.scale, options.steps)  # warm up
    clock, rows = ForwardClock(denoiser.unet), []
    per_round = max(1, options.prompts // options.rounds)
    for number in range(options.rounds):
        part = prompts[number * per_round : (number + 1) * per_round]
        clock.seconds = 0.0
        fast = ours(denoiser, part, range(options.seeds), options.scale, options.steps)
        inside = clock.seconds * fast / (len(part) * options.seeds)
        slow = loop(pipeline, pairs, options.scale, options.steps)
        same = batched(pipeline, prompts[number], options.batch_size, options.scale, options.steps)
        rows.append(
            {
                "basinlab images/s": fast,
                "pipeline images/s, one a call": slow,
                "pipeline images/s, same batch": same,
                "basinlab / pipeline, one a call": fast / slow,
                "basinlab / pipeline, same batch": fast / same,
                "share of our time in the U-Net": inside,
            }
        )
        print(rows[-1], flush=True)
    runs = f"{options.prompts} prompts x {options.seeds} seeds, {options.steps} steps, batches of {options.batch_size}"
    columns = {**by_column(rows), "peak memory GiB": [peak_gib()]}
    write("sampling", columns, f"{runs}, float32, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
