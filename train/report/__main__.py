"""Reports: `python -m train.report runs/NAME`, or `--compare runs/A runs/B ...`."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from train.recipe.errors import UserError
from train.record.command import Figures, command
from train.report.run_page import describe, key_figures, write_report
from train.report.run_record import read_run


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run", type=Path, nargs="+", help="folder of a run, runs/NAME")
    parser.add_argument("--compare", action="store_true", help="compare the given runs")
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
    """Writes the page of one run and prints its key figures."""
    if len(options.run) != 1:
        raise UserError("several runs given", key="RUN", remedy="add --compare, or give one")
    path = write_report(options.run[0])
    figures = key_figures(read_run(options.run[0]))
    print(f"{describe(figures)}\n{path}")
    return Figures(figures)


def compare_runs(options: Namespace) -> Figures:
    """Writes the comparison of several runs and prints its tables."""
    from train.report.compare import as_json, compare, format_comparison, read_entries, write_csv
    from train.report.compare_page import write_page, write_png

    group = [key for key in (options.group or "").split(",") if key]
    entries = read_entries(options.run, group=group, metric=options.metric)
    comparison = compare(entries, baseline=options.baseline, metric=options.metric)
    print(format_comparison(comparison))
    options.out.mkdir(parents=True, exist_ok=True)
    page = options.out / "comparison.html"
    write_page(comparison, page)
    write_png(comparison, options.out / "comparison.png")
    write_csv(comparison, options.out / "comparison.csv")
    print(f"\n{page}, with comparison.png and comparison.csv next to it")
    return Figures(as_json(comparison))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
