"""The sweep over start times against other ways to the same pictures, in one run.

Ways: the official static script's (batch 1, both predictions at every step, one run for each start
time), our own batched `sample` once for each start time, `sweep`, and, where only the transition
points are wanted, `transition_points_by_bisection`. Alternating rounds; the figures that count are
ratios of time for the same pictures (for the bisection, of the same points).

    python benchmarks/sweep.py --prompts 36 --seeds 2 --dtype float32
"""

import argparse

import torch
from common import by_column, seconds_of, write

import basinlab
from basinlab import basin, metrics


def official_way(denoiser, prompt: str, seed: int, start: int, scale: float, steps: int) -> None:
    """One picture as the static script makes it: the weight is 0 until ``start``, both predictions are made."""
    scheduler = type(denoiser.scheduler).from_config(denoiser.scheduler.config)
    scheduler.set_timesteps(steps)
    states = torch.cat([denoiser.embed([""]), denoiser.embed([prompt])])
    latents = torch.randn(1, *denoiser.latent_shape, generator=torch.Generator().manual_seed(seed)).to(denoiser.dtype)
    with torch.no_grad():
        for t in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            unconditional, conditional = denoiser.unet(both, t, encoder_hidden_states=states).sample.chunk(2)
            weight = scale if t <= start else 0.0
            combined = unconditional + weight * (conditional - unconditional)
            latents = scheduler.step(combined, t, latents).prev_sample
        denoiser.decode(latents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="emoji-duplicated", help="checkpoint")
    parser.add_argument("--prompts", type=int, default=36)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--every", type=int, default=2, help="one start time every so many steps, and never")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--official-images", type=int, default=12, help="pictures a round of the slowest way")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--scale", type=float, default=3.0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()

    denoiser = basinlab.load(options.name, dtype=getattr(torch, options.dtype))
    table = basinlab.scenarios.read(options.name).table()
    guidance, seeds = basinlab.ConstantGuidance(options.scale), range(options.seeds)
    starts = [*denoiser.timesteps(options.steps)[:: options.every], 0]
    common = {"steps": options.steps, "batch_size": options.batch_size, "progress": False}
    distance, ball = metrics.CopyDistance(), basin.Ball(0.25, 0.0, {})
    per_round, rows = max(1, options.prompts // options.rounds), []
    official_way(denoiser, "an owl", 0, 500, options.scale, options.steps)  # warm up
    for number in range(options.rounds):
        part = table.iloc[number * per_round : (number + 1) * per_round]
        prompts, pictures = part["prompt"].tolist(), len(part) * options.seeds * len(starts)
        attractors = basinlab.read_pictures(part["attractor"]).repeat_interleave(options.seeds, 0)
        chosen = [starts[i * len(starts) // options.official_images] for i in range(options.official_images)]
        rest = (distance, ball, starts)

        def apart(prompts=prompts):
            for t in starts:
                rule = basinlab.StaticTransitionPoint(t, options.scale)
                basinlab.sample(denoiser, prompts, seeds, rule, record=False, **common).images()

        def official(prompts=prompts, chosen=chosen):
            for seed, t in enumerate(chosen):
                official_way(denoiser, prompts[0], seed, t, options.scale, options.steps)

        def points(prompts=prompts, attractors=attractors, rest=rest):
            basin.transition_points_by_bisection(denoiser, prompts, seeds, attractors, *rest, after=guidance, **common)

        seconds = {
            "official": seconds_of(official) / len(chosen) * pictures,
            "apart": seconds_of(apart),
            "sweep": seconds_of(
                lambda p=prompts: basinlab.sweep(denoiser, p, seeds, starts, after=guidance, **common).images()
            ),
            "bisection": seconds_of(points),
        }
        rows.append(
            {
                "official way / sweep": seconds["official"] / seconds["sweep"],
                "one sample per start / sweep": seconds["apart"] / seconds["sweep"],
                "sweep / bisection": seconds["sweep"] / seconds["bisection"],
                "sweep, pictures a second": pictures / seconds["sweep"],
            }
        )
        print(rows[-1], flush=True)
    runs = f"{options.prompts} prompts x {options.seeds} seeds x {len(starts)} start times"
    write(f"sweep-{options.dtype}", by_column(rows), f"{runs}, {options.dtype}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
