"""Watchdog: a thread of each rank that sees whether the rank still moves, and ends the job if none does.

It writes a heartbeat every few seconds. When its rank has not moved for too long it writes what the
rank knows: the stack of every thread and the collectives that it waits in. A moment later all ranks have,
or have been silent, and the lowest that is alive names the culprits (:mod:`train.health.diagnosis`). All
end with status 76, which a supervisor takes as: start again from the newest checkpoint.

A process that is stopped, or stuck in C with Python's lock held, cannot write its stacks by itself. A rank
on the same host sends it SIGUSR2, whose handler is faulthandler's (C, needs no lock), then SIGCONT.
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
from collections.abc import Callable
from dataclasses import asdict, replace
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
    host_name,
    pid_space,
    read_record,
    read_records,
    stacks_file,
    stuck_file,
    write_record,
)
from train.health.snapshot import Snapshot
from train.recipe.exit_status import HANG_STATUS
from train.recipe.reliability import Watch
from train.recipe.topology import Topology
from train.record import log

logger = log.get_logger(__name__)

BEATS_PER_LIMIT = 10
LONGEST_INTERVAL_SECONDS = 30.0
STACK_SECONDS = 1.0
"""How long a signalled process is given to write its stacks."""


class Watchdog:
    """Watches this rank from a thread of its own, between :meth:`start` and :meth:`stop`.

    Args:
        recipe: limits.
        folder: of the records, shared by all ranks.
        run_folder: of the run.
        topology: this rank.
        recorder: of this process's collectives; None: none are known.
        end: ends the process; for tests.
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
        """Begins to watch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stacks = stacks_file(self.folder, self.topology.rank).open("w")
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self._sign()
        self._thread.start()

    def stop(self) -> None:
        """Ends watching."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._stacks is not None:
            faulthandler.unregister(signal.SIGUSR2)
            self._stacks.close()
            self._stacks = None

    def move(self, where: str, batch: int) -> None:
        """Notes that the rank begins something; called very often, so it only sets fields."""
        self._where, self.batch, self._steps = where, batch, self._steps + 1

    def has_trained(self) -> None:
        """From now on the limit is that of a step, not that of the start."""
        assert self.recipe.hang_seconds is not None
        self.limit = self.recipe.hang_seconds

    def _watch(self) -> None:
        while not self._over.wait(self.interval):
            self._sign()
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
        """Steps of the program and of its collectives: what is the same later has not moved."""
        return self._steps, self.recorder.progress() if self.recorder is not None else 0

    def _sign(self) -> None:
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
        """Writes what this rank knows, waits for the others, and returns the finding of one of them.

        None if the rank has begun to move again.
        """
        rank = self.topology.rank
        self._write_stuck()
        before = {beat.rank: beat.count for beat in read_records(self.folder, "beat-*.json", Heartbeat)}
        self._rest(self._all_are_stuck)
        if self._progress_now() != self._progress:
            stuck_file(self.folder, rank).unlink(missing_ok=True)
            self._moved = time.monotonic()
            return None
        known = {record.rank: record for record in read_records(self.folder, "stuck-*.json", Stuck)}
        if min(known, default=rank) != rank:
            # The lowest writes; it is given as long again, and the time for stacks.
            time.sleep(STACK_SECONDS)
            self._rest((self.folder / FINDING_FILE).exists)
            found = read_record(self.folder / FINDING_FILE, Finding)
            if found is not None:
                return found
        beats = {beat.rank: beat for beat in read_records(self.folder, "beat-*.json", Heartbeat)}
        silent = {who for who, beat in beats.items() if beat.count == before.get(who)} - known.keys()
        finding = diagnose(known, beats, silent, time.time(), seconds)
        suspects = [self._with_stacks(suspect, beats) for suspect in finding.suspects]
        finding = replace(finding, suspects=suspects)
        write_record(self.folder / FINDING_FILE, finding)
        say_finding(finding)
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
            groups=known.ranks,
            waiting=[asdict(each) for each in known.waiting],
            stacks=thread_stacks(),
        )
        write_record(stuck_file(self.folder, rank), stuck)
        if known.trace:
            (self.folder / f"nccl-{rank:05d}.json").write_text(known.trace)

    def _rest(self, is_over: Callable[[], bool]) -> None:
        """Waits for three heartbeats or until ``is_over``; its own goes on meanwhile."""
        for _ in range(3):
            if is_over():
                return
            time.sleep(self.interval)
            self._sign()

    def _all_are_stuck(self) -> bool:
        return len(list(self.folder.glob("stuck-*.json"))) == self.topology.world_size

    def _with_stacks(self, suspect: Suspect, beats: dict[int, Heartbeat]) -> Suspect:
        """The suspect with the stacks that it could not write, if it is a process that can be reached."""
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
            _await_text(file)
            # It must not train on by itself.
            os.kill(beat.pid, signal.SIGKILL)
        return replace(suspect, why=why, stacks=file.read_text() if file.is_file() else "")


def thread_stacks() -> str:
    """The stack of every thread of this process, by the thread's name."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            stack = "".join(traceback.format_stack(frame))
            parts.append(f"thread {names.get(ident, ident)}:\n{stack}")
    return "\n".join(parts)


def say_finding(finding: Finding) -> None:
    """Logs a finding with the stacks of those whom it names."""
    logger.error(finding.line, extra=log.ALL_RANKS)
    for suspect in finding.suspects:
        stacks = f"stacks of rank {suspect.rank}:\n{suspect.stacks or '(out of reach)'}"
        logger.error(stacks, extra=log.ALL_RANKS)


def _signal_main_thread(pid: int, number: int) -> None:
    """Signals the thread that trains, where the C library can name a thread; else the process.

    A stopped process would hand the signal to whichever of its threads wakes first, and the stacks that
    one writes may show the main thread where it has gone since.
    """
    tgkill = getattr(ctypes.CDLL(None), "tgkill", None)
    if tgkill is None or tgkill(pid, pid, number) != 0:
        os.kill(pid, number)


def _await_text(file: Path) -> None:
    """Waits until a file has text that grows no more, a second at most."""
    end, before = time.monotonic() + STACK_SECONDS, 0
    while time.monotonic() < end:
        time.sleep(0.02)
        size = file.stat().st_size
        if size and size == before:
            return
        before = size


def _is_rank(pid: int) -> bool:
    """Whether a process id still belongs to a Python process."""
    try:
        return b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _state(pid: int) -> str:
    """The process's state as Linux says it, T being stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "?"
