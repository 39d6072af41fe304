"""The grid: resumed from its parts, which are not mixed with those of other settings."""

import numpy as np
import pandas as pd
import pytest

import basinlab
from basinlab import basin, experiment
from basinlab.bundled import evaluation


def test_grid_resumes_from_its_parts_and_refuses_those_of_another_guidance(bundled, tmp_path):
    prompts = basinlab.scenarios.read(bundled.name).table().head(3)
    judges = evaluation.Judges(bundled.name)

    def grid(scale):
        guidances = {"cfg": basinlab.ConstantGuidance(scale)}
        judge = lambda run, rows: evaluation.measured(run, rows, judges)  # noqa: E731
        return experiment.run_grid(bundled, prompts, [0, 1], guidances, judge, tmp_path, steps=2, block=2)

    first = grid(3.0)
    assert first[["prompt", "seed"]].values.tolist() == [[p, s] for p in prompts["prompt"] for s in (0, 1)]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert grid(3.0)["distance"].equals(first["distance"])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    with pytest.raises(ValueError, match="made with another guidance"):
        grid(4.0)
    next(iter(written)).write_bytes(b"half a file")
    with pytest.raises(OSError, match="damaged"):
        grid(3.0)


def test_grid_refuses_parts_of_other_rows_or_another_measure_and_takes_any_index_and_seeds(tmp_path):
    world = basinlab.MixtureDenoiser.with_duplicate()
    prompts = pd.DataFrame({"prompt": ["memorized", "ordinary"], "object": ["a", "b"]}, index=[0, 0])
    judge = lambda run, rows: rows.assign(seed=run.seeds, magnitude=run.guidance_magnitude.tolist())  # noqa: E731

    def grid(table=prompts, **options):
        guidances = {"none": basinlab.ConstantGuidance(np.int64(0))}
        return experiment.run_grid(world, table, np.arange(2), guidances, judge, tmp_path, steps=2, **options)

    assert grid()[["object", "seed"]].values.tolist() == [["a", 0], ["a", 1], ["b", 0], ["b", 1]]
    with pytest.raises(ValueError, match="made with another rows"):
        grid(prompts.assign(object="c"))
    with pytest.raises(ValueError, match="made with another measure"):
        grid(measure=("none",))


def test_runs_and_sweeps_are_judged_alike(bundled):
    prompts = basinlab.scenarios.read(bundled.name).table().head(2)
    judges, ball = evaluation.Judges(bundled.name), basin.Ball(0.25, 0.0, {})
    wanted, steps, guidance = prompts["prompt"].tolist(), 4, basinlab.ConstantGuidance(3.0)
    options = {"steps": steps, "progress": False}
    sweep = basinlab.sweep(bundled, wanted, [0, 1], [999, 0], after=guidance, **options)
    table = evaluation.judged(sweep, prompts, judges, ball)
    assert table["start"].tolist() == [999, 0] * 4
    assert table["share"].tolist() == prompts["share"].repeat(4).tolist()
    for start in (999, 0):
        run = basinlab.sample(bundled, wanted, [0, 1], basinlab.StaticTransitionPoint(start, 3.0), **options)
        alone = evaluation.judged(run, prompts, judges, ball)
        same = table.query("start == @start").drop(columns="start").reset_index(drop=True)
        pd.testing.assert_frame_equal(same, alone, check_exact=False, atol=1e-4)
    # and as the grid's own table has it
    grid = evaluation.measured(run, prompts.loc[prompts.index.repeat(2)].reset_index(drop=True), judges)
    assert grid["object_right"].tolist() == alone["object_right"].tolist()
    assert grid["distance"].tolist() == pytest.approx(alone["distance"].tolist(), abs=1e-5)
