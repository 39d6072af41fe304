"""The sweep over start times against one `sample` a start, and the bisection against the sweep, in one run.

Alternating rounds; the figures that count are ratios of time for the same pictures, or for the same transition points.

    python benchmarks/sweep.py --prompts 36 --seeds 2 --dtype float32
"""

import argparse
from functools import partial

import torch
from common import by_column, seconds_of, write

import basinlab
from basinlab import basin, metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=36)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--every", type=int, default=2, help="one start time every so many steps, and never")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--scale", type=float, default=3.0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    denoiser = basinlab.load("emoji-duplicated", dtype=getattr(torch, options.dtype))
    table = basinlab.scenarios.read("emoji-duplicated").table().head(options.prompts)
    starts, seeds = [*denoiser.timesteps(options.steps)[:: options.every], 0], range(options.seeds)
    common = {"steps": options.steps, "batch_size": options.batch_size, "progress": False}
    after = basinlab.ConstantGuidance(options.scale)

    def one_by_one(prompts: list[str]) -> None:
        for t in starts:
            rule = basinlab.StaticTransitionPoint(t, options.scale)
            basinlab.sample(denoiser, prompts, seeds, rule, record=False, **common).images()

    def swept(prompts: list[str]) -> None:
        basinlab.sweep(denoiser, prompts, seeds, starts, after=after, **common).images()

    rows, distance, radius = [], metrics.CopyDistance(), 0.25
    for number in range(options.rounds):
        part = table.iloc[number :: options.rounds]
        prompts, attractors = part["prompt"].tolist(), basinlab.read_pictures(part["attractor"])
        known = (attractors.repeat_interleave(options.seeds, 0), distance, radius, starts)
        halving = partial(basin.transition_points_by_bisection, denoiser, prompts, seeds, *known, after=after)
        works = (partial(one_by_one, prompts), partial(swept, prompts), partial(halving, **common))
        apart, together, halved = (seconds_of(work) for work in works)
        rows.append({
            "one sample per start / sweep": apart / together,
            "sweep / bisection": together / halved,
            "sweep, pictures a second": len(prompts) * options.seeds * len(starts) / together,
        })  # fmt: skip
    runs = f"{options.prompts} prompts x {options.seeds} seeds x {len(starts)} start times"
    write(f"sweep-{options.dtype}", by_column(rows), f"{runs}, {options.dtype}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
