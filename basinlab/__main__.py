"""``python -m basinlab evaluate NAME``: sample and judge all that a bundled checkpoint's claims rest on."""

import argparse
from pathlib import Path

from . import experiment, models


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m basinlab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    evaluate = commands.add_parser("evaluate", help="write NAME's evaluation.parquet (about 15 minutes on 2 cores)")
    evaluate.add_argument("name", nargs="?", default="emoji-duplicated")
    evaluate.add_argument("--device", default="cpu")
    evaluate.add_argument("--parts", type=Path, default=Path("build/evaluation"), help="where it resumes from")
    options = parser.parse_args()
    denoiser = models.load(options.name, device=options.device)
    parts = options.parts / f"{denoiser.name}-{denoiser.fingerprint()}"
    table = experiment.evaluate(denoiser, parts)
    print(f"{len(table)} samples in {experiment.write_evaluation(denoiser, table)}")


if __name__ == "__main__":
    main()
