"""From the shell: ``evaluate`` a bundled checkpoint, ``tune`` the mitigations, ``compare`` them. All resume."""

import argparse
from pathlib import Path

from . import comparison, experiment, models
from .scorecard import ball_of


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m basinlab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    evaluate = commands.add_parser("evaluate", help="write NAME's evaluation.parquet (about 15 minutes on 2 cores)")
    evaluate.add_argument("name", nargs="?", default="emoji-duplicated")
    evaluate.add_argument("--device", default="cpu")
    evaluate.add_argument("--parts", type=Path, default=Path("build/evaluation"), help="where it resumes from")
    tune = commands.add_parser(
        "tune", help="try all settings of all mitigations on held-out prompts (about 10 minutes)"
    )
    compare = commands.add_parser("compare", help="sample the comparison of all mitigations")
    compare.add_argument("--profile", choices=sorted(comparison.PROFILES), default="reader", help="how much")
    compare.add_argument("--dry-run", action="store_true", help="print the plan and its cost, sample nothing")
    for command, folder in ((tune, "build/tuning"), (compare, "build/comparison")):
        command.add_argument("--device", default="cpu")
        command.add_argument("--parts", type=Path, default=Path(folder), help="where it resumes from")
    options = parser.parse_args()
    {"evaluate": run_evaluate, "tune": run_tune, "compare": run_compare}[options.command](options)


def run_evaluate(options: argparse.Namespace) -> None:
    denoiser = models.load(options.name, device=options.device)
    parts = options.parts / f"{denoiser.name}-{denoiser.fingerprint()}"
    table = experiment.evaluate(denoiser, parts)
    print(f"{len(table)} samples in {experiment.write_evaluation(denoiser, table)}")


def run_tune(options: argparse.Namespace) -> None:
    denoiser = models.load(comparison.MAIN, device=options.device)
    judges = experiment.Judges(denoiser.name, options.device)
    ball = ball_of(experiment.read_evaluation(denoiser), denoiser.name, judges.distance)
    table = comparison.tune(denoiser, judges, ball, options.parts)
    table.to_csv(comparison.tuning_path(), index=False)
    print(f"{len(table)} settings in {comparison.tuning_path()}")


def run_compare(options: argparse.Namespace) -> None:
    tasks = comparison.plan(options.profile)
    print(comparison.cost(tasks, options.device))
    if not options.dry_run:
        table = comparison.obtain(options.profile, options.parts, device=options.device)
        print(f"{len(table)} samples; parts in {options.parts}, the table of profile paper in {comparison.kept_path()}")


if __name__ == "__main__":
    main()
