"""The main job: `composer train/main.py RECIPE.yaml [key=value ...]`.

The whole recipe is checked here, within a second, before torch is imported.
"""

import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# `python train/main.py` puts train/ itself on the path, where its modules would shadow others.
sys.path[0] = str(ROOT)

from train.evaluate.task_files import check_suite
from train.health.environment import set_defaults
from train.hf.start import check_start
from train.leaving import Leaving
from train.recipe.catalogue import describe_keys
from train.recipe.describe import describe_run
from train.recipe.errors import UserError
from train.recipe.exit_status import USAGE_STATUS
from train.recipe.packages import check_packages
from train.recipe.reading import load_recipe, to_yaml
from train.recipe.rules import validate
from train.recipe.topology import Topology
from train.record.command import Figures, at_least, command
from train.record.log import progress
from train.record.run_folder import in_place
from train.record.start_times import START_CLOCK
from train.start.readiness import check_readiness
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
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="with --dry-run: the planner's GPU, `none` for no plan (default h100; none for a single rank)",
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
    if options.gpu and not options.dry_run:
        raise UserError("is for --dry-run", key="--gpu", remedy="remove it")
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
        print(f"{to_yaml(recipe)}\n{text}", flush=True)
        gpu = options.gpu or ("h100" if topology.world_size > 1 else "none")
        if gpu != "none" and not ask_planner(options, topology.world_size, gpu):
            return USAGE_STATUS
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


def ask_planner(options: Namespace, world_size: int, gpu: str) -> bool:
    """Has the planner print whether the memory suffices; False if it refuses, for example because of the GPU.

    It runs in a process of its own, since training imports nothing of `launch`.
    """
    command = [sys.executable, "-m", "launch.plan", options.recipe, *options.overrides]
    command += ["--gpus", str(world_size), "--gpu", gpu, "--verdict"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return (
        subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False).returncode != USAGE_STATUS
    )


if __name__ == "__main__":
    with Leaving():
        sys.exit(main(sys.argv[1:]))
