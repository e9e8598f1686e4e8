"""A rehearsal's figures, next to the limits of the cluster."""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from launch.plan.hardware import GIB
from launch.plan.step import Plan
from launch.rehearse.imports import Imports
from launch.rehearse.start import StartCosts
from launch.rehearse.step import StepCollectives
from launch.rehearse.store import Requests, StoreSpeed, gloo_requests, nccl_requests
from train.checkpoint.files import writing_ranks
from train.health.descriptors import OTHERS, PER_GROUP
from train.record.tables import text_table

STORE_SECONDS = 180.0
"""A start may keep rank 0's store busy for this long."""
DESCRIPTORS = 1000
"""Open files of a rank, the store's clients not among them: below the usual soft limit of 1,024."""
PLANNING_SECONDS = 10.0
"""Rank 0 may plan a first save for this long; it trains meanwhile, in the same process."""


@dataclass(frozen=True)
class ClusterLimits:
    """Limits of the nodes."""

    open_files: float
    """The hard limit of each process; infinite: none."""
    host_memory_bytes: int
    """Of a node."""
    ranks_per_node: int


@dataclass(frozen=True)
class RehearsedFigure:
    """One figure of a rehearsal."""

    key: str
    what: str
    value: float
    unit: str
    """`s`, `GiB`, `bytes` or empty."""
    rank: int | None = None
    """The rank that it is of; None: of the job."""
    limit: float | None = None
    limit_of: str = ""
    remedy: str = ""

    @property
    def is_over(self) -> bool:
        """True if the figure is over its limit."""
        return self.limit is not None and self.value > self.limit


def figures(
    plan: Plan,
    imports: Imports,
    starts: list[StartCosts],
    step: StepCollectives,
    speed: StoreSpeed,
    cluster: ClusterLimits,
) -> list[RehearsedFigure]:
    """Lists all figures, in the order in which they are printed."""
    found = [
        RehearsedFigure(
            "gpu_memory_bytes",
            "GPU memory, planned",
            plan.fullest.memory.total,
            "bytes",
            limit=plan.gpu.memory_bytes,
            limit_of=f"an {plan.gpu.name}".replace("an b", "a b"),
            remedy="python -m launch.plan proposes what would make it fit",
        )
    ]
    found += [
        RehearsedFigure("imports_seconds", "imports, on one core of this machine", imports.seconds, "s", 0),
        RehearsedFigure("imports_files", "files that Python opens for them", imports.files, "", 0),
    ]
    for start in starts:
        found += _of_start(start, plan, cluster)
    found += _of_store(starts[0], step, plan, speed)
    found += _of_saves(starts, plan, cluster)
    return found + _of_step(step)


def format_figures(found: list[RehearsedFigure]) -> str:
    """Formats all figures as a table: a line for each, a column for each rank, the job's in rank 0's."""
    ranks = sorted({figure.rank for figure in found if figure.rank is not None})
    lines: dict[str, dict[int, RehearsedFigure]] = {}
    for figure in found:
        lines.setdefault(figure.key, {})[figure.rank or 0] = figure
    rows = []
    for of_ranks in lines.values():
        worst = max(of_ranks.values(), key=lambda figure: (figure.is_over, figure.value))
        cells = [_text(of_ranks[rank].value, worst.unit) if rank in of_ranks else "" for rank in ranks]
        limit = "" if worst.limit is None else f"{_text(worst.limit, worst.unit)}, {worst.limit_of}"
        verdict = "" if worst.limit is None else "OVER" if worst.is_over else "ok"
        rows.append((worst.what, *cells, limit, verdict))
    heads = ("", *(f"rank {rank:,}" if rank else "rank 0, job" for rank in ranks), "limit", "")
    return text_table(heads, rows, "<" + ">" * len(ranks) + "<<")


def lines_over(found: list[RehearsedFigure]) -> list[str]:
    """Says of each figure that is over its limit what, by how much, and what to do."""
    return [
        f"{figure.what}{'' if figure.rank is None else f' of rank {figure.rank:,}'}: "
        f"{_text(figure.value, figure.unit)}, {figure.value / figure.limit:.1f} times the "
        f"{_text(figure.limit, figure.unit)} of {figure.limit_of}; {figure.remedy}"
        for figure in found
        if figure.is_over and figure.limit
    ]


def as_tree(found: list[RehearsedFigure]) -> list[dict[str, Any]]:
    """Returns the figures as plain values for JSON; an infinite limit is none."""
    trees = [asdict(figure) | {"is_over": figure.is_over} for figure in found]
    for tree in trees:
        if tree["limit"] is not None and math.isinf(tree["limit"]):
            tree["limit"] = None
    return trees


def _of_start(start: StartCosts, plan: Plan, cluster: ClusterLimits) -> list[RehearsedFigure]:
    rank, world = start.rank, plan.world_size
    gloo = [group for group in start.groups if group.backend == "gloo" and group.is_member]
    sockets = sum(group.ranks + PER_GROUP for group in gloo)
    clients = world if rank == 0 else 1
    found = [
        RehearsedFigure(
            f"{part.replace(' ', '_')}_seconds", f"{part}, on one core of this machine", seconds, "s", rank
        )
        for part, seconds in start.seconds.items()
    ]
    found += [
        RehearsedFigure(
            "groups_of_rank",
            "process groups that it is in",
            1 + sum(g.is_member for g in start.groups),
            "",
            rank,
        ),
        RehearsedFigure("groups_named", "process groups that it must name", len(start.groups), "", rank),
        RehearsedFigure("sockets", "sockets of gloo and of rank 0's store", sockets + clients, "", rank),
        RehearsedFigure(
            "open_files",
            "open files without the store's clients",
            OTHERS + sockets,
            "",
            rank,
            DESCRIPTORS,
            "the usual soft limit",
            "give the layout more replicas (parallelism.replicate): a group of gloo holds one of them",
        ),
        RehearsedFigure(
            "all_open_files",
            "open files",
            OTHERS + sockets + clients,
            "",
            rank,
            cluster.open_files,
            "the hard limit of open files here",
            f"raise it where the job starts: ulimit -n {OTHERS + sockets + clients}",
        ),
        RehearsedFigure(
            "memory_bytes", "memory of this rehearsal, without weights", start.memory_bytes, "bytes", rank
        ),
    ]
    return found


def _of_store(
    start: StartCosts, step: StepCollectives, plan: Plan, speed: StoreSpeed
) -> list[RehearsedFigure]:
    requests = store_requests(start, step, plan.world_size)
    return [
        RehearsedFigure("store_requests", "requests to rank 0's store, of all ranks", requests.calls, ""),
        RehearsedFigure("store_bytes", "bytes that it serves", requests.bytes, "bytes"),
        RehearsedFigure(
            "store_seconds",
            f"time that it needs, at {speed.calls_per_second / 1e3:,.0f}k requests/s as here",
            speed.seconds(requests),
            "s",
            limit=STORE_SECONDS,
            limit_of="a start",
            remedy="give the layout more replicas (parallelism.replicate), or fewer ranks",
        ),
    ]


def store_requests(start: StartCosts, step: StepCollectives, world_size: int) -> Requests:
    """Returns what all ranks ask of rank 0's store until the end of the first step.

    Args:
        start: of rank 0; what its Python asked, every rank's does.
        step: of rank 0; NCCL makes a communicator of each group that speaks.
        world_size: ranks of the job.
    """
    requests = start.store.times(world_size)
    for group in start.groups:
        if group.backend == "gloo":
            requests += gloo_requests(group.ranks)
    speaking = {ranks for _, ranks in step.collectives if ranks > 1}
    for ranks in speaking:
        requests += nccl_requests(ranks).times(world_size // ranks)
    return requests


def _of_saves(starts: list[StartCosts], plan: Plan, cluster: ClusterLimits) -> list[RehearsedFigure]:
    main = starts[0]
    planning = main.planning
    assert planning is not None, "rank 0 writes"
    world = plan.world_size
    writing = Counter(
        rank // cluster.ranks_per_node for rank in writing_ranks(world, plan.recipe.parallelism.replicate)
    )
    writers_of_node = max(writing.values())
    processes = min(cluster.ranks_per_node, world) * main.process_bytes
    scaled = ", scaled from a part" if planning.is_scaled else ""
    return [
        RehearsedFigure("state_bytes", "a checkpoint", planning.state_bytes, "bytes"),
        RehearsedFigure("writers", "ranks that write it", planning.writers, ""),
        RehearsedFigure("checkpoint_files", "its files", planning.writers + world + 3, ""),
        RehearsedFigure("metadata_bytes", f"its .metadata{scaled}", planning.metadata_bytes, "bytes"),
        RehearsedFigure("shard_bytes", "what a rank writes", main.shard_bytes, "bytes", 0),
        RehearsedFigure(
            "host_memory_bytes",
            "host memory of a node: ranks, and copies to write checkpoints from",
            processes + main.shard_bytes * writers_of_node,
            "bytes",
            limit=cluster.host_memory_bytes,
            limit_of="a node, --host-memory",
            remedy="shard over more ranks (parallelism.replicate, parallelism.expert)",
        ),
        RehearsedFigure("plan_bytes", "its own plan of a save", planning.plan_bytes, "bytes", 0),
        RehearsedFigure(
            "plans_bytes",
            f"plans that it gathers, once per start{scaled}",
            planning.gathered_bytes,
            "bytes",
            0,
        ),
        RehearsedFigure(
            "planning_seconds",
            f"planning of the first save, on one core{scaled}",
            sum(planning.seconds.values()),
            "s",
            0,
            PLANNING_SECONDS,
            "rank 0, which trains meanwhile",
            "give the layout more replicas (parallelism.replicate): fewer ranks write",
        ),
        RehearsedFigure(
            "finishing_seconds",
            f"what ends every save, on one core{scaled}",
            planning.finishing_seconds,
            "s",
            0,
        ),
    ]


def _of_step(step: StepCollectives) -> list[RehearsedFigure]:
    found = [
        RehearsedFigure(
            "step_seconds", "a step of a narrow model, on one core of this machine", step.seconds, "s", 0
        )
    ]
    for (name, ranks), calls in sorted(step.collectives.items()):
        if ranks > 1:
            what = f"{name} over {ranks:,} ranks in a step, calls"
            found.append(RehearsedFigure(f"{name}_{ranks}_calls", what, calls, "", 0))
    return found


def _text(value: float, unit: str) -> str:
    if math.isinf(value):
        return "none"
    if unit == "s":
        return f"{value:,.1f} s"
    if unit == "bytes":
        return f"{value / GIB:,.2f} GiB" if value >= GIB / 10 else f"{value / 1e6:,.2f} MB"
    return f"{value:,.0f}"
