"""The comparison: its plan, its grid, and what is read off the table."""

import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

import basinlab
from basinlab import metrics
from basinlab.bundled import comparison, tables
from basinlab.bundled.evaluation import Judges


def test_settings_are_chosen_on_prompts_that_are_not_compared():
    held_out = set(comparison.held_out()["prompt"])
    assert len(held_out) == comparison.HELD_OUT
    for profile in comparison.PROFILES:
        for task in comparison.plan(profile):
            assert not held_out & set(task.prompts["prompt"])


def test_every_method_gets_the_same_number_of_tries_and_the_weakest_of_the_best_is_taken():
    methods = comparison.contenders(5.0)
    assert {len(tries) for name, tries in methods.items() if name != "CFG"} == {4}
    rows = [(name, i, float(i in (1, 3))) for name, tries in methods.items() for i in range(len(tries))]
    tuning = pd.DataFrame(rows, columns=["method", "setting", "new_and_right"])
    chosen = comparison.tuned(5.0, tuning.sample(frac=1, random_state=0))
    assert {name: strategy.settings() for name, strategy in chosen.items()} == {
        name: tries[min(1, len(tries) - 1)].settings() for name, tries in methods.items()
    }
    assert [*comparison.chosen_settings(tuning)] == [*methods]  # in the tuning's own order
    assert {name for name in comparison.combinations(chosen)} == {
        f"{prior} + {rule}" for prior in comparison.PRIOR for rule in ("DTP", "OG + DTP")
    }


def test_a_missing_or_old_tuning_names_the_cure(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no setting of \['CADS'.*run `make tune`"):
        comparison.tuned(5.0, pd.DataFrame({"method": ["CFG"], "setting": [0], "new_and_right": [0.0]}))
    monkeypatch.setenv("BASINLAB_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"tuning.csv is missing: restore it with .* or run `make tune`"):
        comparison.tuned(5.0)


def test_the_paper_profile_has_the_size_that_is_stated():
    sizes = {
        (t.scenario, t.group): (len(t.prompts), len(t.seeds)) for t in comparison.plan("paper") if t.of == "methods"
    }
    assert sizes == {
        ("emoji-duplicated", "memorized"): (32, 4),
        ("emoji-duplicated", "template"): (16, 4),
        ("emoji-duplicated", "ordinary"): (32, 4),
        ("emoji-finetuned", "memorized"): (16, 4),
        ("emoji-finetuned", "ordinary"): (16, 4),
        ("emoji-classes", "memorized"): (10, 4),  # there are no more classes
        ("emoji-classes", "ordinary"): (16, 4),
    }


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no profile 'papers'.*'paper', 'reader'"):
        comparison.plan("papers")
    with pytest.raises(ValueError, match=r"no method \['STQ'\].*'STP'"):
        comparison.plan("tiny", only=["CFG", "STQ"])


SCRIPT = """
import sys
from basinlab.bundled import comparison
tasks = [t for t in comparison.plan("tiny", only=["CFG", "GNI"]) if t.scenario == "emoji-duplicated"]
comparison.compare(tasks, sys.argv[1], progress=False)
"""


def tasks():
    return [t for t in comparison.plan("tiny", only=["CFG", "GNI"]) if t.scenario == "emoji-duplicated"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return comparison.compare(tasks(), tmp_path_factory.mktemp("whole"), progress=False)


def test_a_comparison_that_was_killed_goes_on_to_the_same_table(tmp_path, table):
    folder = tmp_path / "killed"
    run = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], stderr=subprocess.DEVNULL)
    while not list(folder.rglob("*.parquet")) and run.poll() is None:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL  # it was not over yet
    kept = {path: path.read_bytes() for path in folder.rglob("*.parquet")}
    resumed = comparison.compare(tasks(), folder, progress=False)
    assert kept and all(path.read_bytes() == data for path, data in kept.items())
    pd.testing.assert_frame_equal(resumed.drop(columns="seconds"), table.drop(columns="seconds"))


def test_rows_say_what_became_of_each_sample(table, bundled):
    assert len(table) == 2 * 3 * 3 * 2  # strategies, groups, prompts, seeds
    ordinary = table["group"] == "ordinary"
    assert table["distance"].isna().equals(ordinary)
    assert table["layout"].notna().equals(table["group"] == "template")
    assert (table.loc[~ordinary, "nearest"] <= table.loc[~ordinary, "distance"] + 1e-6)[
        table["group"] == "memorized"
    ].all()
    assert (table["calls"] == 8).all() and (table["gradient_passes"] == 0).all()
    # one row again, by hand
    row = table.query("strategy == 'CFG' and group == 'memorized'").iloc[1]
    options = {"steps": 4, "record": False, "progress": False}
    scale = basinlab.models.read_scenario(bundled.name)["guidance_scale"]
    run = basinlab.sample(bundled, row["prompt"], int(row["seed"]), basinlab.ConstantGuidance(scale), **options)
    wanted = basinlab.read_prompts(bundled.name, "memorized").query("prompt == @row.prompt")["attractor"]
    distance = metrics.CopyDistance()(run.images(), basinlab.read_pictures(wanted))
    assert row["distance"] == pytest.approx(float(distance), abs=1e-4)
    score = metrics.Alignment().score(run.images(), [row["prompt"]])
    assert row["clip_score"] == pytest.approx(float(score), abs=1e-4)


def synthetic(copied: dict[str, float], right: dict[str, float], prompts: int = 20, seeds: int = 5) -> pd.DataFrame:
    """A table in which each strategy copies, and draws the object right, at a given rate."""
    rng, rows = np.random.default_rng(0), []
    for scenario in ("emoji-duplicated", "emoji-finetuned"):
        for group in ("memorized", "ordinary"):
            for name in copied:
                for i in range(prompts):
                    for seed in range(seeds):
                        hit = rng.random() < copied[name]
                        rows.append(
                            (
                                scenario,
                                group,
                                name,
                                f"p{i}",
                                seed,
                                hit,
                                rng.random() < right[name],
                                0.1 + 0.5 * (not hit),
                            )
                        )
    columns = ["scenario", "group", "strategy", "prompt", "seed", "copied", "object_right", "distance"]
    table = pd.DataFrame(rows, columns=columns)
    features = torch.nn.functional.normalize(
        torch.randn(len(table), 128, generator=torch.Generator().manual_seed(0)), dim=1
    )
    extra = {"nearest": table["distance"], "clip": list(features.numpy()), "clip_score": 0.3, "diversity": 0.5}
    calls = {name: 100 if name == "CFG" else 80 for name in copied}
    return table.assign(**extra, saturated=0.1, calls=table["strategy"].map(calls), gradient_passes=0, seconds=1.0)


NAMES = ("CFG", "STP", "DTP", "OG + STP", "OG + DTP")


@pytest.fixture(scope="module")
def rows():
    copied = dict(zip(NAMES, (1.0, 0.0, 0.02, 0.5, 0.6), strict=True))
    return tables.summary(synthetic(copied, dict.fromkeys(NAMES, 0.8)))


def value(rows, strategy, measure, scenario="emoji-duplicated", group="memorized"):
    same = (rows[["scenario", "group", "strategy", "measure"]] == [scenario, group, strategy, measure]).all(axis=1)
    return rows[same].iloc[0]


def test_summary_gives_shares_with_intervals_and_costs_relative_to_cfg(rows):
    half = value(rows, "OG + STP", "copied")
    assert half["low"] < 0.5 < half["high"] and half["n"] == 100 and half["prompts"] == 20
    assert half["high"] - half["low"] == pytest.approx(2 * 1.96 * 0.05, rel=0.3)
    assert value(rows, "STP", "calls")["value"] == 0.8 and value(rows, "CFG", "calls")["value"] == 1
    assert value(rows, "STP", "similarity")["value"] == pytest.approx(0.4)
    assert value(rows, "CFG", "similarity")["value"] == pytest.approx(0.9)


def test_an_outcome_without_exception_still_has_an_interval(rows):
    none, all_ = value(rows, "STP", "copied"), value(rows, "CFG", "copied")
    assert (none["value"], none["low"]) == (0, pytest.approx(0, abs=1e-9)) and none["high"] == pytest.approx(
        0.037, abs=1e-3
    )
    assert all_["value"] == 1 and all_["low"] == pytest.approx(0.963, abs=1e-3)


def test_best_and_what_cannot_be_told_from_it_are_marked(rows):
    marks = {name: value(rows, name, "copied")["best"] for name in NAMES}
    assert marks == {"CFG": "", "STP": "best", "DTP": "tied", "OG + STP": "", "OG + DTP": ""}
    assert sorted(value(rows, name, "object_right")["best"] for name in NAMES).count("best") == 1


def test_claims_are_held_against_the_numbers(rows):
    shown = tables.claims(rows).set_index("claim")["shown"]
    assert shown.filter(like="memorization is gone").tolist() == ["NO (2 of 4)"]
    assert shown.filter(like="it is less").tolist() == ["yes"]
    assert shown.filter(like="no extra predictions").tolist() == ["yes"]
    worse = tables.summary(synthetic(dict.fromkeys(NAMES, 0.5), {**dict.fromkeys(NAMES, 0.2), "CFG": 0.9}))
    shown = tables.claims(worse).set_index("claim")["shown"]
    assert shown.filter(like="alignment is kept").tolist() == ["NO (0 of 4)"]
    assert shown.filter(like="it holds in every scenario").tolist() == ["NO (0 of 8)"]


def test_tables_are_exported_for_sheet_page_and_paper(rows, tmp_path):
    sheet, page, paper = tables.export(rows, tmp_path / "sd1.4")
    assert len(pd.read_csv(sheet)) == len(rows)
    line = next(line for line in page.read_text().splitlines() if line.startswith("| STP"))
    assert "0.00 [0.00, 0.04]**" in line
    assert page.read_text().count("## ") == 4 and paper.read_text().count("\\begin{table}") == 4


def test_pairs_tell_a_method_alone_from_its_combinations():
    table = synthetic(
        {"RNA": 0.5, "RNA + DTP": 0.1, "RNA + OG + DTP": 0.0},
        dict.fromkeys(("RNA", "RNA + DTP", "RNA + OG + DTP"), 1.0),
    )
    found = tables.pairs(table.query("scenario == 'emoji-duplicated' and group == 'memorized'"))
    assert found["prior"].tolist() == ["RNA"] * 3 and found["other"].tolist() == ["CFG", "DTP", "OG + DTP"]
    assert found["value"].is_monotonic_increasing


def test_a_dry_run_prints_the_plan_and_samples_nothing(tmp_path):
    command = [
        sys.executable,
        "-m",
        "basinlab",
        "compare",
        "--profile",
        "paper",
        "--dry-run",
        "--parts",
        tmp_path / "parts",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split()[:3] for line in lines if line.startswith("emoji-classes")] == [
        ["emoji-classes", "memorized", "methods"],
        ["emoji-classes", "ordinary", "methods"],  # in the paper profile only
    ]
    assert "predictions" in lines[-1] and "minutes" in lines[-1]
    assert not (tmp_path / "parts").exists()


def test_what_was_not_measured_is_left_out_of_the_summary():
    table = synthetic({"RNA": 0.5, "RNA + DTP": 0.1}, {"RNA": 1.0, "RNA + DTP": 1.0}).assign(diversity=np.nan)
    rows = tables.summary(table)
    assert not {"diversity", "lpips"} & set(rows["measure"]) and rows["value"].notna().all()


def test_lpips_is_measured_to_the_nearest_learned_scene_where_it_can_be(bundled):
    rows = basinlab.read_prompts(bundled.name, "memorized").head(2)
    run = basinlab.sample(bundled, rows["prompt"], 0, steps=1, record=False, progress=False)
    assert "lpips" not in comparison.outcome(run, rows, Judges(bundled.name))
    apart = lambda a, b: (a - b).abs().mean(dim=(1, 2, 3))  # noqa: E731 - stands for LPIPS
    table = comparison.outcome(run, rows, Judges(bundled.name, lpips=apart))
    wanted = apart(run.images(), basinlab.read_pictures(rows["attractor"]))
    assert table["lpips"].tolist() == pytest.approx(wanted.tolist())
