"""From the shell: ``evaluate`` a bundled checkpoint, ``tune`` the mitigations, ``compare`` them; fetch ``references``.

All resume, and all share their work among the processes of ``accelerate launch --module basinlab``.
"""

import argparse
from pathlib import Path

from . import experiment, models
from .bundled import comparison, evaluation
from .bundled.scorecard import ball_of
from .published import scenarios


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m basinlab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    evaluate = commands.add_parser("evaluate", help="write NAME's evaluation.parquet (about 15 minutes on 2 cores)")
    evaluate.add_argument("name", nargs="?", default="emoji-duplicated")
    tune = commands.add_parser(
        "tune", help="try all settings of all mitigations on held-out prompts (about 10 minutes)"
    )
    compare = commands.add_parser("compare", help="sample the comparison of all mitigations")
    compare.add_argument("--profile", choices=sorted(comparison.PROFILES), default="reader", help="how much")
    compare.add_argument("--dry-run", action="store_true", help="print the plan and its cost, sample nothing")
    for command, folder in ((evaluate, "build/evaluation"), (tune, "build/tuning"), (compare, "build/comparison")):
        command.add_argument("--device", help="default: cpu; of several processes each its own GPU")
        command.add_argument("--parts", type=Path, default=Path(folder), help="where it resumes from")
    references = commands.add_parser("references", help="fetch the reference pictures of scenario NAME, by their urls")
    references.add_argument("name", help=f"one of {', '.join(scenarios.names())}, or a .yaml file")
    references.add_argument("--folder", type=Path, help="where it resumes from (default: build/references/NAME)")
    references.add_argument("--again", action="store_true", help="also try anew what was gone or refused")
    options = parser.parse_args()
    team = experiment.processes()
    if getattr(options, "device", None) is None:
        options.device = str(team.device) if team.num_processes > 1 else "cpu"
    runs = {"evaluate": run_evaluate, "tune": run_tune, "compare": run_compare, "references": run_references}
    runs[options.command](options)
    team.destroy_process_group()


def run_evaluate(options: argparse.Namespace) -> None:
    denoiser = models.load(options.name, device=options.device)
    parts = options.parts / f"{Path(denoiser.name).name}-{denoiser.fingerprint()}"
    table = evaluation.evaluate(denoiser, parts)
    if experiment.processes().is_main_process:
        print(f"{len(table)} samples in {evaluation.write_evaluation(denoiser, table)}")


def run_tune(options: argparse.Namespace) -> None:
    denoiser = models.load(comparison.MAIN, device=options.device)
    judges = evaluation.Judges(denoiser.name, options.device)
    ball = ball_of(evaluation.read_evaluation(denoiser), denoiser.name, judges.distance)
    table = comparison.tune(denoiser, judges, ball, options.parts)
    if experiment.processes().is_main_process:
        table.to_csv(comparison.tuning_path(), index=False)
        print(f"{len(table)} settings in {comparison.tuning_path()}")


def run_compare(options: argparse.Namespace) -> None:
    team = experiment.processes()
    if team.is_main_process:
        print(comparison.cost(comparison.plan(options.profile), options.device, shared_by=team.num_processes))
    if not options.dry_run:
        table = comparison.obtain(options.profile, options.parts, device=options.device)
        kept = f", the table of profile paper in {comparison.kept_path()}"
        team.print(f"{len(table)} samples; parts in {options.parts}{kept}")


def run_references(options: argparse.Namespace) -> None:
    if experiment.processes().is_main_process:
        found = scenarios.fetch_references(scenarios.read(options.name), folder=options.folder, again=options.again)
        counts = found["status"].value_counts()
        print(", ".join(f"{counts.get(status, 0)} {status}" for status in ("got", "gone", "refused", "failed")))


if __name__ == "__main__":
    main()
