"""Reports: `python -m train.report runs/NAME`, or `--compare runs/A runs/B ...`."""

import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

from train.recipe.errors import UserError
from train.record.command import Figures, at_least, command
from train.record.log import get_logger
from train.report.progress import progress_of
from train.report.run_page import describe, key_figures, write_report
from train.report.run_record import read_run

logger = get_logger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run", type=Path, nargs="+", help="folder of a run, runs/NAME")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="lay the given runs over each other, complete or not, and show how their recipes differ; "
        "complete runs of several families are also compared at equal FLOPs",
    )
    parser.add_argument(
        "--follow",
        type=at_least(float, 1),
        nargs="?",
        const=60.0,
        metavar="SECONDS",
        help="rewrite the page every so often until nothing trains in the run's folder (default: 60)",
    )
    parser.add_argument(
        "--group",
        metavar="KEYS",
        help="comma-separated recipe keys that define a family, such as model.moe.balance "
        "(default: dense, or experts and top-k)",
    )
    parser.add_argument("--baseline", metavar="FAMILY", help="family to compare with (default: dense)")
    parser.add_argument(
        "--metric",
        choices=("nats", "bits_per_byte"),
        default="nats",
        help="unit of the loss; bits_per_byte compares tokenizers (default: nats)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/comparison"),
        help="folder for page, PNG and CSV (default: runs/comparison)",
    )


@command(
    "python -m train.report",
    "Writes runs/NAME/report.html from the run's files and prints its key figures, "
    "or compares runs: loss at equal FLOPs, FLOPs at equal loss, with confidence intervals.",
    add_arguments,
    json="also write the figures as JSON",
    mistakes=(OSError,),
)
def main(options: Namespace) -> Figures:
    """Reports on one run or compares several."""
    return compare_runs(options) if options.compare else report(options)


def report(options: Namespace) -> Figures:
    """Writes the page of one run, again and again if asked to, and prints its key figures."""
    if len(options.run) != 1:
        raise UserError("several runs given", key="RUN", remedy="add --compare, or give one")
    path = write_report(options.run[0])
    while options.follow and (progress := progress_of(read_run(options.run[0]))) and progress.is_training:
        logger.info(f"{path}: {progress}")
        time.sleep(options.follow)
        write_report(options.run[0])
    figures = key_figures(read_run(options.run[0]))
    print(f"{describe(figures)}\n{path}")
    return Figures(figures)


def compare_runs(options: Namespace) -> Figures:
    """Writes the page of several runs, and their comparison at equal FLOPs where they allow one."""
    from train.report.overlay import OVERLAY_FILE, write_overlay

    options.out.mkdir(parents=True, exist_ok=True)
    overlay = options.out / OVERLAY_FILE
    write_overlay(options.run, overlay)
    asks_for_families = options.group or options.baseline or len(options.run) > 2
    try:
        figures = compare_families(options)
    except UserError as error:
        # Two runs of one family, or unfinished ones, are compared all the same.
        if asks_for_families:
            raise
        print(f"no comparison at equal FLOPs: {error}")
        figures = Figures({})
    print(f"\n{overlay}: the runs over each other, and the difference of their recipes")
    return figures


def compare_families(options: Namespace) -> Figures:
    """Writes the comparison of families at equal FLOPs and prints its tables."""
    from train.report.compare import as_json, compare, format_comparison, read_entries, write_csv
    from train.report.compare_page import write_page, write_png

    group = [key for key in (options.group or "").split(",") if key]
    entries = read_entries(options.run, group=group, metric=options.metric)
    comparison = compare(entries, baseline=options.baseline, metric=options.metric)
    print(format_comparison(comparison))
    page = options.out / "comparison.html"
    write_page(comparison, page)
    write_png(comparison, options.out / "comparison.png")
    write_csv(comparison, options.out / "comparison.csv")
    print(f"\n{page}, with comparison.png and comparison.csv next to it")
    return Figures(as_json(comparison))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
