"""The main job: `composer train/main.py RECIPE.yaml [key=value ...]`.

The whole recipe is checked here, within a second, before torch is imported.
"""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

# `python train/main.py` puts train/ itself on the path, where its modules would shadow others.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.evaluate.task_files import check_suite
from train.health.environment import set_defaults
from train.hf.start import check_start
from train.readiness import check_readiness
from train.recipe.catalogue import describe_keys
from train.recipe.describe import describe_run
from train.recipe.errors import UserError
from train.recipe.packages import check_packages
from train.recipe.reading import load_recipe, to_yaml
from train.recipe.rules import validate
from train.recipe.topology import Topology
from train.record.command import Figures, at_least, command
from train.record.log import progress
from train.record.run_folder import in_place
from train.record.start_times import START_CLOCK
from train.warm import hand_over


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("recipe", help="YAML file, for example yamls/smoke.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override a key of the file, for example training.clip_norm=0.5",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved recipe, sizes, FLOPs and batch arithmetic; build nothing",
    )
    parser.add_argument(
        "--ranks",
        type=at_least(int, 1),
        metavar="N",
        help="with --dry-run: as if N ranks were started",
    )


@command(
    "composer train/main.py",
    "Trains the model of a recipe. The same command resumes an interrupted run.",
    add_arguments,
    json="with --dry-run: also write its figures as JSON",
    file="recipe",
    intermixed=True,
    epilog=describe_keys(),
)
def main(options: Namespace) -> int | Figures:
    """Checks the recipe, then trains; returns the run's exit status."""
    topology = Topology.from_environment()
    if options.ranks and not options.dry_run:
        raise UserError("is for --dry-run", key="--ranks", remedy="start N ranks with `composer -n N`")
    if options.ranks:
        topology = Topology(world_size=options.ranks, local_world_size=options.ranks)
    recipe = load_recipe(options.recipe, options.overrides)
    recipe = in_place(recipe, Path(options.recipe), options.overrides)
    validate(recipe, topology, options.recipe)
    changes = check_start(recipe, options.recipe)
    if topology.is_main:  # It reads every question, and one line is enough.
        check_suite(recipe, options.recipe)
        if not options.dry_run:
            check_readiness(recipe, options.recipe)
    if options.dry_run:
        if not topology.is_main:
            return 0
        text, figures = describe_run(recipe, topology)
        print(f"{to_yaml(recipe)}\n{text}")
        return Figures(figures)
    check_packages(recipe)
    set_defaults(topology)
    if (status := hand_over(sys.argv)) is not None:
        return status
    for change in changes:
        progress.info(change)
    progress.info(f"{recipe.name}: recipe is sound; importing torch, Composer and MegaBlocks")
    START_CLOCK.begin("imports")
    from train.run import run

    return run(recipe, topology)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
