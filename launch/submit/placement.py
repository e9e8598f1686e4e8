"""Where the ranks of each group of a layout land on nodes, by arithmetic.

Rank r is on node r // gpus_per_node. Neighbouring ranks differ in `expert` first (train/layout/mesh.py), so
a group of `expert` ranks is a run of neighbours that begins at a multiple of its size: it stays inside a
node exactly if its size divides the node's GPUs. Every launcher here numbers ranks node by node.
"""

from launch.submit.job import Job
from train.recipe.errors import UserError
from train.recipe.schema import Recipe


def expert_group(rank: int, expert: int) -> range:
    """Ranks that exchange tokens with a rank."""
    first = rank - rank % expert
    return range(first, first + expert)


def nodes_of(ranks: range, gpus_per_node: int) -> int:
    """On how many nodes some neighbouring ranks are."""
    return (ranks[-1] // gpus_per_node) - (ranks[0] // gpus_per_node) + 1


def check_placement(job: Job, recipe: Recipe) -> list[str]:
    """How the groups lie on the nodes, a line each; a line that begins with `warning:` asks to be read.

    Raises:
        UserError: where some expert groups would lie across a node's border and others not.
    """
    layout, gpus = recipe.parallelism, job.gpus_per_node
    lines = []
    if layout.expert > 1:
        spans = {nodes_of(expert_group(rank, layout.expert), gpus) for rank in range(job.world_size)}
        least = -(-layout.expert // gpus)
        if spans != {least}:
            raise UserError(
                f"{layout.expert} ranks do not fit the nodes' {gpus} GPUs evenly: some groups lie across "
                "a node's border",
                key="parallelism.expert",
                remedy=f"take a divisor or a multiple of {gpus}",
            )
        if least == 1:
            lines.append(f"placement: expert groups of {layout.expert} stay inside a node, on NVLink")
        else:
            lines.append(
                f"warning: expert groups of {layout.expert} span {least} nodes of {gpus} GPUs: "
                f"{1 - gpus / layout.expert:.0%} of the tokens' all-to-all goes over the network; "
                f"parallelism.expert={gpus} would keep it on NVLink"
            )
    copy = job.world_size // layout.replicate
    if copy > gpus:
        where = f"spans {nodes_of(range(copy), gpus)} nodes"
    else:
        where = "stays inside a node" if gpus % copy == 0 else "lies across nodes"
    lines.append(f"placement: {layout.replicate} copies of {copy} ranks each; a copy {where}")
    return lines
