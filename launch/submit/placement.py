"""Placement of a layout's rank groups on nodes.

Rank r is on node r // gpus_per_node: every launcher here numbers ranks node by node. Neighbouring ranks
differ in `expert` first (train/layout/mesh.py), so a group of `expert` ranks is contiguous and starts at a
multiple of its size. It stays within a node exactly if its size divides the number of GPUs per node.
"""

from launch.plan.hardware import GPUS
from launch.plan.search import verdict
from launch.plan.step import make_plan
from launch.submit.job import Device, Job
from train.recipe.errors import UserError
from train.recipe.phases import widest
from train.recipe.schema import Parallelism, Recipe


def expert_group(rank: int, expert: int) -> range:
    """Returns the ranks that a rank exchanges tokens with, including itself."""
    first = rank - rank % expert
    return range(first, first + expert)


def nodes_of(ranks: range, gpus_per_node: int) -> int:
    """Returns the number of nodes that contiguous ranks span."""
    return (ranks[-1] // gpus_per_node) - (ranks[0] // gpus_per_node) + 1


def check_memory(job: Job, recipe: Recipe) -> list[str]:
    """Asks the planner whether the job fits the memory of its GPUs, if it knows them; returns a line."""
    name = job.gpu_type.lower()
    if job.device is not Device.cuda or name not in GPUS:
        return []
    line, fits = verdict(make_plan(recipe, job.world_size, GPUS[name], file=job.recipe_file))
    return [line if fits else f"warning: {line}"]


def _of_experts(layout: Parallelism, gpus: int, world_size: int) -> list[str]:
    """Describes the placement of expert groups, if there are any."""
    local = layout.exchange_node_ranks
    if local is not None and gpus % local:
        raise UserError(
            f"takes {local} ranks for a node, which would cross nodes of {gpus} GPUs",
            key="parallelism.exchange_node_ranks",
            remedy=f"set it to {gpus}, or remove it",
        )
    if layout.expert > 1:
        spans = {nodes_of(expert_group(rank, layout.expert), gpus) for rank in range(world_size)}
        least = -(-layout.expert // gpus)
        if spans != {least}:
            raise UserError(
                f"groups of {layout.expert} ranks do not fit nodes of {gpus} GPUs evenly: some cross a node "
                "boundary",
                key="parallelism.expert",
                remedy=f"use a divisor or a multiple of {gpus}",
            )
        if least == 1:
            return [f"placement: expert groups of {layout.expert} stay within a node, on NVLink"]
        spread, once = "tokens cross the network once per node", ""
        if local != gpus:
            spread = f"{1 - gpus / layout.expert:.0%} of the tokens' all-to-all goes over the network"
            once = f", parallelism.exchange_node_ranks={gpus} would send it once per node"
        return [
            f"warning: expert groups of {layout.expert} span {least} nodes of {gpus} GPUs: {spread}; "
            f"parallelism.expert={gpus} would keep it on NVLink{once}"
        ]
    return []


def check_placement(job: Job, recipe: Recipe) -> list[str]:
    """Describes the placement of each kind of group in a line; lines of concern begin with `warning:`.

    Raises:
        UserError: if groups would cross a node boundary that must not, or only some expert groups do.
    """
    layout, gpus = widest(recipe).parallelism, job.gpus_per_node
    lines = _of_experts(layout, gpus, job.world_size)
    if layout.context > 1:
        inside = gpus % layout.context == 0
        where = "stay within a node, on NVLink" if inside else "cross nodes, and gather keys over the network"
        lines.append(
            f"{'placement' if inside else 'warning'}: groups of {layout.context} that share sequences {where}"
        )
    if layout.tensor > 1:
        if gpus % layout.tensor:
            raise UserError(
                f"groups of {layout.tensor} ranks exchange all tokens several times a layer, and would cross "
                f"nodes of {gpus} GPUs",
                key="parallelism.tensor",
                remedy=f"use a divisor of {gpus}",
            )
        lines.append(
            f"placement: groups of {layout.tensor} that share dense weights stay within a node, on NVLink"
        )
    copy = job.world_size // layout.replicate
    if layout.pipeline > 1:
        stage = copy // layout.pipeline
        lines.append(
            f"placement: {layout.pipeline} stages of {stage} ranks each, which send to the next stage"
        )
    if copy > gpus:
        where = f"spans {nodes_of(range(copy), gpus)} nodes"
    else:
        where = "stays within a node" if gpus % copy == 0 else "crosses node boundaries"
    lines.append(f"placement: {layout.replicate} copies of {copy} ranks each; a copy {where}")
    return lines
