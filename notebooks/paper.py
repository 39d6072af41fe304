"""Write notebooks/paper.md, the paper figure by figure, from figures/: ``python notebooks/paper.py``.

Which of our pictures belongs to which of the paper's is in figures/manifest.json (keys ``paper`` and ``section``), and
our numbers are in the tables beside the pictures. ``make figures PROFILE=paper`` calls it at the end.
"""

import json
import os
import re
from collections.abc import Callable
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
OUT = Path(os.environ.get("BASINLAB_OUT") or HERE.parent)
FIGURES = OUT / "figures"
HEAD = """# The paper, figure by figure

Jain et al., *Classifier-Free Guidance inside the Attraction Basin May Cause Memorization*, CVPR 2025
([arXiv 2411.16738](https://arxiv.org/abs/2411.16738)). The paper says: guidance inside the attraction basin makes the
copy; a trajectory leaves the basin at some time; guidance that starts then gives a new picture with the caption's
object.

The table has a row for each of its figures and tables: the paper's number, where we reproduce it, our number with its
95% interval, and a verdict. A goal was set before looking. **yes**: the whole interval meets the goal. **no**: the
whole interval misses it. **undecided**: the goal lies inside the interval (in Tables 1 to 3: the interval overlaps
CFG's). If a row has several numbers, its verdict is that of the worst. The paper's numbers are of Stable Diffusion,
ours of a small model for which we know what was memorized: compare what happens, not the units. `notebooks/paper.py`
makes this page from the tables in `figures/`.

Words of the table:

* *t* runs from *T* = 999 (noise) to 0 (picture). *Sooner* means at a larger *t*.
* The *magnitude* is the norm of the difference between the predictions with and without the caption.
* STP gives no guidance before a fixed *t* (the static point). DTP gives none before the first minimum of the sample's
  own magnitude (the dynamic point). OG (opposite guidance) reverses the guidance before that point: OG + STP, OG + DTP.
* The *share* says how often a memorized caption came with its duplicate in training: 0.6, 0.8 or 0.95.
* *Duplicated* is our model with duplicates; *finetuned* and *classes* were fine-tuned without any.

| paper | what is on it, and the paper's number | here | ours | verdict, and why |
|---|---|---|---|---|
"""
BELIEFS = [  # a sentence, what is measured, the table and the beginning of the claim that says how far it holds
    ("Guidance from the first step makes the copy", "share copied", "01_scorecard", "memorized, CFG from T: copied"),
    ("The start of guidance decides: one flip at most", "share of samples", "02_claims", "at most one flip"),
    ("Never guided, the caption is lost", "object right", "02_claims", "too late loses the text"),
    ("Reversed guidance leaves sooner", "timesteps", "01_scorecard", "opposite guidance leaves sooner"),
    ("The magnitude's first minimum is the exit", "within 60 timesteps", "01_scorecard", "... and that point"),
    ("One static point releases every copy", "share copied", "01_scorecard", "memorized, copied: no guidance"),
    (
        "The static point keeps the caption's object",
        "object right",
        "01_scorecard",
        "memorized, object right: no guidance",
    ),
    (
        "Opposite guidance before a static point of its own leaves no copy",
        "share copied",
        "01_scorecard",
        "memorized, copied: opposite",
    ),
    (
        "Opposite guidance before that point keeps the object",
        "object right",
        "01_scorecard",
        "memorized, object right: opposite",
    ),
]
TAIL = """
## What this model cannot say

* It was *built* to have an exit: memorized captions also came with other pictures. In the exact world of notebook 00
  a caption without other pictures has no exit (exercise 2). In the fine-tuned model, where each caption came with one
  picture, some captions have an exit all the same (03, 3.1). So a *yes* shows that the mechanism is possible, not how
  common it is.
* It is one world of one kind of picture, and small.
* Its judges (the descriptor, CLIP) were trained on the same world.
* A small model can refute "this always works". It cannot show that it works, or fails, on Stable Diffusion.
  [Notebook 04](04_stable_diffusion.ipynb) asks that of the published checkpoints.
* The paper's fourth scenario (Stable Diffusion 1.4 with its own memorized prompts) has no table in the paper,
  and none here.
"""


def table(name: str) -> pd.DataFrame:
    """The table ``figures/NAME.csv``."""
    return pd.read_csv(FIGURES / f"{name}.csv")


def told(row, form: str = ".2f") -> str:
    """A row's value with its interval, if it has one, and number of samples."""
    interval = f" [{row['low']:{form}}, {row['high']:{form}}]" if row["low"] < row["high"] else ""
    return f"{row['value']:{form}}{interval}, n = {row['n']:.0f}"


def claim(name: str, start: str, form: str = ".2f", what: str = "") -> tuple[str, str]:
    """What figures/NAME.csv says of the claim whose text begins so, after ``what`` it is; and its verdict."""
    found, section = table(name), {"01": "01, 1.12", "02": "02, 2.8", "03": "03, 3.9"}[name[:2]]
    row = found[[fnmatch(text, f"{start}*") for text in found["claim"]]].iloc[0]
    return f"{what}{told(row, form)} ({section}; goal: {row['goal']})", row["verdict"]


def both(*found: tuple[str, str]) -> tuple[str, str]:
    """Several findings as one, whose verdict is the worst of theirs."""
    worst = next(word for word in ("no", "undecided", "yes") if word in [verdict for _, verdict in found])
    return "; ".join(text for text, _ in found), worst


def basin_narrows() -> tuple[str, str]:
    half = table("01_basin_measured").sort_values("t", ascending=False)
    first, last = half.iloc[0], half.iloc[-1]
    begin = f"{first['value']:.2f}" if first["value"] < 9 else "more than 1"
    text = "the basin's width, in units of the distance between the guided and the unguided trajectory: "
    text += f"{begin} at t = {first['t']:.0f}; at t = {last['t']:.0f}: {told(last)} (01, 1.6; goal: more than 1, at "
    text += "the end less)"
    return text, "yes" if first["low"] > 1 > last["high"] else "undecided"


def flip(letter: str, before: str) -> tuple[float, float] | None:
    """The start of the last copy and of the first new picture of one of the three captions, where it flips once."""
    rows = table(f"02_story_{letter}").query("before == @before")
    last, first = rows.loc[rows["copied"], "start"].min(), rows.loc[~rows["copied"], "start"].max()
    return (last, first) if last > first else None


def flips(before: str, sooner: str = "") -> tuple[str, str]:
    found = [flip(letter, before) for letter in "abc"]
    word = "yes" if all(found) else "undecided" if any(found) else "no"
    parts = ["{:.0f} / {:.0f}".format(*pair) if pair else "no flip" for pair in found]
    text = "last copy / first new picture in three captions, of shares 0.6, 0.8 and 0.95: "
    return f"{text}{', '.join(parts)}{sooner} (goal: each flips)", word


def pushed() -> tuple[str, str]:
    sides = [[flip(letter, before) for before in BEFORE] for letter in "abc"]
    gained = ", ".join(f"{opposite[0] - plain[0]:.0f}" for plain, opposite in sides if plain and opposite)
    found = flips(BEFORE[1], f", which is {gained} timesteps sooner than at Fig. 2" if gained else "")
    what = "median over all samples that flip in both: "
    return both(found, claim("01_scorecard", "opposite guidance leaves sooner", ".0f", what))


def signature() -> tuple[str, str]:
    lines = table("02_magnitude").query("panel == 'no guidance'")
    first = lines[lines["t"] == lines["t"].max()].groupby("name")["value"].median()
    ratio = first["memorized"] / first["ordinary"]
    text = f"medians at T {first['memorized']:.3f} against {first['ordinary']:.3f} (captions without a colour word), "
    text += f"{ratio:.1f} times as much (goal: 4)"
    return both(
        (text, "yes" if ratio >= 4 else "no"),
        claim("01_scorecard", "... and that point", what="its first minimum is within 60 timesteps of the exit in: "),
        claim("01_scorecard", "memorized, share 0.8 and 0.95, unguided", what="it halves within 100 timesteps in: "),
    )


def cliff() -> tuple[str, str]:
    lines = table("03_norms").query("scenario == 'emoji-finetuned' and name == 'difference'")
    lines = lines.sort_values("t", ascending=False).reset_index()
    fall = (lines["value"].cummax() / lines["value"]).max()
    text = f"it rises from {lines['value'].iloc[0]:.2f} at T to {lines['value'].max():.2f}, and falls by at most "
    return f"{text}{1 - 1 / fall:.1%} on the way (goal: by 50%)", "yes" if fall >= 2 else "no"


def released() -> tuple[str, str]:
    """What the static point does to the fine-tuned model."""
    words = ("copied", "object right")
    start = "emoji-finetuned, CFG from [0-9]*"
    return both(*(claim("01_scorecard", f"{start}: {of}", what=f"{of} under STP: ") for of in words))


def lower(scenario: str, methods: list[str], measure: str = "similarity_95") -> tuple[str, str]:
    """Whether ``methods`` copy less than CFG beyond doubt, by the summary of notebook 03."""
    rows = table("03_table").query("scenario == @scenario and group == 'memorized' and measure == @measure")
    rows = rows.set_index("method").loc[["CFG", *methods]]
    cfg, own = rows.loc["CFG"], rows.loc[methods]
    numbers = [f"{name} {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" for name, row in rows.iterrows()]
    verdict = "yes" if (own["high"] < cfg["low"]).all() else "no" if (own["low"] > cfg["high"]).any() else "undecided"
    return f"{', '.join(numbers)}, n = {cfg['n']:.0f} each (goal: intervals below CFG's)", verdict


def cost() -> tuple[str, str]:
    """What a picture takes under the paper's rules, and under what the paper compares its cost with."""
    rules = table("02_claims").set_index("claim").filter(like="no extra cost", axis=0).iloc[0]
    wen = table("03_table").query("scenario == 'emoji-duplicated' and group == 'memorized' and method == 'Wen'")
    wen = wen.set_index("measure")["value"]
    text = f"at most {rules['value']:.0f} predictions for a picture under each of {rules['n']:.0f} rules, CFG among "
    text += f"them (02, 2.8; goal: {rules['goal']}); Wen: {wen['calls']:.2f} times CFG's predictions and "
    text += f"{wen['seconds']:.2f} times its seconds (03, 3.4), {wen['gradient_passes']:.0f} gradient passes "
    text += "(figures/03_table.csv)"
    return text, rules["verdict"]


BEFORE = "no guidance before", "opposite guidance before"  # the panels of 02_story
UNTESTED = "a likely cause, not tested: "
FALLS = "the cause (02, 2.4): in some samples the first minimum comes before the exit; others have none in time, and "
FALLS += "guidance starts inside the basin"
GENTLY = "each memorized caption also came with other pictures, so the prediction changes gently"
COPIES = "if more than 5% of the samples are copies, the 95th percentile falls on a copy"
ONE = UNTESTED + "each caption came with one picture only, so some have no exit before the object is lost (03, 3.1)"
ITEMS: list[tuple[str, str, Callable, str]] = [  # of the paper; what it shows; what we found; why, where it is no yes
    ("Fig. 1", "A drawing: the basin narrows from noise to the memorized picture; no number.", basin_narrows,
     UNTESTED + "few trajectories of one prompt"),
    ("Fig. 2", "One prompt: the last copy at 779, the first new one at 759, where the magnitude falls. (Ours: left.)",
     lambda: flips(BEFORE[0]), "of some shares of duplicates no sample flips"),
    ("Fig. 3", "The same under opposite guidance: 879 / 859, 100 timesteps sooner. (Ours: right.)",
     pushed,
     "pairs that do not flip on both sides are not counted"),
    ("Fig. 4", "Fine-tuned: the difference of the predictions falls from 41 to 22, at t = 500 suddenly to 8. "
     "(Ours: right.)",
     cliff, UNTESTED + "each caption named the object on its picture, so captions matter to the end"),
    ("Fig. 5", "Fine-tuned, five prompts over starts: copies early, new pictures late. (Ours: numbers of "
     "*finetuned*.)",
     released, ONE),
    ("Fig. 6", "Duplicated: each prompt flips at another start; the pictures of the dynamic column are new ones.",
     lambda: both(claim("02_claims", "at most one flip", what="samples with at most one flip: "),
                  claim("02_claims", "DTP: nothing is memorized", what="copied under DTP: ")),
     FALLS),
    ("Fig. 7", "At T the magnitude is 4 to 8 for memorized and 0.3 to 0.5 for ordinary captions; it falls almost "
     "vertically at the exit. Under opposite guidance, in (b), it falls sooner, above t = 900. (Ours: (b) is the "
     "right panel of the first picture. How much sooner the copy ends under opposite guidance stands at Fig. 3.)",
     signature,
     UNTESTED + GENTLY),
    ("Fig. 8", "Fine-tuned, grid: training picture, earlier methods, STP, OG + STP. (Ours: numbers of "
     "*finetuned*, in another test than at Fig. 5, mostly with other captions: so STP has another number, and "
     "another goal.)",
     lambda: both(*(claim("03_claims", f"{rule}, finetuned, memorized: copied", what=f"copied under {rule}: ")
                    for rule in ("STP", "OG + STP"))),
     ONE),
    ("Fig. 9", "Duplicated, grid: DTP and OG + DTP. (Ours: numbers of another test than at Fig. 6, so DTP has another "
     "number.)",
     lambda: both(*(claim("03_claims", f"{rule}, duplicated, memorized: copied", what=f"copied under {rule}: ")
                    for rule in ("DTP", "OG + DTP"))),
     FALLS),
    ("Table 1", "Fine-tuned, 95th percentile of the similarity to the training picture: CFG .6504, STP .2857, "
     "OG + STP .3811. (CLIP score, FID: in 03.)",
     lambda: lower("emoji-finetuned", ["STP", "OG + STP"]), COPIES),
    ("Table 2", "Classes, 95th percentile of the similarity: CFG .3702, CFG from 700 .3018, from 600 .2756.",
     lambda: lower("emoji-classes", ["STP"]),
     "twenty samples are too few"),
    ("Table 3", "Duplicated, 95th percentile of the similarity: CFG .7977, DTP .5885, OG + DTP .6915; mean "
     ".5513, .2866, .2844.",
     lambda: both(*((f"{what}{found}", verdict) for what, of in (("", "similarity_95"), ("mean: ", "similarity"))
                    for found, verdict in [lower("emoji-duplicated", ["DTP", "OG + DTP"], of)])),
     COPIES),
    ("Cost", "No extra cost; 1.26 s an image, 2.86 s with the earlier method of Wen et al.",
     cost, ""),
]  # fmt: skip


def belief(sentence: str, what: str, name: str, start: str) -> str:
    """A line of the paper's claims."""
    found, verdict = found_or_open(lambda: claim(name, start, ".0f" if what == "timesteps" else ".2f"))
    return f"* {sentence}: **{verdict}**; {what} {found}."


def found_or_open(find: Callable) -> tuple[str, str]:
    """What ``find()`` gives, or that its tables are not there."""
    try:
        return find()
    except (FileNotFoundError, KeyError, IndexError, pd.errors.UndefinedVariableError):
        return "not made yet", "open"


@cache
def sections(notebook: Path) -> list[tuple[str, str, list[str]]]:
    """Of each cell of a notebook the number of its section, a link to that, and the cell's tags."""
    found, number, address = [], "", ""
    for cell in json.loads(notebook.read_text())["cells"]:
        for number, title in re.findall(r"^## (\d+\.\d+) (.*)", "".join(cell["source"]), re.MULTILINE):
            name = re.sub(r"[^\w\- ]", "", f"{number} {title}".lower()).replace(" ", "-")  # as the pages name headings
            address = f"[{notebook.name[:2]}, {number}]({notebook.name}#{name})"
        found.append((number, address, cell["metadata"].get("tags", [])))
    return found


def where(holds: Callable[[str, list[str]], bool], notebook: str = "[0-9][0-9]") -> str:
    """A link to the first section with a cell for whose section number and tags ``holds`` is true."""
    every = (cell for path in sorted(HERE.glob(f"{notebook}_*.ipynb")) for cell in sections(path))
    return next((address for number, address, tags in every if holds(number, tags)), "")


def row(item: str, shown: str, find: Callable, why: str, manifest: dict) -> str:
    """A line of the page's table."""
    pictures = {n: e for n, e in manifest.items() if item in e.get("paper", "").split(", ")}
    made = [where(lambda number, _, entry=entry: number == entry["section"], n[:2]) for n, entry in pictures.items()]
    tag = item.lower().replace(" ", "-")  # of what is a table in the notebook and no picture
    places = ", ".join(dict.fromkeys(made)) or where(lambda _, tags: tag in tags)
    drawn = [name for name in pictures if (FIGURES / f"{name}.png").exists()]
    drawn.sort(key=lambda name: (name.startswith("00"), "classes" in name, "error" in name, name))
    thumbnails = " ".join(f"![Our {item}: {name}](../figures/{name}.png)" for name in drawn[:3])
    ours, verdict = found_or_open(find)
    because = f"; {why}" if why and verdict in ("no", "undecided") else ""
    return f"| {item} | {shown} | {places} {thumbnails} | {ours} | **{verdict}**{because} |"


def page() -> str:
    """The text of paper.md, as the tables in figures/ have it."""
    manifest = json.loads((FIGURES / "manifest.json").read_text())
    lines = "\n".join(row(*item, manifest) for item in ITEMS)
    beliefs = "\n".join(belief(*item) for item in BELIEFS)
    return f"{HEAD}{lines}\n\n## The paper's claims, on this model\n\n{beliefs}\n{TAIL}"


def main() -> None:
    path = OUT / "notebooks/paper.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(page(), encoding="utf-8")
    print(f"{len(ITEMS)} figures and tables of the paper in {path}")


if __name__ == "__main__":
    main()
