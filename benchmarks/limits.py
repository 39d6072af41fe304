"""How near the U-Net is to what this machine's convolutions and matrix products allow at the same shapes.

Every convolution, linear layer and attention of one forward is timed alone; their sum is this network's limit here.
What the forward takes beyond it are normalisations, activations, memory and Python. Beside it, what might save some.

    python benchmarks/limits.py --dtype bfloat16
"""

import argparse
import copy
from collections import Counter
from functools import partial

import torch
import torch.nn.functional as F
from common import by_column, seconds_of, write

import basinlab


def kernels(forward, unet: torch.nn.Module) -> tuple[Counter, dict]:
    """The kernels of a forward by shape: how often each is called, and how to run it alone."""
    counts, alone, attention = Counter(), {}, F.scaled_dot_product_attention

    def layer_called(layer, inputs, _) -> None:  # the weights of a layer of equal size do just as well
        name = f"{type(layer).__name__} {list(layer.weight.shape)} on {list(inputs[0].shape)}"
        counts[name] += 1
        alone[name] = partial(type(layer).forward, layer, torch.randn_like(inputs[0]))

    def attend(query, key, value, **options):
        name = f"attention {list(query.shape)} to {key.shape[2]}"
        counts[name] += 1
        alone[name] = partial(attention, *map(torch.randn_like, (query, key, value)), **options)
        return attention(query, key, value, **options)

    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    hooks = [module.register_forward_hook(layer_called) for module in unet.modules() if isinstance(module, kinds)]
    F.scaled_dot_product_attention = attend
    forward()
    F.scaled_dot_product_attention = attention
    for hook in hooks:
        hook.remove()
    return counts, alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    name, rows = parser.parse_args().dtype, 64  # two predictions of 32 samples
    denoiser = basinlab.load("emoji-duplicated", dtype=(dtype := getattr(torch, name)))
    latents, embedding = torch.randn(rows, *denoiser.latent_shape, dtype=dtype), denoiser.embed([""])
    forward, found = partial(denoiser, latents, 500, embedding.expand(rows, -1, -1)), []
    counts, alone = kernels(forward, denoiser.unet)
    others = {name: copy.deepcopy(denoiser) for name in ("channels last", "torch.compile")}
    others["channels last"].unet.to(memory_format=torch.channels_last)
    others["torch.compile"].unet.compile()
    others = {f"forward / with {name}": partial(other, *forward.args) for name, other in others.items()}
    with torch.inference_mode():
        others["forward / with torch.compile"]()  # which compiles
        for _ in range(5):
            whole = min(seconds_of(forward) for _ in range(3))
            bare = sum(n * min(seconds_of(alone[name]) for _ in range(3)) for name, n in counts.items())
            tried = {name: whole / min(seconds_of(other) for _ in range(3)) for name, other in others.items()}
            found.append({"kernels alone / forward": bare / whole, "forward, ms a row": whole / rows * 1000} | tried)
    note = f"{len(counts)} shapes of {sum(counts.values())} kernels, {rows} rows, {torch.get_num_threads()} threads"
    write(f"limits-{name}", by_column(found), note)


if __name__ == "__main__":
    main()
