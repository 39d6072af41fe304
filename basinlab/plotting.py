"""Every picture of the notebooks. Plots take a result, compute nothing, and return a Figure.

One theme and one palette (seaborn's colour-blind safe one); the same thing has the same
colour everywhere (``COLOURS``). ``save`` writes a figure as PDF, PNG and CSV with an entry in
manifest.json that says what it was made from.
"""

import io
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

_PALETTE = sns.color_palette("colorblind")
COLOURS = {
    "memorized, CFG": _PALETTE[3],
    "memorized, CFG late": _PALETTE[1],
    "memorized, no CFG": _PALETTE[0],
    "ordinary, CFG": _PALETTE[2],
    "ordinary, no CFG": _PALETTE[4],
    "unseen scene": _PALETTE[5],
    "other artist's scene": _PALETTE[8],
    "captured": _PALETTE[3],
    "free": _PALETTE[0],
    "inside the ball": _PALETTE[3],
    "object named right": _PALETTE[2],
    "new and right": _PALETTE[0],
    "no guidance before": _PALETTE[0],
    "opposite guidance before": _PALETTE[1],
    "measured": "black",
    "static": _PALETTE[2],
    "dynamic": _PALETTE[1],
    0.6: _PALETTE[9],
    0.8: _PALETTE[0],
    0.95: _PALETTE[4],
}
VERSIONS = ("torch", "diffusers", "transformers", "umap-learn", "numpy", "matplotlib")


def use_theme() -> None:
    """The collection's look: call once at the top of a notebook."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind")
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "savefig.dpi": 160,
            "pdf.fonttype": 42,  # text stays text in the PDF
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )


def save(figure: Figure, name: str, data: pd.DataFrame, inputs: Mapping, folder: str | Path = "../figures") -> None:
    """Write ``figure`` as NAME.pdf and NAME.png and ``data`` as NAME.csv; note ``inputs`` in manifest.json.

    ``inputs`` says what the figure shows: weights (`Denoiser.fingerprint`), prompts, seeds, guidance.
    Raises OSError when the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix in (".pdf", ".png"):
            metadata = {"CreationDate": None} if suffix == ".pdf" else {}
            figure.savefig(folder / f"{name}.part{suffix}", bbox_inches="tight", metadata=metadata)
            os.replace(folder / f"{name}.part{suffix}", folder / f"{name}{suffix}")
        data.to_csv(folder / f"{name}.csv", index=False, float_format="%.5g")
        manifest = folder / "manifest.json"
        entries = json.loads(manifest.read_text()) if manifest.exists() else {}
        entries[name] = {**inputs, **_circumstances()}
        manifest.with_suffix(".part").write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")
        os.replace(manifest.with_suffix(".part"), manifest)
    except OSError as error:
        raise OSError(f"cannot write figure {name!r} to {folder.resolve()}: {error.strerror or error}") from error


def _circumstances() -> dict:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "versions": {package: version(package) for package in VERSIONS},
        "commit": git.stdout.strip() or "not a git checkout",
        "date": datetime.now(UTC).date().isoformat(),
    }


def picture_grid(
    pictures: Tensor,
    rows: Sequence[str],
    columns: Sequence[str] | None = None,
    framed: Tensor | None = None,
    left: Tensor | None = None,
    left_title: str = "training\nimage",
) -> Figure:
    """Pictures [R, N, 3, h, w], a label per row; ``framed`` [R, N] puts a frame around memorized ones.

    ``left`` [R, 3, h, w] puts a reference (the attractor) before each row.
    """
    count, width = pictures.shape[:2]
    offset = 0 if left is None else 1
    figure, axes = plt.subplots(
        count, width + offset, figsize=(1.15 * (width + offset) + 1.6, 1.25 * count + 0.3), squeeze=False
    )
    for r in range(count):
        for n in range(width + offset):
            axis = axes[r, n]
            shown = left[r] if offset and n == 0 else pictures[r, n - offset]
            axis.imshow(shown.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            memorized = framed is not None and n >= offset and bool(framed[r, n - offset])
            for spine in axis.spines.values():
                spine.set(visible=memorized, color=COLOURS["memorized, CFG"], linewidth=3)
        axes[r, 0].set_ylabel(rows[r], rotation=0, ha="right", va="center", fontsize=9)
    if offset:
        axes[0, 0].set_title(left_title, fontsize=9)
    for n, title in enumerate(columns or []):
        axes[0, n + offset].set_title(title, fontsize=9)
    figure.tight_layout(pad=0.4)
    return figure


def funnel(projections: Mapping[str, "Projection"]) -> Figure:  # noqa: F821
    """Trajectories in space and time, one panel a condition: position across, timestep downwards.

    Every line is one seed; all panels share their axes, so widths can be compared.
    """
    figure = plt.figure(figsize=(4.2 * len(projections), 4.8))
    everything = np.concatenate([p.coordinates.reshape(-1, 2) for p in projections.values()])
    low, high = everything.min(axis=0), everything.max(axis=0)
    for i, (name, projection) in enumerate(projections.items()):
        axis = figure.add_subplot(1, len(projections), i + 1, projection="3d")
        for line in projection.coordinates:
            axis.plot(line[:, 0], line[:, 1], projection.timesteps, color=COLOURS[name], alpha=0.55, linewidth=1)
            axis.scatter(*line[-1], projection.timesteps[-1], color=COLOURS[name], s=14)
        axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(0, 1000), title=name)
        axis.set(xticklabels=[], yticklabels=[])
        axis.set_zlabel("timestep t")
        axis.view_init(elev=14, azim=-60)
        axis.set_box_aspect((1, 1, 1.25), zoom=1.05)
    figure.suptitle(f"sampling runs downwards in time, projected by {next(iter(projections.values())).method}", y=0.98)
    figure.tight_layout()
    return figure


def _bands(axis: Axes, table: pd.DataFrame) -> None:
    """Lines with intervals over the timestep, time running to the right."""
    for name, part in table.groupby("name", sort=False):
        axis.plot(part["t"], part["value"], color=COLOURS[name], label=name)
        axis.fill_between(part["t"], part["low"], part["high"], color=COLOURS[name], alpha=0.2, linewidth=0)
    axis.set(xlabel="timestep t", xlim=(1000, 0), ylim=(0, None))


def curves(table: pd.DataFrame, ylabel: str) -> Figure:
    """Lines with intervals over the timestep; columns name, t, value, low, high."""
    figure, axis = plt.subplots(figsize=(6.6, 3.8))
    _bands(axis, table)
    axis.set_ylabel(ylabel)
    axis.legend()
    figure.tight_layout()
    return figure


def dispersion(table: pd.DataFrame) -> Figure:
    """Widths of bundles of seeds over t (`basin.dispersion`), states beside predicted clean latents (column ``of``)."""
    titles = {"latents": "states $x_t$", "predicted": "predicted clean latents"}
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        _bands(axis, table[table["of"] == kind])
        axis.set_title(title)
    axes[0].set(ylabel="mean distance between seeds", ylim=(0, 1.05 * table["high"].max()))
    axes[0].legend(loc="lower left")
    figure.tight_layout()
    return figure


def _errors(table: pd.DataFrame, value: str, of: str = "") -> np.ndarray:
    """Error bars [2, N] of column ``value`` from columns low and high, their names after ``of``."""
    return np.clip([table[value] - table[f"{of}low"], table[f"{of}high"] - table[value]], 0, None)


def capture_curve(
    table: pd.DataFrame, by: str = "share", ylabel: str = "share inside the ball", title: str = "duplicate's share"
) -> Figure:
    """A share over the start of CFG; columns start, ``by``, captured, low, high (`basin.capture_probability`).

    A start of 0, which is never, stands at the right end.
    """
    figure, axis = plt.subplots(figsize=(6.6, 3.8))
    for name, part in table.groupby(by, sort=False):
        errors = _errors(part, "captured")
        axis.errorbar(part["start"], part["captured"], errors, marker="o", capsize=3, color=COLOURS[name], label=name)
    low = min(80, table["start"].min() - 20)
    axis.set(xlabel="CFG starts at timestep", ylabel=ylabel, xlim=(1020, low), ylim=(-0.03, 1.03))
    axis.legend(title=title, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def ball_and_roc(distances: Mapping[str, Tensor], radius: float, curve: pd.DataFrame) -> Figure:
    """Distances to the attractor by group, with the ball's radius, beside the ROC of "distance <= radius"."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    top = max(float(d.max()) for d in distances.values())
    for name, values in distances.items():
        bins, line = np.linspace(0, top, 60), {"histtype": "step", "linewidth": 1.8}
        left.hist(values, bins, density=True, color=COLOURS[name], label=name, **line)
    left.axvline(radius, color="black", linestyle="--", label=f"radius {radius:.3f}")
    left.set(xlabel="distance D to the attractor", ylabel="density", yscale="symlog")
    left.legend(fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    none = curve.loc[curve["false_positive"] > 0, "false_positive"].min() / 4  # where a logarithmic axis has its 0
    right.plot(curve["false_positive"].clip(none), curve["true_positive"], color="black")
    caught = curve.loc[curve["radius"] <= radius, "true_positive"].max()
    right.plot(none, caught, "o", color="black", label=f"radius {radius:.3f}: none")
    right.set(xscale="log", xlabel="false-positive rate (left end: none)", ylabel="true-positive rate", ylim=(0, 1.03))
    right.legend(loc="lower right")
    figure.tight_layout()
    return figure


def per_prompt(table: pd.DataFrame) -> Figure:
    """Capture probability of every prompt with its interval; columns prompt, group, captured, low, high."""
    table = table.sort_values(["group", "captured"]).reset_index(drop=True)
    figure, axis = plt.subplots(figsize=(10, 3.8))
    for name, part in table.groupby("group"):
        errors = _errors(part, "captured")
        axis.errorbar(part.index, part["captured"], errors, fmt="o", capsize=2, color=COLOURS[name], label=name)
    axis.set(xlabel="prompt", ylabel="capture probability", xticks=[], ylim=(-0.03, 1.03))
    axis.legend(title="duplicate's\nshare", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def planes(panels: Mapping[str, Mapping[str, Tensor]], limit: float = 8.5, point: Tensor | None = None) -> Figure:
    """Points in the plane, one panel a title: name of each crowd -> [N, 2]; ``point`` [2] is marked by a cross."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.9 * len(panels), 3.1), sharex=True, sharey=True, squeeze=False
    )
    for axis, (title, crowds) in zip(axes[0], panels.items(), strict=True):
        for i, (name, points) in enumerate(crowds.items()):
            axis.scatter(*points.T, s=5, alpha=0.5, linewidth=0, color=COLOURS.get(name, _PALETTE[i]), label=name)
        if point is not None:
            axis.plot(*point, marker="x", color="black", markersize=8, linestyle="")
        axis.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    if len(next(iter(panels.values()))) > 1:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, markerscale=2)
        figure.tight_layout(rect=(0, 0.08, 1, 1))
    else:
        figure.tight_layout()
    return figure


def arrows(panels: Mapping[str, Tensor], grid: Tensor, points: Tensor, limit: float = 8.5) -> Figure:
    """Vector fields [G, 2] on ``grid`` [G, 2], one panel a title; ``points`` [K, 2] are marked.

    Lengths are to scale within a panel, cut at its 90th percentile.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.6 * len(panels), 3.8), sharex=True, sharey=True, squeeze=False
    )
    spacing = float(grid[1, 0] - grid[0, 0])
    for axis, (title, field) in zip(axes[0], panels.items(), strict=True):
        longest = float(field.norm(dim=1).quantile(0.9))
        clipped = field * (longest / field.norm(dim=1, keepdim=True).clamp_min(1e-9)).clamp_max(1)
        axis.quiver(
            *grid.T, *clipped.T, color=_PALETTE[0], angles="xy", scale_units="xy", scale=longest / spacing, width=0.006
        )
        axis.plot(*points[:-1].T, marker="o", color="gray", linestyle="", markersize=5)
        axis.plot(*points[-1], marker="x", color="black", linestyle="", markersize=8, markeredgewidth=2)
        axis.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    figure.tight_layout()
    return figure


def basin_maps(
    maps: Mapping[int, Tensor], limit: float, paths: Mapping[str, Tensor], timesteps: Tensor, point: Tensor
) -> Figure:
    """Which states of the plane lie in the basin, one panel a timestep: [N, N] bool, rows along y.

    ``paths`` (name -> [B, S, 2]) are drawn up to each panel's timestep; ``point`` [K, 2] by t is the
    attractor as it stands in the noised plane.
    """
    shape = {"figsize": (3.1 * len(maps), 4), "sharex": True, "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(1, len(maps), **shape)
    for i, (axis, (t, inside)) in enumerate(zip(axes[0], maps.items(), strict=True)):
        axis.imshow(
            inside.float().numpy(),
            extent=(-limit, limit, -limit, limit),
            origin="lower",
            cmap=sns.light_palette(COLOURS["captured"], as_cmap=True),
            vmax=1.6,
        )
        step = timesteps.tolist().index(t)
        for name, states in paths.items():
            for n, path in enumerate(states):
                axis.plot(*path[: step + 1].T, color=COLOURS[name], linewidth=0.8, alpha=0.7)
                axis.plot(*path[step], "o", color=COLOURS[name], markersize=3, label=None if n else name)
        axis.plot(*point[i], marker="x", color="black", markersize=8, linestyle="")
        axis.set(title=f"t = {t}", xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    legend = {"loc": "outside lower center", "ncols": 3, "title": "shaded: the basin; cross: the attractor"}
    figure.legend(*axes[0, 0].get_legend_handles_labels(), **legend)
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    return figure


def funnel_section(
    inside: Tensor, positions: Tensor, timesteps: Sequence[int], paths: Mapping[str, Tensor], path_times: Tensor
) -> Figure:
    """The basin in full along one line through the attractor: [T, N] bool over time and place.

    Args:
        inside: whether CFG from that place at that time is captured.
        positions: [N], along the line, in units of the clean plane.
        timesteps: T.
        paths: name -> [B, S], places of trajectories along the line at ``path_times`` [S].
    """
    figure, axis = plt.subplots(figsize=(8, 4.2))
    colours = sns.light_palette(COLOURS["captured"], as_cmap=True)
    axis.pcolormesh(timesteps, positions, inside.float().T.numpy(), cmap=colours, vmax=1.6, shading="nearest")
    for name, places in paths.items():
        for i, path in enumerate(places):
            axis.plot(path_times, path, color=COLOURS[name], linewidth=0.9, label=name if i == 0 else None)
    axis.set(
        xlabel="timestep t", ylabel="place along the line", xlim=(1000, 0), ylim=(positions.min(), positions.max())
    )
    axis.legend(title="shaded: the basin", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def widths(table: pd.DataFrame) -> Figure:
    """The funnel's measured width over t (`basin.funnel_width`): in units of the noise at t, and in the latents'."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    units = {"width": ("", "in units of the noise at t"), "absolute": ("absolute_", "in the latents' own units")}
    known = table[np.isfinite(table["width"])]
    for axis, (column, (of, label)) in zip(axes, units.items(), strict=True):
        errors = _errors(known, column, of)
        errors = np.where(np.isfinite(errors), errors, 0)
        axis.errorbar(known["t"], known[column], errors, marker="o", capsize=3, color=COLOURS["captured"])
        axis.set(xlabel="timestep t", ylabel=f"push that frees one half,\n{label}", xlim=(1020, 0), ylim=(0, None))
    figure.tight_layout()
    return figure


def magnitude_panels(magnitudes: Tensor, timesteps: Tensor, marks: pd.DataFrame, titles: Sequence[str]) -> Figure:
    """Guidance magnitude of single trajectories [N, S] with transition points marked.

    ``marks`` has a row a trajectory and a column a kind of point (measured, static, dynamic; NaN: none).
    """
    columns = 4
    lines = -(-len(magnitudes) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3 * columns, 2.2 * lines), sharex=True, squeeze=False)
    styles = {"measured": "-", "static": ":", "dynamic": "--"}
    for i, (axis, magnitude) in enumerate(zip(axes.flat, magnitudes, strict=False)):
        axis.plot(timesteps, magnitude, color="gray")
        for name in marks.columns:
            if np.isfinite(marks[name].iloc[i]):
                axis.axvline(marks[name].iloc[i], color=COLOURS[name], linestyle=styles[name], label=name)
        axis.set_title(titles[i], fontsize=8)
        axis.set(xlim=(1000, 0))
    for axis in axes[-1]:
        axis.set_xlabel("timestep t")
    figure.supylabel(r"$\|\epsilon_c-\epsilon_u\|_2$", fontsize=11)
    handles = {h.get_label(): h for axis in axes.flat for h in axis.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


def point_errors(table: pd.DataFrame) -> Figure:
    """Dynamic transition points against measured ones: scatter, and the error's distribution.

    Columns measured, dynamic (NaN: none found), share.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9))
    found = table.dropna()
    for share, part in found.groupby("share"):
        left.scatter(part["measured"], part["dynamic"], s=22, color=COLOURS[share], label=share)
    left.plot([0, 1000], [0, 1000], color="gray", linewidth=1)
    left.set(xlabel="measured point t", ylabel="dynamic point t", xlim=(1000, 0), ylim=(1000, 0))
    left.set_title("above the line: too late", fontsize=11)
    left.legend(title="duplicate's share")
    error = found["dynamic"] - found["measured"]
    right.hist(error, np.arange(-1000, 1001, 50), color=COLOURS["dynamic"])
    right.axvline(0, color="gray", linewidth=1)
    right.axvline(error.median(), color="black", linestyle="--", label=f"median {error.median():+.0f}")
    right.set(xlabel="dynamic minus measured (right: too early)", ylabel="samples")
    right.legend()
    figure.tight_layout()
    return figure


def shares_over(table: pd.DataFrame, x: str, xlabel: str) -> Figure:
    """Shares of samples over a setting ``x``; columns ``x``, name, captured, low, high."""
    figure, axis = plt.subplots(figsize=(6.6, 3.8))
    for name, part in table.groupby("name", sort=False):
        errors = _errors(part, "captured")
        axis.errorbar(part[x], part["captured"], errors, marker="o", capsize=3, color=COLOURS[name], label=name)
    axis.set(xlabel=xlabel, ylabel="share of samples", ylim=(-0.03, 1.03))
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def point_multiples(table: pd.DataFrame) -> Figure:
    """Transition points by what may move them: columns factor, level, point, low, high; one panel a factor."""
    factors = list(dict.fromkeys(table["factor"]))
    lines = -(-len(factors) // 3)
    figure, axes = plt.subplots(lines, 3, figsize=(12, 3.1 * lines), sharey=True, squeeze=False)
    for axis, factor in zip(axes.flat, factors, strict=False):
        part = table[table["factor"] == factor].reset_index(drop=True)
        errors = _errors(part, "point")
        axis.errorbar(part.index, part["point"], errors, fmt="o", capsize=3, color="black")
        labels = [str(level) for level in part["level"]]
        many = sum(map(len, labels)) > 40
        labels = [] if many else labels
        axis.set(title=factor, xticks=[] if many else part.index, xlim=(-0.5, len(part) - 0.5), ylim=(-25, 1025))
        axis.set_xticklabels(labels, fontsize=8)
        if many:
            axis.set_xlabel(f"{len(part)}, in order")
    for axis in axes[:, 0]:
        axis.set_ylabel("transition point t")
    for axis in axes.flat[len(factors) :]:
        axis.set_visible(False)
    figure.tight_layout()
    return figure


def start_slider(pictures: Tensor, starts: Sequence[int], memorized: Tensor):
    """An ipywidgets slider over the start of CFG; pictures [starts, seeds, 3, h, w] are only shown, not sampled.

    ``memorized`` [starts, seeds] tells which are copies; those are framed.
    """
    import ipywidgets

    def png(start: int, seed: int) -> bytes:
        pixels = np.pad(pictures[start, seed].permute(1, 2, 0).numpy(), ((4, 4), (4, 4), (0, 0)), constant_values=1.0)
        if memorized[start, seed]:
            edge = np.ones(pixels.shape[:2], bool)
            edge[4:-4, 4:-4] = False
            pixels[edge] = COLOURS["memorized, CFG"]
        buffer = io.BytesIO()
        plt.imsave(buffer, np.clip(pixels, 0, 1), format="png")
        return buffer.getvalue()

    frames = [[png(i, k) for k in range(pictures.shape[1])] for i in range(len(starts))]
    start = ipywidgets.SelectionSlider(options=[(f"t = {t}", i) for i, t in enumerate(starts)], description="CFG from")
    seed = ipywidgets.Dropdown(options=list(range(pictures.shape[1])), description="seed")
    picture = ipywidgets.Image(value=frames[0][0], format="png", width=256, height=256)

    def show(_) -> None:
        picture.value = frames[start.value][seed.value]

    start.observe(show, "value")
    seed.observe(show, "value")
    return ipywidgets.VBox([ipywidgets.HBox([start, seed]), picture])


# The methods of the comparison: one colour a family.
_FAMILIES = {
    "CFG": ("black", ("CFG",)),
    "its scale": ("gray", ("lower scale",)),
    "prompt, at random": (_PALETTE[0], ("RNA", "RTA", "CWR", "GNI")),
    "embedding or attention": (_PALETTE[4], ("Wen", "Ren", "CADS")),
    "initial noise": (_PALETTE[2], ("Han, per sample", "Han, batch-wise", "SAIL")),
    "guidance over time": (_PALETTE[1], ("interval", "schedule")),
    "the paper's": (_PALETTE[3], ("STP", "DTP", "OG + STP", "OG + DTP")),
}
COLOURS |= {name: colour for colour, names in _FAMILIES.values() for name in names}


def _name_families(figure: Figure) -> None:
    """A line under ``figure`` that says which colour is which kind of method."""
    marks = [Line2D([], [], color=colour, marker="o", linestyle="") for colour, _ in _FAMILIES.values()]
    figure.legend(marks, _FAMILIES, loc="outside lower center", ncols=len(marks), handletextpad=0.2, fontsize=10)


_AXES = {
    "copied": "share copied",
    "object_right": "share with the object right",
    "similarity": "copy similarity",
    "clip_score": "CLIP score",
}


def trade_offs(
    settings: pd.DataFrame, panels: Sequence[str], across: str = "copied", upwards: str = "object_right"
) -> Figure:
    """Memorization against alignment, a panel a method, its settings joined from weak to strong.

    Columns of `bundled.tables.trade_off`; ``across`` and ``upwards`` are two of them, with their intervals.
    Every panel shows all other methods in grey; the cross is plain CFG.
    """
    columns = 5
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(12, 2.5 * lines), sharex=True, sharey=True)
    cfg = settings[settings["method"] == "CFG"].iloc[0]
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, panels, strict=False):
        for other, part in settings.groupby("method", sort=False):
            if other != name:
                axis.plot(part[across], part[upwards], ".-", color="0.85", linewidth=0.7, markersize=3)
        part = settings[settings["method"] == name].sort_values("setting")
        wide, high = (_errors(part, column, f"{column}_") for column in (across, upwards))
        axis.errorbar(part[across], part[upwards], high, wide, "o-", color=COLOURS[name], elinewidth=0.7)
        axis.plot(cfg[across], cfg[upwards], "x", color="black", markersize=8)
        axis.set_title(name, fontsize=10)
    figure.supxlabel(_AXES[across], fontsize=11, y=0.04)
    figure.supylabel(_AXES[upwards], fontsize=11)
    _name_families(figure)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure


def heat_map(table: pd.DataFrame, label: str) -> Figure:
    """A value in 0..1 for each strategy (rows) and scenario (columns), written into its cell."""
    figure, axis = plt.subplots(figsize=(1.9 * table.shape[1] + 2.4, 0.34 * len(table) + 1.2))
    sns.heatmap(table, vmin=0, vmax=1, cmap="cividis", annot=True, fmt=".2f", ax=axis, cbar_kws={"label": label})
    axis.set(xlabel="", ylabel="")
    axis.tick_params(axis="x", rotation=0)
    axis.tick_params(axis="y", rotation=0)
    figure.tight_layout()
    return figure


def intervals(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """A panel a measure: value, low and high of each strategy, in one order; a line at CFG's value."""
    first = next(iter(panels.values()))
    names = first["strategy"].tolist()
    size = (3.2 * len(panels) + 1.6, 0.27 * len(names) + 1.2)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, (label, table) in zip(axes.flat, panels.items(), strict=True):
        for row, name in enumerate(names):
            part = table[table["strategy"] == name]
            colour = COLOURS.get(name, "black")
            axis.errorbar(part["value"], [row], xerr=_errors(part, "value"), fmt="o", capsize=2, color=colour)
        axis.axvline(
            table.loc[table["strategy"] == "CFG", "value"].iloc[0], color="black", linestyle=":", linewidth=0.8
        )
        axis.set(xlabel=label, yticks=range(len(names)), yticklabels=names)
    axes[0, 0].invert_yaxis()
    _name_families(figure)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure


def costs(table: pd.DataFrame) -> Figure:
    """Predictions of each ``part`` of the work in each ``size``, side by side on a logarithmic axis."""
    figure, axis = plt.subplots(figsize=(6.6, 2.6))
    parts = list(dict.fromkeys(table["part"]))
    for size, rows in table.groupby("size", sort=False):
        axis.plot(rows["predictions"], [parts.index(part) for part in rows["part"]], "o", label=size)
    for row in table.itertuples():
        place = (row.predictions, parts.index(row.part))
        axis.annotate(f"{row.predictions:,}", place, (0, 6), textcoords="offset points", ha="center", fontsize=9)
    axis.set(xscale="log", xlabel="predictions of the U-Net, at most", yticks=range(len(parts)), yticklabels=parts)
    axis.set_ylim(len(parts) - 0.6, -0.7)
    axis.margins(x=0.15)
    axis.legend(loc="upper right")
    figure.tight_layout()
    return figure


def together(table: pd.DataFrame, label: str) -> Figure:
    """Each prior method alone and with other guidance: columns prior, other, value, low, high."""
    priors = list(dict.fromkeys(table["prior"]))
    figure, axis = plt.subplots(figsize=(8, 0.42 * len(priors) + 1.2))
    colours = dict(zip(dict.fromkeys(table["other"]), (_PALETTE[7], _PALETTE[1], _PALETTE[3]), strict=True))
    for offset, (name, part) in zip((-0.2, 0, 0.2), table.groupby("other", sort=False), strict=True):
        rows = [priors.index(prior) + offset for prior in part["prior"]]
        axis.errorbar(
            part["value"], rows, xerr=_errors(part, "value"), fmt="o", capsize=2, color=colours[name], label=name
        )
    axis.set(xlabel=label, yticks=range(len(priors)), yticklabels=priors, xlim=(-0.03, 1.03))
    axis.invert_yaxis()
    axis.legend(title="guidance", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure
