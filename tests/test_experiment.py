"""The grid: resumed from its parts, which are not mixed with those of other settings."""

import pytest

import basinlab
from basinlab import experiment


def test_grid_resumes_from_its_parts_and_refuses_those_of_another_guidance(bundled, tmp_path):
    prompts = basinlab.read_prompts(bundled.name, "memorized").head(3)
    judges = experiment.Judges(bundled.name)

    def grid(scale):
        guidances = {"cfg": basinlab.ConstantGuidance(scale)}
        options = {"steps": 2, "block": 2, "progress": False}
        return experiment.run_grid(bundled, prompts, [0, 1], guidances, judges, tmp_path, **options)

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
