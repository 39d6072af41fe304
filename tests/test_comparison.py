"""The comparison: its methods, its grid, over several processes too, and what is read off the table."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import basinlab
from basinlab import comparison, mitigations, scenarios
from basinlab.guidance import describe

MAIN = scenarios.read(comparison.MAIN)


def test_every_method_gets_the_same_number_of_tries_and_the_weakest_of_the_best_is_taken():
    methods = comparison.methods(MAIN)
    assert {len(settings) for name, settings in methods.items() if name != "CFG"} == {4} and len(methods) >= 23
    rows = [(name, i, float(i in (1, 3))) for name, settings in methods.items() for i in range(len(settings))]
    tuning = pd.DataFrame(rows, columns=["method", "setting", "value"]).sample(frac=1, random_state=0)
    tuning = pd.concat([tuning.assign(measure="new_and_right"), tuning.assign(measure="copied", value=1.0)])
    assert comparison.best_settings(tuning) == {name: int(name != "CFG") for name in methods}
    chosen = comparison.tuned(MAIN)
    known = comparison.best_settings(pd.read_csv(basinlab.data_folder() / comparison.MAIN / "tuning.csv"))
    assert {*chosen} == {*known} <= {*methods} and describe(chosen["CFG"][0])["guidance_scale"] == MAIN.guidance_scale
    compared = {x for n in (2, 3, 4, 16, 32) for x in comparison.spread(MAIN.table("ordinary"), n)["prompt"]}
    assert len(comparison.ordinary_prompts(MAIN)) > 30 and not {*comparison.ordinary_prompts(MAIN)} & compared
    both = comparison.pairs(chosen)
    assert {*both} == {(prior, rule) for prior in comparison.PRIOR for rule in ("DTP", "OG + DTP")}
    assert [type(x).__name__ for x in both["GNI", "DTP"]] == ["EmbeddingNoise", "DynamicTransitionPoint"]
    # published scenarios get their authors' settings
    scenario = scenarios.read("sd21-laion10k")
    methods = comparison.methods(scenario)
    assert len(methods) >= 22 and all(len(settings) == 1 for settings in methods.values())
    chosen = comparison.tuned(scenario)
    assert chosen["Wen"][0] == mitigations.PromptOptimization(3.0, 0.05, 10)
    assert describe(chosen["STP"][0]) == describe(basinlab.StaticTransitionPoint(500, 7.5))
    assert describe(chosen["OG + STP"][0]) == describe(basinlab.OppositeGuidance(650, 7.5, 2.0))
    assert describe(chosen["Han, batch-wise"][-1]) == describe(basinlab.StaticTransitionPoint(919, 7.5))


def test_a_method_that_was_not_tuned_is_said_and_left_out(tmp_path, monkeypatch):
    (tmp_path / comparison.MAIN).mkdir()
    tuning = pd.read_csv(basinlab.data_folder() / comparison.MAIN / "tuning.csv")
    tuning[tuning["method"] != "STP"].to_csv(tmp_path / comparison.MAIN / "tuning.csv", index=False)
    monkeypatch.setattr(comparison, "data_folder", lambda: tmp_path)
    with pytest.warns(UserWarning, match=r"not tuned, so not compared: .*STP.*make tune"):
        chosen = comparison.tuned(MAIN)
    assert "STP" not in chosen and {"CFG", "DTP"} <= chosen.keys()


def test_settings_and_norms_are_chosen_on_prompts_that_are_not_compared():
    held_out = set(MAIN.table()["prompt"].iloc[-comparison.HELD_OUT :])
    for profile in comparison.PROFILES:
        assert not held_out & {prompt for _, _, rows, *_ in comparison.plan(MAIN, profile) for prompt in rows["prompt"]}
    (region, _), compared = comparison.methods(MAIN)["stability"][0], comparison.groups(MAIN, "paper")["ordinary"]
    assert len(region.prompts) == 50 and not {*region.prompts} & {*compared["prompt"]}
    assert {*region.prompts} <= {*MAIN.table("ordinary")["prompt"]}


@pytest.mark.parametrize("name, sizes", [
    ("emoji-duplicated", {"memorized": 32, "template": 16, "ordinary": 32}),
    ("emoji-finetuned", {"memorized": 16}), ("emoji-classes", {"memorized": 10}),  # there are no more classes
])  # fmt: skip
def test_the_paper_profile_has_the_size_that_is_stated(name, sizes):
    grids = [grid for grid in comparison.plan(scenarios.read(name), "paper") if grid[0] == "methods"]
    assert {group: len(rows) for _, group, rows, *_ in grids} == sizes
    seeds = {group: (len(seeds), len(tried)) for _, group, _, seeds, tried in grids}
    expected = {group: 1 if group != "memorized" else 3 if name == comparison.MAIN else 2 for group in sizes}
    assert seeds == {group: (count, len(comparison.tuned(MAIN))) for group, count in expected.items()}


class Plain:
    """Stands for judges, in a world without pictures."""

    def __init__(self, **settings):
        self.settings = settings.copy

    def __call__(self, run, rows):
        table = rows.loc[rows.index.repeat(len(run) // len(rows))].reset_index(drop=True)
        return table.assign(seed=run.seeds, end=run.latents[:, -1].flatten(1).tolist())


PROMPTS = pd.DataFrame({"prompt": ["memorized", "ordinary"], "object": ["a", "b"]})


def grid(folder, judges=None, methods=None, prompts=PROMPTS, **changed):
    world = basinlab.MixtureDenoiser.with_duplicate()
    methods = methods or {"CFG": [basinlab.ConstantGuidance(3.0)], "none": [basinlab.ConstantGuidance(np.int64(0))]}
    options = {"steps": 4, "block": 1, **changed}
    return comparison.run_grid(world, prompts, np.arange(2), methods, judges or Plain(a=1), folder, **options)


def test_a_grid_makes_only_what_is_missing_and_mixes_nothing(tmp_path):
    whole, expected = grid(tmp_path), [*itertools.product(("CFG", "none"), "ab", (0, 1))]
    assert [*whole[["method", "object", "seed"]].itertuples(index=False, name=None)] == expected
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(files) == 4
    pd.testing.assert_frame_equal(grid(tmp_path), whole)
    grid(tmp_path, prompts=PROMPTS.assign(attractor=["/x", "/y"]))  # where pictures lie is no setting
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    settings = [[basinlab.ConstantGuidance(4.0)], [mitigations.EmbeddingNoise(0.0), basinlab.ConstantGuidance(3.0)]]
    others = [{"judges": Plain(a=2)}, {"steps": 5}, {"measure": True}, {"prompts": PROMPTS.assign(object="c")}]
    for changed in [*others, *({"methods": {"CFG": setting}} for setting in settings)]:
        before = len([*tmp_path.iterdir()])
        grid(tmp_path, **changed)
        assert len([*tmp_path.iterdir()]) > before, changed
    with pytest.raises(ValueError, match="'memorized' is given twice"):  # in two blocks
        grid(tmp_path, prompts=pd.concat([PROMPTS, PROMPTS]))


def test_a_comparison_is_all_of_its_plan_and_is_resumed(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(scenarios.Scenario, "load", lambda *_, **__: tiny)
    size = {"methods": ("CFG", "GNI", "DTP", "OG + DTP"), "seeds": 1, "steps": 2}
    monkeypatch.setitem(comparison.PROFILES, "tiny", comparison.PROFILES["tiny"] | size)
    table = comparison.compare(MAIN, "tiny", tmp_path)
    assert table.groupby("of").size().to_dict() == {"methods": 4 * 3 * 3, "pairs": 2 * 3, "attack": 4 * 2 * 2}
    assert set(table.query("of == 'pairs'")["rule"]) == {"DTP", "OG + DTP"} and set(table["group"]) == {*MAIN.prompts}
    assert (table.query("method == 'CFG'")["calls"] == 4).all()
    monkeypatch.setattr(comparison, "sample", lambda *given, **options: pytest.fail("sampled again"))
    pd.testing.assert_frame_equal(comparison.compare(MAIN, "tiny", tmp_path), table)


def synthetic(copied: dict[str, float], right: float = 0.8, prompts: int = 20, seeds: int = 5) -> pd.DataFrame:
    """A table in which each method copies at a given rate."""
    keys = itertools.product(("memorized", "ordinary"), copied, [f"p{i}" for i in range(prompts)], range(seeds))
    table = pd.DataFrame(keys, columns=["group", "method", "prompt", "seed"])
    drawn = np.random.default_rng(0).random((len(table), 2))
    table = table.assign(copied=drawn[:, 0] < table["method"].map(copied), object_right=drawn[:, 1] < right)
    table["distance"] = table["nearest"] = 0.1 + 0.5 * ~table["copied"]
    clip = torch.nn.functional.normalize(torch.randn(len(table), 16, generator=torch.manual_seed(0)), dim=1)
    calls = np.where(table["method"] == "CFG", 100, 80)
    further = {"clip": list(clip.numpy()), "clip_score": 0.3, "diversity": 0.5, "saturated": 0.1, "scenario": "world"}
    return table.assign(new_and_right=table["object_right"] & ~table["copied"], calls=calls, **further)


def value(rows, method, measure, group="memorized"):
    return rows.query("method == @method and measure == @measure and group == @group").iloc[0]


def test_summary_gives_shares_with_intervals_costs_relative_to_cfg_and_marks_the_best(tmp_path):
    copied = {"CFG": 1.0, "STP": 0.0, "DTP": 0.02, "OG + STP": 0.5, "OG + DTP": 0.6}
    real = torch.nn.functional.normalize(torch.randn(30, 16, generator=torch.manual_seed(1)), dim=1)
    rows = comparison.summary(synthetic(copied), real=real)
    half = value(rows, "OG + STP", "copied")
    assert half["low"] < 0.5 < half["high"] and half["n"] == 100 and half["prompts"] == 20
    assert half["high"] - half["low"] == pytest.approx(2 * 1.96 * 0.05, rel=0.3)
    assert value(rows, "STP", "calls")["value"] == 0.8 and value(rows, "CFG", "calls")["value"] == 1
    assert value(rows, "STP", "similarity")["value"] == pytest.approx(0.4)
    assert value(rows, "OG + STP", "similarity_95")["value"] == pytest.approx(0.9)
    cmmd = value(rows, "STP", "cmmd")
    assert cmmd["low"] < cmmd["value"] < cmmd["high"]
    none, every = (value(rows, name, "copied")[["value", "low", "high"]].tolist() for name in ("STP", "CFG"))
    assert none == pytest.approx([0, 0, 0.161], abs=1e-3) and every == pytest.approx([1, 0.839, 1], abs=1e-3)
    marks = {name: value(rows, name, "copied")["best"] for name in copied}
    assert marks == {"CFG": "", "STP": "best", "DTP": "tied", "OG + STP": "", "OG + DTP": ""}
    assert sorted(value(rows, name, "object_right")["best"] for name in copied).count("best") == 1
    # exported for sheet, page and paper
    comparison.export(rows, tmp_path / "sd1.4")
    assert len(pd.read_csv(tmp_path / "sd1.4.csv")) == len(rows)
    page, paper = ((tmp_path / f"sd1.4.{end}").read_text() for end in ("md", "tex"))
    assert "0.00 [0.00, 0.16]**" in next(line for line in page.splitlines() if line.startswith("| STP"))
    assert page.count("## ") == 2 and paper.count("\\begin{table}") == 2


def test_what_was_not_measured_is_left_out_and_what_is_unknown_does_not_count():
    table = synthetic({"RNA": 1.0}).assign(diversity=np.nan).drop(columns=["object_right", "new_and_right"])
    table["copied"] = table["copied"].astype("boolean").mask(table["seed"] == 0)
    rows = comparison.summary(table, by=("method",))
    assert not {"diversity", "cmmd", "object_right", "seconds"} & set(rows["measure"]) and rows["value"].notna().all()
    with pytest.raises(ValueError, match=r"would hold rows of several \['rule'\]"):
        comparison.summary(table.assign(rule=["CFG", "DTP"] * (len(table) // 2)))
    row = rows.query("measure == 'copied'").iloc[0]
    assert row["n"] == 160 and 0.8 < row["low"] < 0.85  # Wilson's: a bootstrap has no width


def test_the_kept_table_is_of_these_weights_judges_and_methods_and_no_others(monkeypatch):
    table = comparison.obtain("reader", folder=None)
    assert len(table) == 10684 and table.attrs["made_with"]
    rows = comparison.summary(table.query("of == 'methods' and scenario == @comparison.MAIN and group == 'memorized'"))
    copied = rows.query("measure == 'copied'").set_index("method")["value"]
    assert copied["CFG"] == pytest.approx(89 / 96) and copied["OG + DTP"] < copied["CFG"]
    monkeypatch.setattr(comparison, "compare", lambda *given: pd.DataFrame({"made": [given[0].name]}))
    monkeypatch.setattr(comparison, "digest", lambda given: "other")
    assert comparison.obtain("paper", folder=None)["made"].tolist() == [*comparison.SCENARIOS]


def test_the_command_samples_judges_and_writes_a_table(tmp_path, monkeypatch):
    team = SimpleNamespace(num_processes=1, is_main_process=True, destroy_process_group=list)
    monkeypatch.setattr(comparison, "processes", lambda: team)
    monkeypatch.setattr(comparison, "compare", lambda *given: pd.DataFrame({"given": [str(given[1:])]}))
    monkeypatch.setattr(sys, "argv", f"comparison emoji-classes --profile tiny --out {tmp_path}/t.parquet".split())
    comparison.main()
    table = pd.read_parquet(tmp_path / "t.parquet")
    assert len(table) == 1 and table.attrs["made_with"] and "'tiny'" in table["given"][0]


GRID = """
import sys
from test_comparison import small_grid
from basinlab import comparison
table, team = small_grid(*sys.argv[1:3]), comparison.processes()
if team.is_main_process:
    table.to_parquet(sys.argv[3])
print(f"pid {team.num_processes}")
team.destroy_process_group()
"""
PARTS = 12


def small_grid(model, folder) -> pd.DataFrame:
    methods = {"CFG": [basinlab.ConstantGuidance(3.0)], "STP": [basinlab.StaticTransitionPoint(500, 3.0)]}
    given = basinlab.load(model), MAIN.table().head(6), range(4), methods, scenarios.Judges(MAIN), folder
    return comparison.run_grid(*given, steps=10, block=1).drop(columns="seconds")


def launched(processes: int, script: Path, *given: Path) -> subprocess.Popen:
    """``accelerate launch`` of the script, one thread each."""
    # without GPUs, several processes talk over gloo
    options = f"--multi_gpu --num_processes {processes} --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = ["-m", "accelerate.commands.launch", *options.split(), "--main_process_port", "0", script, *given]
    here = Path(__file__).parent
    paths = os.pathsep.join([*map(str, (here, here.parent, here.parent / "data")), os.environ.get("PYTHONPATH", "")])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment, **pipes)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes to kill in /proc")
def test_one_of_two_processes_is_killed_and_another_number_goes_on_to_the_table_of_one(tmp_path, tiny_folder):
    script, parts, table = tmp_path / "grid.py", tmp_path / "parts", tmp_path / "table.parquet"
    script.write_text(GRID)
    run = launched(2, script, tiny_folder, parts, table)
    while len(list(parts.glob("*.parquet"))) < 3 and run.poll() is None:
        time.sleep(0.02)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0, output
    kept = {path: path.read_bytes() for path in parts.glob("*.parquet")}
    assert 3 <= len(kept) < PARTS and not table.exists()
    again = launched(3, script, tiny_folder, parts, table)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and output.count("pid 3") == 3, output
    assert all(path.read_bytes() == data for path, data in kept.items())
    assert not list(parts.glob("*.part"))
    pd.testing.assert_frame_equal(pd.read_parquet(table), small_grid(tiny_folder, tmp_path / "alone"))
