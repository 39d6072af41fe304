"""`sample` against diffusers' own pipeline, one picture a call and as many as ours at once, in one run.

Both sides have the same weights, steps and scale, pictures decoded, in alternating rounds; what counts are ratios.

    python benchmarks/sampling.py --compiled       # also with torch.compile: needs a C++ compiler and half a minute
    python benchmarks/sampling.py --model CompVis/stable-diffusion-v1-4 --device cuda --dtype bfloat16 --out build
"""

import argparse
import copy
from functools import partial
from pathlib import Path

import torch
from common import RESULTS, clocked, peak_gib, seconds_of, write

import basinlab


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
    parser.add_argument("--model", default="emoji-duplicated", help="as `basinlab.load` takes it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="also with the U-Net compiled")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table")
    options = parser.parse_args()
    device, dtype, few = options.device, getattr(torch, options.dtype), min(options.batch, 4)
    denoiser = basinlab.load(options.model, device=device, dtype=dtype)
    pipeline = denoiser.pipeline
    pipeline.set_progress_bar_config(disable=True)
    common = {"steps": options.steps, "batch_size": options.batch, "record": False, "progress": False}

    def theirs(calls: int, batch: int) -> None:
        for seed in range(calls):
            noise = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
            pipeline(["an owl"] * batch, num_inference_steps=options.steps, generator=noise, output_type="pt")

    def ours(guidance, denoiser=denoiser) -> None:
        basinlab.sample(denoiser, "an owl", range(options.batch), guidance, **common).images()

    ways = {
        "pipeline, same batch": (partial(theirs, 1, options.batch), options.batch),
        "pipeline, one a call": (partial(theirs, few, 1), few),
        "basinlab, CFG": (partial(ours, cfg := basinlab.ConstantGuidance(7.5)), options.batch),
        "basinlab, STP at 500": (partial(ours, basinlab.StaticTransitionPoint(500, 7.5)), options.batch),
    }
    if options.compiled:
        (compiled := copy.deepcopy(denoiser)).unet.compile()
        ways["basinlab, CFG, compiled"] = (partial(ours, cfg, compiled), options.batch)
    columns = measured(ways, options.rounds, clocked(denoiser.unet, device), device)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else peak_gib()
    columns["peak memory GiB" + ", both models" * options.compiled] = [peak]
    note = f"{options.model}, batches of {options.batch}, {options.steps} steps, {options.dtype}, {options.device}"
    write("sampling", columns, note, options.out)


if __name__ == "__main__":
    main()
