"""What might make the U-Net faster here, each against the plain one in the same run; results must stay near.

Kept: inference_mode, both predictions in one call, fused attention (diffusers' default), all threads, and
bfloat16 for who asks for it. Not kept: channels_last, with which batches of 1 and of 16 differ by more than
1e-4; torch.compile, which wants a C++ compiler and a wait before the first picture; projections fused, and
the text's keys and values kept, which are too little to be worth a line.

python benchmarks/tried.py
"""

import argparse
import copy
import math
import time
from functools import partial

import torch
from common import seconds_of, write
from diffusers.models.attention_processor import AttnProcessor

import basinlab


class Kept(torch.nn.Module):
    """A layer that is computed once: the text's keys and values are the same at every step."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer, self.result = layer, None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.result is None:
            self.result = self.layer(inputs)
        return self.result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="emoji-duplicated", help="checkpoint")
    parser.add_argument("--batch-size", type=int, default=64, help="rows of one call: two predictions of 32 samples")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    denoiser = basinlab.load(options.name)
    unet, latents = denoiser.unet, torch.randn(options.batch_size, *denoiser.latent_shape)
    embedding = denoiser.embed([""]).expand(options.batch_size, -1, -1).contiguous()

    def run(network, dtype=torch.float32, layout=torch.contiguous_format):
        x = latents.to(dtype=dtype, memory_format=layout)
        return network(x, 500, encoder_hidden_states=embedding.to(dtype), return_dict=False)[0]

    def threads(count: int):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return run(unet)
        finally:
            torch.set_num_threads(before)

    def without_inference_mode():
        with torch.inference_mode(False), torch.no_grad():
            return run(unet)

    def split():
        return torch.cat([denoiser(x, 500, e) for x, e in zip(latents.chunk(2), embedding.chunk(2), strict=True)])

    last = torch.channels_last
    fused = copy.deepcopy(unet)
    fused.fuse_qkv_projections()
    written_out = copy.deepcopy(unet)
    written_out.set_attn_processor(AttnProcessor())
    kept = copy.deepcopy(unet)
    for name, attention in kept.named_modules():
        if name.endswith("attn2"):
            attention.to_k, attention.to_v = Kept(attention.to_k), Kept(attention.to_v)
    ways = {
        "bfloat16": partial(run, copy.deepcopy(unet).to(torch.bfloat16), torch.bfloat16),
        "channels_last": partial(run, copy.deepcopy(unet).to(memory_format=last), layout=last),
        "both": partial(run, copy.deepcopy(unet).to(torch.bfloat16, memory_format=last), torch.bfloat16, last),
        "torch.compile": partial(run, torch.compile(copy.deepcopy(unet))),
        "query, key and value fused": partial(run, fused),
        "attention not fused": partial(run, written_out),
        "the text's keys and values kept": partial(run, kept),
        "no_grad instead of inference_mode": without_inference_mode,
        "one thread": partial(threads, 1),
        "two predictions in two calls": split,
    }
    columns = {}
    with torch.inference_mode():
        plain = run(unet)
        for name, way in ways.items():
            began = time.perf_counter()
            try:
                error = (way() - plain).abs().max() / plain.abs().max()  # also warms up
            except Exception as failure:  # a compiler that is not there, say: what was tried is told all the same
                columns[f"{name}: did not run, {type(failure).__name__}"] = [math.nan]
                print(f"{name}: {failure}")
                continue
            if name == "torch.compile":
                columns[f"{name}: first call, s"] = [time.perf_counter() - began]
            ratios = [seconds_of(lambda: run(unet)) / seconds_of(way) for _ in range(options.rounds)]
            columns |= {f"{name}: times as fast": ratios, f"{name}: largest difference": [float(error)]}
    write("tried", columns, f"the U-Net alone, {options.batch_size} rows, differences relative to the largest value")


if __name__ == "__main__":
    main()
