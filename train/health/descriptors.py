"""Open files: how many a rank needs at most, and the limit raised to that before it joins the job.

Gloo connects every rank of a group with every other, so the number grows with the layout. The usual soft
limit is 1,024, which SLURM hands on from wherever a job was submitted; past it, ranks hang while connecting.
"""

import resource

from train.recipe.errors import UserError
from train.recipe.schema import Parallelism
from train.recipe.topology import Topology

PER_GROUP = 3
"""Descriptors of a gloo group in addition to one for each of its ranks."""
OTHERS = 512
"""For everything else: libraries, devices, shards, loader workers, NCCL's own sockets."""
PLENTY = 65_536
"""More than any rank needs, and few enough to close one by one."""


def gloo_groups(layout: Parallelism, world_size: int, uses_gpus: bool) -> list[int]:
    """Returns the sizes of the gloo groups of a rank that writes checkpoints; it is in one of each.

    Args:
        layout: the recipe's layout.
        world_size: number of ranks.
        uses_gpus: training itself speaks NCCL; gloo is left to the ranks that write checkpoints.
    """
    replica = world_size // layout.replicate
    stage = replica // layout.pipeline
    groups = [replica]
    if not uses_gpus:
        groups += [world_size, stage // layout.expert]
        groups += [layout.expert] * (layout.expert > 1)
        groups += [layout.context] * (layout.context > 1)
        groups += [layout.tensor, stage // layout.tensor] if layout.tensor > 1 else []
        links = [layout.pipeline] * (4 if layout.pipeline_chunks > 1 else 2)
        groups += [*links, 2, layout.replicate * stage] if layout.pipeline > 1 else []
        groups += [layout.replicate, stage] * (layout.replicate > 1)
    return groups


def needed_descriptors(layout: Parallelism, topology: Topology, uses_gpus: bool) -> int:
    """Returns how many open files a rank needs at most."""
    sizes = gloo_groups(layout, topology.world_size, uses_gpus) if topology.world_size > 1 else []
    # All ranks connect to the store, which rank 0 keeps.
    clients = topology.world_size if topology.is_main else 0
    return OTHERS + clients + sum(size + PER_GROUP for size in sizes)


def raise_descriptor_limit(layout: Parallelism, topology: Topology, uses_gpus: bool) -> None:
    """Raises this process's limit of open files, if it may, before it joins the job.

    Raises:
        UserError: if the hard limit is below what the layout needs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = needed_descriptors(layout, topology, uses_gpus)
    is_limited = hard != resource.RLIM_INFINITY
    # Not to any hard limit: where that is 2^30, programs that close every descriptor never get done.
    target = min(max(needed, PLENTY), hard) if is_limited else max(needed, PLENTY)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    if is_limited and hard < needed:
        raise UserError(
            f"rank {topology.rank} of {topology.world_size} may need {needed:,} open files, and this node's "
            f"hard limit is {hard:,}",
            remedy=f"raise it where the job starts: ulimit -n {needed}",
        )
