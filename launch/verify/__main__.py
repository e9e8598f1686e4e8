"""Checks of a recipe on this machine: `python -m launch.verify RECIPE.yaml`.

By default, or with `--layouts`, its tiny form is trained under every layout. `--resume`, `--faults`,
`--rollback` and `--export` check other things instead, or beside it.
"""

import argparse
import random
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from launch.verify.options import parse
from train.recipe.errors import UserError
from train.recipe.exit_status import USAGE_STATUS
from train.recipe.reading import load_recipe
from train.recipe.rules import validate
from train.recipe.schema import Precision, Recipe
from train.recipe.topology import Topology

if TYPE_CHECKING:
    from launch.verify.harness import Check


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status (1: a check has failed, 2: a mistake of the user)."""
    try:
        options = parse(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return USAGE_STATUS
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        validate(replace(recipe, parallelism=type(recipe.parallelism)()), Topology(), options.recipe)
        print(f"{recipe.name}: recipe is sound; importing torch, Composer and MegaBlocks", flush=True)
        checks = make_checks(recipe, options)
    except UserError as error:
        print(error.at(options.recipe), file=sys.stderr)
        return USAGE_STATUS
    from launch.verify.harness import run_checks

    return run_checks(recipe, checks, options.json, options.html)


def make_checks(recipe: Recipe, options: argparse.Namespace) -> "list[Check[Any]]":
    """The checks that the command line asks for, in the order in which they are run.

    Raises:
        UserError: if an option's value, or a check for this recipe, makes no sense.
    """
    makers = {
        "layouts": _layouts,
        "resume": _resume,
        "faults": _faults,
        "rollback": _rollback,
        "export": _export,
    }
    return [makers[name](recipe, options) for name in options.checks]


def _layouts(recipe: Recipe, options: argparse.Namespace) -> "Check[Any]":
    from launch.verify.parity import WORLDS, ParityCheck

    precisions = [Precision(name) for name in options.precision or ()]
    return ParityCheck(recipe, options.worlds or WORLDS, options.inputs or (), precisions, options.inject)


def _resume(_: Recipe, options: argparse.Namespace) -> "Check[Any]":
    from launch.verify.resumption import KILLS, ResumeCheck

    return ResumeCheck(options.kills or KILLS)


def _faults(_: Recipe, options: argparse.Namespace) -> "Check[Any]":
    from launch.verify.fault_injection import FaultInjectionCheck, draw

    seed, count = options.seed or 0, options.faults
    kinds = [options.only] * count if options.only else draw(count, random.Random(seed))
    return FaultInjectionCheck(kinds, seed)


def _rollback(_: Recipe, options: argparse.Namespace) -> "Check[Any]":
    from launch.verify.bad_data import BadDataCheck

    return BadDataCheck()


def _export(recipe: Recipe, _: argparse.Namespace) -> "Check[Any]":
    from launch.verify.export import ExportCheck

    return ExportCheck(recipe)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
