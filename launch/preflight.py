"""Checks nodes and links before a job: `python -m launch.preflight yamls/dbrx.yaml`.

Started through `composer`, torchrun or srun it checks all of their ranks; alone, this node, or with
--ranks as many forked ranks of it. With --trials it tries itself: each of the forked ranks in turn is slowed
down, and must be named, and between them nobody is, and nobody may be.
Exit status: 0 fit, 1 a trial failed, 2 a mistake, 78 unfit.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from train.recipe.errors import UserError
from train.recipe.exit_status import UNFIT_STATUS, USAGE_STATUS
from train.recipe.reading import load_recipe
from train.recipe.rules import validate
from train.recipe.topology import Topology

if TYPE_CHECKING:
    from train.preflight.together import Findings, PreflightRow


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.preflight", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the file")
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="fork N ranks over gloo on this node"
    )
    parser.add_argument(
        "--trials", type=int, metavar="N", help="N trials with a slow rank and N without, over --ranks (>= 3)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the findings as JSON too")
    options = parser.parse_intermixed_args(arguments)
    try:
        if options.trials is not None and (options.trials < 1 or options.ranks < 3):
            what = f"{options.trials} trials with {options.ranks} ranks tell nothing"
            raise UserError(what, key="--trials", remedy="give at least 1, with --ranks 3 or more")
        topology = Topology.from_environment()
        recipe = load_recipe(options.recipe, options.overrides)
        validate(recipe, topology, options.recipe)
    except UserError as error:
        print(error.at(options.recipe), file=sys.stderr)
        return USAGE_STATUS
    if topology.is_main:
        print("preflight: importing torch", file=sys.stderr, flush=True)
    import torch

    from data.opened import OpenedData
    from launch.verify.forked_ranks import run_ranks
    from train.preflight.together import Findings, preflight
    from train.run import start_processes

    if options.trials is not None:
        from launch.experiments.preflight_trials import run_trials

        return run_trials(options.ranks, options.trials, recipe.preflight.slow_factor, options.json)

    folder = Path(recipe.runs_dir)

    def check(topology: Topology) -> Findings:
        return preflight(OpenedData(recipe), folder, topology, torch.device("cpu"))

    if options.ranks > 1:
        findings = run_ranks(options.ranks, check)[0]
    else:
        machine = start_processes(recipe, topology)
        findings = preflight(OpenedData(recipe), folder, topology, torch.device(machine.device_type))
    if topology.is_main:
        ranks = options.ranks if options.ranks > 1 else topology.world_size
        print("\n".join(describe(findings, ranks)))
        if options.json:
            Path(options.json).write_text(json.dumps(asdict(findings), indent=1))
    return UNFIT_STATUS if findings.faults else 0


def describe(findings: "Findings", ranks: int) -> Iterator[str]:
    """The findings as a table, what is wrong, and the verdict: lines."""
    table = [("check", "where", "found", "wanted", ""), *map(_cells, _by_check(findings.rows))]
    widths = [max(len(row[column]) for row in table) for column in range(5)]
    for row in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield ""
    for word, lines in (("slow", findings.warnings), ("UNFIT", findings.faults)):
        yield from (f"{word}: {line}" for _, line in lines)
    job = f"a job of {ranks} rank{'s' * (ranks > 1)}"
    if findings.faults:
        count = len(findings.faults)
        yield f"UNFIT: {count} fault{'s' * (count > 1)}; {job} must not start here"
    elif findings.warnings:
        yield f"FIT, but slow: {job} may start; what is named above holds it up"
    else:
        yield f"FIT: {job} may start"


def _by_check(rows: "list[PreflightRow]") -> "Iterator[PreflightRow]":
    """The rows; of what was looked at on several nodes, how many are alike, or the worst of them."""
    seen = set()
    for row in rows:
        alike = [each for each in rows if each.is_of_node and each.check == row.check]
        if not row.is_of_node or len(alike) == 1:
            yield row
        elif row.check not in seen:
            seen.add(row.check)
            worst = min(alike, key=lambda each: (not each.is_bad, each.level))
            are_equal = len({each.found for each in alike}) == 1
            where = f"{len(alike)} nodes" if are_equal else f"worst of {len(alike)} nodes: {worst.where}"
            yield replace(worst, where=where)


def _cells(row: "PreflightRow") -> tuple[str, ...]:
    return row.check, row.where, row.found, row.wanted, row.verdict


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
