"""Our sampler held against the official scripts, run from a clone of theirs.

    git clone https://github.com/SonyResearch/mitigating_memorization FOLDER
    python benchmarks/official.py FOLDER

Nothing of theirs is in this repository, and nothing is written into the clone. Each script runs in a process of its
own, under a `Shim` that lists what it must change, and watches latents, weights and the transition point from outside.
The same pictures are then made with `basinlab.sample`. Also timed, in rounds: images a second.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

import diffusers
import numpy as np
import pandas as pd
import torch
from diffusers.guiders import BaseGuidance
from torch import Tensor

import basinlab
from basinlab.models import Denoiser

RESULTS = Path(__file__).parent / "results"
REPOSITORY = "https://github.com/SonyResearch/mitigating_memorization"
STATIC, DYNAMIC = "generate_test_dataset_stp.py", "generate_test_dataset_dtp.py"
OPPOSITE = "generate_test_dataset-opposite_guidance.py"
BOUND = 1e-3  # of the final latents, float32
SCALE, STEPS, FIRST_SEED = 7.5, 50, 42  # written into the scripts
PROMPTS, SEEDS = 4, range(FIRST_SEED, FIRST_SEED + 2)  # that are compared
ROUNDS, THEIR_IMAGES, OUR_IMAGES = 3, 4, 64  # of timing


@dataclass
class Pass:
    """One way from noise to clean latents: what was seen at each step; latents also before the first."""

    timesteps: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)


@dataclass
class Picture:
    initial: Tensor
    passes: list[Pass]
    point: float | None
    predictions: int
    finished: float  # seconds, of a clock that all pictures of a run share


@dataclass
class Job:
    script: str
    arguments: list[str]
    names: dict  # given to the script beside what it defines itself
    seeds: list[int]  # of the pictures in turn; the first is the script's own
    record: bool = True  # keep latents and weights, which takes time
    epsilon: bool = False  # turn the network's v into epsilon, and tell the scheduler
    keep_steps: bool = False  # a change of the number of steps half way does nothing
    go_on: bool = False  # ``exit`` does nothing


@dataclass
class Record:
    ended: str
    pictures: list[Picture]
    changes: list[str]

    @classmethod
    def read(cls, path: Path) -> "Record":
        parts = torch.load(path, weights_only=True)
        pictures = [Picture(**p | {"passes": [Pass(**q) for q in p["passes"]]}) for p in parts["pictures"]]
        return cls(parts["ended"], pictures, parts["changes"])


def _gone(name: str, *_, **__):
    raise NotImplementedError(f"{name} is not installed, and the script uses the stand-in for it")


class _Idle(types.ModuleType):
    def __getattr__(self, name: str) -> Callable:
        return lambda *_, **__: None


class Shim:
    """Runs one script on this machine. ``changes`` lists whatever that took."""

    def __init__(self, job: Job):
        self.job = job
        self.changes = ["basinlab is imported first: it lets a torchvision of another build than torch's import"]
        self.pictures, self.passes, self.noise = [], [], []  # a `Picture`, `Pass`, Tensor each
        self.steps, self.predictions = None, 0
        self.namespace = {"__name__": "__main__", "__file__": job.script, **job.names}

    def run(self) -> Record:
        """The script from beginning to end. What it raises is told in the record's ``ended``."""
        code = self.compiled(Path(self.job.script).read_text())
        self._watch()
        self.changes += [f"the name {name} is given: {value!r}" for name, value in self.job.names.items()]
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
        return Record(ended, self.pictures, self.changes)

    def compiled(self, source: str):
        tree, devices = ast.parse(source), 0
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value == "cuda":
                node.value, devices = "cpu", devices + 1
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    self._provide(alias.name)
            elif isinstance(node, ast.ImportFrom):
                self._provide(node.module, [alias.name for alias in node.names])
        self.changes += ['"cuda" is read as "cpu"'] if devices else []
        return compile(tree, self.job.script, "exec")

    def _provide(self, module: str, names: Sequence[str] = ()) -> None:
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
            setattr(home, name, partial(_gone, f"{module}.{name}"))

    def _watch(self) -> None:
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
        self.changes.append(f"each picture but the first is seeded anew (the script seeds once, with {FIRST_SEED})")

    def _when_loaded(self, kind: type, then: Callable) -> None:
        load = kind.from_pretrained

        def from_pretrained(*arguments, **options):
            then(loaded := load(*arguments, **options))
            return loaded

        kind.from_pretrained = from_pretrained

    def _predicted(self, unet, inputs: tuple, output):
        """After each network call: unconditional and conditional prediction are its two rows."""
        latents, timestep = inputs[:2]
        self.predictions += len(latents)
        if self.job.epsilon:
            alpha_bar = self.scheduler.alphas_cumprod[int(timestep)]
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
            decoded, point = decode(*arguments, **options), self.namespace.get("transition_point")
            seen = (self.passes, None if point is None else float(point), self.predictions)
            self.pictures.append(Picture(self.noise[-1], *seen, time.perf_counter()))
            self.passes, self.predictions = [], 0
            return decoded

        vae.decode = watched_decode


def run_job(folder: Path) -> None:  # in a process of its own, as all above
    job = Job(**json.loads((folder / "job.json").read_text()))
    sys.dont_write_bytecode = True
    sys.path[0], sys.argv = str(Path(job.script).parent), [job.script, *job.arguments]
    torch.save(asdict(Shim(job).run()), folder / "record.pt")


def found_scripts(clone: Path) -> dict[str, Path]:
    scripts = {name: (clone / name).resolve() for name in (STATIC, DYNAMIC, OPPOSITE)}
    if missing := [name for name, path in scripts.items() if not path.is_file()]:
        cure = f"get it with `git clone {REPOSITORY} FOLDER` and give that FOLDER"
        raise FileNotFoundError(f"{clone} is no clone of the official code, it has no {', '.join(missing)}: {cure}")
    return scripts


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


def cases() -> list[Case]:
    """The points of the static script are none of its timesteps: at one that is, it never ends."""
    dynamic = basinlab.DynamicTransitionPoint(SCALE, before=1.0, latest=0)
    opposite = basinlab.OppositeGuidance(None, SCALE, opposite_scale=SCALE, latest=0)
    kept, names = {"go_on": True, "keep_steps": True}, {"exp": "sdv1_pretrained", "cads": False}
    later, now = ["--prompt_json", "captions.json", "--guidance_scale_later", str(SCALE)], "--guidance_change_step"
    static = {
        "plain": (basinlab.StaticTransitionPoint(999, SCALE), f"--guidance_scale 0.0 {now} 1000"),
        "STP 501": (basinlab.StaticTransitionPoint(501, SCALE), f"--guidance_scale 0.0 {now} 501"),
        "OG+STP 650": (basinlab.OppositeGuidance(650, SCALE, opposite_scale=2.0), f"--guidance_scale -2.0 {now} 650"),
    }
    return [
        *(Case(name, STATIC, ours, [*later, *written.split()]) for name, (ours, written) in static.items()),
        Case("DTP", DYNAMIC, dynamic, names=names, own_units=False),
        Case("DTP, epsilon", DYNAMIC, dynamic, names=names, changes={"epsilon": True}),
        # as published it ends at its point; gone on with, it changes to 200 steps there
        Case("OG+DTP, 50 steps kept", OPPOSITE, opposite, names={"exp": "200_memorized"}, changes=kept, replayed=True),
    ]


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
    """Runs the scripts of a clone on one checkpoint, each time in a new process and an empty folder."""

    def __init__(self, scripts: dict[str, Path], denoiser: Denoiser, timeout: float):
        self.scripts, self.timeout = scripts, timeout
        model = str(Path(denoiser.pipeline.config._name_or_path).resolve())
        side = str(8 * denoiser.latent_shape[-1])  # the scripts divide by 8
        self.common = ["--pretrained_model_name_or_path", model, "--img_size", side, "--outdir", "output"]
        self.unet = {DYNAMIC: ["--unet_path", "nowhere"], OPPOSITE: ["--unet_path", f"{model}/unet"]}
        self.changes: dict[str, set[str]] = {}  # of each change the cases

    def run(self, case: Case, pairs: Sequence[tuple[str, int]], record: bool = True) -> Record:
        prompts, seeds = zip(*pairs, strict=True)
        arguments = [*self.common, "--end_iter", str(len(pairs)), *case.arguments, *self.unet.get(case.script, [])]
        job = Job(str(self.scripts[case.script]), arguments, case.names, list(seeds), record, **case.changes)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            _write_prompts(folder, prompts)
            (folder / "job.json").write_text(json.dumps(asdict(job)))
            command = [sys.executable, str(Path(__file__).resolve()), "--job", str(folder)]
            subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=self.timeout)
            found = Record.read(folder / "record.pt")
        if len(found.pictures) < len(pairs):
            raise RuntimeError(f"{case.script} made no {len(pairs)} pictures for {case.name!r}: {found.ended}")
        for change in found.changes:
            self.changes.setdefault(change, set()).add(case.name)
        return found


class _Seen(basinlab.ConstantGuidance):  # the weights that a script was seen to use
    def __init__(self, timesteps: Sequence[int], weights: Sequence[float]):
        super().__init__()
        self.weights = dict(zip(timesteps, weights, strict=True))

    def weight(self, timestep: int) -> float:
        return self.weights.get(timestep, 0.0)


def _point(case: Case, picture: Picture) -> float:
    """The first timestep at which a picture's full guidance acted, as the script has it; NaN for none."""
    last = picture.passes[-1]
    if case.script == OPPOSITE:  # a step
        return float(last.timesteps[int(picture.point)])
    if case.script == DYNAMIC:
        return math.nan if picture.point == -1 else picture.point
    return float(next(t for t, weight in zip(last.timesteps, last.weights, strict=True) if weight == SCALE))


def compared(case: Case, record: Record, denoiser: Denoiser, prompts: Sequence[str], seeds: Sequence[int]) -> dict:
    """A row of the table of agreement."""
    pictures, unit = record.pictures, denoiser.epsilon_scale
    if not case.own_units:
        denoiser.epsilon_scale = lambda timestep: 1.0  # a difference of what the network predicts
    ours = basinlab.sample(denoiser, prompts, seeds, case.guidance, steps=STEPS, progress=False)
    denoiser.epsilon_scale = unit
    initial = torch.cat([picture.initial for picture in pictures])
    differences, finals = [], []  # of each pass, one a step; of each picture
    for picture, prompt, seed, latents in zip(pictures, ours.prompts, ours.seeds, ours.latents, strict=True):
        for seen in picture.passes:
            if case.replayed:
                weights = _Seen(seen.timesteps, seen.weights)
                latents = basinlab.sample(denoiser, prompt, seed, weights, steps=STEPS, progress=False).latents[0]
            differences.append((torch.cat(seen.latents) - latents).abs().flatten(1).amax(1))
        finals.append(float(differences[-1][-1]))
    points = [_point(case, picture) for picture in pictures]
    same = np.isclose(points, ours.transition_point, atol=0.5, rtol=0, equal_nan=True)  # none found is the same, too
    return {
        "case": case.name,
        "pictures": len(pictures),
        "initial latents": float((initial - ours.latents[:, 0]).abs().max()),
        "same points": int(same.sum()),
        "latents, all steps": float(torch.cat(differences).max()),
        "final latents": max(finals),
        "largest final latent": max(float(p.passes[-1].latents[-1].abs().max()) for p in pictures),
    }


def timed(official: Official, case: Case, denoiser: Denoiser, prompts: Sequence[str]) -> dict[str, float]:
    """Images a second of either side; the script's first picture warms up, uncounted."""
    pairs = [(prompts[i % len(prompts)], FIRST_SEED + i) for i in range(THEIR_IMAGES + 1)]
    pictures = official.run(case, pairs, record=False).pictures
    theirs = THEIR_IMAGES / (pictures[-1].finished - pictures[0].finished)
    seeds, began = range(OUR_IMAGES // len(prompts)), time.perf_counter()
    run = basinlab.sample(denoiser, prompts, seeds, case.guidance, steps=STEPS, record=False, progress=False)
    run.images()
    ours = len(run) / (time.perf_counter() - began)
    return {"the script, images/s": theirs, "ours, images/s": ours, "ours / the script": ours / theirs}


def main() -> None:
    if sys.argv[1:2] == ["--job"]:
        return run_job(Path(sys.argv[2]))
    from common import write  # as a script, not in the tests

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help=f"folder of a clone of {REPOSITORY}")
    scripts, denoiser = found_scripts(parser.parse_args().clone), basinlab.load("emoji-duplicated")
    official = Official(scripts, denoiser, timeout=600)
    every = basinlab.scenarios.read(denoiser.name).table()["prompt"].tolist()
    pairs = [(prompt, seed) for prompt in every[:PROMPTS] for seed in SEEDS]
    agreement, speed = [], {}
    for case in cases():
        agreement.append(compared(case, official.run(case, pairs), denoiser, every[:PROMPTS], SEEDS))
    for case in [case for case in cases() if not case.changes.get("epsilon")] * ROUNDS:
        for name, value in timed(official, case, denoiser, every[:8]).items():
            speed.setdefault(f"{case.name}: {name}", []).append(value)
    pd.DataFrame(agreement).to_csv(RESULTS / "official-agreement.csv", index=False, float_format="%.4g")
    table = write("official", speed, "float32, CPU").drop(columns="of")
    (RESULTS / "official.md").write_text(report(official, agreement, table, denoiser))


def report(official: Official, agreement: list[dict], speed: pd.DataFrame, denoiser: Denoiser) -> str:
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, Python {platform.python_version()}"
    digests = [f"{name} {hashlib.sha256(p.read_bytes()).hexdigest()[:12]}" for name, p in official.scripts.items()]
    changes = [{"change": change, "in": "; ".join(sorted(homes))} for change, homes in official.changes.items()]
    tables = {"Agreement": agreement, "Speed": speed, "What the shim changes": changes}
    parts = [
        "# Against the official scripts",
        f"{denoiser.name}, {PROMPTS} memorized prompts x {len(SEEDS)} seeds, {STEPS} steps, scale {SCALE}, "
        f"float32, CPU. {versions}. Scripts (SHA-256): {'; '.join(digests)}.",
        "Agreement: largest absolute differences, and how many transition points are the same. OG+DTP: latents are "
        "held against our sampler under the weights that the script was seen to use, as its rule is not ours. DTP: "
        "ours watches the difference of v, as the script does; in DTP, epsilon the script gets epsilon. Speed: images "
        "a second, decoded; the script one picture at a time, after one that warms up; ours in batches of 32.",
    ]
    for name, rows in tables.items():
        parts.append(f"## {name}\n\n{pd.DataFrame(rows).to_markdown(index=False, floatfmt='.3g')}")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
