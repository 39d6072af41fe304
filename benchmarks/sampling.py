"""Sampling against a loop of diffusers' own pipeline at batch 1, in one run.

Both draw the same (prompt, seed) pairs with the same steps and guidance scale, decoded pictures
included, in alternating rounds; the figure that counts is the ratio of images per second. Also
reported: the share of our time inside the U-Net's forward, and the process's peak memory.

    python benchmarks/sampling.py --prompts 48 --seeds 8
"""

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

import pandas as pd
import torch

import basinlab
from basinlab.models import Denoiser

RESULTS = Path(__file__).parent / "results"


class ForwardClock:
    """Seconds spent inside a module's forward."""

    def __init__(self, module: torch.nn.Module):
        self.seconds = 0.0
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)

    def _start(self, *_) -> None:
        self._began = time.perf_counter()

    def _stop(self, *_) -> None:
        self.seconds += time.perf_counter() - self._began


def ours(denoiser: Denoiser, prompts: list[str], seeds: range, scale: float, steps: int) -> float:
    """Images per second of `basinlab.sample`, decoding included."""
    began = time.perf_counter()
    guidance = basinlab.ConstantGuidance(scale)
    basinlab.sample(denoiser, prompts, seeds, guidance, steps=steps, record=False, progress=False).images()
    return len(prompts) * len(seeds) / (time.perf_counter() - began)


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
    options = parser.parse_args()

    from diffusers import StableDiffusionPipeline

    denoiser = basinlab.load(options.name)
    pipeline = StableDiffusionPipeline.from_pretrained(denoiser.folders[0], torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = basinlab.read_prompts(denoiser.name, "memorized")["prompt"].tolist()[: options.prompts]
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
        rows.append({"basinlab images/s": fast, "pipeline images/s": slow, "ratio": fast / slow, "in U-Net": inside})
        print(rows[-1], flush=True)
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30
    columns = {k: [r[k] for r in rows] for k in rows[0]}
    table = pd.DataFrame(
        {
            "figure": [*columns, "peak memory GiB"],
            "median": [*(statistics.median(v) for v in columns.values()), peak],
            "lowest": [*(min(v) for v in columns.values()), peak],
            "highest": [*(max(v) for v in columns.values()), peak],
        }
    )
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / "sampling.csv", index=False, float_format="%.4g")
    print(table.to_string(index=False))
    runs = f"{options.prompts} prompts x {options.seeds} seeds, {options.steps} steps"
    print(f"{runs}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
