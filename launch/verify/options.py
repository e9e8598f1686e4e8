"""Command line of the checks. Needs no torch, so that mistakes in it are reported at once."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from train.recipe.errors import UserError
from train.record.command import add_recipe_arguments, at_least

CHECKS = {
    "layouts": "the parity gate: every layout against one unsharded process (the default)",
    "resume": "kills and preempts runs at random; they must resume exactly, also under other layouts",
    "faults": "injects N faults (default 50) into runs, which must end as if there had been none",
    "rollback": "trains on documents of noise; the run must roll back and end as if it had never read them",
    "corruption": "flips bits on one rank, which steps computed again must find",
    "export": "exports a trained run; transformers must compute the same from it",
}
"""The checks in the order in which they run, with their help."""
OPTIONS_OF = {
    "layouts": ("worlds", "inputs", "precision", "inject"),
    "resume": ("kills",),
    "faults": ("only", "seed"),
    "corruption": ("flips",),
}
"""Options that only one check reads."""
FAULTS = 50


def bind_count(arguments: Sequence[str]) -> list[str]:
    """Joins `--faults` to the number that may follow it: argparse would take a recipe there for it."""
    bound: list[str] = []
    for argument in arguments:
        if bound and bound[-1] == "--faults":
            is_count = argument.lstrip("-").isdigit()
            bound[-1:] = [f"--faults={argument}"] if is_count else [f"--faults={FAULTS}", argument]
        else:
            bound.append(argument)
    return bound


def choose_checks(options: Namespace) -> None:
    """Sets ``checks``, the names of the checks to run. Options that were not given are None.

    Raises:
        UserError: if an option is given that none of the checks reads.
    """
    options.checks = [name for name in CHECKS if options.all or getattr(options, name)] or ["layouts"]
    if options.all and options.faults is None:
        options.faults = FAULTS
    for check, names in OPTIONS_OF.items():
        for name in names:
            if check not in options.checks and getattr(options, name) is not None:
                what = f"is read only by --{check}, which is not given"
                raise UserError(what, key=f"--{name}", remedy=f"add --{check} or drop --{name}")


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments."""
    parser.allow_abbrev = False
    add_recipe_arguments(parser, example="yamls/smoke.yaml")
    checks = parser.add_argument_group("checks, any of them")
    for name, help_text in CHECKS.items():
        if name == "faults":
            checks.add_argument(
                "--faults", nargs="?", const=FAULTS, type=at_least(int, 1), metavar="N", help=help_text
            )
        else:
            checks.add_argument(f"--{name}", action="store_true", help=help_text)
    checks.add_argument("--all", action="store_true", help="all six")
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="page, by default CHECK-RECIPE.html (parity-RECIPE.html for layouts); of several checks, "
        "one each: FILE with the check's name before its suffix",
    )
    _add_options_of_checks(parser)


def _add_options_of_checks(parser: ArgumentParser) -> None:
    layouts = parser.add_argument_group("--layouts")
    layouts.add_argument(
        "--worlds", type=at_least(int, 1), nargs="+", metavar="N", help="numbers of ranks (default: 1 2 4)"
    )
    layouts.add_argument("--inputs", nargs="+", metavar="NAME", help="inputs (default: all)")
    layouts.add_argument(
        "--precision",
        nargs="+",
        choices=["fp32", "bf16"],
        help="default: fp32, and bf16 too unless the recipe says fp32",
    )
    layouts.add_argument("--inject", metavar="FAULT", help="inject a known fault, to see the gate fail")
    resume = parser.add_argument_group("--resume")
    resume.add_argument("--kills", type=at_least(int, 1), metavar="N", help="number of kills (default: 20)")
    corruption = parser.add_argument_group("--corruption")
    corruption.add_argument(
        "--flips",
        type=at_least(int, 1),
        metavar="N",
        help="persistent faults, and healthy runs (default: 20)",
    )
    faults = parser.add_argument_group("--faults")
    faults.add_argument("--only", metavar="KIND", help="one kind of fault, for example SIGKILL")
    faults.add_argument("--seed", type=int, metavar="N", help="of the random draw (default: 0)")
