"""What is kept on disk, and found again: a run that was killed makes only what is missing.

A file's name ends with a digest of the settings that it was made with. Other settings are another file.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
import psutil
from safetensors import SafetensorError
from safetensors.torch import load_file, save


def output_folder() -> Path:
    """Where figures/ and build/ are written: the ``BASINLAB_OUT`` variable, or the project's folder."""
    return Path(os.environ.get("BASINLAB_OUT", Path(__file__).resolve().parents[1]))


def digest(settings) -> str:
    """Ten digits that stand for ``settings``, as JSON; a path is refused, as it says nothing of content."""

    def plain(value):
        if isinstance(value, os.PathLike):
            raise TypeError(f"settings hold the path {value}: give what the file holds")
        return value.tolist()  # of numpy and torch

    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=plain).encode()).hexdigest()[:10]


def kept(folder: str | Path | None, name: str, settings: Mapping, make: Callable, suffix: str = ".parquet"):
    """What ``make()`` gives, a DataFrame or tensors by name: made once for ``settings``, kept whole in ``folder``."""
    if folder is None:
        return make()
    path = Path(folder) / f"{name}-{digest(settings)}{suffix}"
    if not path.exists():
        _write(make(), path)
    try:
        return pd.read_parquet(path) if suffix == ".parquet" else load_file(path)
    except Exception as error:
        raise OSError(f"{path} is damaged ({error}): delete it, and the next run makes it again") from error


def _write(result, path: Path) -> None:
    """Write beside ``path`` and move there, so that a kill or a full disk leaves no half file under its name."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            result.to_parquet(part)
        else:
            part.write_bytes(save({key: tensor.contiguous() for key, tensor in result.items()}))  # no file of its own
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written ({error}): make room or give another folder; it goes on") from error
    finally:
        if part.exists():
            part.unlink()
    for stale in path.parent.glob(f"{path.stem}.*.part"):  # of runs that were killed
        if not psutil.pid_exists(int(stale.suffixes[-2][1:])):
            stale.unlink(missing_ok=True)
