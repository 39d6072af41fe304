"""The sweep over start times against one `sample` a start, and the bisection against the sweep, in one run.

Alternating rounds; the figures that count are ratios of time for the same pictures, or for the same transition points.

    python benchmarks/sweep.py --dtype bfloat16
"""

import argparse
from functools import partial

import torch
from common import by_column, seconds_of, write

import basinlab
from basinlab import basin, metrics

PROMPTS, SEEDS, STEPS, ROUNDS, SCALE, RADIUS = 36, range(2), 50, 3, 3.0, 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    dtype = parser.parse_args().dtype
    denoiser = basinlab.load("emoji-duplicated", dtype=getattr(torch, dtype))
    table = basinlab.scenarios.read("emoji-duplicated").table().head(PROMPTS)
    starts, common = [*denoiser.timesteps(STEPS)[::2], 0], {"steps": STEPS, "progress": False}
    after = basinlab.ConstantGuidance(SCALE)

    def one_by_one(prompts: list[str]) -> None:
        for t in starts:
            rule = basinlab.StaticTransitionPoint(t, SCALE)
            basinlab.sample(denoiser, prompts, SEEDS, rule, record=False, **common).images()

    def swept(prompts: list[str]) -> None:
        basinlab.sweep(denoiser, prompts, SEEDS, starts, after=after, **common).images()

    rows, distance = [], metrics.CopyDistance()
    for number in range(ROUNDS):
        part = table.iloc[number::ROUNDS]
        prompts, attractors = part["prompt"].tolist(), basinlab.read_pictures(part["attractor"])
        known = (attractors.repeat_interleave(len(SEEDS), 0), distance, RADIUS, starts)
        halving = partial(basin.transition_points_by_bisection, denoiser, prompts, SEEDS, *known, after=after)
        works = (partial(one_by_one, prompts), partial(swept, prompts), partial(halving, **common))
        apart, together, halved = (seconds_of(work) for work in works)
        rows.append({
            "one sample per start / sweep": apart / together,
            "sweep / bisection": together / halved,
            "sweep, pictures a second": len(prompts) * len(SEEDS) * len(starts) / together,
        })  # fmt: skip
    runs = f"{PROMPTS} prompts x {len(SEEDS)} seeds x {len(starts)} start times"
    write(f"sweep-{dtype}", by_column(rows), f"{runs}, {dtype}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
