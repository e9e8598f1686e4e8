"""Families of models trained at several sizes: `python -m launch.experiments.ladder LADDER.yaml`."""

import argparse
import dataclasses
import fnmatch
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.experiments.ladder.plan import LadderPlan, Run
from launch.experiments.ladder.runner import Timings, missing, summary_of, train_missing
from launch.experiments.ladder.search import chosen, search_rates, told
from train.recipe.errors import UserError
from train.recipe.topology import usable_cores
from train.recipe.units import duration, short_number

USAGE_STATUS = 2
INCOMPLETE_STATUS = 3


def main(arguments: list[str]) -> int:
    """Runs what is missing, compares what is there; 2: a mistake of the user, 3: runs are missing."""
    options = parse(arguments)
    try:
        plan = LadderPlan(options.ladder, scale=options.scale, overrides=options.overrides)
        folder = Path(plan.runs()[0].recipe.runs_dir) / plan.label
        if options.dry_run:
            print(describe(plan, Timings(folder / "timings.jsonl"), options.workers))
            return 0
        return climb(plan, folder, options)
    except UserError as error:
        print(error.at(str(options.ladder)), file=sys.stderr)
        return USAGE_STATUS


def climb(plan: LadderPlan, folder: Path, options: argparse.Namespace) -> int:
    """Searches rates, trains, compares, tells MLflow."""
    deadline = time.time() + options.hours * 3600 if options.hours else None
    how = {"workers": options.workers, "deadline": deadline}
    searched, losses = search_rates(plan, lambda runs: train_missing(runs, folder, **how))
    if searched and not losses:
        print("the search of learning rates is not complete; the same command goes on with it")
        return INCOMPLETE_STATUS
    for line in told(losses):
        print(line)
    runs = plan.runs(chosen(losses))
    wanted = [run for run in runs if fnmatch.fnmatch(run.recipe.name, options.only)]
    train_missing(wanted, folder, **how)
    left = missing(runs)
    there = [run for run in runs if run not in left]
    if len({run.family for run in there}) > 1:
        compare_runs(plan, folder, there, options)
    if options.mlflow:
        from launch.experiments.ladder.record import send
        from train.tracking.mlflow_upload import UploadError

        try:
            send(plan.ladder, plan.label, folder, [*searched, *there], is_complete=not left)
        except UploadError as error:
            print(f"tracking: not everything is sent ({error}); the same command sends the rest")
    if left:
        print(f"{len(left)} of {len(runs)} runs are missing; the same command goes on with them")
    return INCOMPLETE_STATUS if left else 0


def compare_runs(plan: LadderPlan, folder: Path, there: Sequence[Run], options: argparse.Namespace) -> None:
    """Prints and writes the comparison of complete runs, each under its family's name."""
    from launch.experiments.ladder.record import write_comparison
    from train.report.compare import compare, format_comparison, read_entries

    names = {run.recipe.name: run.family for run in there}
    dirs = [Path(run.recipe.runs_dir) / run.recipe.name for run in there]
    entries = read_entries(dirs, metric=plan.ladder.metric)
    entries = [dataclasses.replace(entry, family=names[entry.name]) for entry in entries]
    if plan.ladder.baseline not in names.values():
        print(f"no run of {plan.ladder.baseline} is complete: nothing to compare with")
        return
    comparison = compare(entries, baseline=plan.ladder.baseline, metric=plan.ladder.metric)
    write_comparison(comparison, folder)
    timings = Timings(folder / "timings.jsonl").read()
    print(f"\n{format_comparison(comparison)}\n")
    if timings:
        off = sorted(it.taken_seconds / it.predicted_seconds for it in timings)
        print(
            f"time taken over predicted: median {off[len(off) // 2]:.2f}, {off[0]:.2f} to {off[-1]:.2f}, "
            f"{len(off)} runs"
        )
    print(f"{folder}/comparison.html, .png, .csv, .json; times in timings.jsonl")
    if options.json:
        options.json.write_text((folder / "comparison.json").read_text())


def describe(plan: LadderPlan, timings: Timings, workers: int) -> str:
    """The runs with their sizes and predicted times."""
    from train.recipe import sizes

    heads = f"{'run':44}{'total':>8}{'active':>8}{'tokens':>8}{'FLOPs':>10}{'predicted':>14}"
    lines, seconds = [heads], 0.0
    for run in [*plan.search_runs(), *plan.runs()]:
        state = "done" if summary_of(run) else ""
        predicted = timings.predict(run)
        seconds += 0 if state else predicted
        model = run.recipe.model
        lines.append(
            f"{run.recipe.name:44}{short_number(sizes.total_parameters(model)):>8}"
            f"{short_number(sizes.active_parameters(model)):>8}"
            f"{short_number(sizes.trained_tokens(run.recipe)):>8}{run.flops:>10.3g}"
            f"{state or duration(predicted):>14}"
        )
    lines.append(f"about {duration(seconds / workers)} with {workers} runs at once")
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.experiments.ladder",
        description="Trains the runs of a ladder that are missing, several at once, and compares them. "
        "The same command goes on with what was cut off.",
    )
    parser.add_argument("ladder", type=Path, help="YAML file, for example yamls/ladder.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over every recipe")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their times; train nothing")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="train runs with such names alone")
    parser.add_argument("--hours", type=float, help="begin no run that would end later (default: no limit)")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="runs at once (default: cores)")
    parser.add_argument("--scale", type=float, default=1.0, help="of every run's length (default: 1)")
    parser.add_argument("--no-mlflow", dest="mlflow", action="store_false", help="keep it out of MLflow")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparison as JSON there too")
    options = parser.parse_intermixed_args(arguments)
    if options.workers < 1 or options.scale <= 0:
        parser.error("--workers must be at least 1 and --scale above 0")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
