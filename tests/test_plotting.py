"""Figures: written whole or not at all, with what they were made from."""

import json

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from basinlab import plotting

matplotlib.use("Agg")
TABLE = pd.DataFrame({"t": [999, 0], "value": [1.0, 0.5]})


@pytest.fixture
def figure():
    figure, axis = plt.subplots()
    axis.plot(TABLE["t"], TABLE["value"])
    yield figure
    plt.close(figure)


def test_save_writes_all_forms_and_a_manifest_entry(figure, tmp_path):
    plotting.save(figure, "one", TABLE, {"seeds": [0]}, tmp_path / "figures")
    plotting.save(figure, "two", TABLE, {"seeds": [1]}, tmp_path / "figures")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {f"{n}.{s}" for n in ("one", "two") for s in ("pdf", "png", "csv")} | {"manifest.json"}
    manifest = json.loads((tmp_path / "figures/manifest.json").read_text())
    assert [manifest[name]["seeds"] for name in ("one", "two")] == [[0], [1]]
    assert "torch" in manifest["one"]["versions"]
    assert pd.read_csv(tmp_path / "figures/one.csv").equals(TABLE)


def test_a_folder_that_cannot_be_written_is_named(figure, tmp_path):
    (tmp_path / "figures").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"cannot write figure 'one' to .*figures"):
        plotting.save(figure, "one", TABLE, {}, tmp_path / "figures")


def test_copies_are_framed_and_others_are_not():
    pictures = torch.rand(1, 2, 3, 8, 8)
    figure = plotting.picture_grid(pictures, ["row"], framed=torch.tensor([[True, False]]), left=pictures[:, 0])
    visible = [axis.spines["top"].get_visible() for axis in figure.axes]
    assert visible == [False, True, False]
    plt.close(figure)


def test_slider_shows_the_picture_of_the_chosen_start_and_seed():
    pictures = torch.rand(3, 2, 3, 8, 8)
    widget = plotting.start_slider(pictures, [900, 500, 100], torch.zeros(3, 2, dtype=torch.bool))
    (start, seed), picture = widget.children[0].children, widget.children[1]
    seen = {bytes(picture.value)}
    for i in range(3):
        for k in range(2):
            start.value, seed.value = i, k
            seen.add(bytes(picture.value))
    assert len(seen) == 6


SHARES = pd.DataFrame({"start": [900, 500], "captured": [1.0, 0.2], "low": [0.9, 0.1], "high": [1.0, 0.4]})
GRID = torch.stack(torch.meshgrid(torch.arange(3.0), torch.arange(3.0), indexing="xy"), -1).reshape(-1, 2)
PATHS = {"captured": torch.zeros(2, 4, 2), "free": torch.ones(2, 4, 2)}
TIMES = torch.tensor([900, 600, 300])
WIDTHS = pd.DataFrame({"t": [9, 5], "width": [float("inf"), 2], "low": 1.0, "high": 3.0}).assign(
    absolute=lambda rows: rows["width"], absolute_low=0.5, absolute_high=4.0
)
POINTS = pd.DataFrame({"factor": ["a", "a", "b"], "level": [1, 2, 3], "point": 500.0, "low": 400.0, "high": 600.0})


@pytest.mark.parametrize(
    "draw, panels",
    [
        (lambda: plotting.planes({"t = 0": {"free": GRID}, "t = 9": {"free": GRID}}, point=torch.zeros(2)), 2),
        (lambda: plotting.arrows({"a": GRID, "b": -GRID, "c": GRID}, GRID, GRID), 3),
        (lambda: plotting.basin_maps({900: GRID > 1, 300: GRID > 0}, 2.0, PATHS, TIMES, GRID), 2),
        (lambda: plotting.funnel_section(GRID.new_ones(3, 5), torch.arange(5), [9, 6, 3], {}, TIMES), 1),
        (lambda: plotting.capture_curve(SHARES.assign(name="new and right"), "name"), 1),
        (lambda: plotting.shares_over(SHARES.assign(name="new and right"), "start", "start"), 1),
        (lambda: plotting.widths(WIDTHS), 2),
        (lambda: plotting.point_multiples(POINTS), 3),
        (lambda: plotting.point_errors(pd.DataFrame({"measured": [500.0], "dynamic": [400.0], "share": [0.6]})), 2),
        (
            lambda: plotting.magnitude_panels(
                torch.ones(2, 3), TIMES, pd.DataFrame({"measured": [500, float("nan")], "dynamic": 300.0}), ["a", "b"]
            ),
            4,
        ),
    ],
)
def test_each_figure_has_its_panels_and_can_be_written(draw, panels, tmp_path):
    figure = draw()
    assert len(figure.axes) == panels
    figure.savefig(tmp_path / "figure.pdf")
    plt.close(figure)
