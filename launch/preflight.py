"""Checks nodes and links before a job: `python -m launch.preflight yamls/dbrx.yaml`.

Started through composer, torchrun or srun it checks all of their ranks; by itself it checks this node, with
--ranks N using N forked ranks.
Exit status: 0 fit, 2 a usage or recipe error, 78 unfit.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from train import old_names
from train.recipe.exit_status import UNFIT_STATUS
from train.recipe.reading import load_recipe
from train.recipe.rules import validate
from train.recipe.topology import Topology
from train.record import log
from train.record.command import Figures, add_recipe_arguments, command
from train.record.tables import text_table

if TYPE_CHECKING:
    from train.preflight.together import Findings, PreflightRow

logger = log.get_logger("launch.preflight")


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_recipe_arguments(parser)
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="fork N gloo ranks on this node (default 1)"
    )


@command(
    "python -m launch.preflight",
    __doc__,
    add_arguments,
    json="write the findings as JSON too",
    file="recipe",
    intermixed=True,
)
def main(options: Namespace) -> int | Figures:
    """Checks the nodes and prints the findings."""
    topology = Topology.from_environment()
    recipe = load_recipe(options.recipe, options.overrides)
    validate(recipe, topology, options.recipe)
    logger.info("preflight: importing torch")
    import torch

    from data.opened import OpenedData
    from launch.verify.forked_ranks import run_ranks
    from train.preflight.together import Findings, preflight
    from train.run import start_processes

    folder = Path(recipe.runs_dir)

    def check(topology: Topology) -> Findings:
        return preflight(OpenedData(recipe), folder, topology, torch.device("cpu"))

    if options.ranks > 1:
        findings = run_ranks(options.ranks, check)[0]
    else:
        machine = start_processes(recipe, topology)
        findings = preflight(OpenedData(recipe), folder, topology, torch.device(machine.device_type))
    status = UNFIT_STATUS if findings.faults else 0
    if not topology.is_main:
        return status
    ranks = options.ranks if options.ranks > 1 else topology.world_size
    print("\n".join(describe(findings, ranks)))
    return Figures(asdict(findings), status)


def describe(findings: "Findings", ranks: int) -> Iterator[str]:
    """Yields the lines of the table of findings, the problems and the verdict."""
    rows = map(_cells, _by_check(findings.rows))
    yield from text_table(("check", "where", "found", "wanted", ""), rows, "<<<<<").splitlines()
    yield ""
    for word, lines in (("slow", findings.warnings), ("UNFIT", findings.faults)):
        yield from (f"{word}: {line}" for _, line in lines)
    job = f"a job of {ranks} rank{'s' * (ranks > 1)}"
    if findings.faults:
        count = len(findings.faults)
        yield f"UNFIT: {count} problem{'s' * (count > 1)}; {job} must not start here"
    elif findings.warnings:
        yield f"FIT, but slow: {job} may start, held up by the above"
    else:
        yield f"FIT: {job} may start"


def _by_check(rows: "list[PreflightRow]") -> "Iterator[PreflightRow]":
    """Yields the rows, merging a check of several nodes into one: their number if equal, else the worst."""
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
    old_names.run_if_given("launch.preflight", "--trials", keeps_value=True)
    sys.exit(main(sys.argv[1:]))
