"""Ranks on this machine, forked from a process that has imported everything, so that they start at once.

For the checks and the tests. A rank computes on one thread: the parent's thread pools do not survive a fork,
and ranks share the cores anyway.
"""

import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from train.recipe.topology import Topology

Result = TypeVar("Result")


class RankError(RuntimeError):
    """A rank failed, was killed, or took too long; carries the rank's traceback."""


class Ranks(Generic[Result]):
    """Forked processes that do the same work, in a gloo process group if there are several.

    Args:
        world_size: number of processes.
        work: called in each with its topology. May be a closure: only its result is pickled.
        output: file to which all ranks append standard output and error; None: the parent's.
    """

    do_as_told = False
    """Is work done whenever :meth:`StandingRanks.do` says so, and not once?"""

    def __init__(self, world_size: int, work: Callable[..., Result], output: Path | None = None) -> None:
        context = multiprocessing.get_context("fork")
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.processes: list[ForkProcess] = []
        self._pipes: list[Connection] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            topology = Topology(rank, world_size, rank, world_size)
            store = Path(self._folder.name) / "store"
            args = (topology, store, work, theirs, output, self.do_as_told)
            process = context.Process(target=_run_rank, args=args)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)

    def __enter__(self) -> "Ranks[Result]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kills what still runs."""
        self.kill()
        self._folder.cleanup()

    @property
    def are_running(self) -> bool:
        """True while any rank runs."""
        return any(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """Kills every rank with SIGKILL."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def exit_codes(self, timeout_seconds: float) -> list[int | None]:
        """Waits for the ranks to exit; None for one that has not, negative for one ended by a signal."""
        deadline = time.monotonic() + timeout_seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def results(self, timeout_seconds: float) -> list[Result]:
        """Waits for every rank's result, by rank.

        Raises:
            RankError: as soon as one fails; the others are killed.
        """
        found = self._replies(timeout_seconds)
        for process in self.processes:
            process.join()
        return found

    def _replies(self, timeout_seconds: float) -> list[Result]:
        """Waits for the next reply of every rank."""
        deadline = time.monotonic() + timeout_seconds
        found: dict[int, Result] = {}
        while len(found) < len(self._pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in found}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.kill()
                raise RankError(f"ranks {sorted(waiting.values())} took over {timeout_seconds:.0f} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting[pipe]
                try:
                    is_sound, value = pipe.recv()
                except EOFError:
                    self.processes[rank].join()
                    is_sound, value = False, f"ended with status {self.processes[rank].exitcode}"
                if not is_sound:
                    self.kill()
                    raise RankError(f"rank {rank} of {len(self._pipes)}: {value}")
                found[rank] = value
        return [found[rank] for rank in range(len(self._pipes))]


class StandingRanks(Ranks[Result]):
    """Ranks that do one piece of work after another, in half the time of ranks that are forked for each.

    What torch, Composer and the process group do at their first use in a process is then done once. Work must
    leave a process as it found it, but for the process groups that it made: each holds threads and sockets
    until the process ends, so that ranks should not stand for hundreds of pieces.
    """

    do_as_told = True

    def do(self, *given: object, timeout_seconds: float = 180.0) -> list[Result]:
        """Does ``work(topology, *given)`` on every rank; what is given is pickled.

        Raises:
            RankError: if a rank fails or the time runs out. All are killed then, and can do nothing more.
        """
        for pipe in self._pipes:
            pipe.send(given)
        return self._replies(timeout_seconds)


def run_ranks(
    world_size: int,
    work: Callable[[Topology], Result],
    timeout_seconds: float = 180.0,
    output: Path | None = None,
) -> list[Result]:
    """Does ``work`` on ``world_size`` forked ranks and returns their results; see :class:`Ranks`.

    Raises:
        RankError: if a rank fails or the time runs out.
    """
    with Ranks(world_size, work, output) as ranks:
        return ranks.results(timeout_seconds)


def _run_rank(
    topology: Topology,
    store: Path,
    work: Callable[..., Result],
    pipe: Connection,
    output: Path | None,
    does_as_told: bool,
) -> None:
    # Else the collector visits, and so copies, all that the parent has imported.
    gc.freeze()
    if output is not None:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    torch.set_num_threads(1)
    rank, size = str(topology.rank), str(topology.world_size)
    os.environ |= {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"NODE_RANK": "0", "GLOO_SOCKET_IFNAME": "lo"}
    try:
        if topology.world_size > 1:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(str(store), topology.world_size),
                rank=topology.rank,
                world_size=topology.world_size,
            )
        while does_as_told:
            pipe.send((True, work(topology, *_next_of(pipe))))
        result = work(topology)
        if topology.world_size > 1:
            # No rank exits while another may still need it. The group is not destroyed, since the process
            # ends right away: gloo's destructor holds the GIL while it waits for threads that may need the
            # GIL to release the last collective's tensors, which can deadlock (torch 2.7.0).
            dist.barrier()
    except SystemExit:
        raise
    except BaseException:  # The parent reports every failure of a rank.
        pipe.send((False, traceback.format_exc()))
        return
    pipe.send((True, result))


def _next_of(pipe: Connection) -> tuple[object, ...]:
    """Waits for what the parent gives next; ends the process if the parent has ended.

    Then the pipe is not closed, since ranks that were forked later hold its other end open too.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    while not pipe.poll(1.0):
        if os.getppid() != parent.pid:
            os._exit(1)
    given = pipe.recv()
    assert isinstance(given, tuple)
    return given
