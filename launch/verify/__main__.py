"""The parity gate: `python -m launch.verify RECIPE.yaml` trains a recipe's shrunken form under every layout.

Exit status 0: every layout trains the same model as one process does. 1: one does not, and the first value
that differs is named. 2: a mistake in the recipe.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.recipe.rules import validate
from train.recipe.schema import Balance, BalanceScope, Precision, Recipe
from train.recipe.topology import Topology

if TYPE_CHECKING:
    from launch.verify.case_run import CaseOutcome

USAGE_STATUS = 2


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    options = parse(arguments)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        validate(replace(recipe, parallelism=type(recipe.parallelism)()), Topology(), options.recipe)
    except UserError as error:
        print(error.at(options.recipe), file=sys.stderr)
        return USAGE_STATUS
    print(f"{recipe.name}: recipe is sound; importing torch, Composer and MegaBlocks", flush=True)
    if options.resume:
        from launch.verify.resumption import certify

        return certify(recipe, options.json, options.html, options.kills)
    return gate(recipe, options)


def gate(recipe: Recipe, options: argparse.Namespace) -> int:
    """Runs every case and reports."""
    from launch.verify import parity_report

    begun = time.monotonic()
    precisions = tuple(Precision(name) for name in options.precision) or precisions_of(recipe)
    outcomes = run_gate(recipe, tuple(options.worlds), tuple(options.inputs), precisions, options.inject)
    summary = describe(recipe, outcomes, time.monotonic() - begun)
    file = Path(options.html or f"parity-{recipe.name}.html")
    parity_report.write_html(file, summary, outcomes)
    if options.json:
        Path(options.json).write_text(json.dumps(parity_report.as_figures(summary, outcomes), indent=1))
    difference = parity_report.first_difference(outcomes)
    passed = sum(outcome.has_passed for outcome in outcomes)
    print(f"{passed} of {len(outcomes)} cases passed in {summary['seconds']} s; {file}")
    if difference:
        print(f"FAIL: {difference}", file=sys.stderr)
    return 1 if difference else 0


def precisions_of(recipe: Recipe) -> tuple[Precision, ...]:
    """fp32, where nothing hides behind rounding, and bf16 unless the recipe never uses it."""
    fp32 = recipe.training.precision is Precision.fp32
    return (Precision.fp32,) if fp32 else (Precision.fp32, Precision.bf16)


def run_gate(
    recipe: Recipe,
    worlds: tuple[int, ...],
    inputs: tuple[str, ...],
    precisions: tuple[Precision, ...],
    inject: str | None = None,
) -> "list[CaseOutcome]":
    """Every case with its outcome, printed as it comes.

    Args:
        recipe: the whole recipe.
        worlds: numbers of ranks.
        inputs: names of inputs; all where empty.
        precisions: fp32, bf16 or both.
        inject: a fault of :mod:`launch.verify.faults` to put in; its layout and input are run alone.
    """
    from launch.verify import parity_report
    from launch.verify.case_run import CaseOutcome, import_optimizers, make_reference, run_case
    from launch.verify.cases import cases, find_case, reference_of
    from launch.verify.faults import FAULTS
    from launch.verify.forked_ranks import RankError

    import_optimizers()

    if inject is None:
        fault = None
        todo = [case for each in precisions for case in cases(recipe, worlds, inputs, each)]
    else:
        fault = FAULTS[inject]
        if fault.needs_global_scope:
            recipe = with_global_scope(recipe)
        todo = [find_case(recipe, fault.layout, fault.input, fault.precision)]
    print(parity_report.header(), flush=True)
    outcomes: list[CaseOutcome] = []
    seen: tuple[object, ...] = ()
    seed = 0
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        file = Path(folder) / "reference.pt"
        for case in todo:
            begun = time.monotonic()
            outcome = CaseOutcome(case)
            try:
                if reference_of(case) != seen:
                    seed, seen = make_reference(case, file), reference_of(case)
                outcome.deviations = run_case(case, seed, file, *([fault.put_in] if fault else []))
            except RankError as error:
                outcome.error = str(error)
            outcome.seconds = time.monotonic() - begun
            outcomes.append(outcome)
            print(parity_report.line(outcome), flush=True)
    return outcomes


def with_global_scope(recipe: Recipe) -> Recipe:
    """The recipe with a balance loss over the global batch."""
    assert recipe.model.moe is not None
    moe = replace(recipe.model.moe, balance=Balance.loss, balance_scope=BalanceScope.global_batch)
    return replace(recipe, model=replace(recipe.model, moe=moe))


def describe(recipe: Recipe, outcomes: "list[CaseOutcome]", seconds: float) -> dict[str, Any]:
    """What was run, for the report."""
    from train.recipe.sizes import total_parameters
    from train.record.provenance import git_commit

    small = outcomes[0].case.recipe
    model, whole = small.model, recipe.model
    phases = [str(phase.sequence_tokens) for phase in small.data.phases]
    lengths = f" (phases of {' and '.join(phases)})" if phases else ""
    return {
        "recipe": recipe.name,
        "commit": git_commit(),
        "shrunken": f"{total_parameters(whole):,} parameters to {total_parameters(model):,}: width "
        f"{whole.d_model} to {model.d_model}, layers {whole.n_layers} to {model.n_layers}, vocabulary "
        f"{whole.vocab_size} to {model.vocab_size}, sequence {recipe.data.sequence_tokens} to "
        f"{small.data.sequence_tokens}{lengths}; features, losses, optimizer and schedule as in the recipe",
        "steps": "3, clipped to a norm that every gradient exceeds",
        "seconds": round(seconds),
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.verify",
        description="Trains the recipe's shrunken form on one process and under every layout that fits this "
        "machine, and compares losses, gradients, norms and weights step by step.",
    )
    parser.add_argument("recipe", help="YAML file, for example yamls/smoke.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the file")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="instead: kill runs at random, resume them on the same and on other layouts, and certify",
    )
    parser.add_argument("--kills", type=int, default=20, help="with --resume: number of kills (default 20)")
    parser.add_argument(
        "--worlds", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="numbers of ranks"
    )
    parser.add_argument("--inputs", nargs="+", default=[], metavar="NAME", help="inputs; all by default")
    parser.add_argument(
        "--precision",
        nargs="+",
        default=[],
        choices=["fp32", "bf16"],
        help="default: fp32, and bf16 too unless the recipe says fp32",
    )
    parser.add_argument("--inject", metavar="FAULT", help="put a known fault in, to see the gate fail")
    parser.add_argument("--json", metavar="FILE", help="write every figure")
    parser.add_argument("--html", metavar="FILE", help="default parity-NAME.html or resume-NAME.html")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
