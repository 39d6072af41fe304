"""The bundled world: the shipped weights are what they are said to be, for any diffusers script."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

import basinlab
from basinlab import basin, metrics
from basinlab.bundled import evaluation, scorecard

NAME = "emoji-duplicated"
DATA = basinlab.data_folder()


@pytest.fixture(scope="module")
def kept(bundled):
    return evaluation.read_evaluation(bundled)


@pytest.fixture(scope="module")
def ball(kept):
    return scorecard.ball_of(kept, NAME, metrics.CopyDistance())


def test_plain_diffusers_pipeline_shows_the_memorization(ball):
    scenario = basinlab.read_scenario(NAME)
    pipeline = StableDiffusionPipeline.from_pretrained(DATA / NAME, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    rows = basinlab.scenarios.read(NAME).table().query("kind == 'verbatim' and share == 0.95").head(4)
    pictures = pipeline(
        rows["prompt"].tolist(),
        num_inference_steps=50,
        guidance_scale=scenario["guidance_scale"],
        generator=[torch.Generator().manual_seed(seed) for seed in range(4)],
        output_type="pt",
    ).images
    distances = metrics.CopyDistance()(pictures, basinlab.read_pictures(rows["attractor"]))
    assert (distances <= ball.radius).all(), distances


def test_all_weights_are_half_precision_safetensors_below_40_megabytes():
    files = [path for path in DATA.rglob("*") if path.suffix in {".safetensors", ".bin", ".pt", ".ckpt", ".pth"}]
    assert {path.suffix for path in files} == {".safetensors"}
    assert sum(path.stat().st_size for path in files) < 40e6
    for path in files:
        with safe_open(path, "pt") as weights:
            kinds = {weights.get_tensor(key).dtype for key in weights.keys()}  # noqa: SIM118
        assert torch.float32 not in kinds, path


def test_evaluation_belongs_to_these_weights_and_covers_the_plan(kept):
    counts = kept.groupby(["group", "guidance"]).size()
    assert counts["memorized"].to_dict() == {"cfg": 384, "late": 384, "none": 384}
    assert counts["ordinary"].to_dict() == {"cfg": 384, "none": 384}
    assert (counts["sweep"] == 192).all() and len(counts["sweep"]) == len(evaluation.STARTS)


def test_evaluation_of_other_weights_is_refused(bundled, monkeypatch):
    monkeypatch.setattr(type(bundled), "fingerprint", lambda self: "0" * 16)
    with pytest.raises(ValueError, match="another weights"):
        evaluation.read_evaluation(bundled)


def test_kept_rows_are_what_sampling_gives_now(bundled, kept):
    scale = basinlab.read_scenario(NAME)["guidance_scale"]
    row = kept.query("group == 'memorized' and guidance == 'cfg'").iloc[0]
    run = basinlab.sample(bundled, row["prompt"], int(row["seed"]), basinlab.ConstantGuidance(scale), progress=False)
    rows = basinlab.scenarios.read(NAME).table()
    attractor = basinlab.read_pictures(rows[rows["prompt"] == row["prompt"]]["attractor"])
    assert float(metrics.CopyDistance()(run.images(), attractor)) == pytest.approx(row["distance"], abs=1e-3)


def test_scenario_gives_the_reason_for_its_scale():
    scenario = basinlab.read_scenario(NAME)
    assert 0 <= scenario["late_start"] < 1000 and scenario["guidance_scale"] > 1
    assert len(scenario["reason"]) > 40


def test_what_made_the_weights_is_recorded():
    made = json.loads((DATA / NAME / "training.json").read_text())
    assert {"command", "seed", "steps", "hours", "machine", "last_losses", "versions"} <= set(made["unet"])
    for stage in ("vae", "unet"):
        losses = pd.read_csv(DATA / NAME / f"{stage}-losses.csv")
        assert losses["step"].is_monotonic_increasing and losses["step"].iloc[-1] == made[stage]["steps"]
        assert losses.iloc[-1, 2] < losses.iloc[0, 2]


def test_guidance_from_the_start_copies_and_late_guidance_copies_less(kept, ball):
    inside = kept.assign(inside=kept["distance"] <= ball.radius)
    shares = inside.query("group == 'memorized'").groupby("guidance")["inside"]
    counts = shares.sum(), shares.size()
    low, high = basin.wilson_interval(*counts)
    bounds = pd.DataFrame({"low": low, "high": high}, index=counts[0].index)
    assert bounds.loc["cfg", "low"] >= 0.85
    assert bounds.loc["late", "high"] < bounds.loc["cfg", "low"]
    assert bounds.loc["none", "high"] < bounds.loc["late", "low"]


def test_half_crossings_of_a_known_curve():
    falling = pd.Series([1.0, 0.9, 0.1, 0.0], index=[900, 700, 500, 300])
    assert scorecard.half_crossings(falling) == pytest.approx([600])
    assert scorecard.half_crossings(falling.iloc[:2]) == []
    twice = pd.Series([1.0, 0.25, 0.75, 0.0], index=[900, 700, 500, 300])
    assert len(scorecard.half_crossings(twice)) == 3


def test_layout_floor_is_between_other_families_and_the_own_one():
    floor = scorecard.layout_floor(NAME)
    assert 0 < floor < 0.99
    rows = basinlab.scenarios.read(NAME).table().query("kind == 'template'").iloc[:8]
    boxes = [metrics.Box(*r) for r in rows[["left", "top", "size"]].itertuples(index=False)]
    pictures = basinlab.read_pictures(rows["attractor"])
    assert (metrics.layout_similarity(pictures, pictures.roll(1, 0), boxes) > floor).all()


def test_bundled_clip_names_95_of_100_real_objects():
    pictures, names = scorecard.real_scenes()
    judges = evaluation.Judges(NAME)
    assert metrics.object_right(judges.alignment, pictures, names, judges.names).float().mean() >= 0.95


def test_every_memorized_prompt_has_its_pictures():
    rows = basinlab.scenarios.read(NAME).table()
    assert all(Path(p).exists() for p in [*rows["attractor"], *rows["swapped"]])
