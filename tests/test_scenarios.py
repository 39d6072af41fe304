"""Scenario files, the field's lists of prompts, and the one table that a run becomes."""

import dataclasses
import json
from pathlib import Path

import checkpoints
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

import basinlab
from basinlab import basin, scenarios

PAPERS = ("sd14-finetuned", "sd14-webster", "sd21-imagenette", "sd21-laion10k")
BUNDLED = ("emoji-classes", "emoji-duplicated", "emoji-finetuned")
TEXTS = {"memorized": {"texts": {"a": "an owl", "b": "a tomato"}}}
LEAST = {"title": "t", "source": "s", "model": "emoji-duplicated", "static_transition_point": 650, "prompts": TEXTS}
LEAST |= {"copy": "descriptor", "alignment": "clip"}


def written(folder, **changed):
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({**LEAST, **changed}, sort_keys=False))
    return scenarios.read(path)


def test_the_papers_have_the_constants_of_the_official_commands():
    assert scenarios.names() == sorted([*PAPERS, *BUNDLED])
    found = {name: scenarios.read(name) for name in PAPERS}
    assert all((s.guidance_scale, s.copy, s.radius) == (7.5, "sscd", 0.5) for s in found.values())
    laion, classes = found["sd21-laion10k"], found["sd21-imagenette"]
    assert (laion.static_transition_point, laion.opposite_until, laion.opposite_scale) == (500, 650, 2.0)
    assert (laion.resolution, classes.resolution, classes.static_transition_point) == (256, 256, 600)
    table = classes.table()
    assert len(table) == 10 and table.set_index("index")["prompt"]["n03000684"] == "An image of chain saw"


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_ones_have_prompts_attractors_and_a_reason_for_their_scale(name):
    scenario = scenarios.read(name)
    for group in set(scenario.prompts) - {"ordinary"}:
        assert all(Path(p).is_file() for p in scenario.table(group)[["attractor", "swapped"]].to_numpy().flat)
    ordinary = scenario.table("ordinary")
    assert len(ordinary) > 70 and len(scenario.reason) > 40 and scenario.radius < 0.2
    assert not set(ordinary["prompt"]) & set(scenario.table()["prompt"])


def test_a_scenario_loads_its_denoiser_from_its_own_folder_and_what_is_missing_says_where_it_is(tmp_path, tiny_folder):
    (tmp_path / "weights").symlink_to(tiny_folder)
    assert written(tmp_path, model="./weights", resolution=32).load().latent_shape[1:] == (4, 4)
    with pytest.raises(ValueError, match=r"sd-21-finetuned_LAION10K.*weights of sd21-laion10k: https://drive"):
        scenarios.read("sd21-laion10k").load()
    prompts = {"memorized": {"file": "x.jsonl", "format": "wen", "url": "https://example.org/x.jsonl"}}
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/x.jsonl is missing: fetch it from https://example.org/x"):
        written(tmp_path, prompts=prompts).table()
    with pytest.raises(ValueError, match=r"no scenario 'sd15'.*'sd14-webster'"):
        scenarios.read("sd15")
    with pytest.raises(TypeError, match="stpes"):
        written(tmp_path, stpes=50)


def test_references_are_found_by_the_index_or_the_row_of_a_prompt(tmp_path):
    for name in "a/2.png a/1.png a/notes.txt [b]/3.JPG 00000/000000001.jpg 00000/000000001.json".split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    prompts = {"memorized": {"texts": {"a": "an owl", "[b]": "a tomato"}}}
    table = written(tmp_path, references="{index}/*", prompts=prompts).table()
    assert table["prompt"].tolist() == ["an owl", "an owl", "a tomato"]
    assert [Path(path).name for path in table["attractor"]] == ["1.png", "2.png", "3.JPG"]
    table = written(tmp_path, references="00000/00000{row:04d}.*").table()
    assert table["attractor"].isna().tolist() == [True, False] and table["attractor"][1].endswith("1.jpg")


CAPTION = '"Watch: The ""New"" Video; part\u2028two"'


@pytest.mark.parametrize("format, text", [
    ("wen", json.dumps({"caption": CAPTION, "index": 7, "url": "https://example.org/a.jpg"}) + "\n"),
    ("lines", f"{CAPTION}\n"),
    ("dcr", json.dumps({"/data/x/007.png": [CAPTION, "second"]})),
    ("csv", "prompt,object\n{}\n".format('"' + CAPTION.replace('"', '""') + '",owl')),
])  # fmt: skip
def test_every_format_gives_a_prompt_as_it_is_written(tmp_path, format, text):
    path = tmp_path / "list"
    path.write_text(text, encoding="utf-8", newline="")
    table = scenarios.read_list(path, format)
    assert table["prompt"].tolist() == [CAPTION]
    assert format not in ("wen", "dcr") or int(table["index"][0]) == 7
    for name in "ba":  # and texts beside pictures
        (tmp_path / f"{name}.txt").write_text(f"caption {name}\n")
    assert scenarios.read_list(tmp_path, "pairs").values.tolist() == [["caption a", "a"], ["caption b", "b"]]


MAIN = scenarios.read("emoji-duplicated")


@pytest.fixture(scope="module")
def judges():
    return scenarios.Judges(MAIN)


def test_a_row_says_what_became_of_a_sample_whatever_a_second_judge_says(tiny, judges):
    rows = MAIN.table().head(2)
    run = basinlab.sample(tiny, rows["prompt"].tolist(), [0, 1], steps=4, record=False, progress=False)
    table = judges(run, MAIN.table())
    assert table["prompt"].tolist() == run.prompts and table["seed"].tolist() == run.seeds
    attractors = basinlab.read_pictures(rows["attractor"]).repeat_interleave(2, 0)
    np.testing.assert_allclose(table["distance"], judges.distance(run.images(), attractors), atol=1e-5)
    everything = judges.distance.pairs(run.images(), basinlab.read_pictures(MAIN.table()["attractor"]))
    np.testing.assert_allclose(table["nearest"], everything.amin(dim=1), atol=1e-5)
    assert (table["copied"] == (table["distance"] <= MAIN.radius)).all() and table["copied"].dtype == bool
    clip = judges.alignment
    score = (clip.features(run.images()) * clip.text_features(run.prompts)).sum(dim=1)
    np.testing.assert_allclose(table["clip_score"], score, atol=1e-5)
    assert (table["new_and_right"] == table["object_right"] & ~table["copied"]).all()
    assert (table["calls"] == 8).all() and table["share"].tolist() == rows["share"].repeat(2).tolist()
    assert not judges.notices and not {"attractor", "swapped", "start"} & {*table.columns}
    # a second judge stands beside and decides nothing
    both = scenarios.Judges(dataclasses.replace(MAIN, second_copy="descriptor"))
    seen = both(run, MAIN.table())
    np.testing.assert_allclose(seen["sscd"], 1 - table["distance"], atol=1e-6)
    table = table.drop(columns="sscd", errors="ignore")  # of SSCD's student, where it is installed
    pd.testing.assert_frame_equal(seen[[*table]], table)
    assert both.settings() != judges.settings()


def test_templates_are_copied_by_their_layout_and_ordinary_prompts_if_near_any_memorized_picture(tiny, judges):
    rows = MAIN.table("template").head(4)
    run = basinlab.sample(tiny, rows["prompt"].tolist(), 0, steps=4, record=False, progress=False)
    run._images = basinlab.read_pictures(rows["swapped"])  # the same layout, another object
    table = judges(run, rows)
    assert table["copied"].all() and (table["layout"] > MAIN.layout_floor).all()
    run._images = basinlab.read_pictures(rows["attractor"])
    table = judges(run, rows)
    assert (table["distance"] < 1e-5).all() and (table["nearest"] > MAIN.radius).all()  # to the group memorized alone
    # ordinary prompts are copies of any picture
    rows = MAIN.table("ordinary").head(2)
    run = basinlab.sample(tiny, rows["prompt"].tolist(), 0, steps=1, record=False, progress=False)
    run._images = torch.stack([basinlab.read_pictures(MAIN.table()["attractor"][3:4])[0], torch.ones(3, 96, 96)])
    table = judges(run, rows)
    assert table["distance"].isna().all() and table["copied"].tolist() == [True, False]


def test_a_sweep_is_judged_as_separate_runs_are(tiny, judges):
    prompts, options = MAIN.table()["prompt"][:2].tolist(), {"steps": 4, "progress": False}
    sweep = basinlab.sweep(tiny, prompts, [0, 1], [999, 0], after=basinlab.ConstantGuidance(3.0), **options)
    table = judges(sweep, MAIN.table())
    assert table["start"].tolist() == [999, 0] * 4
    for start in (999, 0):
        run = basinlab.sample(tiny, prompts, [0, 1], basinlab.StaticTransitionPoint(start, 3.0), **options)
        alone = judges(run, MAIN.table()).drop(columns=["calls", "clip"])
        same = table.query("start == @start").reset_index(drop=True)[[*alone]]
        pd.testing.assert_frame_equal(same, alone, check_exact=False, atol=1e-3, check_dtype=False)


@pytest.fixture(scope="module")
def sd_run(tmp_path_factory):
    """Of a checkpoint of which little is known."""
    denoiser = basinlab.load(checkpoints.save("sd1", tmp_path_factory.mktemp("sd1")))
    return basinlab.sample(denoiser, ["an owl", "a tomato"], [0, 1, 2], steps=4, progress=False)


def test_a_prompt_without_a_reference_is_unknown_until_its_attractor_is_estimated(sd_run, tmp_path):
    picture = (sd_run.images()[1] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(picture).save(tmp_path / "a.png")
    scenario = written(tmp_path, references="{index}.png", radius=0.002)
    judges = scenarios.Judges(scenario)
    before, settings = judges(sd_run, scenario.table()), judges.settings()
    assert before["distance"].iloc[:3].argmin() == 1 and before["copied"].iloc[1]
    assert before["distance"].iloc[3:].isna().all() and before["copied"].iloc[3:].isna().all()
    assert not {"object_right", "new_and_right", "layout"} & {*before.columns}
    judges.estimate(sd_run)
    after = judges(sd_run, scenario.table())
    assert after["distance"].iloc[:3].equals(before["distance"].iloc[:3])
    assert after["distance"].iloc[3:].min() == pytest.approx(0, abs=1e-5)  # the medoid itself
    assert judges.settings() != settings and str(tmp_path) not in str(settings)
    # without references a sweep is not said to be free of copies
    scenario, cfg = written(tmp_path), basinlab.ConstantGuidance(3.0)
    sweep = basinlab.sweep(sd_run.denoiser, ["an owl"], [0, 1], [999, 0], after=cfg, steps=2, progress=False)
    table = scenarios.Judges(scenario)(sweep, scenario.table())
    assert table["copied"].isna().all()
    (tmp_path / "x.csv").write_text("prompt,object\nan owl,taxi\n")
    named = written(tmp_path, prompts={"memorized": {"file": "x.csv"}}, alignment="clip")
    known = scenarios.Judges(named)(sweep, named.table())
    assert known["object_right"].notna().all() and known["new_and_right"].isna().all()  # it may be a copy
    assert basin.capture_probability(table, "start", "copied").empty and basin.transition_points(table, "copied").empty


def test_missing_judges_are_named_and_not_measured(sd_run, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    judges = scenarios.Judges(scenarios.read("sd14-webster"))
    assert judges.distance is None and judges.alignment is None
    assert "CopyDistance sscd" in judges.notices[0] and "curl -L" in judges.notices[0]
    assert "hf download openai/clip-vit-large-patch14" in judges.notices[1]
    table = judges(sd_run, pd.DataFrame({"prompt": ["an owl", "a tomato"]}))
    assert table[["distance", "nearest", "diversity", "copied"]].isna().all(None) and "clip" not in table
