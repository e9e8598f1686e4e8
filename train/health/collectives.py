"""What each rank last sent and what it waits for: a flight recorder of collectives for any backend.

NCCL has a recorder in C++ that gloo lacks. This one stands in front of both: every collective of
torch.distributed's Python functions (FSDP2, MegaBlocks, Composer and this project use no others while they
train) goes through a method of ``ProcessGroup`` and is waited for by ``Work.wait``, and both are wrapped once
per process. Functional collectives, which are C++ from end to end, are not seen.
"""

import functools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

KEPT = 64
"""Collectives that are remembered; more than a microbatch of one layer issues."""
METHODS = (
    "_allgather_base",
    "_reduce_scatter_base",
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
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor_coalesced",
    "scatter",
)


@dataclass(frozen=True)
class IssuedCollective:
    """One collective as a rank issued it."""

    group: str
    """The group's name, equal on its ranks."""
    number: int
    """Place among the group's collectives, from 1: ranks that are in step issue the same under it."""
    operation: str
    size_bytes: int
    """Of the tensors that this rank hands in or gets."""
    since: float
    """Seconds since 1970."""

    def __str__(self) -> str:
        return f"{self.operation} of {self.size_bytes:,} bytes, number {self.number} of group {self.group}"


@dataclass
class _Seen:
    collective: IssuedCollective
    work: Any
    """torch's handle until it is seen to be complete; None after that."""


@dataclass
class CollectiveRecorder:
    """The last collectives of this process and those that it still waits in."""

    issued: dict[str, int] = field(default_factory=dict)
    """Collectives issued by group."""
    ranks: dict[str, list[int]] = field(default_factory=dict)
    """Global ranks by group."""
    waited_seconds: float = 0.0
    """Time that the main thread has stood in ``wait``."""
    total: int = 0
    """Collectives issued in all, which is how a watcher sees that something moves."""
    _seen: deque[_Seen] = field(default_factory=lambda: deque(maxlen=KEPT))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def last(self, count: int = 8) -> list[IssuedCollective]:
        """The newest collectives, oldest first."""
        with self._lock:
            return [seen.collective for seen in list(self._seen)[-count:]]

    def waiting(self) -> list[IssuedCollective]:
        """Collectives that are issued and not complete."""
        with self._lock:
            return [seen.collective for seen in self._seen if not _is_complete(seen)]

    def note(self, group: Any, operation: str, arguments: tuple[Any, ...]) -> _Seen:
        """Notes that a collective is about to be issued."""
        name = group.group_name
        with self._lock:
            if name not in self.ranks:
                self.ranks[name] = dist.get_process_group_ranks(group)
            self.issued[name] = self.issued.get(name, 0) + 1
            self.total += 1
            size = max((_size_bytes(argument) for argument in arguments), default=0)
            seen = _Seen(IssuedCollective(name, self.issued[name], operation, size, time.time()), _NOT_ISSUED)
            for older in self._seen:
                # A handle keeps the tensors alive.
                _is_complete(older)
            self._seen.append(seen)
        return seen


_NOT_ISSUED = object()
_current: CollectiveRecorder | None = None


def record_collectives() -> CollectiveRecorder:
    """Begins a record of this process's collectives, in place of the one before, and returns it."""
    global _current  # noqa: PLW0603  (what is wrapped is the process's, so is the record)
    if _current is None:
        for name in METHODS:
            setattr(dist.ProcessGroup, name, _recorded(getattr(dist.ProcessGroup, name), name.strip("_")))
        setattr(dist.Work, "wait", _timed(dist.Work.wait))  # noqa: B010  (mypy knows it as a method)
    _current = CollectiveRecorder()
    return _current


def _recorded(issue: Callable[..., Any], operation: str) -> Callable[..., Any]:
    @functools.wraps(issue)
    def wrapper(group: Any, *arguments: Any, **keywords: Any) -> Any:
        assert _current is not None
        seen = _current.note(group, operation, arguments)
        try:
            seen.work = issue(group, *arguments, **keywords)
        except BaseException:
            seen.work = None
            raise
        return seen.work

    return wrapper


def _timed(wait: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(wait)
    def wrapper(work: Any, *arguments: Any, **keywords: Any) -> Any:
        begun = time.perf_counter()
        try:
            return wait(work, *arguments, **keywords)
        finally:
            if _current is not None and threading.current_thread() is threading.main_thread():
                _current.waited_seconds += time.perf_counter() - begun

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


def nccl_trace() -> str:
    """NCCL's own flight recorder as JSON, empty without NCCL (not yet run on a GPU).

    It holds what the environment's TORCH_NCCL_TRACE_BUFFER_SIZE allows, kernels' states included.
    """
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
    if dump is None or not torch.cuda.is_available():
        return ""
    text = dump(includeCollectives=True, onlyActive=False)
    return text.decode() if isinstance(text, bytes) else str(text)
