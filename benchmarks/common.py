"""What the benchmarks share: clocks, and tables of rounds."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

RESULTS = Path(__file__).parent / "results"


def now(device: str = "cpu") -> float:
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def seconds_of(work: Callable[[], object], device: str = "cpu") -> float:
    began = now(device)
    work()
    return now(device) - began


def peak_gib() -> float:
    """The most memory that this process has had, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def clocked(module: torch.nn.Module, device: str = "cpu") -> list[float]:
    """A list that fills with the seconds of each forward; a device is waited for, which slows what is measured."""
    seconds, forward = [], module.forward

    def watched(*arguments, **options):
        began = now(device)
        output = forward(*arguments, **options)
        seconds.append(now(device) - began)
        return output

    module.forward = watched
    return seconds


def write(name: str, columns: dict[str, list[float]], note: str, folder: Path = RESULTS) -> pd.DataFrame:
    """Write and print figures, of each the median, lowest and highest of its rounds; ``note`` says of what."""
    rows = [(name, statistics.median(v), min(v), max(v), len(v), note) for name, v in columns.items()]
    table = pd.DataFrame(rows, columns=["figure", "median", "lowest", "highest", "rounds", "of"])
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv", index=False, float_format="%.4g")
    print(table.drop(columns="of").to_string(index=False, float_format="%.4g"))
    print(note)
    return table


def by_column(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in rows[0]}
