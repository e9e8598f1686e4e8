"""A flight recorder for gloo, which lacks one: the collectives that this process has issued and waits in.

Every collective of torch.distributed's Python functions goes through a method of ``ProcessGroup`` and is
awaited with ``Work.wait``; FSDP2, MegaBlocks, Composer and this project use no others in training.
:func:`recorded_collectives` wraps both, and :func:`collectives_of` decides when. Functional collectives,
which are C++ from end to end, are not recorded. NCCL is never wrapped: it has its own recorder
(:mod:`train.health.nccl`), and each of its handles would keep a collective's output in memory.
"""

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from train.health.nccl import NcclRecorder
from train.health.snapshot import IssuedCollective, Snapshot

KEPT = 64
"""Collectives kept; more than one layer issues for a microbatch."""
METHODS = tuple(
    name
    for name in (
        "_allgather_base",
        "_reduce_scatter_base",
        "all_gather_single",
        "all_gather_single_coalesced",
        "all_to_all_single",
        "allgather",
        "allgather_coalesced",
        "allgather_into_tensor_coalesced",
        "allreduce",
        "allreduce_coalesced",
        "alltoall",
        "alltoall_base",
        "barrier",
        "broadcast",
        "gather",
        "gather_single",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_single",
        "reduce_scatter_single_coalesced",
        "reduce_scatter_tensor_coalesced",
        "scatter",
    )
    if hasattr(dist.ProcessGroup, name)
)
"""Collectives of the installed torch's process groups; those ending in `single` are newer than torch 2.7."""


class Recorder(Protocol):
    """Recorder of this process's collectives, for the watchdog."""

    def progress(self) -> int:
        """Returns a number that changes while collectives are issued; read every few seconds."""
        ...

    def snapshot(self) -> Snapshot:
        """Returns everything recorded; read when training hangs."""
        ...


@dataclass
class _Seen:
    collective: IssuedCollective
    work: Any
    """torch's handle until the collective is complete, then None."""


@dataclass
class CollectiveRecorder:
    """The last collectives of this process, and which of them it still waits in."""

    issued: dict[str, int] = field(default_factory=dict)
    """Number of collectives issued, by group."""
    ranks: dict[str, list[int]] = field(default_factory=dict)
    """Global ranks by group."""
    waited_seconds: float = 0.0
    """Time that the main thread has spent in ``wait``."""
    _seen: deque[_Seen] = field(default_factory=lambda: deque(maxlen=KEPT))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def progress(self) -> int:
        """Returns the number of collectives issued."""
        return sum(list(self.issued.values()))

    def snapshot(self) -> Snapshot:
        """Returns counts and ranks by group, and the incomplete collectives."""
        return Snapshot(dict(self.issued), dict(self.ranks), self.waiting())

    def last(self, count: int = 8) -> list[IssuedCollective]:
        """Returns the newest collectives, oldest first."""
        with self._lock:
            return [seen.collective for seen in list(self._seen)[-count:]]

    def waiting(self) -> list[IssuedCollective]:
        """Returns the collectives that are issued and not complete."""
        with self._lock:
            return [seen.collective for seen in self._seen if not _is_complete(seen)]

    def note(self, group: Any, operation: str, arguments: tuple[Any, ...]) -> _Seen:
        """Notes that a collective is about to be issued."""
        name = group.group_name
        with self._lock:
            if name not in self.ranks:
                self.ranks[name] = dist.get_process_group_ranks(group)
            self.issued[name] = self.issued.get(name, 0) + 1
            size = max((_size_bytes(argument) for argument in arguments), default=0)
            seen = _Seen(IssuedCollective(name, self.issued[name], operation, size, time.time()), _NOT_ISSUED)
            for older in self._seen:
                # Drops the handles of complete ones, which keep their tensors alive.
                _is_complete(older)
            self._seen.append(seen)
        return seen


_NOT_ISSUED = object()


def collectives_of(watches_for_hangs: bool) -> AbstractContextManager[Recorder | None]:
    """Returns a context in which this process's collectives are recorded.

    Args:
        watches_for_hangs: whether a watchdog reads the recorder; without one nothing is wrapped.

    Returns:
        A context of the backend's recorder, or of None without a watchdog or a process group.
    """
    if not (watches_for_hangs and dist.is_initialized()):
        return nullcontext()
    if dist.get_backend() == dist.Backend.NCCL:
        return nullcontext(NcclRecorder())
    return recorded_collectives() if dist.get_backend() == dist.Backend.GLOO else nullcontext()


@contextmanager
def recorded_collectives(recorder: CollectiveRecorder | None = None) -> Iterator[CollectiveRecorder]:
    """Records the collectives that this process issues in this context, by wrapping torch's methods.

    Args:
        recorder: where they are noted; None: a new one.
    """
    recorder = recorder or CollectiveRecorder()
    # From the class's dictionary: as an attribute of the class, a method of torch 2.15 is a plain function,
    # which, put back, would no longer receive its process group.
    originals = {name: vars(dist.ProcessGroup)[name] for name in METHODS}
    wait = vars(dist.Work)["wait"]
    for name in METHODS:
        issue = getattr(dist.ProcessGroup, name)
        setattr(dist.ProcessGroup, name, _recorded(recorder, issue, name.strip("_")))
    setattr(dist.Work, "wait", _timed(recorder, dist.Work.wait))  # noqa: B010  (mypy knows it as a method)
    try:
        yield recorder
    finally:
        for name, method in originals.items():
            setattr(dist.ProcessGroup, name, method)
        setattr(dist.Work, "wait", wait)  # noqa: B010


def _recorded(recorder: CollectiveRecorder, issue: Callable[..., Any], operation: str) -> Callable[..., Any]:
    @functools.wraps(issue)
    def wrapper(group: Any, *arguments: Any, **keywords: Any) -> Any:
        seen = recorder.note(group, operation, arguments)
        try:
            seen.work = issue(group, *arguments, **keywords)
        except BaseException:
            seen.work = None
            raise
        return seen.work

    return wrapper


def _timed(recorder: CollectiveRecorder, wait: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(wait)
    def wrapper(work: Any, *arguments: Any, **keywords: Any) -> Any:
        begun = time.perf_counter()
        try:
            return wait(work, *arguments, **keywords)
        finally:
            if threading.current_thread() is threading.main_thread():
                recorder.waited_seconds += time.perf_counter() - begun

    return wrapper


def _is_complete(seen: _Seen) -> bool:
    if seen.work is not None and seen.work is not _NOT_ISSUED and seen.work.is_completed():
        seen.work = None
    return seen.work is None


def _size_bytes(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    if isinstance(argument, list | tuple):
        return sum(_size_bytes(item) for item in argument)
    return 0
