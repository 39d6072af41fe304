"""The comparison on a real checkpoint's layout, with the bundled judges on pictures that are known."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import basinlab
from basinlab import basin, experiment
from basinlab import mitigations as perturbation
from basinlab.published import comparison, scenarios, stand_in

PROMPTS, SEEDS = ["an owl", "a tomato"], [0, 1, 2]
CFG = basinlab.ConstantGuidance(3.0)


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    return basinlab.load(str(stand_in.save("sd1", tmp_path_factory.mktemp("sd1"))))


@pytest.fixture(scope="module")
def run(denoiser):
    return basinlab.sample(denoiser, PROMPTS, SEEDS, CFG, steps=4, progress=False)


@pytest.fixture
def table(run, tmp_path):
    """Prompts of which the first has its own second sample as reference, and the second none."""
    Image.fromarray((run.images()[1] * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "learned.png")
    return pd.DataFrame({"prompt": PROMPTS, "attractor": [str(tmp_path / "learned.png"), ""]})


def judges(table):
    return comparison.judges(scenarios.read("emoji-duplicated"), table)


def test_similarity_is_to_the_prompts_own_reference(run, table):
    seen = comparison.observed(run, judges(table))
    assert seen["similarity"].iloc[:3].argmax() == 1
    assert seen["similarity"].iloc[1] == pytest.approx(1, abs=2e-3)
    assert seen["similarity"].iloc[3:].isna().all()
    assert (seen["calls"] == 8).all() and seen["clip_score"].between(-1, 1).all()


def test_an_attractor_is_estimated_where_there_is_no_reference(run, table):
    before = judges(table)
    after = before.estimated(run)
    assert torch.equal(after.references["an owl"], before.references["an owl"])
    seen = comparison.observed(run, after)
    assert seen["similarity"].iloc[3:].max() == pytest.approx(1, abs=1e-5)  # the medoid itself


def test_without_a_reference_a_sweep_is_not_said_to_be_free_of_copies(denoiser):
    sweep = basinlab.sweep(denoiser, PROMPTS, SEEDS, [999, 0], after=CFG, steps=2, progress=False)
    swept = comparison.swept(sweep, comparison.Judges(None, None))
    assert swept["inside"].isna().all()
    assert basin.capture_probability(swept, "start").empty and basin.transition_points(swept).empty


def test_a_sweep_is_judged_as_separate_runs_are(denoiser, table):
    judging = judges(table)
    sweep = basinlab.sweep(denoiser, PROMPTS, SEEDS, [999, 0], after=CFG, steps=4, progress=False)
    swept = comparison.swept(sweep, judging)
    for start in (999, 0):
        rule = basinlab.StaticTransitionPoint(start, 3.0)
        alone = comparison.observed(basinlab.sample(denoiser, PROMPTS, SEEDS, rule, steps=4, progress=False), judging)
        np.testing.assert_allclose(swept.query("start == @start")["similarity"], alone["similarity"], atol=1e-3)
    known = swept.dropna(subset="similarity")
    assert (known["inside"] == (known["similarity"] > 0.5)).all() and swept["inside"].count() == len(known)


def test_measures_have_intervals_over_prompts_and_none_of_what_was_not_measured():
    rows = [("CFG", f"prompt {i}", 0.1 * i, np.nan, 0.5) for i in range(8) for _ in range(3)]
    seen = pd.DataFrame(rows, columns=["strategy", "prompt", "similarity", "clip_score", "diversity"])
    found = comparison.measures(seen).set_index("measure")
    assert list(found.index) == ["similarity", "similarity_95", "diversity"]
    row = found.loc["similarity"]
    assert row["value"] == pytest.approx(0.35) and row["low"] < 0.35 < row["high"]
    assert (row["n"], row["prompts"]) == (24, 8)
    assert found.loc["similarity_95", "value"] > row["high"]


def test_missing_judges_are_named_and_not_measured(run, table, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    judging = comparison.judges(scenarios.read("sd14-webster"), table)
    assert judging.distance is None and judging.alignment is None and not judging.references
    assert "copy similarity: not measured; SSCD weights" in judging.notices[0]
    assert "alignment: not measured; no CLIP in 'openai/clip" in judging.notices[1]
    assert comparison.observed(run, judging)[["similarity", "clip_score", "diversity"]].isna().all(None)
    assert comparison.measures(comparison.observed(run, judging).assign(strategy="CFG")).empty


def test_all_methods_go_through_the_grid_with_their_authors_settings(denoiser, run, table, tmp_path):
    scenario = scenarios.read("sd14-webster")
    methods = comparison.strategies(scenario)
    assert len(methods) == 18
    assert methods["Wen"].perturbations == (perturbation.PromptOptimization(3.0, 0.05, 10),)
    assert methods["STP"].guidance.start == scenario.static_transition_point
    short = comparison.shortened(methods)
    assert short["Han, per sample"].perturbations[0].iterations == 2 and short["RNA"] == methods["RNA"]
    judge = lambda run, rows: comparison.observed(run, judges(table))  # noqa: E731
    grid = experiment.run_grid(denoiser, table.head(1), [0], short, judge, tmp_path / "grid", steps=3)
    assert grid["strategy"].tolist() == list(methods)
    assert grid["calls"].iloc[0] == 6


def test_dear_parts_go_to_different_processes():
    costs = [100] * 8 + [1] * 40
    loads = [sum(costs[i] for i in share) for share in experiment.shares(costs, 8)]
    assert loads == [105] * 8
    everything = sorted(i for share in experiment.shares(costs, 5) for i in share)
    assert everything == list(range(48))
