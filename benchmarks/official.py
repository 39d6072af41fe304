"""Our sampler held against the official scripts, run from a clone of theirs.

    git clone https://github.com/SonyResearch/mitigating_memorization FOLDER
    python benchmarks/official.py FOLDER

Nothing of theirs is in this repository, and nothing is written into the clone. Each script runs in a
process of its own, under a `Shim` that changes what keeps it from starting or ending here, lists every
such change, and watches from outside: the initial latents, the latents after each step, the weight
that each step gave the prompt, the transition point. The same pictures are then made with
`basinlab.sample`. Also timed, in alternating rounds: images a second of either side.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path

import diffusers
import numpy as np
import pandas as pd
import torch
import transformers
from diffusers.guiders import BaseGuidance
from torch import Tensor

import basinlab
from basinlab.models import Denoiser

RESULTS = Path(__file__).parent / "results"
REPOSITORY = "https://github.com/SonyResearch/mitigating_memorization"
STATIC, DYNAMIC, OPPOSITE = (
    "generate_test_dataset_stp.py",
    "generate_test_dataset_dtp.py",
    "generate_test_dataset-opposite_guidance.py",
)
BOUND = 1e-3  # of the final latents, float32
QUICK = ", bfloat16"  # ours in the dtype that this machine may be quick at; the scripts run in float32
SCALE, STEPS, FIRST_SEED = 7.5, 50, 42  # written into the scripts


# What runs in the script's own process


@dataclass
class Pass:
    """One way from noise to clean latents: what was seen at each of its steps.

    ``latents`` has one more entry than there are steps; ``switched`` is the step at which the script
    asked for another number of steps, None where it never did.
    """

    timesteps: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    switched: int | None = None


@dataclass
class Picture:
    """One picture of a script: its noise, its passes, the script's ``transition_point`` where it has one."""

    initial: Tensor
    passes: list[Pass]
    point: float | None
    predictions: int
    finished: float  # seconds, of a clock that all pictures of a run share


@dataclass
class Job:
    """A script to run and how.

    Attributes:
        names: given to the script beside what it defines itself.
        seeds: of the pictures in turn; the first is the script's own.
        record: keep latents and weights, which takes time.
        epsilon: turn the network's v into epsilon, and tell the scheduler.
        keep_steps: a change of the number of steps half way does nothing.
        go_on: ``exit`` does nothing.
    """

    script: str
    arguments: list[str]
    names: dict
    seeds: list[int]
    record: bool = True
    epsilon: bool = False
    keep_steps: bool = False
    go_on: bool = False


@dataclass
class Record:
    """What a run left: how it ended, its pictures, the passes of one that was not finished, the shim's changes."""

    ended: str
    pictures: list[Picture]
    unfinished: list[Pass]
    changes: list[str]

    def save(self, path: Path) -> None:
        torch.save(asdict(self), path)

    @classmethod
    def read(cls, path: Path) -> "Record":
        parts = torch.load(path, weights_only=True)
        pictures = [Picture(**p | {"passes": [Pass(**q) for q in p["passes"]]}) for p in parts["pictures"]]
        return cls(parts["ended"], pictures, [Pass(**p) for p in parts["unfinished"]], parts["changes"])


def _gone(name: str) -> Callable:
    def stand_in(*_, **__):
        raise NotImplementedError(f"{name} is not installed, and the script uses the stand-in for it")

    return stand_in


class _Idle(types.ModuleType):
    """A module whose every function does nothing."""

    def __getattr__(self, name: str) -> Callable:
        return lambda *_, **__: None


class Shim:
    """Runs one script on this machine. ``changes`` lists whatever that took, ``events`` gets a line a switch."""

    def __init__(self, job: Job, events: Path):
        self.job, self.events = job, events
        self.changes = ["basinlab is imported first: it lets a torchvision of another build than torch's import"]
        self.pictures: list[Picture] = []
        self.passes: list[Pass] = []
        self.steps: int | None = None
        self.predictions = 0
        self.noise: list[Tensor] = []
        self.namespace = {"__name__": "__main__", "__file__": job.script, **job.names}

    def run(self) -> Record:
        """The script from beginning to end. What it raises is told in the record's ``ended``."""
        code = self.compiled(Path(self.job.script).read_text())
        self._watch()
        for name, value in self.job.names.items():
            self.changes.append(f"the name {name} is given: {value!r}")
        if self.job.go_on:
            self.changes.append("exit() does nothing")
            self.namespace["exit"] = lambda *_: None
        ended = "ran to its end"
        try:
            exec(code, self.namespace)
        except SystemExit as error:
            ended = f"exit({error.code})"
        except Exception as error:
            ended = f"{type(error).__name__}: {error}".splitlines()[0]
        return Record(ended, self.pictures, self.passes, self.changes)

    def compiled(self, source: str):
        """The script's code, with the device replaced and a stand-in for every import that fails."""
        tree, devices = ast.parse(source), 0
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value == "cuda":
                node.value, devices = "cpu", devices + 1
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    self._provide(alias.name)
            elif isinstance(node, ast.ImportFrom):
                self._provide(node.module, [alias.name for alias in node.names])
        if devices:
            self.changes.append('"cuda" is read as "cpu"')
        return compile(tree, self.job.script, "exec")

    def _provide(self, module: str, names: Sequence[str] = ()) -> None:
        """Make ``from module import names`` work."""
        if module == "matplotlib.pyplot":
            self.changes.append("matplotlib.pyplot draws nothing: its plots are no part of sampling")
            sys.modules[module] = _Idle(module)
            return
        if module not in sys.modules and importlib.util.find_spec(module.split(".")[0]) is None:
            self.changes.append(f"module {module}, not installed: an empty stand-in")
            sys.modules[module] = types.ModuleType(module)
        home = importlib.import_module(module)
        for name in names:
            if hasattr(home, name) or (hasattr(home, "__path__") and importlib.util.find_spec(f"{module}.{name}")):
                continue
            self.changes.append(f"{module}.{name}, gone: a stand-in that fails when it is used")
            setattr(home, name, _gone(f"{module}.{name}"))

    def _watch(self) -> None:
        """Hooks on the parts that a script loads, and on the draws of initial noise."""
        self._when_loaded(diffusers.UNet2DConditionModel, lambda unet: unet.register_forward_hook(self._predicted))
        self._when_loaded(diffusers.DPMSolverMultistepScheduler, self._watch_scheduler)
        self._when_loaded(diffusers.AutoencoderKL, self._watch_decoder)
        draw = torch.randn

        def randn(*shape, **options):
            if not (len(shape) == 1 and len(shape[0]) == 4):
                return draw(*shape, **options)
            if self.noise:
                torch.manual_seed(self.job.seeds[len(self.noise)])
            self.noise.append(draw(*shape, **options))
            return self.noise[-1]

        torch.randn = randn
        self.changes.append(
            f"the generator is seeded anew for each picture but the first (the script seeds once, with {FIRST_SEED})"
        )

    def _when_loaded(self, kind: type, then: Callable) -> None:
        load = kind.from_pretrained

        def from_pretrained(*arguments, **options):
            loaded = load(*arguments, **options)
            then(loaded)
            return loaded

        kind.from_pretrained = from_pretrained

    def _predicted(self, unet, inputs: tuple, output):
        """After each network call: unconditional and conditional prediction are its two rows."""
        latents, self.timestep = inputs[:2]
        self.predictions += len(latents)
        if self.job.epsilon:
            alpha_bar = self.scheduler.alphas_cumprod[int(self.timestep)]
            output = type(output)(sample=alpha_bar.sqrt() * output.sample + (1 - alpha_bar).sqrt() * latents)
        self.both = output.sample
        return output

    def _watch_scheduler(self, scheduler) -> None:
        self.scheduler, step, set_timesteps = scheduler, scheduler.step, scheduler.set_timesteps
        if self.job.epsilon:
            self.changes.append("the network's v is turned into epsilon, and the scheduler told so")
            scheduler.register_to_config(prediction_type="epsilon")
        if self.job.keep_steps:
            self.changes.append("a change of the number of steps half way does nothing")

        def watched_set_timesteps(steps, *arguments, **options):
            self.steps = self.steps or steps
            if steps == self.steps:
                self.passes.append(Pass())
            elif self.job.keep_steps:
                return None
            else:
                self.passes[-1].switched = len(self.passes[-1].timesteps)
                with self.events.open("a") as file:
                    print(int(self.timestep), steps, file=file)
            return set_timesteps(steps, *arguments, **options)

        def watched_step(output, timestep, sample, *arguments, **options):
            result = step(output, timestep, sample, *arguments, **options)
            if self.job.record:
                self._seen(int(timestep), output, sample, result.prev_sample)
            return result

        scheduler.step, scheduler.set_timesteps = watched_step, watched_set_timesteps

    def _seen(self, timestep: int, output: Tensor, before: Tensor, after: Tensor) -> None:
        unconditional, conditional = self.both.double().chunk(2)
        pull = conditional - unconditional
        weight = ((output.double() - unconditional) * pull).sum() / pull.square().sum()
        last = self.passes[-1]
        last.timesteps.append(timestep)
        last.weights.append(round(float(weight), 3))
        last.latents = [*(last.latents or [before.clone()]), after.clone()]

    def _watch_decoder(self, vae) -> None:
        decode = vae.decode

        def watched_decode(*arguments, **options):
            decoded = decode(*arguments, **options)
            point = self.namespace.get("transition_point")
            point = None if point is None else float(point)
            clock = time.perf_counter()
            self.pictures.append(Picture(self.noise[-1], self.passes, point, self.predictions, clock))
            self.passes, self.predictions = [], 0
            return decoded

        vae.decode = watched_decode


def run_job(folder: Path) -> None:
    """In a process of its own: the job in ``folder``, whose record is left there."""
    job = Job(**json.loads((folder / "job.json").read_text()))
    sys.dont_write_bytecode = True
    sys.path[0], sys.argv = str(Path(job.script).parent), [job.script, *job.arguments]
    Shim(job, folder / "events.txt").run().save(folder / "record.pt")


# What runs on our side


def found_scripts(clone: Path) -> dict[str, Path]:
    """The three scripts in ``clone``. Raises FileNotFoundError that says how to get them."""
    cure = f"get it with `git clone {REPOSITORY} FOLDER` and give that FOLDER"
    if not clone.is_dir():
        raise FileNotFoundError(f"{clone} is no folder, so it holds no clone of the official code: {cure}")
    if missing := [name for name in (STATIC, DYNAMIC, OPPOSITE) if not (clone / name).is_file()]:
        raise FileNotFoundError(f"{clone} is no clone of the official code, it has no {', '.join(missing)}: {cure}")
    return {name: (clone / name).resolve() for name in (STATIC, DYNAMIC, OPPOSITE)}


@dataclass
class Case:
    """A setting of an official script, and the guidance of ours that is held against it."""

    name: str
    script: str
    guidance: BaseGuidance
    arguments: Sequence[str] = ()
    names: dict = field(default_factory=dict)
    changes: dict = field(default_factory=dict)  # epsilon, keep_steps, go_on of a `Job`
    own_units: bool = True  # ours watches the difference of epsilon, as the paper, whatever the network predicts
    replayed: bool = False  # latents are held against the weights that the script was seen to use, not ``guidance``


DTP_NAMES = {"exp": "sdv1_pretrained", "cads": False}
OG_NAMES = {"exp": "200_memorized"}


def cases() -> list[Case]:
    """The points of the static script are none of its timesteps: at one that is, it never ends."""
    dynamic = basinlab.DynamicTransitionPoint(SCALE, before=1.0, latest=0)
    opposite = basinlab.OppositeGuidance(None, SCALE, opposite_scale=SCALE, latest=0)
    static = {
        "plain": (basinlab.StaticTransitionPoint(999, SCALE), 1000, 0.0),
        "STP 501": (basinlab.StaticTransitionPoint(501, SCALE), 501, 0.0),
        "OG+STP 650": (basinlab.OppositeGuidance(650, SCALE, opposite_scale=2.0), 650, -2.0),
    }
    return [
        *(Case(name, STATIC, ours, _static(point, before)) for name, (ours, point, before) in static.items()),
        Case("DTP", DYNAMIC, dynamic, names=DTP_NAMES, own_units=False),
        Case("DTP, epsilon", DYNAMIC, dynamic, names=DTP_NAMES, changes={"epsilon": True}),
        Case("OG+DTP", OPPOSITE, opposite, names=OG_NAMES, changes={"go_on": True}, replayed=True),
        Case(
            "OG+DTP, 50 steps kept",
            OPPOSITE,
            opposite,
            names=OG_NAMES,
            changes={"go_on": True, "keep_steps": True},
            replayed=True,
        ),
    ]


def _static(point: float, before: float) -> list[str]:
    scales = ["--guidance_scale", str(before), "--guidance_scale_later", str(SCALE)]
    return [*scales, "--guidance_change_step", str(point), "--prompt_json", "captions.json"]


def _write_prompts(folder: Path, prompts: Sequence[str]) -> None:
    """``prompts`` as each script reads them; in the pool that the static one draws from they lie where it draws."""
    for size in count(1000):
        places = np.random.RandomState(FIRST_SEED).choice(size, len(prompts))
        if len(set(places)) == len(prompts):
            break
    pool = {str(i): ["never drawn"] for i in range(size)}
    pool |= {str(place): [prompt] for place, prompt in zip(places, prompts, strict=True)}
    (folder / "captions.json").write_text(json.dumps(pool))
    (folder / "sdv1_500_memorized.jsonl").write_text("".join(json.dumps({"caption": p}) + "\n" for p in prompts))
    (folder / "memorized_images").mkdir()
    for i, prompt in enumerate(prompts):
        (folder / "memorized_images" / f"{i:05}.txt").write_text(prompt)


class Official:
    """Runs the scripts of a clone on one checkpoint, each time in a new process and an empty folder.

    ``changes`` gathers what the shim changed: of each change the scripts.
    """

    def __init__(self, scripts: dict[str, Path], denoiser: Denoiser, timeout: float):
        self.scripts, self.timeout = scripts, timeout
        model = str(denoiser.folders[0].resolve())
        side = str(8 * denoiser.latent_shape[-1])  # the scripts divide by 8
        self.common = ["--pretrained_model_name_or_path", model, "--img_size", side, "--outdir", "output"]
        self.unet = {DYNAMIC: "nowhere", OPPOSITE: f"{model}/unet"}
        self.changes: dict[str, list[str]] = {}

    def run(self, case: Case, pairs: Sequence[tuple[str, int]], record: bool = True) -> Record:
        """The pictures of ``pairs``. Raises RuntimeError when the script does not make them."""
        found = self.probe(case, pairs, self.timeout, record)
        if isinstance(found, Record) and len(found.pictures) == len(pairs):
            for change in found.changes:
                homes = self.changes.setdefault(change, [])
                homes.extend({case.name} - set(homes))
            return found
        how = found.ended if isinstance(found, Record) else f"had not ended after {self.timeout:.0f} s (--timeout)"
        raise RuntimeError(f"{case.script} made no {len(pairs)} pictures for {case.name!r}: {how}")

    def probe(
        self, case: Case, pairs: Sequence[tuple[str, int]], patience: float, record: bool = True
    ) -> Record | list[str]:
        """The record of a run, however it ended; of one killed after ``patience`` seconds its events."""
        prompts, seeds = zip(*pairs, strict=True)
        arguments = [*self.common, "--end_iter", str(len(pairs)), *case.arguments]
        if case.script in self.unet:
            arguments += ["--unet_path", self.unet[case.script]]
        job = Job(str(self.scripts[case.script]), arguments, case.names, list(seeds), record, **case.changes)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            _write_prompts(folder, prompts)
            (folder / "job.json").write_text(json.dumps(asdict(job)))
            command = [sys.executable, str(Path(__file__).resolve()), "--job", str(folder)]
            try:
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=patience)
            except subprocess.TimeoutExpired:
                events = folder / "events.txt"
                return events.read_text().splitlines() if events.exists() else []
            if done.returncode:
                raise RuntimeError(f"the process of {case.script} failed: {done.stderr.strip().splitlines()[-1]}")
            return Record.read(folder / "record.pt")


class _Seen(basinlab.ConstantGuidance):
    """The weights that a script was seen to use, by timestep."""

    def __init__(self, timesteps: Sequence[int], weights: Sequence[float]):
        super().__init__()
        self.weights = dict(zip(timesteps, weights, strict=True))

    def weight(self, timestep: int) -> float:
        return self.weights.get(timestep, 0.0)


def _replay(denoiser: Denoiser, prompt: str, seed: int, seen: Pass) -> Tensor:
    """Our latents [steps + 1, C, H, W] under the weights of a pass, through its switch to other steps if it has one."""
    k = len(seen.timesteps) if seen.switched is None else seen.switched
    before = _Seen(seen.timesteps[:k], seen.weights[:k])
    latents = basinlab.sample(denoiser, prompt, seed, before, steps=STEPS, progress=False).latents[0, : k + 1]
    if k == len(seen.timesteps):
        return latents
    after = _Seen(seen.timesteps[k:], seen.weights[k:])
    rest = basinlab.sample_from(denoiser, [prompt], latents[-1:], seen.timesteps[k], after, steps=200, progress=False)
    return torch.cat([latents, rest.latents[0, 1:]])


def _point(case: Case, picture: Picture) -> float:
    """The first timestep at which a picture's full guidance acted, as the script has it; NaN for none."""
    last = picture.passes[-1]
    if case.script == OPPOSITE:  # a step
        return float(last.timesteps[int(picture.point)])
    if case.script == DYNAMIC:
        return math.nan if picture.point == -1 else picture.point
    return float(next(t for t, weight in zip(last.timesteps, last.weights, strict=True) if weight == SCALE))


def _same(a: Sequence[float], b: Sequence[float]) -> int:
    """How many timesteps are the same; none found is the same as none found."""
    return int(np.isclose(a, b, atol=0.5, rtol=0, equal_nan=True).sum())


def compared(case: Case, record: Record, denoiser: Denoiser, prompts: Sequence[str], seeds: Sequence[int]) -> dict:
    """A row of the table of agreement: largest absolute differences, and how many transition points are the same."""
    pictures, unit = record.pictures, denoiser.epsilon_scale
    if not case.own_units:
        denoiser.epsilon_scale = lambda timestep: 1.0  # a difference of what the network predicts
    ours = basinlab.sample(denoiser, prompts, seeds, case.guidance, steps=STEPS, progress=False)
    denoiser.epsilon_scale = unit
    initial = torch.cat([picture.initial for picture in pictures])
    differences = []  # of each pass of each picture, one a step
    for picture, prompt, seed, latents in zip(pictures, ours.prompts, ours.seeds, ours.latents, strict=True):
        for seen in picture.passes:
            made = _replay(denoiser, prompt, seed, seen) if case.replayed else latents
            differences.append((torch.cat(seen.latents) - made).abs().flatten(1).amax(1))
    points = [_point(case, picture) for picture in pictures]
    last = differences[len(pictures[0].passes) - 1 :: len(pictures[0].passes)]
    largest = float(torch.stack([d[-1] for d in last]).max())
    same = _same(points, ours.transition_point.tolist())
    scale = max(float(p.passes[-1].latents[-1].abs().max()) for p in pictures)
    return {
        "case": case.name,
        "pictures": len(pictures),
        "initial latents": float((initial - ours.latents[:, 0]).abs().max()),
        "same points": same,
        "latents, all steps": float(torch.cat(differences).max()),
        "final latents": largest,
        "largest final latent": scale,
        "final within 1e-3": "yes" if largest <= BOUND else "no",
    }


def timed(
    official: Official, case: Case, denoisers: Sequence[Denoiser], prompts: Sequence[str], images: int, seeds: int
) -> dict[str, float]:
    """Images a second and predictions an image of either side; the script's first picture warms up, uncounted.

    Of ours with each of ``denoisers``, the first of which has the script's dtype.
    """
    pairs = [(prompts[i % len(prompts)], FIRST_SEED + i) for i in range(images + 1)]
    pictures = official.run(case, pairs, record=False).pictures
    theirs = images / (pictures[-1].finished - pictures[0].finished)
    found = {"official images/s": theirs}
    for denoiser, label in zip(denoisers, ("", QUICK), strict=True):
        began = time.perf_counter()
        run = basinlab.sample(denoiser, prompts, range(seeds), case.guidance, steps=STEPS, record=False, progress=False)
        run.images()
        mine = len(run) / (time.perf_counter() - began)
        found |= {f"ours images/s{label}": mine, f"ratio{label}": mine / theirs}
    predictions = statistics.mean(p.predictions for p in pictures[1:])
    return found | {
        "official predictions": predictions,
        "our predictions": float(run.network_calls.double().mean()),
    }


def departures(
    official: Official,
    records: dict[str, Record],
    denoiser: Denoiser,
    prompts: Sequence[str],
    seeds: Sequence[int],
    patience: float,
) -> pd.DataFrame:
    """Where the scripts are not what the paper says, or do not run, each with what was seen of it here."""
    known, pair = {case.name: case for case in cases()}, [(prompts[0], FIRST_SEED)]

    def ended(name: str, **changes) -> str:
        found = official.probe(replace(known[name], **changes), pair, official.timeout)
        if not isinstance(found, Record):
            return f"had not ended after {official.timeout:.0f} s"
        return f"{textwrap.shorten(found.ended, 80)}; {len(found.pictures)} pictures of 1"

    def stuck(point: int) -> str:
        case = replace(known["STP 501"], arguments=_static(point, 0.0))
        found = official.probe(case, pair, patience)
        if isinstance(found, Record):
            return f"{found.ended}; {len(found.pictures)} pictures of 1"
        at = sorted({line.split()[0] for line in found})
        where = f"{len(found)} switches to 200 steps, all at t = {', '.join(at)}" if found else "no switch yet"
        return f"killed after {patience:.0f} s: {where}; 0 pictures of 1"

    dynamic, opposite = records["DTP"].pictures, records["OG+DTP"].pictures
    before = {w for p in dynamic for w in _weights_before(p.passes[-1], _point(known["DTP"], p))}
    ours = basinlab.sample(denoiser, prompts, seeds, known["DTP"].guidance, steps=STEPS, progress=False)
    points = [_point(known["DTP"], p) for p in dynamic]
    static = [p.passes[-1] for name in ("STP 501", "OG+STP 650") for p in records[name].pictures]
    switched = sum(seen.switched is not None for seen in static)
    first = [seen.weights[: seen.switched] for seen in (p.passes[-1] for p in opposite)]
    after = [p.passes[-1].weights[-1] for p in opposite]
    searched = [p.passes[0].weights[0] for p in opposite]
    found = {
        "DTP: scale 1 before the point, the paper's is 0": f"weights before the point: {_listed(before)}",
        "DTP: watches the difference of what the network predicts, here v; ours that of epsilon": (
            f"{_same(points, ours.transition_point.tolist())} of {len(points)} points are those of ours on epsilon; "
            "with the same quantity on both sides: rows DTP and DTP, epsilon"
        ),
        "STP: switches to 200 steps where a timestep is the point, and goes back to it: no end": stuck(500),
        "STP: no switch where none is (why the points here are 501 and 650)": f"{switched} of {len(static)} switched",
        "OG+DTP: the point is a minimum of the cosine distance of successive latents, on a run of its own": (
            f"passes a picture: {_listed({len(p.passes) for p in opposite})}; "
            f"the first is made with weights {_listed(searched)}, in order of the pictures"
        ),
        "OG+DTP: the opposite scale's sign turns at every step": f"first weights: {_listed(first[0][:6])}",
        "OG+DTP: the sign of the last step stays, for the rest and the next picture": (
            f"weights after the point, in order of the pictures: {_listed(after)}"
        ),
        "OG+DTP: ends at its point, before the first picture": ended("OG+DTP", changes={}),
        "OG+DTP: with exit() idle, goes on from the point with 200 steps": (
            f"steps of the second pass: {_listed([len(p.passes[-1].timesteps) for p in opposite])}"
        ),
        "DTP: names that are nowhere defined": "; ".join(
            ended("DTP", names={k: v for k, v in DTP_NAMES.items() if k != missing}) for missing in DTP_NAMES
        ),
        "OG+DTP: a name that is nowhere defined": ended("OG+DTP", names={}),
        "DTP: the branch of the 200 prompts": ended("DTP", names=DTP_NAMES | {"exp": "200_memorized"}),
        "OG+DTP: the branch of the 500 prompts": ended("OG+DTP", names={"exp": "sdv1_pretrained"}),
        "DTP: --unet_path is not read": "given a folder that is not there, it made all pictures",
    }
    return pd.DataFrame({"departure": [*found], "what we saw": [*found.values()]})


def _weights_before(seen: Pass, point: float) -> list[float]:
    return [w for t, w in zip(seen.timesteps, seen.weights, strict=True) if not t <= point]


def _listed(values) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _spread(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Median, lowest and highest of each figure."""
    return {
        f"{figure}{suffix}": measure([r[figure] for r in rounds])
        for figure in rounds[0]
        for suffix, measure in (("", statistics.median), (" lowest", min), (" highest", max))
    }


def speed_table(table: pd.DataFrame) -> pd.DataFrame:
    """Figures with their ranges as text, one row a case."""

    def ranged(figure: str, row: pd.Series) -> str:
        return f"{row[figure]:.3g} ({row[figure + ' lowest']:.3g} to {row[figure + ' highest']:.3g})"

    rates = ("official images/s", "ours images/s", "ratio", f"ours images/s{QUICK}", f"ratio{QUICK}")
    calls = ("official predictions", "our predictions")
    return pd.DataFrame(
        [
            {"case": row["case"]} | {f: ranged(f, row) for f in rates} | {f: f"{row[f]:.4g}" for f in calls}
            for _, row in table.iterrows()
        ]
    )


def main() -> None:
    if sys.argv[1:2] == ["--job"]:
        return run_job(Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help=f"folder of a clone of {REPOSITORY}")
    parser.add_argument("--name", default="emoji-duplicated", help="checkpoint")
    parser.add_argument("--prompts", type=int, default=4, help="memorized prompts that are compared")
    parser.add_argument("--seeds", type=int, default=2, help=f"of each, from {FIRST_SEED} on")
    parser.add_argument("--rounds", type=int, default=3, help="of timing; 0 leaves it out")
    parser.add_argument("--official-images", type=int, default=4, help="images a round of the official side")
    parser.add_argument("--images", type=int, default=64, help="images a round of ours")
    parser.add_argument("--patience", type=float, default=30, help="seconds that the script that never ends is given")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that any other script is given")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    try:
        scripts = found_scripts(options.clone)
    except FileNotFoundError as error:
        parser.error(str(error))

    denoiser = basinlab.load(options.name)
    official = Official(scripts, denoiser, options.timeout)
    every = basinlab.scenarios.read(denoiser.name).table()["prompt"].tolist()
    prompts, seeds = every[: options.prompts], range(FIRST_SEED, FIRST_SEED + options.seeds)
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    records, rows = {}, []
    for case in cases():
        records[case.name] = official.run(case, pairs)
        rows.append(compared(case, records[case.name], denoiser, prompts, seeds))
        print(rows[-1], flush=True)
    seen = departures(official, records, denoiser, prompts, seeds, options.patience)
    agreement = pd.DataFrame(rows)

    several = every[:8]
    both = denoiser, basinlab.load(options.name, dtype=torch.bfloat16)
    rounds = {case.name: [] for case in cases() if not case.changes.get("epsilon")}
    for _ in range(options.rounds):
        for case in cases():
            if case.name in rounds:
                each = options.images // len(several)
                rounds[case.name].append(timed(official, case, both, several, options.official_images, each))
                print(case.name, rounds[case.name][-1], flush=True)
    speed = pd.DataFrame(
        [{"case": name, "rounds": len(timings)} | _spread(timings) for name, timings in rounds.items() if timings]
    )
    table = agreement.merge(speed, on="case", how="left") if len(speed) else agreement
    report = _report(options, official, denoiser, agreement, speed, seen)
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "official.csv", index=False, float_format="%.4g")
    (options.out / "official.md").write_text(report)
    print(report)


def _report(
    options, official: Official, denoiser: Denoiser, agreement: pd.DataFrame, speed: pd.DataFrame, seen: pd.DataFrame
) -> str:
    """All tables and what they rest on, as markdown."""
    digests = [f"{name} {hashlib.sha256(p.read_bytes()).hexdigest()[:12]}" for name, p in official.scripts.items()]
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}"
    changes = pd.DataFrame(
        {
            "change": [*official.changes],
            "in": ["all" if len(homes) == len(cases()) else "; ".join(homes) for homes in official.changes.values()],
        }
    )
    side = 8 * denoiser.latent_shape[-1]
    timing = (
        f"Images a second, decoded, median (lowest to highest) of {options.rounds} rounds: the script under the shim, "
        f"one picture at a time, {options.official_images} a round after one that warms up, start and loading not "
        "counted, its PNG files written; "
        f"ours {options.images} a round through `basinlab.sample`, batches of 32, in float32 and{QUICK[1:]}. "
        f"{torch.get_num_threads()} threads. "
        "Predictions: conditional and unconditional ones, an image."
    )
    parts = [
        "# Against the official scripts",
        f"{denoiser.name}, {options.prompts} memorized prompts x {options.seeds} seeds, {STEPS} steps, scale {SCALE}, "
        f"float32, CPU. {versions}, Python {platform.python_version()}. Scripts (SHA-256): {'; '.join(digests)}.",
        "## Agreement",
        "Largest absolute differences, and how many transition points are the same.",
        agreement.to_markdown(index=False, floatfmt=".2g"),
        "OG+DTP: latents are held against our sampler under the weights that the script was seen to use, through its "
        "switch to 200 steps, as its rule is not ours; points against `OppositeGuidance`. DTP: ours watches "
        "the difference of v here, as the script does. DTP, epsilon: the script gets epsilon, ours is as it is.",
        "## Speed",
        f"{timing}\n\n{speed_table(speed).to_markdown(index=False)}" if len(speed) else "Not measured.",
        "## What the shim changes",
        changes.to_markdown(index=False),
        f"Not changes, but arguments: --img_size {side} (8 x the latents' side); captions in a pool of which the "
        "static script draws the wanted ones.",
        "## Departures",
        seen.to_markdown(index=False),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
