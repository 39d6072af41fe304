"""The comparison's samples as tables: measures with intervals, trade-offs, combinations, the paper's claims."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .. import metrics
from ..basin import mean_interval, quantile_interval
from .comparison import MAIN, OWN
from .scorecard import real_scenes

MEASURES = {  # name -> whether more of it is better, on memorized prompts
    "copied": False,
    "similarity": False,
    "similarity_95": False,
    "lpips": True,
    "object_right": True,
    "clip_score": True,
    "new_and_right": True,
    "cmmd": False,
    "diversity": True,
    "saturated": False,
}


def summary(table: pd.DataFrame, by=("scenario", "group", "strategy")) -> pd.DataFrame:
    """One row a scenario, group, strategy and measure: value, low, high (95%), n samples, prompts, and ``best``.

    Intervals are percentile bootstraps over prompts, a Wilson interval where every sample agrees,
    and for CMMD a jackknife over prompts. ``best`` is "best", "tied" where the interval overlaps
    that of the best, or "". Cost (calls, gradient_passes, seconds) is relative to CFG's calls and seconds.
    """
    table = table.astype({"copied": bool}).assign(
        similarity=1 - table["distance"].fillna(table["nearest"]),
        new_and_right=table["object_right"] & ~table["copied"].astype(bool),
    )
    reference = metrics.Alignment().picture_features(real_scenes()[0])
    rows = [
        dict(zip(by, key, strict=True)) | row
        for key, part in table.groupby(list(by), sort=False)
        for row in _measured(part, reference)
    ]
    return _marked(pd.DataFrame(rows), [name for name in by if name != "strategy"])


def _measured(part: pd.DataFrame, reference: torch.Tensor):
    """The measures of one strategy on one group of prompts."""
    count = {"n": len(part), "prompts": part["prompt"].nunique()}
    for name in MEASURES:
        if name in ("lpips", "diversity") and (name not in part or part[name].isna().all()):
            continue  # no weights for it, or one seed only
        if name == "cmmd":
            features = torch.from_numpy(np.stack(part["clip"]).astype(np.float32))
            prompts = part["prompt"].tolist()
            value = float(metrics.cmmd(features, reference, groups=prompts))
            low, high = metrics.mmd_interval(features, prompts, reference)
        elif name == "similarity_95":
            value, low, high = quantile_interval([rows.to_numpy() for _, rows in part.groupby("prompt")["similarity"]])
        else:
            value, low, high = mean_interval(part, name)
        yield {"measure": name, "value": value, "low": float(low), "high": float(high), **count}
    for name in ("calls", "gradient_passes", "seconds"):
        value = part[name].mean()
        yield {"measure": name, "value": value, "low": value, "high": value, **count}


def _marked(rows: pd.DataFrame, within: list[str]) -> pd.DataFrame:
    """With costs relative to CFG, and the best of each measure marked."""
    for _, part in rows.groupby([*within, "measure"]):
        name, cfg = part["measure"].iloc[0], part.loc[part["strategy"] == "CFG", "value"]
        if name in ("calls", "seconds") and len(cfg):
            rows.loc[part.index, ["value", "low", "high"]] /= cfg.iloc[0]
        if name in MEASURES:
            top = part.loc[part["value"].idxmax() if MEASURES[name] else part["value"].idxmin()]
            tied = (part["low"] <= top["high"]) & (part["high"] >= top["low"])
            rows.loc[part.index, "best"] = np.where(part.index == top.name, "best", np.where(tied, "tied", ""))
    return rows.fillna({"best": ""})


def trade_off(table: pd.DataFrame) -> pd.DataFrame:
    """Of samples at every setting: method, setting, n, and means with intervals (_low, _high).

    Of copied, object_right, similarity to the learned picture and clip_score.
    """
    found, table = [], table.astype({"copied": bool}).assign(similarity=1 - table["distance"])
    for name, part in table.groupby("strategy", sort=False):
        method, setting = name.rsplit(" #", 1)
        row = {"method": method, "setting": int(setting), "n": len(part)}
        for column in ("copied", "object_right", "similarity", "clip_score"):
            row |= dict(zip((column, f"{column}_low", f"{column}_high"), mean_interval(part, column), strict=True))
        found.append(row)
    return pd.DataFrame(found)


def at_settings(table: pd.DataFrame, chosen: Mapping[str, int]) -> pd.DataFrame:
    """Those rows of samples at every setting that are at the chosen ones, called by the method."""
    names = {f"{method} #{setting}": method for method, setting in chosen.items()}
    return table[table["strategy"].isin(names)].assign(strategy=lambda rows: rows["strategy"].map(names))


def pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Share new and right of each prior method, alone (``other`` is "CFG") and combined, with low and high."""
    rows = summary(table).query("measure == 'new_and_right'")
    split = [[*name.split(" + ", 1), "CFG"][:2] for name in rows["strategy"]]
    return rows[["value", "low", "high", "n"]].assign(prior=[p for p, _ in split], other=[o for _, o in split])


LABELS = {
    "copied": "copied",
    "similarity": "copy similarity",
    "similarity_95": "its 95th percentile",
    "lpips": "LPIPS",
    "object_right": "object right",
    "clip_score": "CLIP score",
    "new_and_right": "new and right",
    "cmmd": "CMMD",
    "diversity": "diversity",
    "saturated": "saturated",
    "calls": "predictions, times CFG's",
    "gradient_passes": "gradient passes",
    "seconds": "seconds, times CFG's",
}


def wide(rows: pd.DataFrame, measures: Sequence[str] = tuple(LABELS)) -> pd.DataFrame:
    """One line a strategy, one column a measure, "value [low, high]"; ** the best, * tied with it."""
    stars = rows["best"].map({"best": "**", "tied": "*", "": ""})
    bare = rows["low"] == rows["high"]
    text = [
        f"{v:.2f}" if b else f"{v:.2f} [{lo:.2f}, {hi:.2f}]"
        for v, lo, hi, b in zip(rows["value"], rows["low"], rows["high"], bare, strict=True)
    ]
    shown = rows.assign(text=pd.Series(text, rows.index) + stars)
    table = shown.pivot(index="strategy", columns="measure", values="text").reindex(rows["strategy"].unique())
    return table[[m for m in measures if m in table]].rename(columns=LABELS)


def export(rows: pd.DataFrame, path: str | Path) -> list[Path]:
    """Write a summary as PATH.csv (one row a measure), PATH.md and PATH.tex (a table a scenario and group)."""
    sheet, page, paper = files = [Path(f"{path}{suffix}") for suffix in (".csv", ".md", ".tex")]
    rows.to_csv(sheet, index=False, float_format="%.5g")
    parts = {
        f"{scenario}, {group}": wide(part)
        for (scenario, group), part in rows.groupby(["scenario", "group"], sort=False)
    }
    page.write_text("\n".join(f"## {name}\n\n{table.to_markdown()}\n" for name, table in parts.items()))
    paper.write_text("\n".join(table.to_latex(caption=name, escape=True) for name, table in parts.items()))
    return files


def claims(rows: pd.DataFrame) -> pd.DataFrame:
    """The paper's claims about its strategies, held against a summary: claim, here (the numbers), shown (yes or NO)."""
    at = rows.set_index(["scenario", "group", "strategy", "measure"]).sort_index()
    memorized = [(s, "memorized") for s in dict.fromkeys(rows["scenario"])]
    found = []

    def claim(text: str, measure: str, groups, holds, names=OWN) -> None:
        verdicts, numbers = [], []
        for scenario, group in groups:
            cfg = at.loc[(scenario, group, "CFG", measure)]
            for name in names:
                own = at.loc[(scenario, group, name, measure)]
                verdicts.append(bool(holds(own, cfg)))
                numbers.append(f"{name} {own['value']:.3f} [{own['low']:.2f}, {own['high']:.2f}]")
            numbers[-len(names)] = f"{scenario}, CFG {cfg['value']:.2f}: {numbers[-len(names)]}"
        shown = "yes" if all(verdicts) else f"NO ({sum(verdicts)} of {len(verdicts)})"
        found.append({"claim": text, "here": "; ".join(numbers), "shown": shown})

    main = memorized[:1]
    claim("memorization is gone: at most 5% copies", "copied", main, lambda own, cfg: own["value"] <= 0.05)
    claim("it is less, beyond doubt", "copied", main, lambda own, cfg: own["high"] < cfg["low"])
    claim(
        "alignment is kept: objects as right as under CFG",
        "object_right",
        main,
        lambda own, cfg: own["high"] >= cfg["low"],
    )
    claim("quality is kept: CMMD no worse than CFG's", "cmmd", main, lambda own, cfg: own["low"] <= cfg["high"])
    claim("no extra predictions", "calls", main, lambda own, cfg: own["value"] <= 1)
    claim(
        "ordinary prompts lose nothing: objects as right",
        "object_right",
        [(MAIN, "ordinary")],
        lambda own, cfg: own["high"] >= cfg["low"],
    )
    claim(
        "it holds in every scenario: fewer copies, beyond doubt",
        "copied",
        memorized,
        lambda own, cfg: own["high"] < cfg["low"],
    )
    return pd.DataFrame(found)
