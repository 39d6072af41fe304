"""The paper's scenarios as data: data/scenarios/NAME.yaml -> a checked ``Scenario`` and its tables of prompts.

Every relative path in such a file is meant from the file's own folder. The prompt lists and weights of
others are not bundled: a file says where they come from, and reading a missing one says where to put it.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pandas as pd
import yaml
from jsonschema import Draft202012Validator

from ..models import Denoiser, data_folder, load, read_scenario
from . import downloads
from .prompt_lists import FILE_NAME, FORMATS, read_list, read_text

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".JPEG", ".JPG", ".PNG")


@dataclass(frozen=True)
class PromptList:
    """Where the prompts of one group are: a ``file`` (or folder) of ``format`` from ``url``, or ``texts``."""

    file: Path | None = None
    format: str = ""
    url: str = ""
    texts: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Scenario:
    """One scenario: what is sampled, with which prompts and settings, and what judges it. `read` makes it.

    ``model``, ``unet`` and ``resolution`` are as `models.load` takes them; ``weights_url`` is where they can
    be had. ``guidance_scale`` may be None, ``scale`` is not. ``static_transition_point`` and
    ``opposite_until`` are timesteps. ``references`` says where reference pictures come from: "table" (the
    prompt table's column attractor), "url" (its column url), or a folder that has, for every ``index`` of
    the table, a picture of that name or a folder of pictures, to be had at ``references_url``.
    """

    path: Path
    name: str
    title: str
    source: str
    model: str
    unet: Path | None
    weights_url: str
    resolution: int | None
    guidance_scale: float | None
    steps: int
    static_transition_point: int
    opposite_scale: float
    opposite_until: int
    prompts: Mapping[str, PromptList]
    references: str | Path
    references_url: str
    metrics: Mapping[str, str | list[str]]

    @property
    def scale(self) -> float:
        """The guidance scale: the scenario's own, or the bundled checkpoint's."""
        return self.guidance_scale or read_scenario(self.model)["guidance_scale"]

    def load(self, **options) -> Denoiser:
        """The denoiser; ``options`` and errors as of `models.load`, with where the weights can be had."""
        try:
            return load(self.model, unet=self.unet, resolution=self.resolution, **options)
        except (ValueError, OSError) as error:
            if not self.weights_url:
                raise
            raise type(error)(f"{error}; scenario {self.name} has its weights from {self.weights_url}") from error

    def table(self, group: str = "memorized") -> pd.DataFrame:
        """The prompts of ``group``, one row a prompt and reference picture: prompt, and where known url, index,
        kind and attractor (the picture's path).

        Raises ValueError for no such group or a malformed list, naming file and line, and FileNotFoundError
        for a list or pictures that are not there, saying where they can be had and where to put them.
        """
        if group not in self.prompts:
            raise ValueError(f"{self.path} has no prompts.{group}: give one of {sorted(self.prompts)}")
        prompts = self.prompts[group]
        if prompts.texts is not None:
            table = pd.DataFrame({"prompt": prompts.texts.values(), "index": prompts.texts.keys()})
        elif not prompts.file.exists():
            raise FileNotFoundError(f"{prompts.file} is missing: fetch it from {prompts.url} and put it there")
        else:
            table = read_list(prompts.file, prompts.format)
        if isinstance(self.references, Path) and group == "memorized":
            table["attractor"] = [_pictures_of(index, self) for index in table["index"]]
            table = table.explode("attractor", ignore_index=True)
        return table


def _pictures_of(index: str, scenario: Scenario) -> list[str]:
    """The reference pictures called ``index`` in the scenario's folder, in the order of their names."""
    folder = scenario.references
    within = folder / index
    found = within.iterdir() if within.is_dir() else (folder / f"{index}{suffix}" for suffix in _PICTURES)
    pictures = sorted(str(path) for path in found if path.suffix in _PICTURES and path.is_file())
    if not pictures:
        source = f", from {scenario.references_url}" if scenario.references_url else ""
        raise FileNotFoundError(
            f"{folder} has no picture {index}.* and no folder {index} of pictures: "
            f"put the reference pictures of {scenario.name} there{source}"
        )
    return pictures


def fetch_references(scenario: Scenario, group: str = "memorized", folder: str | Path | None = None, **options):
    """Fetch the pictures that the prompt list's urls name into ``folder``, by default build/references/NAME.

    Returns the table of ``group`` with status, reason and attractor, the path of the picture or "" where there
    is none. ``options`` and resuming as of `downloads.fetch`. Raises ValueError when the list has no urls.
    """
    table = scenario.table(group)
    if "url" not in table:
        raise ValueError(
            f"the prompts of {scenario.name}, {group}, come without urls: their references are not fetched"
        )
    folder = Path(folder or Path("build/references") / scenario.name)
    record = downloads.fetch(table["url"].tolist(), folder, **options)
    table = table.merge(record[["url", "file", "status", "reason"]], on="url", how="left")
    table["attractor"] = [str(folder / file) if file else "" for file in table.pop("file")]
    return table


def _one_of(values: list[str], **more) -> dict:
    return {"enum": values, "description": f"one of {values}", **more}


def _number(kind: str, low: float, high: float, words: str) -> dict:
    return {"type": kind, "minimum": low, "maximum": high, "description": f"{words} from {low} to {high}"}


def _some_of(values: list[str]) -> dict:
    few = {"items": _one_of(values), "uniqueItems": True, "minItems": 1}
    return {"type": "array", **few, "description": f"a list of {values}"}


def _mapping(required: list[str], words: str = "", **properties: dict) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
        "description": words or f"a mapping of {sorted(properties)}",
    }


_TEXT = {"type": "string", "pattern": r"\S", "maxLength": 2000, "description": "a text that is not empty"}
_URL = {"type": "string", "pattern": r"^https?://[^\s/]+", "description": "an address with http:// or https://"}
_LIST = _mapping(
    [],
    "file, format and url of a list, or texts",
    file=_TEXT,
    format=_one_of(list(FORMATS)),
    url=_URL,
    texts={
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"type": "string", "pattern": f"^{FILE_NAME}$", "description": "a name without slashes"},
        "additionalProperties": _TEXT,
        "description": "a mapping of names to prompts",
    },
)
SCHEMA = _mapping(  # JSON Schema 2020-12; a description says what is allowed, for the errors
    ["title", "source", "model", "static_transition_point", "prompts", "references", "metrics"],
    title=_TEXT,
    source=_TEXT,
    model=_TEXT,
    unet=_TEXT,
    weights_url=_URL,
    resolution=_number("integer", 8, 4096, "pixels, a whole number"),
    guidance_scale=_number("number", 0.1, 100, "a number"),
    steps=_number("integer", 1, 1000, "a whole number"),
    static_transition_point=_number("integer", 1, 999, "a timestep, a whole number"),
    opposite_scale=_number("number", 0, 100, "a number"),
    opposite_until=_number("integer", 1, 999, "a timestep, a whole number"),
    prompts=_mapping(["memorized"], memorized=_LIST, ordinary=_LIST),
    references=_mapping(["from"], **{"from": _one_of(["table", "url", "folder"]), "folder": _TEXT, "url": _URL}),
    metrics=_mapping(
        ["copy", "alignment", "quality"],
        copy=_some_of(["descriptor", "sscd", "lpips"]),
        alignment={
            "type": "string",
            "pattern": r"^(clip|openai/clip-[\w.-]+)$",
            "description": "clip, the bundled one, or a hub id such as openai/clip-vit-large-patch14",
        },
        quality=_some_of(["cmmd", "kid", "fid"]),
    ),
)


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error."""

    def construct_mapping(self, node, deep=False):
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in counts.items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _document(path: Path):
    """What is in a YAML file of 100 kB at most, without aliases, tags or deep nesting."""
    if path.stat().st_size > 100_000:
        raise ValueError(f"{path} has more than 100 kB: it is no scenario")
    text, depth = read_text(path), 0
    try:
        for event in yaml.parse(text):  # before anything is built
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            long = len(getattr(event, "value", "")) > 2000  # also numbers, which may grow too long to print
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) or long or depth > 10:
                line = event.start_mark.line + 1
                raise ValueError(f"line {line}: aliases, tags, deep nesting and 2000 letters at once are not read")
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two of dates and numbers that are none
        raise ValueError(f"{path} is no YAML of a scenario: {error}") from error


def _problem(path: Path, error) -> str:
    """What is wrong, at which key, and what is allowed there."""
    place = ".".join(str(step) for step in error.absolute_path)
    within = f"{place}." if place else ""
    if error.validator == "additionalProperties":
        unknown = sorted(repr(key) for key in error.instance if key not in error.schema["properties"])
        return f"{path}: unknown key {within}{', '.join(unknown)}: the keys are {sorted(error.schema['properties'])}"
    if error.validator == "required":
        given, allowed = error.instance, error.schema["properties"]
        missing = [
            f"{within}{key} is missing: give {allowed[key]['description']}"
            for key in error.validator_value
            if key not in given
        ]
        return "\n".join(f"{path}: {words}" for words in missing)
    return f"{path}: {place or 'the file'} is {error.instance!r:.80}: give {error.schema['description']}"


def names() -> list[str]:
    """The scenarios that come with the package."""
    return sorted(path.stem for path in data_folder().glob("scenarios/*.yaml"))


def read(name: str | Path) -> Scenario:
    """The scenario called ``name``, one of `names`, or in the YAML file ``name``.

    Raises ValueError that names the file, the key and what is allowed there.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else data_folder() / "scenarios" / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"no scenario {str(name)!r}: give one of {names()}, or a .yaml file")
    found = _document(path)
    errors = sorted(Draft202012Validator(SCHEMA).iter_errors(found), key=lambda error: list(map(str, error.path)))
    if errors:
        raise ValueError("\n".join(dict.fromkeys(_problem(path, error) for error in errors)))
    for key in ("guidance_scale", "opposite_scale"):
        if not math.isfinite(found.get(key, 1)):  # no NaN is less than the minimum
            raise ValueError(f"{path}: {key} is {found[key]}: give {SCHEMA['properties'][key]['description']}")
    for key in ("resolution", "steps", "static_transition_point", "opposite_until"):
        if key in found:
            found[key] = int(found[key])  # to the schema, 50.0 is whole too
    here, references = path.parent, found["references"]
    lists = {group: _list(path, f"prompts.{group}", given) for group, given in found["prompts"].items()}
    if (references["from"] == "folder") != ("folder" in references):
        raise ValueError(f"{path}: references.folder goes with references.from folder, and with no other")
    found["prompts"] = MappingProxyType(lists)
    found["references"] = here / references["folder"] if "folder" in references else references["from"]
    found["references_url"] = references.get("url", "")
    found["metrics"] = MappingProxyType(found["metrics"])
    if found["model"].startswith(("./", "../")):
        found["model"] = str(here / found["model"])
    found["unet"] = here / found["unet"] if "unet" in found else None
    point = found["static_transition_point"]
    usual = {"weights_url": "", "resolution": None, "guidance_scale": None, "steps": 50}
    return Scenario(path, path.stem, **usual | {"opposite_scale": 2.0, "opposite_until": point} | found)


def _list(path: Path, key: str, given: dict) -> PromptList:
    """The list that ``given`` means: a file with its format, or texts."""
    if ("texts" in given) == ("file" in given) or ("file" in given) != ("format" in given):
        raise ValueError(f"{path}: {key} has {sorted(given)}: give file, format and url, or texts")
    if "file" in given and "url" not in given and given["format"] != "basinlab":
        raise ValueError(f"{path}: {key}.url is missing: give {_URL['description']}")
    return PromptList(**given | ({"file": path.parent / given["file"]} if "file" in given else {}))
