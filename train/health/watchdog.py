"""Hang watchdog: a thread of each rank that checks for progress, and ends the job if no rank makes any.

It writes a heartbeat every few seconds. If its rank has made no progress for too long, it records the stack
of every thread and the collectives that the rank waits in. A moment later all ranks have done so or are
silent. Rank 0 reads what they wrote and names the culprits (:mod:`train.health.diagnosis`); if it is silent
itself, the first rank of a node does, then any: always one, since thousands of ranks that read thousands of
files would be too much for a shared file system. All exit with status 76, on which a supervisor restarts from
the newest checkpoint.

A process that is stopped, or stuck in C while holding the GIL, cannot write its stacks itself. A rank on the
same host sends it SIGUSR2, whose handler is faulthandler's (C, needs no lock), then SIGCONT.
"""

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import IO

from train.health.collectives import Recorder
from train.health.diagnosis import diagnose
from train.health.heartbeat import (
    FINDING_FILE,
    Finding,
    Heartbeat,
    Stuck,
    Suspect,
    heartbeat_file,
    read_record,
    read_records,
    runs,
    stacks_file,
    stuck_file,
    write_record,
)
from train.health.snapshot import Snapshot
from train.recipe.exit_status import HANG_STATUS
from train.recipe.reliability import Watch
from train.recipe.topology import Topology
from train.record import log
from train.record.process import host_name, pid_space

logger = log.get_logger(__name__)

BEATS_PER_LIMIT = 10
LONGEST_INTERVAL_SECONDS = 30.0
STACK_SECONDS = 1.0
"""Time for a signalled process to write its stacks."""


class Lookers(Enum):
    """The ranks that look at all ranks' records, in order; the next ones only if there is no finding."""

    rank_0 = 0
    first_of_a_node = 1
    any_rank = 2


class Watchdog:
    """Watches this rank from a separate thread, between :meth:`start` and :meth:`stop`.

    Args:
        recipe: the recipe's limits.
        folder: folder of the records, shared by all ranks.
        run_folder: folder of the run.
        topology: this rank.
        recorder: recorder of this process's collectives; None: collectives are not recorded.
        end: ends the process; replaced in tests.
    """

    def __init__(
        self,
        recipe: Watch,
        folder: Path,
        run_folder: Path,
        topology: Topology,
        recorder: Recorder | None,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        assert recipe.hang_seconds is not None
        self.recipe, self.folder, self.run_folder = recipe, folder, run_folder
        self.topology, self.recorder, self._end = topology, recorder, end
        self.limit = max(recipe.hang_seconds, recipe.start_seconds)
        self.interval = min(LONGEST_INTERVAL_SECONDS, recipe.hang_seconds / BEATS_PER_LIMIT)
        self.batch = 0
        """Batches trained."""
        self._where, self._steps = "start", 0
        self._moved, self._progress = time.monotonic(), (0, 0)
        self._count = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._stacks: IO[str] | None = None
        self._pid_space = pid_space()

    def start(self) -> None:
        """Starts watching."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stacks = stacks_file(self.folder, self.topology.rank).open("w")
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """Stops watching."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._stacks is not None:
            faulthandler.unregister(signal.SIGUSR2)
            self._stacks.close()
            self._stacks = None

    def move(self, where: str, batch: int) -> None:
        """Notes which part of the program the rank starts; called very often, so it only sets fields."""
        self._where, self.batch, self._steps = where, batch, self._steps + 1

    def has_trained(self) -> None:
        """Switches from the limit for the start to the limit for a step."""
        assert self.recipe.hang_seconds is not None
        self.limit = self.recipe.hang_seconds

    def _watch(self) -> None:
        while not self._over.wait(self.interval):
            self._beat()
            progress = self._progress_now()
            now = time.monotonic()
            if progress != self._progress:
                self._progress, self._moved = progress, now
            elif now - self._moved > self.limit:
                finding = self._find(now - self._moved)
                if finding is not None:
                    self._end(HANG_STATUS)
                    return

    def _progress_now(self) -> tuple[int, int]:
        """Returns the counts of program parts and collectives; equal counts later mean no progress."""
        return self._steps, self.recorder.progress() if self.recorder is not None else 0

    def _beat(self) -> None:
        self._count += 1
        rank = self.topology.rank
        beat = Heartbeat(
            rank=rank,
            host=host_name(),
            pid=os.getpid(),
            pid_space=self._pid_space,
            count=self._count,
            time=time.time(),
            where=self._where,
            batch=self.batch,
            run=str(self.run_folder),
        )
        write_record(heartbeat_file(self.folder, rank), beat)

    def _find(self, seconds: float) -> Finding | None:
        """Records this rank's state, and returns the finding of the rank whose turn it is to look at all.

        None if the rank makes progress again.
        """
        self._write_stuck()
        for turn in Lookers:
            if self._has_turn(turn):
                return self._look(seconds)
            found = self._await_finding()
            if found is not None:
                return found
            if self._has_moved():
                return None
        return self._look(seconds)  # whoever had the turn has died

    def _has_turn(self, turn: Lookers) -> bool:
        """Returns whether this rank is the one that looks: the lowest of those that may and have noticed."""
        rank, per_node = self.topology.rank, self.topology.local_world_size
        if turn is Lookers.rank_0:
            return rank == 0
        if turn is Lookers.first_of_a_node and self.topology.local_rank != 0:
            return False
        stride = per_node if turn is Lookers.first_of_a_node else 1
        return rank == min((who for who in self._stuck_ranks() if who % stride == 0), default=rank)

    def _await_finding(self) -> Finding | None:
        """Waits for the finding as long as the rank that looks may take."""
        file = self.folder / FINDING_FILE
        self._rest(file.exists)
        if not file.exists():
            time.sleep(STACK_SECONDS)
            self._rest(file.exists)
        return read_record(file, Finding)

    def _has_moved(self) -> bool:
        """Returns whether the rank makes progress again, and then takes its record back."""
        if self._progress_now() == self._progress:
            return False
        stuck_file(self.folder, self.topology.rank).unlink(missing_ok=True)
        self._moved = time.monotonic()
        return True

    def _look(self, seconds: float) -> Finding | None:
        """Reads what the others wrote and writes the finding; None if the rank makes progress again."""
        before = self._beats_without(self._stuck_ranks())
        self._rest(self._all_are_stuck)
        if self._has_moved():
            return None
        known = {record.rank: record for record in read_records(self.folder, "stuck-*.json", Stuck)}
        beats = self._beats_without(known)
        silent = {who for who, beat in beats.items() if who in before and beat.count == before[who].count}
        finding = diagnose(known, beats, silent, time.time(), seconds)
        woken: list[int] = []
        suspects = [self._with_stacks(suspect, beats, woken) for suspect in finding.suspects]
        finding = replace(finding, suspects=suspects)
        write_record(self.folder / FINDING_FILE, finding)
        for pid in woken:
            # A continued process must not train without the others. Its end may at once end this process too.
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        log_finding(finding)
        return finding

    def _write_stuck(self) -> None:
        rank = self.topology.rank
        known = self.recorder.snapshot() if self.recorder is not None else Snapshot()
        stuck = Stuck(
            rank=rank,
            host=host_name(),
            batch=self.batch,
            where=self._where,
            issued=known.issued,
            groups={each.group: runs(known.ranks[each.group]) for each in known.waiting},
            waiting=[asdict(each) for each in known.waiting],
            stacks=thread_stacks(),
        )
        write_record(stuck_file(self.folder, rank), stuck)
        if known.trace:
            (self.folder / f"nccl-{rank:05d}.json").write_text(known.trace)

    def _rest(self, is_over: Callable[[], bool]) -> None:
        """Waits for three heartbeats or until ``is_over``, and keeps sending its own."""
        for _ in range(3):
            if is_over():
                return
            time.sleep(self.interval)
            self._beat()

    def _stuck_ranks(self) -> set[int]:
        """Ranks that have noticed the hang, from the names of their files."""
        return {int(file.stem.removeprefix("stuck-")) for file in self.folder.glob("stuck-*.json")}

    def _all_are_stuck(self) -> bool:
        return len(self._stuck_ranks()) == self.topology.world_size

    def _beats_without(self, known: Collection[int]) -> dict[int, Heartbeat]:
        """Reads the last heartbeat of each rank but the known ones."""
        others = (rank for rank in range(self.topology.world_size) if rank not in known)
        beats = ((rank, read_record(heartbeat_file(self.folder, rank), Heartbeat)) for rank in others)
        return {rank: beat for rank, beat in beats if beat is not None}

    def _with_stacks(self, suspect: Suspect, beats: dict[int, Heartbeat], woken: list[int]) -> Suspect:
        """Adds the stacks of a suspect that could not write them, if its process is on this machine.

        Args:
            suspect: the suspect.
            beats: heartbeats by rank.
            woken: the process is added here, to be killed.
        """
        beat = beats.get(suspect.rank)
        is_here = beat is not None and beat.pid_space == self._pid_space
        if suspect.stacks or beat is None or not is_here or not _is_rank(beat.pid):
            return suspect
        state = _state(beat.pid)
        why = suspect.why + (" and is stopped (SIGSTOP or a debugger)" if state in "tT" else "")
        file = stacks_file(self.folder, suspect.rank)
        with contextlib.suppress(OSError):
            _signal_main_thread(beat.pid, signal.SIGUSR2)
            os.kill(beat.pid, signal.SIGCONT)
            woken.append(beat.pid)
            _await_text(file)
        return replace(suspect, why=why, stacks=file.read_text() if file.is_file() else "")


def thread_stacks() -> str:
    """Returns the stack of every thread of this process, by thread name."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            stack = "".join(traceback.format_stack(frame))
            parts.append(f"thread {names.get(ident, ident)}:\n{stack}")
    return "\n".join(parts)


def log_finding(finding: Finding) -> None:
    """Logs a finding with what the recorders show and the stacks of its suspects."""
    for line in (finding.line, *finding.recorded):
        logger.error(line, extra=log.ALL_RANKS)
    for suspect in finding.suspects:
        stacks = f"stacks of rank {suspect.rank}:\n{suspect.stacks or '(not available)'}"
        logger.error(stacks, extra=log.ALL_RANKS)


def _signal_main_thread(pid: int, number: int) -> None:
    """Signals the main thread if the C library can (tgkill), else the process.

    A stopped process hands the signal to whichever of its threads wakes first; by the time that thread writes
    the stacks, the main thread may have moved.
    """
    tgkill = getattr(ctypes.CDLL(None), "tgkill", None)
    if tgkill is None or tgkill(pid, pid, number) != 0:
        os.kill(pid, number)


def _await_text(file: Path) -> None:
    """Waits until a file has text and stops growing, for a second at most."""
    end, before = time.monotonic() + STACK_SECONDS, 0
    while time.monotonic() < end:
        time.sleep(0.02)
        size = file.stat().st_size
        if size and size == before:
            return
        before = size


def _is_rank(pid: int) -> bool:
    """Returns whether a process id still belongs to a Python process."""
    try:
        return b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _state(pid: int) -> str:
    """Returns the process's state in Linux's terms; T means stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "?"
