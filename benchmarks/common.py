"""What the benchmarks share: a clock inside a module, and tables of rounds."""

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
    """The time, once the device has done all that was asked of it."""
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


class ForwardClock:
    """Seconds spent inside a module's forward; a device is waited for, which slows what is measured."""

    def __init__(self, module: torch.nn.Module, device: str = "cpu"):
        self.seconds, self.device = 0.0, device
        self.hooks = [module.register_forward_pre_hook(self._start), module.register_forward_hook(self._stop)]

    def _start(self, *_) -> None:
        self._began = now(self.device)

    def _stop(self, *_) -> None:
        self.seconds += now(self.device) - self._began

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def write(name: str, columns: dict[str, list[float]], note: str, folder: Path = RESULTS) -> pd.DataFrame:
    """Write and print figures, of each the median, lowest and highest of its rounds; ``note`` says of what."""
    table = pd.DataFrame(
        {
            "figure": [*columns],
            "median": [statistics.median(values) for values in columns.values()],
            "lowest": [min(values) for values in columns.values()],
            "highest": [max(values) for values in columns.values()],
            "rounds": [len(values) for values in columns.values()],
            "of": note,
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv", index=False, float_format="%.4g")
    print(table.drop(columns="of").to_string(index=False, float_format="%.4g"))
    print(note)
    return table


def by_column(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """Rounds as columns."""
    return {name: [row[name] for row in rows] for name in rows[0]}
