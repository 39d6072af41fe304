"""Execute the notebooks, two at a time, each written only once all of it ran: ``make figures``.

    python notebooks/execute.py                                   # all, copies in build/reader
    python notebooks/execute.py --at-once 1                       # one after the other: half the memory
    BASINLAB_PROFILE=paper python notebooks/execute.py            # all, in the place of the committed ones
    python notebooks/execute.py 01_basin_observation.ipynb        # some, by name or path
    python notebooks/execute.py --out elsewhere                   # elsewhere/notebooks and elsewhere/figures
    python notebooks/execute.py --figure 2                        # only what figure 2 needs, in build/figure-2

A cell's tags say what it is for: "setup", "figure-2", "table-1". With ``--figure`` only such cells run, and those
before them whose names they read.

Only the profile "paper" writes the project's notebooks/ and figures/: a reader's run changes no committed file.

What differs from run to run (times, paths, progress bars) is dropped or made regular: a second run gives a small diff.
Kept is how long the notebook took in a profile and how fast the machine was: the next run estimates from both.
What a cell's metadata says of its pictures in words (``mystnb.image.alt``, which the pages read) is written to the
pictures too, where Jupyter and nbconvert look for it.
"""

import argparse
import ast
import base64
import io
import os
import re
import signal
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

import nbformat
import numpy as np
import psutil
from nbclient.exceptions import DeadKernelError
from papermill import execute_notebook
from papermill.exceptions import PapermillExecutionError
from PIL import Image

HERE = Path(__file__).resolve().parent
PICTURE = "image/png"
STYLED = re.compile(r"(?<!\w)T_[0-9a-f]{5}(?![0-9a-zA-Z])")
KERNEL = "python3"
QUIET = ["--IPKernelApp.log_level=50"]  # else each kernel warns of local TCP, and complains when it is stopped
PROFILE = os.environ.get("BASINLAB_PROFILE", "reader")


def clock(seconds: float) -> str:
    """Minutes and seconds: ``clock(75) == "1:15"``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def pace_of_this_machine() -> float:
    """Seconds for a fixed piece of work of the notebooks' kind, matrix products: machines differ by four times."""
    states, rounds = np.ones((1000, 1000), np.float32), []
    for _ in range(10):  # the best: the first wakes the threads, and others may work beside
        start = time.monotonic()
        states @ states @ states @ states @ states
        rounds.append(time.monotonic() - start)
    return 5 * min(rounds)


def cores() -> int:
    """The cores that this process may use."""
    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else os.cpu_count() or 1


def seconds_expected(notebook: nbformat.NotebookNode, pace: float, threads: int) -> int | None:
    """The seconds of the last run in this profile, as its metadata has them, at this machine's pace and ``threads``."""
    last = notebook.metadata.get("basinlab", {}).get(PROFILE)
    return last and round(last["seconds"] * pace / last["pace"] * last["threads"] / threads)


def seconds_together(seconds: list[int], at_once: int) -> int:
    """The seconds that so many notebooks at once take, each next one begun when one ends."""
    busy = [0] * at_once
    for notebook in seconds:
        busy[busy.index(min(busy))] += notebook
    return max(busy)


def is_bar(output: nbformat.NotebookNode) -> bool:
    """Whether an output is a progress bar, which tells another time in every run."""
    text = output.text if output.output_type == "stream" and output.name == "stderr" else "anything"
    drawn = "\r" in text or not text.strip()
    return drawn or "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def smaller(picture: str) -> str:
    """A PNG in base64 with 256 colours: a third of the size."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB").quantize(256).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def tidy(notebook: nbformat.NotebookNode, seconds: float, pace: float, threads: int) -> str:
    """The executed notebook as text, without what differs between equal runs."""
    before = seconds_expected(notebook, pace, threads)
    if before is None or abs(seconds - before) > max(2, before / 4):  # noise in timing is no news
        notebook.metadata.setdefault("basinlab", {}).pop("seconds", None)
        notebook.metadata["basinlab"][PROFILE] = {"seconds": round(seconds), "pace": round(pace, 3), "threads": threads}
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": KERNEL}
    notebook.metadata.pop("papermill", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        cell.get("outputs", [])[:] = [output for output in cell.get("outputs", []) if not is_bar(output)]
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        for output in cell.get("outputs", []):
            if PICTURE in output.get("data", {}):
                output.data[PICTURE] = smaller(output.data[PICTURE])
                output.metadata.setdefault(PICTURE, {}).update(cell.metadata.get("mystnb", {}).get("image", {}))
    text = nbformat.writes(notebook)
    text = re.sub(r" at 0x[0-9a-f]{6,}>", ">", text)  # where an object lay
    # styled tables come with random ids; numbered in order, they are the same every time
    tables = {name: f"T_{number:05x}" for number, name in enumerate(dict.fromkeys(STYLED.findall(text)))}
    return STYLED.sub(lambda match: tables[match[0]], text) + "\n"


def names(code: str) -> tuple[set[str], set[str]]:
    """The names that a cell binds, and those that it reads from cells before it."""
    bound, read = set(), set()
    for statement in ast.parse(code).body:
        nodes = [*ast.walk(statement)]
        stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        stored |= {n.arg for n in nodes if isinstance(n, ast.arg)} | {getattr(statement, "name", "")}
        loaded = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        if isinstance(statement, ast.AugAssign):
            loaded |= stored
        elif isinstance(statement, ast.Assign):  # "x = f(x)" reads x; the names of comprehensions it does not
            inner = [n for n in nodes if isinstance(n, ast.comprehension)]
            loaded -= {n.id for part in inner for n in ast.walk(part.target) if isinstance(n, ast.Name)}
        else:
            loaded -= stored
        read |= loaded - bound
        bound |= stored
    return bound, read


def only(notebook: nbformat.NotebookNode, tag: str) -> nbformat.NotebookNode | None:
    """The notebook with its code of ``tag``, what that reads, and set-up; None where nothing has that tag."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = [{*cell.metadata.get("tags", [])} & {tag, "setup"} for cell in cells]
    if not any(tag in tags for tags in tagged):
        return None
    found, kept = [names(cell.source) for cell in cells], {i for i, tags in enumerate(tagged) if tags}
    waiting = sorted(kept)
    while waiting:
        reader = waiting.pop()
        for name in found[reader][1]:
            binder = next((i for i in reversed(range(reader)) if name in found[i][0]), None)
            if binder is not None and binder not in kept:
                kept.add(binder)
                waiting.append(binder)
    notebook.cells = [cells[i] for i in sorted(kept)]
    return notebook


def execute(source: nbformat.NotebookNode, target: Path, pace: float, threads: int) -> float:
    """Run ``source`` from top to bottom, write it to ``target``; the seconds it took."""
    source.metadata.pop("widgets", None)  # of older editions
    start = time.monotonic()
    executed = execute_notebook(source, None, kernel_name=KERNEL, progress_bar=False, extra_arguments=QUIET)
    seconds = time.monotonic() - start
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(tidy(executed, seconds, pace, threads), encoding="utf-8")
    os.replace(partial, target)
    return seconds


def end(pool: ThreadPoolExecutor, waiting: Iterable[Future]) -> None:
    """Begin no further notebook, and end the kernels of those that run, or are only starting."""
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second one
    pool.shutdown(wait=False, cancel_futures=True)
    while not all(future.done() for future in waiting):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        time.sleep(0.1)
    signal.signal(signal.SIGINT, usual)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="names or paths (default: all that begin NN_)")
    parser.add_argument("--out", type=Path, help="folder of notebooks/ and figures/ (default: by profile, see above)")
    parser.add_argument("--figure", help="only what this figure of the paper needs, such as 2 (or table-1)")
    parser.add_argument("--at-once", type=int, default=2, help="how many run at once and share the cores (default: 2)")
    options = parser.parse_args()
    paths = [path.resolve() if path.exists() else HERE / path.name for path in dict.fromkeys(options.notebooks)]
    paths = paths or sorted(HERE.glob("[0-9][0-9]_*.ipynb")) or [HERE / "NN_*.ipynb"]
    if missing := [path.name for path in paths if not path.exists()]:
        parser.error(f"no notebook {', '.join(missing)} in {HERE}")
    tag = options.figure and (options.figure if "-" in options.figure else f"figure-{options.figure}")
    usual = HERE.parent if PROFILE == "paper" and not tag else HERE.parent / "build" / (tag or PROFILE)
    out = (options.out or usual).resolve()
    (out / "notebooks").mkdir(parents=True, exist_ok=True)
    os.environ["BASINLAB_OUT"] = str(out)  # the kernels write figures there
    sources = [nbformat.read(path, as_version=4) for path in paths]
    if tag:
        found = [(path, only(source, tag)) for path, source in zip(paths, sources, strict=True)]
        paths, sources = [path for path, source in found if source], [source for _, source in found if source]
        if not paths:
            parser.error(f"no cell is tagged {tag}")
    os.chdir(out / "notebooks")  # the kernels begin there
    pace, at_once = pace_of_this_machine(), max(1, min(options.at_once, len(paths)))
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, cores() // at_once)
    if at_once > 1:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # the kernels'
    jobs = dict(zip(paths, sources, strict=True))
    ahead = {path: None if tag else seconds_expected(source, pace, threads) for path, source in jobs.items()}
    if known := None not in ahead.values():
        # after the first, which is short and draws at once, the longest, so that all are busy to the end
        first, *others = jobs
        jobs = {path: jobs[path] for path in [first, *sorted(others, key=ahead.get, reverse=True)]}
        total = clock(seconds_together([ahead[path] for path in jobs], at_once))
        print(f"{len(jobs)} notebooks, about {total} minutes on this machine (profile {PROFILE})", flush=True)
    begin = time.monotonic()

    def run(path: Path) -> float:
        last = "not timed yet" if ahead[path] is None else f"about {clock(ahead[path])}"
        print(f"{path.name}: running ({last})\n", end="", flush=True)
        return execute(jobs[path], out / "notebooks" / path.name, pace, threads)

    pool = ThreadPoolExecutor(at_once)
    waiting = {pool.submit(run, path): path for path in jobs}
    try:
        for done in as_completed([*waiting]):
            seconds, elapsed, name = done.result(), time.monotonic() - begin, waiting.pop(done).name
            left = seconds_together([ahead[path] for path in waiting.values()], at_once) if known else None
            left = "time left unknown" if left is None else f"at most about {clock(left)} left"
            print(f"{name}: took {clock(seconds)}, {clock(elapsed)} elapsed, {left}\n", end="", flush=True)
    except (PapermillExecutionError, DeadKernelError, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt):
            why = "stopped"
        elif isinstance(error, PapermillExecutionError):
            print(error, flush=True)  # the traceback
            why = f"{waiting[done].name}, cell {error.cell_index + 1}: {error.ename}: {error.evalue}"
        else:
            half = " (--at-once 1 needs half)" * (at_once > 1)
            why = f"{waiting[done].name}: its kernel died, often for want of memory{half}"
        rest = " ".join(str(path) for path in paths if path in waiting.values())
        sys.exit(f"{why}\nThese are as they were, all others are done: {rest}")
    finally:
        end(pool, waiting)
    print(f"{len(paths)} notebook{'s' * (len(paths) != 1)} executed; see {out / 'notebooks'} and {out / 'figures'}")


if __name__ == "__main__":
    main()
