"""Every picture of the notebooks. A plot takes a table or tensors and returns a Figure.

``dots`` and ``intervals`` draw nearly all tables, from the columns value, low and high. The same thing has the same
colour everywhere (``COLOURS``, of seaborn's colour-blind safe palette). ``save`` writes a figure and what it shows.
"""

import base64
import html
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
from filelock import FileLock
from matplotlib import colors, image
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage, TextArea, VPacker
from PIL import Image
from torch import Tensor

from .store import output_folder

_PALETTE = sns.color_palette("colorblind")
_FAMILIES = {  # the methods of the comparison: one colour a family
    "CFG": ("black", ("CFG",)),
    "lower scale": ("gray", ("lower scale",)),
    "prompt, at random": (_PALETTE[0], ("RNA", "RTA", "CWR")),
    "embedding or attention": (_PALETTE[4], ("GNI", "Wen", "Ren", "CADS")),
    "initial noise": (_PALETTE[2], ("Han, per sample", "Han, batch-wise", "SAIL")),
    "guidance over time": (_PALETTE[1], ("interval", "schedule")),
    "the paper's": (_PALETTE[3], ("STP", "DTP", "OG + STP", "OG + DTP")),
    "since the paper": (_PALETTE[5], ("GUARD", "PRSS", "stability", "APG", "CFG-Zero*")),
}
_NAMED = (  # what has the first colours of the palette; 0.6, 0.8 and 0.95 are shares of duplicates
    ("unguided", "new and right", "no guidance before", "unconditional", 0.8),
    ("opposite guidance before", "dynamic", "conditional"),
    ("ordinary", "ordinary, CFG", "object right", "static"),
    ("memorized", "memorized, CFG", "captured", "copied", "difference"),
    ("memorized, CFG late", "released", "measured", 0.95),
)
COLOURS = {name: _PALETTE[i] for i, names in enumerate(_NAMED) for name in names}
COLOURS |= {"unseen scene": _PALETTE[5], "ordinary, colour named": _PALETTE[7], "other artist's scene": _PALETTE[8]}
COLOURS |= {0.6: _PALETTE[9]} | {name: colour for colour, names in _FAMILIES.values() for name in names}
_STYLES = {"measured": ("-", 1.5), "static": (":", 3.5), "dynamic": ("--", 1.5)}  # of points' lines, and widths


def use_theme() -> None:
    """Set the collection's look; call it once at the top of a notebook."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind")
    looks = {"figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}
    plt.rcParams.update({"figure.dpi": 100, "savefig.dpi": 150, "pdf.fonttype": 42, "legend.frameon": False, **looks})


def save(figure: Figure, name: str, data: pd.DataFrame, inputs: Mapping) -> None:
    """Write NAME.png, NAME.pdf and ``data`` as NAME.csv into figures/; note ``inputs`` in manifest.json there.

    Those are what it was made from: weights, prompts, seeds, guidance. A PNG has 256 colours; no PDF holds pictures.
    """
    folder, lock = output_folder() / "figures", output_folder() / "build" / "manifest.lock"
    for parent in (folder, lock.parent):
        parent.mkdir(parents=True, exist_ok=True)
    pictures = figure.findobj(lambda part: isinstance(part, OffsetImage | image.AxesImage))
    for suffix in (".png",) if pictures else (".png", ".pdf"):
        part = folder / f"{name}.part{suffix}"
        figure.savefig(part, bbox_inches="tight", metadata={"CreationDate": None} if suffix == ".pdf" else {})
        if suffix == ".png":
            Image.open(part).convert("RGB").quantize(256).save(part, optimize=True)
        os.replace(part, folder / f"{name}{suffix}")
    data.to_csv(folder / f"{name}.csv", index=False, float_format="%.5g")
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "not a checkout"
    versions = {x: version(x) for x in ("torch", "diffusers", "transformers", "umap-learn", "numpy", "matplotlib")}
    manifest, part = folder / "manifest.json", folder / "manifest.part"
    with FileLock(lock):  # another process may write another figure
        entries = json.loads(manifest.read_text()) if manifest.exists() else {}
        entries[name] = {**inputs, "versions": versions, "commit": commit, "date": datetime.now(UTC).date().isoformat()}
        part.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")
        os.replace(part, manifest)


def picture_grid(pictures, rows, columns=(), framed=None, left=None) -> Figure:
    """Pictures [R, N, 3, h, w]; a frame marks copies, ``framed`` [R, N] bool; before each row ``left`` [R, 3, h, w]."""
    (count, width), offset = pictures.shape[:2], int(left is not None)
    size = (1.15 * (width + offset) + 1.6, 1.25 * count + 0.3)
    figure, axes = plt.subplots(count, width + offset, figsize=size, squeeze=False)
    for r, n in np.ndindex(count, width + offset):
        shown = left[r] if n < offset else pictures[r, n - offset]
        axes[r, n].imshow(shown.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes[r, n].set(xticks=[], yticks=[])
        copied = framed is not None and n >= offset and bool(framed[r, n - offset])
        for spine in axes[r, n].spines.values():
            spine.set(visible=copied, color=COLOURS["copied"], linewidth=3)
    for axis, label in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for axis, title in zip(axes[0], ["training\npicture"] * offset + list(columns), strict=False):
        axis.set_title(title, fontsize=9)
    if framed is not None:
        figure.supxlabel("framed: a copy of a training picture", color=COLOURS["copied"], fontsize=9)
    return figure


def thumbnails(axis, rows: pd.DataFrame, right: bool = False) -> None:
    """Pictures in a row over ``axis``, or at its right, each with a line to its place in the plot.

    Columns picture [3, h, w], label, copied (which frames it; NA: no frame), and x and y of the place (NaN: no line).
    """
    side, edge = ((-0.05, 0.5), (0, 0.5)) if right else ((0.5, -0.08), (0.5, 0))  # of the box, towards the plot
    for place, row in zip((np.arange(len(rows)) + 0.5) / len(rows), rows.itertuples(), strict=True):
        image = OffsetImage(row.picture.permute(1, 2, 0).numpy(), zoom=46 / row.picture.shape[-1])
        box = VPacker(children=[TextArea(row.label, textprops={"fontsize": 8}), image], align="center", pad=0, sep=2)
        frame = {"edgecolor": COLOURS["copied"] if pd.notna(row.copied) and row.copied else "0.8", "linewidth": 2}
        looks = {"bboxprops": frame, "pad": 0.15, "annotation_clip": False, "boxcoords": "axes fraction"}
        if np.isfinite(row.y):
            looks["arrowprops"] = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.7, "relpos": edge}
            axis.plot(row.x, row.y, "o", color="0.3", markersize=4, clip_on=False)
        at = (1, 1 - place) if right else (place, 1)
        point, of = ((row.x, row.y), "data") if np.isfinite(row.y) else (at, "axes fraction")
        axis.add_artist(AnnotationBbox(box, point, at, xycoords=of, box_alignment=side, **looks))


def _panels(table: pd.DataFrame, panel: str | None, columns: int, size: tuple[float, float], **shared):
    """A figure with one axes for each value of the column ``panel``: (figure, [(title, axes, rows of the table)])."""
    parts = [("", table)] if panel is None else list(table.groupby(panel, sort=False))
    width, height = min(columns, len(parts)), -(-len(parts) // columns)
    figure, axes = plt.subplots(height, width, figsize=(size[0] * width, size[1] * height), squeeze=False, **shared)
    for axis in axes.flat[len(parts) :]:
        axis.set_visible(False)
    return figure, [(title, axis, part) for axis, (title, part) in zip(axes.flat, parts, strict=False)]


def errors(table: pd.DataFrame, value: str = "value", of: str = "") -> np.ndarray:
    """Error bars [2, N] around a column, from the columns low and high; ``of`` stands before their names."""
    bars = np.array([table[value] - table[f"{of}low"], table[f"{of}high"] - table[value]])
    return np.where(np.isfinite(bars), bars.clip(0), 0)


def dots(
    table: pd.DataFrame, x: str, hue=None, panel=None, title="", band=False, size=None, strips=None, marks=None, **axes
) -> Figure:
    """Points, or lines with a band, with intervals: columns ``x``, value, low, high; a bool column gold shades places.

    There is a colour for each value of the column ``hue`` and a panel for each of ``panel``. ``title`` is the legend's;
    ``axes`` are set on every panel (xlabel, ylabel, xlim, ylim, ...). ``strips`` has ``panel`` and the columns of
    `thumbnails`, ``marks`` ``panel``, name and at: vertical lines, such as the transition points.
    """
    figure, panels = _panels(table, panel, 3, size or ((4.2, 3.3) if panel else (6.6, 3.8)), sharey=True)
    for name, axis, rows in panels:
        for label, part in [(None, rows)] if hue is None else rows.groupby(hue, sort=False):
            colour, numbers = COLOURS.get(label, "black"), pd.api.types.is_numeric_dtype(part[x])
            if band:
                axis.plot(part[x], part["value"], color=colour, label=label)
                axis.fill_between(part[x], part["low"], part["high"], color=colour, alpha=0.2, linewidth=0)
            else:
                line = {"marker": "o", "linestyle": "-" if numbers else "", "capsize": 3, "color": colour}
                axis.errorbar(part[x], part["value"], errors(part), label=label, **line)
        if "gold" in rows:
            half = rows[x].diff().abs().median() / 2
            for place in rows.loc[rows["gold"], x].unique():
                axis.axvspan(place - half, place + half, color="gold", alpha=0.4, linewidth=0, zorder=0)
        for mark in () if marks is None else marks[marks[panel] == name].dropna().itertuples():
            style, width = _STYLES[mark.name]
            axis.axvline(mark.at, color=COLOURS[mark.name], linestyle=style, linewidth=width, label=mark.name)
        axis.set_title(name, pad=None if strips is None else 72)
        if strips is not None:
            thumbnails(axis, strips[strips[panel] == name])
            axis.plot([], [], "s", color="none", markeredgecolor=COLOURS["copied"], label="a copy")
    for _, axis, rows in panels:  # when all is drawn: they share an axis
        axis.set(**axes)
        if not pd.api.types.is_numeric_dtype(rows[x]) and rows[x].astype(str).str.len().sum() > 30:  # would overlap
            plt.setp(axis.get_xticklabels(), rotation=30, horizontalalignment="right")
    if axis.get_legend_handles_labels()[1]:
        axis.legend(title=title, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def over_start(table: pd.DataFrame, hue: str, title="") -> Figure:
    """The share copied over the start of CFG: columns start, ``hue``, value, low, high; 0, at the right, is never."""
    axes = {"xlim": (1020, min(80, table["start"].min() - 20)), "ylim": (-0.03, 1.03), "ylabel": "share copied"}
    return dots(table, "start", hue, title=title, band=True, xlabel="CFG starts at timestep", **axes)


def intervals(table: pd.DataFrame, panel: str, **axes) -> Figure:
    """Value, low and high of each ``method``, a row each; panels by the column ``panel``, dotted at CFG's value."""
    names = list(dict.fromkeys(table["method"]))
    figure, panels = _panels(table, panel, 4, (3.6, 0.34 * len(names) + 1.2), sharey=True)
    for label, axis, rows in panels:
        for bar, row in zip(errors(rows).T, rows.itertuples(), strict=True):
            colour, y = COLOURS.get(row.method, "black"), names.index(row.method)
            axis.errorbar(row.value, y, xerr=bar[:, None], fmt="o", capsize=2, color=colour)
        for value in rows.loc[rows["method"] == "CFG", "value"]:
            axis.axvline(value, color="black", linestyle=":", linewidth=0.8)
        axis.set(xlabel=label, yticks=range(len(names)), yticklabels=names, **axes)
    panels[0][1].invert_yaxis()
    legend(figure, names)
    return figure


def legend(figure: Figure, methods: Sequence[str]) -> None:
    """A line over ``figure`` that names the colours of the families that ``methods`` belong to."""
    drawn = {family: colour for family, (colour, names) in _FAMILIES.items() if {*names} & {*methods}}
    marks = [Line2D([], [], color=colour, marker="o", linestyle="") for colour in drawn.values()]
    figure.legend(marks, drawn, loc="outside upper center", ncols=max(1, len(marks)), handletextpad=0.2, fontsize=10)


def singles(table: pd.DataFrame, ylabel: str) -> Figure:
    """Single lines (paper, Fig. 7): columns panel, name (which has the colour), line, t, value."""
    figure, panels = _panels(table, "panel", 3, (4.6, 3.6), sharey=True)
    for title, axis, rows in panels:
        last = axis is panels[-1][1] and rows["name"].nunique() > 1
        alone = {"units": "line", "estimator": None, "linewidth": 0.9, "alpha": 0.8, "legend": last}
        sns.lineplot(rows, x="t", y="value", hue="name", palette=COLOURS, ax=axis, **alone)
        axis.set(title=title, xlim=(1000, 0), xlabel="timestep t", ylabel=ylabel)
    axis.set_ylim(bottom=0)
    if last:
        sns.move_legend(axis, "center left", bbox_to_anchor=(1, 0.5), title=None)
    return figure


def section(shares: pd.DataFrame, half: pd.DataFrame, paths: pd.DataFrame, ends: pd.DataFrame, axis=None) -> Figure:
    """The basin, measured (paper, Fig. 1): over t, on the way from the captured state (0) to the unguided one (1).

    ``shares`` has t, push (the place on the way) and value (the share captured), ``half`` t and value (where one half
    escapes), ``paths`` name, t and value (the place), ``ends`` the columns of `thumbnails`.
    """
    axis = axis or plt.subplots(figsize=(8.6, 4.6))[1]
    shade, grid = sns.light_palette(COLOURS["captured"], as_cmap=True), shares.pivot(index="push", columns="t")["value"]
    drawn = axis.pcolormesh(grid.columns, grid.index, grid, cmap=shade, vmin=0, vmax=1.4, shading="nearest")
    bar = {"boundaries": np.linspace(0, 1, 21), "ticks": [0, 0.5, 1], "location": "top", "shrink": 0.4, "aspect": 30}
    axis.figure.colorbar(drawn, ax=axis, label="share captured", **bar)
    top = float(grid.index.max())
    axis.plot(half["t"], half["value"].where(half["value"] <= top), color="black", label="one half escapes")
    for name, part in paths.groupby("name", sort=False):
        axis.plot(part["t"], part["value"], color=COLOURS[name], linewidth=1.8, label=name)
    axis.set(xlim=(1000, 0), ylim=(float(grid.index.min()) - 0.05, top), xlabel="timestep t", ylabel="way out, λ")
    axis.set_yticks([0, 1], ["captured, 0", "unguided, 1"])
    thumbnails(axis, ends, right=True)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4, fontsize=9)
    return axis.figure


def planes(panels: Mapping[str, Mapping], limit: float) -> Figure:
    """The exact world's plane, one panel a title. Each has attractor [2], a cross, and any of the others.

    points [N, 2]: a crowd. inside [N, N] bool, rows along y: the basin, shaded. arrows: grid [G, 2] and field [G, 2],
    cut at the 90th percentile. paths: name -> [B, S, 2], trajectories up to now. centres [K, 2]: gray dots.
    """
    count = len(panels)
    figure, axes = plt.subplots(1, count, figsize=(3.1 * count, 3.4), sharex=True, sharey=True, squeeze=False)
    shade = {"cmap": sns.light_palette(COLOURS["captured"], as_cmap=True), "vmax": 1.6, "origin": "lower"}
    for axis, (title, panel) in zip(axes[0], panels.items(), strict=True):
        if "inside" in panel:
            axis.imshow(panel["inside"].float().numpy(), extent=(-limit, limit, -limit, limit), **shade)
        if "points" in panel:
            axis.scatter(*panel["points"].T, s=5, alpha=0.5, linewidth=0, color=_PALETTE[0])
        if "arrows" in panel:
            grid, field = panel["arrows"]
            longest = field.norm(dim=1).quantile(0.9)
            clipped, scale = field.renorm(2, 0, float(longest)), float(longest / (grid[1, 0] - grid[0, 0]))
            axis.quiver(*grid.T, *clipped.T, color=_PALETTE[0], angles="xy", scale_units="xy", scale=scale, width=0.006)
        for name, states in panel.get("paths", {}).items():
            axis.plot(*states.permute(2, 1, 0), color=COLOURS[name], linewidth=0.8, alpha=0.7)
            axis.plot(*states[:, -1].T, "o", color=COLOURS[name], markersize=3, label=name)
        if "centres" in panel:
            axis.plot(*panel["centres"].T, "o", color="gray", markersize=5)
        axis.plot(*panel["attractor"], marker="x", color="black", markersize=8, markeredgewidth=2, linestyle="")
        axis.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    if (named := axes[0, 0].get_legend_handles_labels())[0]:  # those of paths
        figure.legend(*named, loc="outside lower center", ncols=2)
    return figure


def _address(picture: Tensor) -> str:
    """A picture [3, h, w] in 0..1 as a small file in a data address."""
    pixels, buffer = Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy()), io.BytesIO()
    pixels.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def explorer(samples: pd.DataFrame, curves: pd.DataFrame, ways: pd.DataFrame):
    """A linked figure without kernel or network: drag the start of guidance; picture and trajectory follow.

    ``samples``: prompt, seed, before, start, copied, picture [3, h, w]; ``curves``: prompt, seed, before, t, magnitude;
    ``ways``: prompt, seed, before, start, t, place (`basin.on_the_way`).
    """
    import altair as alt
    from IPython.display import HTML

    keys = ["prompt", "seed", "before", "start"]
    rows = samples[[*keys, "copied", "picture"]].merge(curves.rename(columns={"t": "start"}), "left", on=keys)
    labels = rows["start"].map(lambda t: f"from {t}" if t else "never") + np.where(rows["copied"], ": copy", ": new")
    rows = rows.assign(picture=rows["picture"].map(_address), label=labels, k=(-rows["start"]).rank(method="dense") - 1)
    ways = ways.round(2).merge(rows[[*keys, "k", "copied"]])
    options = {name: rows[name].unique().tolist() for name in ("prompt", "seed", "before")}
    choices = [alt.param(n, value=x[0], bind=alt.binding_select(options=x, name=f"{n} ")) for n, x in options.items()]
    drag = "pointerdown, [pointerdown, window:pointerup] > window:pointermove"
    slider = alt.binding_range(min=0, max=int(rows["k"].max()), step=1, name="start of guidance ")
    start = alt.selection_point(name="start", fields=["k"], value=0, nearest=True, on=drag, clear=False, bind=slider)
    chosen = "datum.prompt == prompt && datum.seed == seed && datum.before == before"
    x = alt.X("t:Q", scale=alt.Scale(domain=[1000, 0]), title="timestep t")
    line = alt.Chart(curves).transform_filter(chosen).mark_line(color="gray").encode(x, alt.Y("magnitude:Q"))
    colours = alt.Scale(domain=[True, False], range=[*map(colors.to_hex, (COLOURS["copied"], COLOURS["unguided"]))])
    points = alt.Chart(rows).transform_filter(chosen + " && isValid(datum.magnitude)").mark_point(filled=True)
    size, colour = alt.condition(start, alt.value(260), alt.value(60)), alt.Color("copied:N", scale=colours)
    points = points.encode(x="start:Q", y="magnitude:Q", color=colour, size=size)
    here = alt.Chart(rows).transform_filter(chosen).transform_filter(start)
    picture = here.mark_image(width=192, height=192).encode(url="picture:N", x=alt.value(100), y=alt.value(100))
    label = here.mark_text(fontSize=15).encode(text="label:N", x=alt.value(100), y=alt.value(215))
    left = alt.layer(line, points.add_params(start)).properties(width=330, title="guidance magnitude without guidance")
    place = alt.Y("place:Q", title="captured (0) ... unguided (1)", scale=alt.Scale(domain=[-0.5, 1.5], clamp=True))
    way = alt.Chart(ways).transform_filter(chosen).encode(x, place)
    own = way.transform_filter(start).mark_line(strokeWidth=3).encode(color=colour)
    right = alt.layer(way.mark_line(color="lightgray").encode(detail="start:N"), own).properties(width=270)
    chart = alt.hconcat(left, alt.layer(picture, label).properties(width=200), right).add_params(*choices)
    chart = chart.configure_view(stroke=None, continuousHeight=220)
    page = html.escape(chart.to_html(inline=True, embed_options={"renderer": "svg"}))
    frame = 'width="100%" height="420" style="border: 0" title="the start of guidance, to be dragged"'
    return HTML(f'<div><iframe srcdoc="{page}" {frame}></iframe></div>')
