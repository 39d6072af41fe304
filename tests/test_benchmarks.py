"""The benchmarks run, at sizes whose figures mean nothing; the official scripts' shim on a script of our own."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import basinlab
from benchmarks import official

# As the official ones in what matters here: the same vanished imports, `cuda`, an undefined name, a loop by hand.
SCRIPT = """
import argparse
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, FlaxKarrasVeScheduler, UNet2DConditionModel
from npy_append_array import NpyAppendArray
from local_sd_pipeline import LocalStableDiffusionPipeline
import matplotlib.pyplot as plt

parser = argparse.ArgumentParser()
parser.add_argument("--model")
model = parser.parse_args().model
unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").to("cuda")
vae = AutoencoderKL.from_pretrained(model, subfolder="vae").to("cuda")
scheduler = DPMSolverMultistepScheduler.from_pretrained(model, subfolder="scheduler")
text = torch.zeros(2, 32, unet.config.cross_attention_dim, device="cuda")
text[1] = 1
torch.manual_seed(42)
for number in range(2):
    scheduler.set_timesteps(4)
    latents = torch.randn((1, 4, 12, 12), device="cuda")
    for t in scheduler.timesteps:
        with torch.no_grad():
            u, c = unet(torch.cat([latents] * 2), t, encoder_hidden_states=text).sample.chunk(2)
        latents = scheduler.step(u + (scale if t < 600 else 0) * (c - u), t, latents).prev_sample
        transition_point = 500
    plt.plot([1]); plt.savefig("/nowhere/plot.png")
    with torch.no_grad():
        vae.decode(latents)
    FINALLY
"""


def run(tmp_path, tiny_folder, ending="", **options):
    """The record of the script above, made in a process of its own."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("FINALLY", ending))
    job = official.Job(str(script), ["--model", str(tiny_folder)], {"scale": 3.0}, [42, 7], **options)
    (tmp_path / "job.json").write_text(json.dumps(asdict(job)))
    command = [sys.executable, official.__file__, "--job", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return official.Record.read(tmp_path / "record.pt")


def test_the_shim_runs_lists_its_changes_and_sees_what_the_script_does(tmp_path, tiny_folder, tiny):
    record = run(tmp_path, tiny_folder, "exit(0)", go_on=True)
    assert record.ended == "ran to its end"
    told = "\n".join(record.changes)
    for part in ("FlaxKarrasVeScheduler", "npy_append_array", "local_sd_pipeline", '"cuda"', "scale", "exit", "pyplot"):
        assert part in told
    noise = basinlab.sampling.initial_noise(tiny, [42, 7])
    for picture, own in zip(record.pictures, noise, strict=True):
        seen = picture.passes[0]
        assert torch.equal(picture.initial[0], own) and torch.equal(seen.latents[0], picture.initial)
        assert (picture.predictions, picture.point, len(seen.latents)) == (8, 500, 5)
        assert seen.weights == [3.0 if t < 600 else 0.0 for t in seen.timesteps]


def test_how_a_script_ends_is_told(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(official.Shim, "_watch", lambda self: None)
    (tmp_path / "script.py").write_text("scale")
    failing = official.Job(str(tmp_path / "script.py"), [], {}, [42])
    assert official.Shim(failing).run().ended == "NameError: name 'scale' is not defined"
    ending = "try: FlaxKarrasVeScheduler()\n    except NotImplementedError as error: exit(str(error))"
    record = run(tmp_path, tiny_folder, ending, record=False)
    assert record.ended.startswith("exit(diffusers.FlaxKarrasVeScheduler is not installed")
    assert len(record.pictures) == 1


def test_the_scripts_find_the_prompts_and_a_missing_clone_names_cause_and_cure(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} is no clone of the official code.*git clone"):
        official.found_scripts(tmp_path)
    # and prompts lie where the static script draws them
    wanted = [f"prompt {i}" for i in range(30)]
    official._write_prompts(tmp_path, wanted)
    pool = [v[0] for v in json.loads((tmp_path / "captions.json").read_text()).values()]
    np.random.seed(42)
    assert list(np.random.choice(pool, 30)) == wanted


@pytest.mark.skipif("BASINLAB_OFFICIAL" not in os.environ, reason="BASINLAB_OFFICIAL names no clone of theirs")
@pytest.mark.parametrize("case", official.cases(), ids=lambda case: case.name)
def test_our_sampler_makes_what_the_official_script_makes(case, bundled):
    runner = official.Official(official.found_scripts(Path(os.environ["BASINLAB_OFFICIAL"])), bundled, 300)
    prompts = basinlab.scenarios.read("emoji-duplicated").table()["prompt"].tolist()[:1]
    record = runner.run(case, [(prompts[0], seed) for seed in (42, 43)])
    row = official.compared(case, record, bundled, prompts, [42, 43])
    assert row["initial latents"] == 0 and row["final latents"] <= official.BOUND
    assert case.replayed or row["same points"] == 2


def test_sampling_runs_at_a_size_whose_figures_mean_nothing(tmp_path, monkeypatch, tiny_folder):
    options = f"--steps 2 --batch 2 --rounds 1 --model {tiny_folder} --out {tmp_path}"
    script = Path(official.__file__).with_name("sampling.py")
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script), *options.split()])
    runpy.run_path(str(script), run_name="__main__")
    table = pd.read_csv(tmp_path / "sampling.csv").set_index("figure")
    assert table.loc["basinlab, CFG / pipeline, same batch", "rounds"] == 1
    assert 0 < table.loc["share of our time in the U-Net", "median"] < 1
    assert table["of"].eq(f"{tiny_folder}, batches of 2, 2 steps, float32, cpu").all()
