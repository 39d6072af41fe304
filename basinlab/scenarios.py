"""Scenarios: what is sampled, with which prompts, and how it is judged. One yaml file each, in data/scenarios.

What a file does not say is left out of the tables. Its relative paths start at its own folder.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor

from . import metrics
from .basin import estimate_attractor
from .forks import Sweep
from .models import Denoiser, data_folder, load, read_pictures
from .sampling import Trajectory

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif"}


def read_list(path: Path, format: str = "csv") -> pd.DataFrame:
    """The prompts in ``path``, a row each.

    "csv" has a column prompt, the bundled ones more; "wen" JSON lines with caption, url and index; "lines" one prompt a
    line; "pairs" is a folder of texts; "dcr" a JSON object, image's path -> its captions (the first is used).
    """
    if format == "csv":
        table = pd.read_csv(path, keep_default_na=False)
        for column in {"attractor", "swapped"} & {*table.columns}:
            table[column] = [str(path.parent / picture) for picture in table[column]]
        return table
    if format == "pairs":
        return pd.DataFrame([{"prompt": p.read_text().strip(), "index": p.stem} for p in sorted(path.glob("*.txt"))])
    text = path.read_text("utf-8-sig")
    if format == "dcr":
        return pd.DataFrame([{"prompt": c[0], "index": Path(p).stem} for p, c in json.loads(text).items()])
    lines = text.removesuffix("\n").split("\n")  # captions hold other separators of lines
    if format == "wen":
        return pd.DataFrame(map(json.loads, lines)).rename(columns={"caption": "prompt"})
    if format == "lines":
        return pd.DataFrame({"prompt": lines})
    raise ValueError(f"no prompt format {format!r}")


@dataclass(frozen=True)
class Scenario:
    """One scenario, as its file has it; `read` makes it."""

    name: str
    title: str
    source: str
    model: str  # as `models.load` takes it, like unet and resolution
    prompts: dict  # group -> file, format (of `read_list`) and url of a list, or texts (name -> prompt)
    static_transition_point: int
    guidance_scale: float = 7.5
    opposite_scale: float = 2.0
    opposite_until: int | None = None  # None: until the static transition point
    unet: str | None = None
    resolution: int | None = None
    references: str | None = None  # pattern of a prompt's images, with its {index} or {row}; None: a column attractor
    copy: str = "sscd"  # name of the `metrics.CopyDistance`
    second_copy: str | None = None  # another, whose similarity stands beside in the column sscd
    radius: float = 0.5  # up to which a sample is a copy; the field's similarity of 0.5 (Somepalli et al., CVPR 2023)
    layout_floor: float | None = None  # layout similarity from which a template is copied
    alignment: str = "openai/clip-vit-large-patch14"  # name of the `metrics.Alignment`
    weights_url: str = ""
    reason: str = ""
    here: Path = field(default_factory=data_folder, repr=False)  # folder of the file

    def load(self, **options) -> Denoiser:
        """The denoiser, with ``options`` of `models.load`."""
        model = str(self.here / self.model) if self.model.startswith(".") else self.model
        try:
            return load(model, unet=self.unet and self.here / self.unet, resolution=self.resolution, **options)
        except (ValueError, OSError) as error:
            where = f" (weights of {self.name}: {self.weights_url})" if self.weights_url else ""
            raise (OSError if isinstance(error, OSError) else ValueError)(f"{error}{where}") from error

    def table(self, group: str = "memorized") -> pd.DataFrame:
        """The prompts of ``group``, a row each, or a row for each reference image, with what the list says of them."""
        listed = self.prompts[group]
        if "texts" in listed:
            table = pd.DataFrame(listed["texts"].items(), columns=["index", "prompt"])
        else:
            path = self.here / listed["file"]
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing: fetch it from {listed.get('url')} and put it there")
            table = read_list(path, listed.get("format", "csv"))
        if self.references and group == "memorized":
            names = table.get("index", pd.Series(range(len(table))))
            patterns = [self.references.format(index=escape(str(name)), row=row) for row, name in enumerate(names)]
            found = [sorted(p for p in self.here.glob(q) if p.suffix.lower() in PICTURES) for q in patterns]
            table = table.assign(attractor=[[*map(str, f)] for f in found]).explode("attractor", ignore_index=True)
        return table


def names() -> list[str]:
    """The scenarios that come with the package."""
    return sorted(path.stem for path in data_folder().glob("scenarios/*.yaml"))


def read(name: str | Path) -> Scenario:
    """The scenario called ``name``, one of `names`, or the one in the YAML file ``name``."""
    path = Path(name) if str(name).endswith(".yaml") else data_folder() / "scenarios" / f"{name}.yaml"
    if not path.exists():
        raise ValueError(f"no scenario {str(name)!r}: give one of {names()}, or a .yaml file")
    return Scenario(name=path.stem, here=path.parent, **yaml.safe_load(path.read_text()))


def _nearest(features: Tensor, known: dict[str, Tensor], prompts: pd.Series) -> list[float]:
    """Distance of each image's ``features`` to the nearest of those ``known`` of its prompt; NaN without any."""
    unknown = torch.full_like(features[:1], torch.nan)
    return [float((1 - known.get(p, unknown) @ f).min()) for p, f in zip(prompts, features, strict=True)]


class Judges:
    """The models that look at a scenario's images: a run or a sweep becomes one table, a row a sample.

    ``distance``, ``second`` and ``alignment`` are None where their weights are missing, as ``notices`` say. Descriptors
    are ``references``, [K, F] of the K images learned with each prompt, and ``learned``, [N, F] of all memorized ones.
    """

    def __init__(self, scenario: Scenario, device: str | torch.device = "cpu"):
        self.scenario, self.notices, self.references, self.learned = scenario, [], {}, None
        self._seen = hashlib.sha256()  # of the reference images
        self._files, self._second_references = {}, {}
        self.distance = self._made(metrics.CopyDistance, scenario.copy, device)
        self.second = None
        with suppress(FileNotFoundError):  # an optional package
            self.second = scenario.second_copy and metrics.CopyDistance(scenario.second_copy)
        self.alignment = self._made(metrics.Alignment, scenario.alignment, device)
        tables = {group: x for group in scenario.prompts if (x := self._made(scenario.table, group)) is not None}
        self.objects = sorted({name for table in tables.values() for name in table.get("object", [])})
        for group, table in tables.items():
            if self.distance and "attractor" in table:
                known = table.dropna(subset="attractor").groupby("prompt", sort=False)["attractor"].agg(list)
                self._files |= known.to_dict()
                for prompt, paths in known.items():
                    self._learn(prompt, [read_pictures([path]) for path in paths])  # of all sizes
                if group == "memorized" and len(known):
                    self.learned = torch.cat([self.references[prompt] for prompt in known.index])

    def _made(self, make, *given):
        """What ``make(*given)`` gives; None, and a notice, where a file is missing."""
        try:
            return make(*given)
        except FileNotFoundError as missing:
            self.notices.append(f"{make.__name__} {given[0]}: {missing}")

    def _learn(self, prompt: str, pictures: list[Tensor]) -> None:
        self.references[prompt] = torch.cat([self.distance.features(picture) for picture in pictures])
        pixels = [(picture * 255).round().byte().numpy().tobytes() for picture in pictures]
        self._seen.update(prompt.encode() + b"".join(pixels))

    def settings(self) -> dict:
        """What a table depends on beside the run, for the digest of kept tables."""
        judges = {"distance": self.distance, "second": self.second, "alignment": self.alignment}
        known = {"references": self._seen.hexdigest()[:16], "objects": self.objects}
        limits = {"radius": self.scenario.radius, "layout_floor": self.scenario.layout_floor}
        return {name: judge and judge.weights for name, judge in judges.items()} | known | limits

    def estimate(self, run: Trajectory) -> None:
        """Take the attractor that ``run``, under CFG from T, shows for each prompt without a reference."""
        for prompt in dict.fromkeys(run.prompts):
            if prompt not in self.references:
                pictures = run.of(prompt).images()
                self._learn(prompt, [pictures[estimate_attractor(pictures, self.distance)[0]][None]])

    def __call__(self, run: Trajectory | Sweep, prompts: pd.DataFrame) -> pd.DataFrame:
        """One row a sample of ``run``, of a sweep a sample and start: what became of it, and what it took.

        Columns: those of ``prompts`` and ``run.table()``; distance to the nearest image learned with the prompt,
        nearest, to that learned with any, and diversity between a prompt's samples (NaN where unknown); copied (NA
        where unknown): within the radius, a template by its layout, a prompt of a list without attractors by nearest;
        clip, the image's features [F], clip_score, saturated, sharpness; where known object_right, new_and_right,
        layout, sscd (similarity by the second judge to the nearest image learned with the prompt).
        """
        pictures = run.images().flatten(0, -4)
        table = run.table().merge(prompts.drop_duplicates("prompt"), on="prompt", how="left", validate="m:1")
        table["saturated"], table["sharpness"] = metrics.saturated_share(pictures), metrics.sharpness(pictures)
        self._copies(table, pictures)
        if self.alignment:
            clip = self.alignment.features(pictures)
            table["clip"] = list(clip.half().numpy())
            table["clip_score"] = (clip * self.alignment.text_features(table["prompt"])).sum(dim=1)
            if "object" in table:
                table["object_right"] = table["object"] == self.alignment.classify(clip, self.objects)
                table["new_and_right"] = (table["object_right"] & ~table["copied"]).mask(table["copied"].isna())
        return table.drop(columns=["attractor", "swapped"], errors="ignore")

    def _copies(self, table: pd.DataFrame, pictures: Tensor) -> None:
        table[["distance", "nearest", "diversity"]] = np.nan
        if self.distance:
            features = self.distance.features(pictures)
            table["distance"] = _nearest(features, self.references, table["prompt"])
            if self.learned is not None:
                table["nearest"] = (1 - features @ self.learned.T).amin(dim=1)
            for rows in table.groupby([name for name in ("prompt", "start") if name in table]).indices.values():
                table.loc[rows, "diversity"] = float(metrics.diversity(features[rows]))
        if self.second:
            known = self._second_references
            for prompt in {*table["prompt"]} & self._files.keys() - known.keys():
                known[prompt] = torch.cat([self.second.features(read_pictures([file])) for file in self._files[prompt]])
            table["sscd"] = 1 - np.array(_nearest(self.second.features(pictures), known, table["prompt"]))
        judged = table["distance"] if "attractor" in table else table["distance"].fillna(table["nearest"])
        copied = (judged <= self.scenario.radius).astype("boolean").mask(judged.isna())
        if self.scenario.layout_floor is not None and "left" in table:
            boxes = [*table[["left", "top", "size"]].itertuples(index=False, name=None)]
            table["layout"] = metrics.layout_similarity(pictures, read_pictures(table["attractor"]), boxes)
            copied = copied.mask(table["kind"] == "template", table["layout"] > self.scenario.layout_floor)
        table["copied"] = copied if copied.isna().any() else copied.astype(bool)


def unseen_scenes() -> tuple[Tensor, list[str]]:
    """The bundled scenes that no training saw: images [B, 3, height, width] and the names of their objects."""
    table = pd.read_csv(data_folder() / "unseen" / "metadata.csv")
    return read_pictures([data_folder() / "unseen" / name for name in table["file_name"]]), table["object"].tolist()
