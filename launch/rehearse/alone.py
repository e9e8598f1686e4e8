"""One rank of a job whose other ranks are not there, on torch's fake process group.

No collective moves anything. Where a value decides what happens next, every other rank sends what this one
sends. For processes of their own: the job is never left.
"""

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed import fake_pg  # noqa: F401  (registers the backend)

from launch.rehearse.store import CountingStore
from train.health.collectives import CollectiveRecorder, recorded_collectives


@dataclass(frozen=True)
class AskedGroup:
    """A process group that this rank's code asked for."""

    ranks: int
    backend: str
    """Empty: that of the job."""
    is_member: bool


@dataclass
class JoinedJob:
    """The job that a rank has joined."""

    store: CountingStore
    """Counts what Python asks of rank 0's store; backends ask nothing of it."""
    groups: list[AskedGroup] = field(default_factory=list)
    """All groups that were asked for, those of other ranks included, which every rank must name."""


Kind = tuple[str, int]
"""A collective's name, and the ranks of its group."""


class Tally(CollectiveRecorder):
    """Counts collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Kind] = Counter()

    def note(self, group: Any, operation: str, arguments: tuple[Any, ...]) -> Any:
        """Counts a collective."""
        self.calls[operation, group.size()] += 1
        return super().note(group, operation, arguments)


def join_alone(world_size: int, rank: int) -> JoinedJob:
    """Makes this process one rank of a job of ``world_size``."""
    torch.set_num_threads(1)  # Seconds are those of one core.
    job = JoinedJob(CountingStore(_EveryoneCame(world_size)))
    dist.init_process_group("fake", store=job.store, rank=rank, world_size=world_size)
    ask = distributed_c10d.new_group

    @functools.wraps(ask)
    def new_group(ranks: list[int] | None = None, *args: Any, backend: str = "", **keywords: Any) -> Any:
        members = range(world_size) if ranks is None else ranks
        job.groups.append(AskedGroup(len(members), backend or "", rank in members))
        return ask(ranks, *args, **keywords)  # of the fake backend, whichever was asked for

    exchange = dist.all_to_all_single

    @functools.wraps(exchange)
    def all_to_all_single(output: torch.Tensor, sent: torch.Tensor, *args: Any, **keywords: Any) -> Any:
        handle = exchange(output, sent, *args, **keywords)
        if not sent.is_floating_point():  # How many tokens each rank sends.
            group = keywords.get("group")
            parts = dist.get_world_size(group)
            mine = sent.reshape(parts, -1)[dist.get_rank(group)]
            output.copy_(mine.repeat(parts).view_as(output))
        return handle

    for module in (dist, distributed_c10d):
        vars(module).update(new_group=new_group, all_to_all_single=all_to_all_single)
    return job


@contextmanager
def tallied() -> Iterator[Tally]:
    """Counts the collectives of this process while the context is entered."""
    tally = Tally()
    with recorded_collectives(tally):
        yield tally


class _EveryoneCame:
    """A store in which all ranks have written what is asked for."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def add(self, key: str, amount: int) -> int:
        return self.world_size

    def set(self, key: str, value: str | bytes) -> None:
        pass

    def wait(self, keys: list[str], timeout: Any = None) -> None:
        pass
