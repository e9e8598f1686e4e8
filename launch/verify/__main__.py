"""Checks of a recipe on this machine: `python -m launch.verify RECIPE.yaml`.

By default, or with `--layouts`, the tiny recipe is trained under every layout. `--resume`, `--faults`,
`--rollback`, `--corruption` and `--export` run other checks instead, or as well.
"""

import random
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from launch.verify.options import add_arguments, bind_count, choose_checks
from train.recipe.reading import load_recipe
from train.recipe.rules import validate
from train.recipe.schema import Precision, Recipe
from train.recipe.topology import Topology
from train.record.command import Figures, command

if TYPE_CHECKING:
    from launch.verify.harness import Check


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status (1: a check has failed, 2: a user error)."""
    return verify(bind_count(arguments))


@command(
    "python -m launch.verify",
    "Trains the tiny recipe on forked ranks of this machine and checks its results. Exit status 0: all "
    "checks pass; 1: a check fails, and the failures are listed; 2: an error in the recipe or the options.",
    add_arguments,
    json="every figure",
    file="recipe",
    intermixed=True,
)
def verify(options: Namespace) -> Figures:
    """Runs the checks that are asked for."""
    choose_checks(options)
    recipe = load_recipe(options.recipe, options.overrides)
    validate(replace(recipe, parallelism=type(recipe.parallelism)()), Topology(), options.recipe)
    print(f"{recipe.name}: recipe is sound; importing torch, Composer and MegaBlocks", flush=True)
    checks = make_checks(recipe, options)
    from launch.verify.harness import run_checks

    return run_checks(recipe, checks, options.html)


def make_checks(recipe: Recipe, options: Namespace) -> "list[Check[Any]]":
    """Builds the checks that the command line asks for, in the order in which they run.

    Raises:
        UserError: if an option's value, or a check for this recipe, makes no sense.
    """
    makers = {
        "layouts": _layouts,
        "resume": _resume,
        "faults": _faults,
        "rollback": _rollback,
        "corruption": _corruption,
        "export": _export,
    }
    return [makers[name](recipe, options) for name in options.checks]


def _layouts(recipe: Recipe, options: Namespace) -> "Check[Any]":
    from launch.verify.parity import WORLDS, ParityCheck

    precisions = [Precision(name) for name in options.precision or ()]
    return ParityCheck(recipe, options.worlds or WORLDS, options.inputs or (), precisions, options.inject)


def _resume(_: Recipe, options: Namespace) -> "Check[Any]":
    from launch.verify.resumption import KILLS, ResumeCheck

    return ResumeCheck(options.kills or KILLS)


def _faults(_: Recipe, options: Namespace) -> "Check[Any]":
    from launch.verify.fault_injection import FaultInjectionCheck, draw

    seed, count = options.seed or 0, options.faults
    kinds = [options.only] * count if options.only else draw(count, random.Random(seed))
    return FaultInjectionCheck(kinds, seed)


def _rollback(_: Recipe, options: Namespace) -> "Check[Any]":
    from launch.verify.bad_data import BadDataCheck

    return BadDataCheck()


def _corruption(_: Recipe, options: Namespace) -> "Check[Any]":
    from launch.verify.corruption import FLIPS, CorruptionCheck

    flips = options.flips or FLIPS
    return CorruptionCheck(flips, flips)


def _export(recipe: Recipe, _: Namespace) -> "Check[Any]":
    from launch.verify.export import ExportCheck

    return ExportCheck(recipe)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
