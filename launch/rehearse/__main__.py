"""The start of a large job, rehearsed here: `python -m launch.rehearse yamls/dbrx.yaml --gpus 3072`.

Starts rank 0, and the first rank of the next replica, of a job whose other ranks are not there, takes a step
and plans a save; says what would not come up before the job is submitted. Needs no GPU. Each part runs in a
process of its own.
"""

import multiprocessing
import resource
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from launch.plan.hardware import GIB, GPUS, gpu_named
from launch.plan.step import Plan, make_plan
from launch.plan.text import plan_figures
from train.recipe.errors import UserError
from train.recipe.phases import widest
from train.recipe.reading import load_recipe
from train.record.command import Figures, add_recipe_arguments, at_least, command
from train.record.log import progress

Found = TypeVar("Found")

OVER_STATUS = 1
HOST_MEMORY_GIB = 1024.0


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_recipe_arguments(parser)
    parser.add_argument("--gpus", type=at_least(int, 2), default=8, help="number of GPUs (default 8)")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(GPUS)} (default h100)")
    parser.add_argument(
        "--open-files",
        type=at_least(int, 1),
        help="hard limit of open files on the nodes (default: that of this shell, `ulimit -Hn`)",
    )
    parser.add_argument(
        "--host-memory",
        type=at_least(float, 1),
        default=HOST_MEMORY_GIB,
        metavar="GIB",
        help="host memory of a node (default %(default)g)",
    )


@command(
    "python -m launch.rehearse",
    "Rehearses the start, a step and a save of a job on this machine, without its other ranks and without a "
    "GPU, and compares them with the limits of the cluster. Takes some minutes. Exit status 1: something is "
    "over its limit; 2: an error in the recipe or the options.",
    add_arguments,
    json="write the figures as JSON too",
    file="recipe",
    intermixed=True,
)
def main(options: Namespace) -> Figures:
    """Rehearses a recipe; returns status 1 if anything is over its limit."""
    recipe, gpu = load_recipe(options.recipe, options.overrides), gpu_named(options.gpu)
    if recipe.parallelism.pipeline > 1:
        what = "is not rehearsed: a rank's step would wait for those of other stages"
        raise UserError(what, key="parallelism.pipeline", remedy="set it to 1", file=options.recipe)
    plan = make_plan(recipe, options.gpus, gpu, file=options.recipe)
    return rehearse(plan, options.open_files, int(options.host_memory * GIB))


def rehearse(plan: Plan, open_files: int | None, host_memory_bytes: int) -> Figures:
    """Rehearses a planned recipe."""
    progress.info(f"{plan.recipe.name}: recipe is sound; importing torch")
    from launch.rehearse import limits
    from launch.rehearse.imports import count_imports
    from launch.rehearse.start import rehearse_start
    from launch.rehearse.step import rehearse_step
    from launch.rehearse.store import measure_store

    recipe, world, per_node = widest(plan.recipe), plan.world_size, plan.gpu.gpus_per_node
    replicas = recipe.parallelism.replicate
    ranks = [0, world // replicas] if replicas > 1 else [0]
    progress.info("importing what a rank imports, and measuring a store of this machine")
    imports = apart(count_imports)
    speed = apart(measure_store)
    starts = []
    for rank in ranks:
        progress.info(f"starting rank {rank:,} of {world:,}, and planning its save")
        starts.append(apart(rehearse_start, recipe, world, rank, per_node))
    progress.info("taking a step as rank 0, a few layers deep")
    step = apart(rehearse_step, recipe, world)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = float("inf") if hard == resource.RLIM_INFINITY else hard
    cluster = limits.ClusterLimits(open_files or allowed, host_memory_bytes, per_node)
    found = limits.figures(plan, imports, starts, step, speed, cluster)
    layout = plan_figures(plan)["layout"]
    names = " and rank ".join(map(str, ranks))
    print(
        f"{recipe.name} on {world:,} x {plan.gpu.name}: replicate {layout['replicate']} x shard "
        f"{layout['shard']} x expert {layout['expert']}; rehearsed as rank {names}\n"
    )
    print(limits.format_figures(found))
    print(
        "\nnot rehearsed: kernels, waits for the device, NCCL, and how fast networks and disks are; "
        "see docs/standin.md"
    )
    over = limits.lines_over(found)
    print(
        "\n"
        + ("\n".join(["would not come up:", *(f"  {line}" for line in over)]) if over else "would come up")
    )
    tree = {"recipe": recipe.name, "gpus": world, "gpu": plan.gpu.name, "layout": layout, "ranks": ranks}
    return Figures(tree | {"figures": limits.as_tree(found)}, OVER_STATUS if over else 0)


def apart(work: Callable[..., Found], *arguments: object) -> Found:
    """Does work in a fresh process, which ends with it.

    Raises:
        UserError: if the process was killed, for example by the kernel for its memory.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(work, *arguments).result()
    except BrokenProcessPool:
        raise UserError(
            "a part of the rehearsal was killed: is there enough memory?", remedy="use a larger machine"
        ) from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
