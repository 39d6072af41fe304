"""Figures: written whole or not at all, with what they were made from; trajectories on a sheet of paper."""

import html
import itertools
import json
import multiprocessing
import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import needs_browser, shown
from matplotlib.colors import to_hex, to_rgb
from matplotlib.offsetbox import AnnotationBbox
from PIL import Image

from basinlab import plotting, projection

matplotlib.use("Agg")
TABLE = pd.DataFrame({"t": [999, 0], "value": [1.0, 0.5]})


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setenv("BASINLAB_OUT", str(tmp_path))
    yield tmp_path
    plt.close("all")


def test_save_writes_all_forms_and_a_manifest_entry_without_git_too(output, monkeypatch):
    figure, axis = plt.subplots()
    axis.plot(TABLE["t"], TABLE["value"])
    monkeypatch.setenv("PATH", "")
    plotting.save(figure, "one", TABLE, {"seeds": [0]})
    plotting.save(figure, "two", TABLE, {"seeds": [1]})
    names = {path.name for path in (output / "figures").iterdir()}
    assert names == {f"{n}.{s}" for n in ("one", "two") for s in ("pdf", "png", "csv")} | {"manifest.json"}
    manifest = json.loads((output / "figures/manifest.json").read_text())
    assert [manifest[name]["seeds"] for name in ("one", "two")] == [[0], [1]]
    assert "torch" in manifest["one"]["versions"] and manifest["one"]["commit"] == "not a checkout"
    assert pd.read_csv(output / "figures/one.csv").equals(TABLE)
    plotting.save(plotting.picture_grid(torch.rand(1, 2, 3, 8, 8), ["row"]), "grid", TABLE, {})  # a small PNG alone
    assert {path.name for path in (output / "figures").glob("grid*")} == {"grid.png", "grid.csv"}
    assert Image.open(output / "figures/grid.png").mode == "P"


def test_two_writers_lose_no_entry(output):
    def write(name):
        for i in range(8):
            plotting.save(plt.figure(), f"{name}{i}", TABLE, {})

    fork = multiprocessing.get_context("fork").Process
    writers = [fork(target=write, args=(name,)) for name in ("left", "right")]
    for step in (*(writer.start for writer in writers), *(writer.join for writer in writers)):
        step()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(json.loads((output / "figures/manifest.json").read_text())) == 16
    assert not [*output.rglob("*.part*")]


ROWS = pd.DataFrame({"t": [900, 500], "value": [1.0, 0.2], "low": [0.9, 0.1], "high": [1.0, 0.4]})
GRID = torch.stack(torch.meshgrid(torch.arange(3.0), torch.arange(3.0), indexing="xy"), -1).reshape(-1, 2)
PLANE = {"points": GRID, "inside": GRID[:, 0].view(3, 3) > 1, "arrows": (GRID, GRID), "centres": GRID}
PLANE |= {"paths": {"captured": torch.zeros(2, 4, 2), "unguided": torch.ones(2, 4, 2)}, "attractor": torch.zeros(2)}
METHODS = ROWS.assign(method=["CFG", "STP"], panel=["a", "b"])
STRIP = pd.DataFrame({"picture": [torch.rand(3, 8, 8) for _ in "abc"], "label": ["from 9", "from 5", "never"]})
STRIP = STRIP.assign(copied=pd.array([True, False, None], "boolean"), x=[900, 500, 0], y=[1.0, 0.2, float("nan")])


@pytest.mark.parametrize("draw, panels", [
    (lambda: plotting.planes({"t = 0": PLANE, "t = 9": {"attractor": torch.zeros(2)}}, 2.0), 2),
    (lambda: plotting.dots(ROWS.assign(name="captured", of=["a", "b"]), "t", "name", "of", band=True), 2),
    (lambda: plotting.over_start(ROWS.rename(columns={"t": "start"}).assign(name="new and right"), "name"), 1),
    (lambda: plotting.dots(ROWS.assign(level=["x", "y"], of=["a", "b"]), "level", panel="of", ylabel="point"), 2),
    (lambda: plotting.intervals(METHODS, "panel"), 2),
])  # fmt: skip
def test_each_figure_has_its_panels_and_can_be_written(draw, panels, tmp_path):
    figure = draw()
    assert len(figure.axes) == panels
    figure.savefig(tmp_path / "figure.pdf")


def boxes(axis):
    return [artist for artist in axis.artists if isinstance(artist, AnnotationBbox)]


def test_copies_are_framed_and_thumbnails_are_tied_to_their_places():
    pictures = torch.rand(1, 2, 3, 8, 8)
    figure = plotting.picture_grid(pictures, ["row"], framed=torch.tensor([[True, False]]), left=pictures[:, 0])
    assert [axis.spines["top"].get_visible() for axis in figure.axes] == [False, True, False]
    figure, axis = plt.subplots()
    plotting.thumbnails(axis, STRIP)
    found = boxes(axis)
    assert [box.offsetbox.get_children()[0].get_text() for box in found] == STRIP["label"].tolist()
    assert [box.patch.get_edgecolor()[:3] == plotting.COLOURS["copied"] for box in found] == [True, False, False]
    assert [box.arrow_patch is not None for box in found] == [True, True, False]  # no place, no line
    assert [box.xy for box in found[:2]] == [(900, 1.0), (500, 0.2)]
    assert [box.xybox[0] for box in found] == pytest.approx([1 / 6, 1 / 2, 5 / 6])


def test_a_story_has_a_panel_for_what_was_before_with_its_points_and_pictures():
    before = ["no guidance before", "opposite guidance before"]
    curves = pd.concat([ROWS.assign(before=name) for name in before])
    strips = pd.concat([STRIP.assign(before=name) for name in before])
    points = {"measured": 650.0, "static": 500.0, "dynamic": float("nan")}
    marks = pd.DataFrame({"before": before[0], "name": list(points), "at": list(points.values())})
    figure = plotting.dots(curves, "t", panel="before", band=True, strips=strips, marks=marks, xlim=(1000, 0))
    left, right = figure.axes
    assert [axis.get_title() for axis in figure.axes] == before
    assert [len(boxes(axis)) for axis in figure.axes] == [3, 3]
    at = {line.get_label(): line.get_xdata()[0] for line in left.lines if line.get_label() in points}
    assert at == {"measured": 650.0, "static": 500.0}  # where there is no point there is no line
    assert not [line for line in right.lines if line.get_label() in points]


def test_error_bars_reach_from_low_to_high_and_starts_that_are_safe_and_right_are_gold():
    assert plotting.errors(ROWS).tolist() == pytest.approx(np.array([[0.1, 0.1], [0.0, 0.2]]))
    rows = pd.DataFrame({"start": [900, 800, 700], "value": 0.5, "low": 0.4, "high": 0.6, "gold": [False, True, False]})
    figure = plotting.dots(rows, "start", band=True)
    gold = [patch for patch in figure.axes[0].patches if patch.get_facecolor()[:3] == to_rgb("gold")]
    assert [(patch.get_x(), patch.get_width()) for patch in gold] == [(750, 100)]


def test_single_lines_are_not_averaged_and_none_is_cut():
    heights = {"no guidance": 1.0, "opposite guidance": 5.0}
    keys = itertools.product(heights, ("memorized", "ordinary"), range(3), (999, 500))
    rows = pd.DataFrame(keys, columns=["panel", "name", "line", "t"])
    rows["value"] = rows["panel"].map(heights) * (rows["line"] + 1)
    figure = plotting.singles(rows.assign(line=rows["name"] + rows["line"].astype(str)), "magnitude")
    drawn = [[line for line in axis.lines if len(line.get_xdata())] for axis in figure.axes]
    assert [len(lines) for lines in drawn] == [6, 6]
    assert figure.axes[0].get_ylim()[0] == 0 and figure.axes[0].get_ylim()[1] >= 15  # axes are shared
    colours = {to_hex(line.get_color()) for line in drawn[0]}
    assert colours == {to_hex(plotting.COLOURS[name]) for name in ("memorized", "ordinary")}


def test_the_measured_basin_is_shaded_where_states_are_captured():
    shares = pd.DataFrame([(t, r, float(r * 1000 < t)) for t in (900, 500, 100) for r in (0, 0.5, 1)])
    shares.columns = ["t", "push", "value"]
    half = pd.DataFrame({"t": [900, 500, 100], "value": [float("inf"), 0.5, 0.1]})
    paths = pd.DataFrame({"name": ["captured", "unguided"] * 2, "t": [900, 900, 100, 100], "value": [0, 1] * 2})
    axis = plotting.section(shares, half, paths, STRIP).axes[0]
    assert axis.collections[0].get_array().reshape(3, 3).tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    lines = {line.get_label(): line for line in axis.lines}
    assert str(lines["one half escapes"].get_ydata().tolist()) == "[nan, 0.5, 0.1]"  # no wall there: no line
    assert lines["unguided"].get_xdata().tolist() == [900, 100] and len(boxes(axis)) == 3


MOVE = """<script>setTimeout(async () => {
  const slider = document.querySelector("input[type=range]"), seen = new Set(), ways = new Set();
  for (let k = 0; k < 3; k++) {
    slider.value = k;
    slider.dispatchEvent(new Event("input"));
    await new Promise(done => setTimeout(done, 500));
    seen.add([...document.querySelectorAll("image")].map(image => image.outerHTML).join());
    ways.add([...document.querySelectorAll("path[stroke-width='3']")].map(path => path.outerHTML).join());
  }
  document.title = seen.size + " pictures and " + ways.size + " ways seen";
}, 2000)</script>"""


@needs_browser
def test_the_picture_follows_the_slider_in_a_browser_without_a_network(tmp_path):
    rows = [("a", 0, "no guidance", start, start > 500, torch.rand(3, 8, 8)) for start in (999, 599, 0)]
    samples = pd.DataFrame(rows, columns=["prompt", "seed", "before", "start", "copied", "picture"])
    curves = pd.DataFrame({"prompt": "a", "seed": 0, "before": "no guidance", "t": [999, 599], "magnitude": [1.0, 2.0]})
    ways = samples[["prompt", "seed", "before", "start"]].merge(pd.DataFrame({"t": [999, 599]}), "cross")
    ways["place"] = ways["start"] / ways["t"]
    frame = plotting.explorer(samples, curves, ways).data
    page = html.unescape(re.search('srcdoc="(.*?)"', frame, re.DOTALL)[1])
    (tmp_path / "page.html").write_text(page + MOVE)  # at the end: the library holds a "</body>" of its own
    assert "3 pictures and 3 ways seen" in shown((tmp_path / "page.html").as_uri(), tmp_path / "profile")


TIMES = torch.tensor([900, 500, 100])


def states(count, spread, seed=0):
    """Trajectories [count, 3, 4, 2, 2] whose spread at each time is ``spread``."""
    noise = torch.randn(count, 1, 4, 2, 2, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(spread).view(1, 3, 1, 1, 1) * noise + 0.01 * torch.randn(count, 3, 4, 2, 2)


BUNDLES = {"memorized, CFG": states(8, [1.0, 0.5, 0.05]), "ordinary, CFG": states(8, [1.0, 1.0, 1.0], seed=1)}


def test_each_bundle_has_its_true_width_at_each_time():
    found = projection.umap(BUNDLES, TIMES, neighbours=5)
    assert found.columns.tolist() == ["name", "trajectory", "t", "x", "y"] and len(found) == 16 * 3
    assert found["trajectory"].nunique() == 16 and found["t"].tolist()[:3] == TIMES.tolist()
    for name, bundle in BUNDLES.items():
        for step, t in enumerate(TIMES.tolist()):
            place = found[(found["name"] == name) & (found["t"] == t)][["x", "y"]].to_numpy()
            drawn = np.sqrt(np.square(place).sum(axis=1).mean())
            true = float((bundle[:, step] - bundle[:, step].mean(dim=0)).square().mean().sqrt())
            assert drawn == pytest.approx(true, rel=1e-3) and np.abs(place.mean(axis=0)).max() < 1e-4  # centred
    assert found[found["t"] == TIMES[-1].item()][["x", "y"]].var().is_monotonic_decreasing  # ends spread along x


def test_the_linear_view_is_the_direction_of_most_spread_and_what_cannot_be_projected_is_refused():
    bundle = torch.zeros(5, 3, 1, 2, 2)
    bundle[:, :, 0, 0, 1] = torch.arange(-2.0, 3)[:, None]
    found = projection.linear({"a": bundle + 7}, TIMES, torch.full((3, 1, 2, 2), 7.0))
    across = found[found["t"] == 500]["x"].to_numpy()
    assert np.abs(across).tolist() == pytest.approx([2, 1, 0, 1, 2], abs=1e-5)
    assert found["y"].abs().max() < 1e-5
    with pytest.raises(ValueError, match="1 trajectories of 3 states"):
        projection.umap({"a": states(1, [1.0, 1.0, 1.0])}, TIMES)
    bad = states(6, [1.0, 1.0, 1.0])
    bad[1, 2] = torch.nan
    with pytest.raises(ValueError, match="all finite"):
        projection.umap({"a": bad}, TIMES)
