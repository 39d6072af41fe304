"""The bundled world: the shipped weights are what they are said to be, for any diffusers script."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

import basinlab
from basinlab import metrics, scenarios
from basinlab.comparison import SCENARIOS
from recipe import evaluate, scorecard

MAIN = scenarios.read("emoji-duplicated")
DATA = basinlab.data_folder()


@pytest.fixture(scope="module")
def kept(bundled):
    return evaluate.read_evaluation(bundled)


def test_plain_diffusers_pipeline_shows_the_memorization():
    pipeline = StableDiffusionPipeline.from_pretrained(DATA / MAIN.model, torch_dtype=torch.float32)
    rows = MAIN.table().query("share == 0.95").head(4)
    options = {"guidance_scale": MAIN.guidance_scale, "num_inference_steps": 50, "output_type": "pt"}
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    pictures = pipeline(rows["prompt"].tolist(), generator=generators, **options).images
    distances = metrics.CopyDistance()(pictures, basinlab.read_pictures(rows["attractor"]))
    assert (distances <= MAIN.radius).all(), distances


def test_all_weights_are_half_precision_safetensors_below_40_megabytes_and_what_made_them_is_recorded():
    files = [path for path in DATA.rglob("*") if path.suffix in {".safetensors", ".bin", ".pt", ".ckpt", ".pth"}]
    assert {path.suffix for path in files} == {".safetensors"}
    assert sum(path.stat().st_size for path in files) < 40e6
    assert not [path for path in files for tensor in load_file(path).values() if tensor.dtype == torch.float32]
    made = json.loads((DATA / MAIN.model / "training.json").read_text())
    assert {"command", "seed", "steps", "hours", "machine", "last_losses", "versions"} <= set(made["unet"])
    for stage in ("vae", "unet"):
        losses = pd.read_csv(DATA / MAIN.model / f"{stage}-losses.csv")
        assert losses["step"].is_monotonic_increasing and losses["step"].iloc[-1] == made[stage]["steps"]
        assert losses.iloc[-1, 2] < losses.iloc[0, 2]


def test_the_kept_evaluation_is_of_these_weights_and_covers_the_plan(kept, bundled, monkeypatch):
    for group, prompts, seeds, guidances in evaluate.plan(MAIN):
        counts = kept[kept["group"] == group].groupby("guidance").size()
        assert counts[[*guidances]].tolist() == [len(prompts) * len(seeds)] * len(guidances)
    monkeypatch.setattr(type(bundled), "fingerprint", lambda self: "0" * 16)
    with pytest.raises(ValueError, match=r"is of the weights .*make evaluate"):
        evaluate.read_evaluation(bundled)


def test_the_scorecard_the_radius_and_the_layout_floor_are_the_committed_ones(kept, bundled):
    negatives = scorecard.negatives_of(kept, MAIN, metrics.CopyDistance())
    found = scorecard.calibrate_radius(negatives), scorecard.layout_floor(MAIN)
    assert found == pytest.approx((MAIN.radius, MAIN.layout_floor), rel=1e-5)  # float32, summed as the CPU likes
    others = {name: evaluate.read_evaluation(scenarios.read(name).load()) for name in SCENARIOS[1:]}
    card = scorecard.scorecard(kept, bundled, scenarios.Judges(MAIN), others).set_index("claim")
    committed = pd.read_csv(DATA.parent / "figures/01_scorecard.csv").set_index("claim")
    if "VAE, unseen scenes: SSCD of reconstruction to original" not in card.index:  # the student is not installed
        committed = committed.drop("VAE, unseen scenes: SSCD of reconstruction to original")
    assert card.index.equals(committed.index) and card["verdict"].equals(committed["verdict"])
    assert not (card["low"] > card["high"]).any()  # as where a quotient's divisor is below 0
    pd.testing.assert_series_equal(card["value"], committed["value"], rtol=0.02)


def test_kept_rows_are_what_sampling_gives_now(bundled, kept):
    compared = pd.read_parquet(DATA / "comparison.parquet").query("method == 'CFG'").iloc[1]
    guidance, judges = basinlab.ConstantGuidance(MAIN.guidance_scale), scenarios.Judges(MAIN)
    for row in (kept.query("group == 'memorized' and guidance == 'cfg'").iloc[0], compared):
        run = basinlab.sample(bundled, row["prompt"], int(row["seed"]), guidance, record=False, progress=False)
        found = judges(run, MAIN.table()).iloc[0]
        assert found["distance"] == pytest.approx(row["distance"], abs=1e-3)
    assert found["copied"] == row["copied"] and found["clip_score"] == pytest.approx(row["clip_score"], abs=1e-3)


def test_the_evaluation_gives_all_that_is_kept_and_its_scorecard_asks_for(kept, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(scenarios.Scenario, "load", lambda *_, **__: tiny)  # it does not matter what is sampled
    scenario, (pictures, names) = replace(MAIN, second_copy="descriptor"), scenarios.unseen_scenes()
    monkeypatch.setattr(scorecard, "unseen_scenes", lambda: (pictures[:24], names[:24]))
    few = {group: MAIN.table(group).groupby("share", sort=False).tail(2) for group in ("memorized", "template")}
    few["ordinary"] = MAIN.table("ordinary").head(3)
    plan = [(group, few.get(group, few["ordinary"]), [0, 1], tried) for group, *_, tried in evaluate.plan(MAIN)]
    swept = [(group, few["template" if group == "template" else "memorized"], range(2), *rest)
             for group, _, _, *rest in evaluate.sweeps(MAIN)]  # fmt: skip
    monkeypatch.setattr(evaluate, "plan", lambda scenario: plan)
    monkeypatch.setattr(evaluate, "sweeps", lambda scenario: swept)
    monkeypatch.setattr(evaluate, "STARTS", (999, 0))
    monkeypatch.setattr(scorecard, "HELD_OUT", 4)
    table = evaluate.evaluate(scenario, tmp_path, steps=4)
    assert {*kept.columns} <= {*table.columns} and table.attrs.keys() == kept.attrs.keys()
    others = {name: table[table["group"] == "sweep"] for name in ("emoji-finetuned", "emoji-classes")}
    monkeypatch.setattr(type(tiny), "timesteps", lambda _: [999, 666, 333, 0])
    card = scorecard.scorecard(table, tiny, scenarios.Judges(scenario), others)
    assert len(card) > 35 and {*card["verdict"]} <= {"yes", "no", "undecided", "reported"}
    assert card["claim"].is_unique and (card["n"] > 0).all()


def test_measures_of_the_scorecards_on_known_curves_and_pictures():
    falling, twice = ([1.0, 0.9, 0.1, 0.0], [1.0, 0.25, 0.75, 0.0])
    for values, at in ((falling, [600]), (falling[:2], []), (twice, [900 - 400 / 3, 600, 500 - 200 / 3])):
        assert scorecard.half_crossings(pd.Series(values, [900, 700, 500, 300][: len(values)])) == pytest.approx(at)
    # the largest fall is within a hundred timesteps, and relative to the peak
    curves = np.array([[1, 4, 2, 2], [1, 1, 1, 1], [1, 4, 4, 1]], float)
    assert scorecard.largest_fall(curves, np.array([900, 800, 700, 550])).tolist() == [0.5, 0, 0]
    colour = torch.tensor([0.2, 0.6, 0.9])  # of the background: not of the middle nor of a few odd pixels
    pictures = colour[None, :, None, None].repeat(1, 1, 64, 64)
    pictures[..., 2:-2, 2:-2], pictures[..., :2, :40] = 0, 1
    torch.testing.assert_close(scorecard.background_colour(pictures), colour[None])
