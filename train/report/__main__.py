"""The report of a run: `python -m train.report runs/NAME`."""

import argparse
import json
import sys
from pathlib import Path

from train.recipe import RecipeError
from train.report.page import describe, key_figures, write_report
from train.report.run_record import read_run


def main(arguments: list[str]) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.report",
        description="Writes runs/NAME/report.html from the files of the run and prints its key figures.",
    )
    parser.add_argument("run", type=Path, help="folder of a run, runs/NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the key figures as JSON too")
    options = parser.parse_args(arguments)
    try:
        path = write_report(options.run)
        figures = key_figures(read_run(options.run))
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{describe(figures)}\n{path}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
