"""The cost of a recipe before it runs: `python -m launch.plan yamls/X.yaml --gpus 3072 --gpu h100`.

Needs no GPU and no torch. We have measured none of its GPU figures; docs/planner.md gives their sources.
"""

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from launch.plan.goodput import PUBLISHED_FAILURES, RESTART_MINUTES, goodput
from launch.plan.hardware import GPUS, gpu_named
from launch.plan.plan_page import write_html
from launch.plan.search import remedies, search, verdict
from launch.plan.step import make_plan
from launch.plan.table5 import format_table5, table5
from launch.plan.text import format_plan, format_search, plan_figures
from train import old_names
from train.recipe.errors import UserError
from train.recipe.reading import load_recipe
from train.record.command import Figures, add_recipe_arguments, at_least, command

DOES_NOT_FIT_STATUS = 1
SHOWN = 10


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_recipe_arguments(parser, needed=False)
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs (default 8)")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(GPUS)} (default h100)")
    parser.add_argument(
        "--imbalance",
        type=float,
        default=1.0,
        help="rows of the busiest experts relative to the mean (default 1)",
    )
    parser.add_argument(
        "--failures",
        type=at_least(float, 0),
        default=PUBLISHED_FAILURES,
        metavar="RATE",
        help="interruptions per GPU-hour (default 419 in 54 days on 16,384 GPUs, as published for Llama 3)",
    )
    parser.add_argument(
        "--restart-minutes",
        type=at_least(float, 0),
        default=RESTART_MINUTES,
        metavar="M",
        help=f"time from a failure to the first new step (default {RESTART_MINUTES:g}, assumed)",
    )
    parser.add_argument("--price", type=float, default=0.0, help="dollars per GPU-hour")
    parser.add_argument("--verdict", action="store_true", help="one line: the memory, and what makes it fit")
    parser.add_argument(
        "--search", action="store_true", help="try layouts and microbatches and rank those that fit"
    )
    parser.add_argument("--table5", action="store_true", help="the announcement's table 5 from the recipes")
    parser.add_argument(
        "--html", metavar="FILE", help="write the plan as a page: memory bars and the timeline of a step"
    )


@command(
    "python -m launch.plan",
    "Predicts the memory, traffic, time and cost of a recipe on GPUs, without a GPU.",
    add_arguments,
    json="write the figures as JSON too",
    file="recipe",
    mistakes=(OSError,),
    intermixed=True,
)
def main(options: Namespace) -> Figures:
    """Plans a recipe or prints a table; returns status 1 if the plan does not fit."""
    if options.table5:
        rows = table5()
        print(format_table5(rows))
        return Figures([asdict(row) for row in rows])
    return plan_recipe(options)


def plan_recipe(options: Namespace) -> Figures:
    """Plans one recipe, or searches its layouts."""
    if not options.recipe:
        raise UserError("is missing", key="RECIPE", remedy="give a YAML file, or --table5")
    if options.gpus < 1:
        raise UserError(f"is {options.gpus}", key="--gpus", remedy="give the number of GPUs, for example 64")
    recipe, gpu = load_recipe(options.recipe, options.overrides), gpu_named(options.gpu)
    prices = {"imbalance": options.imbalance, "dollars_per_gpu_hour": options.price}
    if options.search:
        plans = search(recipe, options.gpus, gpu, **prices)
        print(format_search(plans, SHOWN))
        if plans and options.html:
            write_html(Path(options.html), plans[0])
        return Figures([plan_figures(plan) for plan in plans], 0 if plans else DOES_NOT_FIT_STATUS)
    plan = make_plan(recipe, options.gpus, gpu, file=options.recipe, **prices)
    if options.verdict:
        line, fits = verdict(plan)
        print(line)
        return Figures(plan_figures(plan), 0 if fits else DOES_NOT_FIT_STATUS)
    kept = goodput(plan, options.failures, options.restart_minutes)
    print(format_plan(plan, kept))
    if options.html:
        write_html(Path(options.html), plan, kept)
    if not plan.fits:
        print("\nto make it fit:\n" + "\n".join(f"  {line}" for line in remedies(plan)))
    return Figures(plan_figures(plan, kept), 0 if plan.fits else DOES_NOT_FIT_STATUS)


if __name__ == "__main__":
    old_names.run_if_given("launch.plan", "--published")
    sys.exit(main(sys.argv[1:]))
