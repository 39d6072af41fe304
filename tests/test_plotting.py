"""Figures: written whole or not at all, with what they were made from."""

import html
import json
import re
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import needs_browser, shown
from PIL import Image

from basinlab import plotting

matplotlib.use("Agg")
TABLE = pd.DataFrame({"t": [999, 0], "value": [1.0, 0.5]})


@pytest.fixture
def figure():
    figure, axis = plt.subplots()
    axis.plot(TABLE["t"], TABLE["value"])
    yield figure
    plt.close(figure)


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setenv("BASINLAB_OUT", str(tmp_path))
    return tmp_path


def test_save_writes_all_forms_and_a_manifest_entry(figure, output):
    plotting.save(figure, "one", TABLE, {"seeds": [0]})
    plotting.save(figure, "two", TABLE, {"seeds": [1]})
    names = {path.name for path in (output / "figures").iterdir()}
    assert names == {f"{n}.{s}" for n in ("one", "two") for s in ("pdf", "png", "csv")} | {"manifest.json"}
    manifest = json.loads((output / "figures/manifest.json").read_text())
    assert [manifest[name]["seeds"] for name in ("one", "two")] == [[0], [1]]
    assert "torch" in manifest["one"]["versions"]
    assert pd.read_csv(output / "figures/one.csv").equals(TABLE)


def test_pictures_alone_are_saved_as_a_small_png(output):
    plotting.save(plotting.picture_grid(torch.rand(1, 2, 3, 8, 8), ["row"]), "grid", TABLE, {})
    assert {path.name for path in (output / "figures").iterdir()} == {"grid.png", "grid.csv", "manifest.json"}
    assert Image.open(output / "figures/grid.png").mode == "P"


def test_two_writers_lose_no_entry(output):
    code = "import matplotlib.pyplot as p, pandas as d; from basinlab import plotting as g; import sys; "
    code += "[g.save(p.figure(), f'{sys.argv[1]}{i}', d.DataFrame({'a': [i]}), {}) for i in range(8)]"
    writers = [subprocess.Popen([sys.executable, "-c", code, name]) for name in ("left", "right")]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(json.loads((output / "figures/manifest.json").read_text())) == 16
    assert not [*output.rglob("*.part*")]


def test_figures_are_saved_without_git(figure, output, monkeypatch):
    monkeypatch.setenv("PATH", "")
    plotting.save(figure, "one", TABLE, {})
    assert json.loads((output / "figures/manifest.json").read_text())["one"]["commit"] == "not a checkout"


def test_copies_are_framed_and_others_are_not():
    pictures = torch.rand(1, 2, 3, 8, 8)
    figure = plotting.picture_grid(pictures, ["row"], framed=torch.tensor([[True, False]]), left=pictures[:, 0])
    visible = [axis.spines["top"].get_visible() for axis in figure.axes]
    assert visible == [False, True, False]
    plt.close(figure)


ROWS = pd.DataFrame({"t": [900, 500], "value": [1.0, 0.2], "low": [0.9, 0.1], "high": [1.0, 0.4]})
GRID = torch.stack(torch.meshgrid(torch.arange(3.0), torch.arange(3.0), indexing="xy"), -1).reshape(-1, 2)
PLANE = {"points": GRID, "inside": GRID[:, 0].view(3, 3) > 1, "arrows": (GRID, GRID), "centres": GRID}
PLANE |= {"paths": {"captured": torch.zeros(2, 4, 2), "free": torch.ones(2, 4, 2)}, "attractor": torch.zeros(2)}
METHODS = ROWS.assign(method=["CFG", "STP"], panel=["a", "b"])
POINTS = pd.DataFrame({"measured": [500.0, float("nan")], "dynamic": 300.0})


@pytest.mark.parametrize(
    "draw, panels",
    [
        (lambda: plotting.planes({"t = 0": PLANE, "t = 9": {"attractor": torch.zeros(2)}}, 2.0), 2),
        (lambda: plotting.bands(ROWS.assign(name="captured", of=["a", "b"]), "width", "of"), 2),
        (lambda: plotting.over_start(ROWS.rename(columns={"t": "start"}).assign(name="new and right"), "name"), 1),
        (lambda: plotting.dots(ROWS.assign(level=["x", "y"], of=["a", "b"]), "level", panel="of", ylabel="point"), 2),
        (lambda: plotting.intervals(METHODS, "panel"), 2),
        (lambda: plotting.intervals(METHODS.assign(rule="with CFG"), "panel", hue="rule"), 2),
        (lambda: plotting.magnitudes(torch.ones(2, 3), torch.tensor([900, 600, 300]), POINTS, ["a", "b"]), 4),
    ],
)
def test_each_figure_has_its_panels_and_can_be_written(draw, panels, tmp_path):
    figure = draw()
    assert len(figure.axes) == panels
    figure.savefig(tmp_path / "figure.pdf")
    plt.close(figure)


def test_error_bars_reach_from_low_to_high():
    assert plotting.errors(ROWS).tolist() == pytest.approx(np.array([[0.1, 0.1], [0.0, 0.2]]))


MOVE = """<script>setTimeout(async () => {
  const slider = document.querySelector("input[type=range]"), seen = new Set();
  for (let k = 0; k < 3; k++) {
    slider.value = k;
    slider.dispatchEvent(new Event("input"));
    await new Promise(done => setTimeout(done, 500));
    seen.add([...document.querySelectorAll("image")].map(image => image.outerHTML).join());
  }
  document.title = seen.size + " pictures seen";
}, 2000)</script>"""


@needs_browser
def test_the_picture_follows_the_slider_in_a_browser_without_a_network(tmp_path):
    rows = [("a", 0, "no guidance", start, start > 500, torch.rand(3, 8, 8)) for start in (999, 599, 0)]
    samples = pd.DataFrame(rows, columns=["prompt", "seed", "before", "start", "copied", "picture"])
    curves = pd.DataFrame({"prompt": "a", "seed": 0, "before": "no guidance", "t": [999, 599], "magnitude": [1.0, 2.0]})
    frame = plotting.explorer(samples, curves).data
    page = html.unescape(re.search('srcdoc="(.*?)"', frame, re.DOTALL)[1])
    (tmp_path / "page.html").write_text(page + MOVE)  # at the end: the library holds a "</body>" of its own
    assert "3 pictures seen" in shown((tmp_path / "page.html").as_uri(), tmp_path / "profile")
