"""A grid prompt x seed x strategy -> one tidy table, one row a sample, resumable.

The table is kept in parts, one parquet file per strategy and block of prompts, each written
beside its place and moved there, with the weights' fingerprint and the settings inside: a
killed run goes on with the missing parts, and a part of other weights or settings is named
instead of being mixed in. Under ``accelerate launch`` every process makes its share of the missing
parts; how many processes there are matters to no part, and may differ from run to run.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers.guiders import BaseGuidance
from tqdm.auto import tqdm

from .guidance import describe
from .models import Denoiser
from .sampling import Mitigation, Trajectory, most_predictions, sample


@dataclass(frozen=True)
class Strategy:
    """A mitigation as it is compared: what is perturbed, and the guidance that samples."""

    guidance: BaseGuidance
    perturbations: tuple[Mitigation, ...] = ()

    @property
    def mitigations(self) -> list:
        return [*self.perturbations, self.guidance]

    def settings(self) -> dict:
        """All that tells it from another, for a record of what was done."""
        return {"guidance": describe(self.guidance), "perturbations": [describe(p) for p in self.perturbations]}

    def predictions(self, denoiser: Denoiser, steps: int = 50) -> int:
        """At most so many network predictions a sample, a differentiated one counted as three."""
        return most_predictions(denoiser, self.mitigations, steps)


def combined(*strategies: Strategy) -> Strategy:
    """The perturbations of all, in order, with the guidance of the last."""
    perturbations = [p for s in strategies for p in s.perturbations]
    return Strategy(strategies[-1].guidance, tuple(perturbations))


def read_part(path: Path, expected: dict) -> tuple[pd.DataFrame, dict]:
    """A part, after checking that it is whole and belongs to this grid, and what is noted in it.

    Raises OSError when it is damaged, ValueError when its settings are others. Parts written before there
    were checksums have none to check.
    """
    try:
        arrow = pq.read_table(path)
        metadata, table = arrow.schema.metadata or {}, arrow.to_pandas()
        noted = metadata.get(b"basinlab", b"{}")
        found = dict(json.loads(noted))
        if b"sha256" in metadata and metadata[b"sha256"] != _digest(table, noted):
            raise ValueError("its checksum is another")
    except Exception as error:  # of damaged bytes, arrow and pandas raise of all sorts
        raise OSError(f"{path} is damaged ({error}): delete it, and the next run makes it again") from error
    different = [key for key in expected if found.get(key) != expected[key]]
    if different:
        raise ValueError(f"{path} was made with another {', '.join(different)}: delete it, or give another folder")
    return table, found


def _digest(table: pd.DataFrame, noted: bytes) -> bytes:
    """The checksum that a part holds, of its table as pandas reads it and of what is noted in it."""
    arrow = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata().combine_chunks()
    content = pa.BufferOutputStream()
    with pa.ipc.new_stream(content, arrow.schema) as stream:
        stream.write_table(arrow)
    return hashlib.sha256(noted + content.getvalue()).hexdigest().encode()


def write_part(table: pd.DataFrame, path: Path, settings: dict) -> None:
    """Write ``table`` with its ``settings`` inside, whole or not at all."""
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    noted = json.dumps(settings).encode()
    note = {b"basinlab": noted, b"sha256": _digest(arrow.to_pandas(), noted)}
    arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), **note})
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    pq.write_table(arrow, part)
    os.replace(part, path)


def processes() -> PartialState:
    """The processes of this run: one, or those that ``accelerate launch`` began, over gloo where there is no GPU."""
    # one may wait for the others' last parts for long
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


@dataclass(frozen=True)
class _Part:
    """One strategy on one block of prompts: what is kept in one file."""

    strategy: str
    rows: pd.DataFrame
    path: Path
    settings: dict


def shares(costs: Sequence[float], processes: int) -> list[list[int]]:
    """Which of the tasks with ``costs`` each process does, the dearest first: each goes to who has least so far.

    >>> shares([1, 1, 4, 1, 1], 2)
    [[2], [0, 1, 3, 4]]
    """
    loads, found = [0.0] * processes, [[] for _ in range(processes)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        found[least].append(i)
        loads[least] += costs[i]
    return found


def run_grid(
    denoiser: Denoiser,
    prompts: pd.DataFrame,
    seeds: Sequence[int],
    strategies: Mapping[str, Strategy | BaseGuidance],
    judge: Callable[[Trajectory, pd.DataFrame], pd.DataFrame],
    folder: str | Path,
    *,
    steps: int = 50,
    measure: Sequence[str] = (),
    block: int = 16,
    batch_size: int = 32,
    judges: str = "",
    bar: tqdm | None = None,
) -> pd.DataFrame:
    """Sample ``prompts`` x ``seeds`` under every strategy and judge the pictures; resumes from ``folder``.

    Args:
        prompts: a table of `read_prompts`.
        strategies: name -> strategy, or guidance alone; the name becomes the column ``strategy``.
        judge: of a run and the rows of ``prompts`` that its samples are of, the rows of the result.
        folder: of the parts; where several processes work, all of them see it.
        measure: names of strategies whose guidance magnitude is measured at every step.
        block: prompts in one part.
        batch_size: samples that go through the network together.
        judges: which they are, such as `bundled.evaluation.Judges.fingerprint`; noted in every part.
        bar: moved on by the samples of every part.

    Raises ValueError or OSError when a part in ``folder`` has other settings or is damaged.
    """
    strategies = {name: s if isinstance(s, Strategy) else Strategy(s) for name, s in strategies.items()}
    parts = _parts(denoiser, prompts, seeds, strategies, Path(folder), steps, measure, block, judges)
    done = {part.path: read_part(part.path, part.settings) for part in parts if part.path.exists()}
    before = 0 if bar is None else bar.n

    def show() -> None:
        if bar is not None:
            bar.update(before + sum(len(p.rows) * len(seeds) for p in parts if p.path.exists()) - bar.n)

    show()
    team = processes()
    missing = [i for i, part in enumerate(parts) if part.path not in done]
    missing = broadcast_object_list([missing])[0]  # the first process's list: others may have come later
    each = {name: strategy.predictions(denoiser, steps) for name, strategy in strategies.items()}
    costs = [each[parts[i].strategy] * len(parts[i].rows) for i in missing]
    for i in (missing[n] for n in shares(costs, team.num_processes)[team.process_index]):
        part, strategy = parts[i], strategies[parts[i].strategy]
        options = {"steps": steps, "batch_size": batch_size, "measure": part.strategy in measure}
        _make(denoiser, part, strategy, seeds, judge, options)
        show()
    team.wait_for_everyone()
    show()
    found = [(part, *(done.get(part.path) or read_part(part.path, part.settings))) for part in parts]
    tables = [table.assign(strategy=part.strategy, seconds=note["seconds"]) for part, table, note in found]
    return pd.concat(tables, ignore_index=True)


def _make(denoiser: Denoiser, part: _Part, strategy: Strategy, seeds: Sequence[int], judge, options: dict) -> None:
    """Sample the pictures of one part, judge them, and write it."""
    prompts, options = part.rows["prompt"].tolist(), {"record": False, "progress": False, **options}
    began = time.perf_counter()
    run = sample(denoiser, prompts, seeds, strategy.mitigations, **options)
    seconds = (time.perf_counter() - began) / len(run)
    each = np.repeat(np.arange(len(part.rows)), len(seeds))
    table = judge(run, part.rows.iloc[each].reset_index(drop=True))
    write_part(table, part.path, {**part.settings, "seconds": seconds})


def _parts(denoiser, prompts, seeds, strategies, folder: Path, steps: int, measure, block, judges) -> list[_Part]:
    """All parts of a grid, in the order of its table."""
    made_with, parts = denoiser.settings(), []
    for name, strategy in strategies.items():
        for number, start in enumerate(range(0, len(prompts), block)):
            rows = prompts.iloc[start : start + block]
            # where pictures lie may change; all else of the prompts' table goes into the result
            further = rows.drop(columns=["attractor", "swapped"], errors="ignore").to_json(orient="records")
            settings = {
                **made_with,
                **strategy.settings(),
                "prompts": rows["prompt"].tolist(),
                "rows": hashlib.sha256(further.encode()).hexdigest()[:16],
                "seeds": [int(seed) for seed in seeds],
                "steps": steps,
                "measure": name in measure,
                "judges": judges,
            }
            parts.append(_Part(name, rows, folder / f"{name}-{number:02d}.parquet", settings))
    return parts
