"""Comparison of model families at several sizes: `python -m launch.experiments.ladder LADDER.yaml`."""

import dataclasses
import fnmatch
import os
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from launch.experiments.ladder.plan import LadderPlan, Rates, Run
from launch.experiments.ladder.results import is_complete
from launch.experiments.ladder.runner import RECORD, Timings, missing, train_missing
from launch.experiments.ladder.search import chosen, search_rates, summary_lines
from train.recipe.errors import UserError
from train.recipe.topology import usable_cores
from train.recipe.units import duration, short_number
from train.record.command import Figures, Outcome, command
from train.record.tables import text_table

INCOMPLETE_STATUS = 3


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("ladder", type=Path, help="YAML file, for example yamls/ladder.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over every recipe")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their times; train nothing")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="train only runs with such names")
    parser.add_argument("--hours", type=float, help="begin no run that would end later (default: no limit)")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="runs at once (default: cores)")
    parser.add_argument("--nice", type=int, default=0, metavar="N", help="19: give way to other programs")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on every run's length (default: 1)")
    parser.add_argument(
        "--transfer",
        metavar="FAMILY:SIZE",
        help="search only this one's rate, and scale all others from it by model.transfer_base",
    )
    parser.add_argument("--no-mlflow", dest="mlflow", action="store_false", help="send nothing to MLflow")


@command(
    "python -m launch.experiments.ladder",
    "Trains the missing runs of a ladder, several at once, and compares all of them. Stop it any time; the "
    "same command continues.",
    add_arguments,
    json="write the comparison as JSON there too",
    file="ladder",
    intermixed=True,
)
def main(options: Namespace) -> Outcome:
    """Trains the missing runs and compares the complete ones; status 3: runs are still missing."""
    if options.workers < 1 or options.scale <= 0:
        raise UserError("--workers must be at least 1 and --scale above 0")
    plan = LadderPlan(
        options.ladder, scale=options.scale, overrides=options.overrides, transfer=options.transfer
    )
    folder = Path(plan.runs()[0].recipe.runs_dir) / plan.label
    if options.dry_run:
        print(describe(plan, Timings(folder / "timings.jsonl"), options.workers))
        return 0
    os.nice(options.nice)
    # As Ctrl-C: the runs are ended, and continue from their checkpoints when the command is given again.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return climb(plan, folder, options)
    finally:
        signal.signal(signal.SIGTERM, before)


def climb(plan: LadderPlan, folder: Path, options: Namespace) -> Outcome:
    """Searches learning rates, trains block by block, compares, sends to MLflow."""
    ladder, searched, rates = plan.ladder, list[Run](), Rates()
    by_parabola = ladder.search is not None and ladder.search.by_parabola
    deadline = time.time() + options.hours * 3600 if options.hours else None

    def train(runs: Sequence[Run]) -> list[Run]:
        return train_missing(
            runs,
            folder,
            workers=options.workers,
            deadline=deadline,
            average=ladder.average,
            counts_diverged=ladder.counts_diverged,
        )

    for name, block in plan.blocks.items():
        if ladder.blocks:
            print(f"block {name}", flush=True)
        tried, losses = search_rates(plan, train, block)
        if tried and not losses:
            print("the search for learning rates is not complete; run the same command again to continue")
            return INCOMPLETE_STATUS
        for line in summary_lines(losses, by_parabola=by_parabola):
            print(line)
        searched += [run for run in tried if run not in searched]
        rates |= chosen(losses, by_parabola=by_parabola)
        of_block = plan.runs_of(block, rates) if ladder.blocks else plan.runs(rates)
        train([run for run in of_block if fnmatch.fnmatch(run.recipe.name, options.only)])
    runs = plan.runs(rates)
    left = missing(runs, ladder.average)
    there = [run for run in runs if run not in left]
    print(f"{folder / RECORD} has every run")
    # Families of several blocks have different tokens and questions.
    is_one = not ladder.blocks and len({run.family for run in there}) > 1
    comparison = compare_runs(plan, folder, there) if is_one else None
    if options.mlflow:
        from launch.experiments.ladder.record import send
        from train.tracking.mlflow_upload import UploadError

        try:
            send(plan.ladder, plan.label, folder, [*searched, *there], is_complete=not left)
        except UploadError as error:
            print(f"tracking: not everything was sent ({error}); run the same command again to send the rest")
    if left:
        print(f"{len(left)} of {len(runs)} runs are missing; run the same command again to continue")
    status = INCOMPLETE_STATUS if left else 0
    return Figures(comparison, status) if comparison else status


def compare_runs(plan: LadderPlan, folder: Path, there: Sequence[Run]) -> str | None:
    """Prints and writes the comparison of complete runs, each under its family's name; returns it as JSON."""
    from launch.experiments.ladder.record import FIGURES, write_comparison
    from train.report.compare import compare, format_comparison, read_entries

    names = {run.recipe.name: run.family for run in there}
    dirs = [Path(run.recipe.runs_dir) / run.recipe.name for run in there]
    entries = read_entries(dirs, metric=plan.ladder.metric)
    entries = [dataclasses.replace(entry, family=names[entry.name]) for entry in entries]
    if plan.ladder.baseline not in names.values():
        print(f"no run of {plan.ladder.baseline} is complete: nothing to compare with")
        return None
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
    return (folder / FIGURES).read_text()


def describe(plan: LadderPlan, timings: Timings, workers: int) -> str:
    """Lists the runs with their sizes and predicted times."""
    from train.recipe import sizes

    rows, seconds = [], 0.0
    for run in [*plan.search_runs(), *plan.runs()]:
        state = "done" if is_complete(run, plan.ladder.average) else ""
        predicted = timings.predict(run)
        seconds += 0 if state else predicted
        model = run.recipe.model
        counts = (
            sizes.total_parameters(model),
            sizes.active_parameters(model),
            sizes.trained_tokens(run.recipe),
        )
        numbers = [short_number(count) for count in counts]
        rows.append((run.recipe.name, *numbers, f"{run.flops:.3g}", state or duration(predicted)))
    table = text_table(("run", "total", "active", "tokens", "FLOPs", "predicted"), rows, "<>>>>>")
    return f"{table}\nabout {duration(seconds / workers)} with {workers} runs at once"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
