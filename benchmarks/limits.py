"""How near the U-Net is to what this machine's convolutions and matrix products allow at the same shapes.

Every convolution, linear layer and attention of one forward is timed alone, on inputs of its own shape;
their sum is the physical limit of this network here. What the forward takes beyond it (normalisations,
activations, memory traffic, Python) is named by torch's profiler in results/profile.txt.

    python benchmarks/limits.py --batch-size 64
"""

import argparse
from collections import Counter
from functools import partial

import torch
import torch.nn.functional as F
from common import RESULTS, by_column, seconds_of, write
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import basinlab


class Seen:
    """Counts the kernels of a forward by shape: name -> how often, and how to run it alone."""

    def __init__(self, unet: torch.nn.Module):
        self.counts, self.alone = Counter(), {}
        kinds = (torch.nn.Conv2d, torch.nn.Linear)
        self.hooks = [m.register_forward_hook(self._layer) for m in unet.modules() if isinstance(m, kinds)]
        self.attention = F.scaled_dot_product_attention

    def _layer(self, layer, inputs, _) -> None:
        # a layer of these shapes: its weights are another's of equal size just as well
        name = f"{type(layer).__name__} {list(layer.weight.shape)} on {list(inputs[0].shape)}"
        self.counts[name] += 1
        self.alone[name] = partial(type(layer).forward, layer, torch.randn_like(inputs[0]))

    def attend(self, query, key, value, **options):
        name = f"attention {list(query.shape)} to {key.shape[2]}"
        self.counts[name] += 1
        self.alone[name] = partial(self.attention, *map(torch.randn_like, (query, key, value)), **options)
        return self.attention(query, key, value, **options)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def fastest(work, tries: int = 3) -> float:
    return min(seconds_of(work) for _ in range(tries))


def product_rate(dtype: torch.dtype, side: int = 2048) -> float:
    """Floating-point operations a second of a product of square matrices."""
    a = torch.randn(side, side, dtype=dtype)
    return 2 * side**3 / fastest(lambda: a @ a, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="emoji-duplicated", help="checkpoint")
    parser.add_argument("--batch-size", type=int, default=64, help="rows of one call: two predictions of 32 samples")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    denoiser = basinlab.load(options.name, dtype=dtype)
    latents = torch.randn(options.batch_size, *denoiser.latent_shape, dtype=dtype)
    embedding = denoiser.embed([""]).expand(options.batch_size, -1, -1)
    forward = partial(denoiser, latents, 500, embedding)
    seen = Seen(denoiser.unet)
    F.scaled_dot_product_attention = seen.attend
    with FlopCounterMode(display=False) as counter:
        forward()
    F.scaled_dot_product_attention = seen.attention
    seen.remove()
    operations, rows = counter.get_total_flops(), []
    with torch.inference_mode():
        for _ in range(options.rounds):
            whole = fastest(forward)
            bare = sum(count * fastest(seen.alone[name]) for name, count in seen.counts.items())
            rows.append(
                {
                    "kernels alone / forward": bare / whole,
                    "forward, GFLOP/s": operations / whole / 1e9,
                    "kernels alone, GFLOP/s": operations / bare / 1e9,
                    "large matrix product, GFLOP/s": product_rate(dtype) / 1e9,
                    "forward, ms a row": whole / options.batch_size * 1000,
                }
            )
            print(rows[-1], flush=True)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            forward()
    text = profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40)
    (RESULTS / "profile.txt").write_text(text)
    note = (
        f"{len(seen.counts)} shapes of {sum(seen.counts.values())} kernels, {options.batch_size} rows, {options.dtype}"
    )
    write(f"limits-{options.dtype}", by_column(rows), f"{note}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
