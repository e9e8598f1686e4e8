"""Fault injection: a run with injected faults ends as if there had been none.

The tiny recipe trains on two forked ranks under the real supervisor, watchdog and guard. Faults are drawn at
random and injected one by one, several per run. Every run must end with the losses, data log, weights,
optimizer and random-number states of an undisturbed run, bit for bit, and the supervisor must have classified
every fault correctly.
"""

import json
import os
import random
import resource
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from launch.restart.history import Policy, read_log
from launch.restart.supervisor import Supervisor
from launch.verify.cases import Layout
from launch.verify.disturbances import DISTURBANCES, disturbed
from launch.verify.equality import differences
from launch.verify.forked_ranks import RankError, Ranks
from launch.verify.harness import Row, TableCheck, Workspace
from launch.verify.tiny_runs import named, steps, tail, trainer
from train.checkpoint.files import newest_whole_checkpoint
from train.health.exclusion import CORRUPTION_FILE
from train.health.heartbeat import RECORDS_VARIABLE
from train.health.stragglers import STRAGGLERS_FILE
from train.recipe.errors import UserError
from train.recipe.exit_status import HANG_STATUS, PREEMPTED_STATUS, REPLAY_STATUS
from train.recipe.reliability import Watch
from train.recipe.schema import Data, Recipe
from train.recipe.topology import Topology
from train.record.run_folder import CHECKPOINTS_FOLDER, DATA_LOG_FILE, METRICS_FILE, batches_of
from train.record.step_log import read_steps

RANKS = 2
"""Ranks of every run, under :attr:`Workspace.pair`."""
FAULTS_PER_RUN = 5
HANG_SECONDS = 6.0
DISK_BYTES = 200_000
"""File size limit while the disk is "full": less than a checkpoint, more than a log."""
FULL_SECONDS = 1.0
PATIENCE_SECONDS = 180.0
LAST_WORDS_SECONDS = 10.0
"""Grace period of the other ranks after one has failed."""

KINDS: dict[str, tuple[str, str]] = {
    "SIGKILL": ("a rank is killed", "killed"),
    "SIGSTOP": ("a rank is stopped", "hang"),
    "SIGTERM": ("a rank is asked to stop", "preempted"),
    "full disk": ("no file may grow for a second", "finished"),
    "bad shard": ("a byte of a cached shard changes while the job is down", "killed"),
    "bad checkpoint": ("a byte of the newest of two checkpoints changes while the job is down", "killed"),
    "no tracking": ("the tracking server goes away", "finished"),
    "torn files": ("a kill leaves lines and the newest of two checkpoints written in part", "killed"),
    "second start": ("the same run is started once more while it trains", "finished"),
    "NaN": ("a gradient of one rank is not a number", "replay"),
    "flipped bit": ("a bit of one rank's gradient changes, while steps are computed again", "finished"),
    "wrong data": ("a rank reads sequences that it has read before", "replay"),
    "slow rank": ("a rank takes longer for every step", "finished"),
}
"""Action, and how the attempt must end; one that is "finished" may also be ended by the next fault."""


@dataclass
class InjectedFault(Row):
    """One injected fault and its outcome."""

    rank: int = 0
    run: str = ""
    batch: int = 0
    """The batch after which it was injected; 0: the attempt had already ended."""
    ending: str = ""
    """Ending of the attempt, according to the supervisor's log."""
    seconds: float = 0.0
    problem: str = ""
    """Failure of the attempt itself, if there was one."""


class FaultInjectionCheck(TableCheck):
    """Runs with faults, one run after the other.

    Args:
        kinds: faults to inject, of :data:`KINDS`, in this order.
        seed: of the random choice of ranks and batches.

    Raises:
        UserError: if a kind is unknown.
    """

    name = page = "faults"
    title = "Faults injected into"
    text = (
        "Faults injected into runs of the tiny recipe, several per run. Each run must end with the losses, "
        "data log, weights, optimizer and generators of an undisturbed one, bit for bit, and each fault must "
        "be classified correctly."
    )

    def __init__(self, kinds: Sequence[str], seed: int = 0) -> None:
        super().__init__()
        for kind in kinds:
            if kind not in KINDS:
                remedy = f"one of {', '.join(map(repr, KINDS))}"
                raise UserError(f"{kind!r} is not a kind of fault", key="--only", remedy=remedy)
        self.left = list(kinds)
        """Faults still to be injected."""
        self.total = len(kinds)
        self.generator = random.Random(seed)
        self.runs = 0

    def run(self, workspace: Workspace) -> Iterator[InjectedFault]:
        """Yields every fault, after the run that it was injected into."""
        layout, small = workspace.pair, workspace.small
        whole = workspace.uninterrupted(layout)
        cached = replace(
            small.data,
            shards=str(workspace.folder / "cached-shards"),
            remote=str(Path(small.data.shards).resolve()),
            corpus=None,
            corpus_bytes=Data().corpus_bytes,
        )
        watch = Watch(hang_seconds=HANG_SECONDS, start_seconds=60.0, straggler_interval_batches=3)
        while self.left:
            recipe = named(replace(small, data=cached, watch=watch), layout, f"injected-{self.runs}")
            self.runs += 1
            yield from self._one_run(recipe, layout, whole)

    def _one_run(self, recipe: Recipe, layout: Layout, whole: Path) -> Iterator[InjectedFault]:
        """Completes one supervised run with up to :data:`FAULTS_PER_RUN` faults."""
        folder = Path(recipe.runs_dir) / recipe.name
        records = folder.with_suffix(".restarts")
        found: list[InjectedFault] = []
        wanted = min(FAULTS_PER_RUN, len(self.left))

        def attempt(_hosts: tuple[str, ...]) -> int:
            if len(found) == wanted:
                return one_try(recipe, None, 0, records, folder)
            rank = self.generator.randrange(RANKS)
            fault = InjectedFault(self.left[0], str(layout), "", rank=rank, run=recipe.name)
            begun = time.monotonic()
            status = one_try(recipe, fault, steps(folder) + self.generator.randint(1, 3), records, folder)
            fault.seconds = round(time.monotonic() - begun, 1)
            if fault.batch:
                found.append(fault)
                self.left.pop(0)
            return status

        policy = Policy(same_batch=FAULTS_PER_RUN + 1, backoff_seconds=0.0)
        status = Supervisor(attempt, policy, records, say=lambda _: None).run()
        problems = [f"{recipe.name} ended with {status}: {tail(folder)}"] if status else []
        if problems and not found:
            raise RankError(problems[0])
        problems += [] if status else list(differences(whole, folder))
        for fault, line in zip(found, read_log(records), strict=False):
            fault.ending = line["kind"]
            where = f"rank {fault.rank}, batch {fault.batch} of {fault.run}"
            fault.figures = f"{where}: {fault.ending}, {fault.seconds:.1f} s"
            own = [fault.problem] if fault.problem else []
            fault.violations = [*problems, *own, *_misnamed(fault, line, records)]
            yield fault


def draw(faults: int, generator: random.Random) -> list[str]:
    """Draws faults, equally many of every kind, in random order."""
    kinds = [list(KINDS)[number % len(KINDS)] for number in range(faults)]
    generator.shuffle(kinds)
    return kinds


def one_try(recipe: Recipe, fault: InjectedFault | None, after: int, records: Path, folder: Path) -> int:
    """Runs one attempt of the job with one fault; returns the exit status that a launcher would."""
    kind = fault.what if fault is not None else ""
    rank = fault.rank if fault is not None else -1
    with (
        contextmanager(_server)() as (uri, close_server),
        mock.patch.dict(os.environ, {RECORDS_VARIABLE: str(records)}),
    ):
        if kind == "no tracking":
            recipe = replace(recipe, tracking=replace(recipe.tracking, mlflow=True, uri=uri))
        if kind == "flipped bit":
            recipe = replace(recipe, guard=replace(recipe.guard, recheck_interval_batches=1))
        work = _as_a_process(disturbed(trainer(recipe), kind, rank, after))
        with Ranks(RANKS, work, folder.with_suffix(".log")) as ranks:
            while fault is not None and ranks.are_running and not _is_time(kind, after, folder):
                time.sleep(0.005)
            if fault is not None and (ranks.are_running or kind in DISTURBANCES):
                fault.batch = max(1, steps(folder))
                _strike(kind, rank, ranks, close_server)
                if kind == "second start":
                    fault.problem = _start_again(recipe, folder)
            status = _await_end(ranks)
    if fault is not None and fault.batch and kind in ("bad shard", "bad checkpoint"):
        _flip_byte(_victim(kind, recipe, folder))
    if fault is not None and fault.batch and kind == "torn files":
        _tear(_victim(kind, recipe, folder), folder)
    return status


def _is_time(kind: str, after: int, folder: Path) -> bool:
    """Returns whether a run has trained as many batches, and has what the fault is to damage.

    Without an older checkpoint behind it a damaged one ends the run, for a person to look.
    """
    if steps(folder) < after or kind not in ("bad checkpoint", "torn files"):
        return steps(folder) >= after
    root = folder / CHECKPOINTS_FOLDER
    # Two folders are not enough: one may still be written, or have been damaged before.
    return sum(newest_whole_checkpoint(root, batch=batch)[0] is not None for batch in batches_of(root)) > 1


def _as_a_process(work: Callable[[Topology], None]) -> Callable[[Topology], None]:
    """Makes failing work exit with a status, like a process that a launcher started."""

    def process(topology: Topology) -> None:
        try:
            work(topology)
        except Exception:
            traceback.print_exc()
            raise SystemExit(1) from None

    return process


def _strike(kind: str, rank: int, ranks: Ranks[None], close_server: Callable[[], None]) -> None:
    """Injects the faults that come from outside the ranks."""
    processes = ranks.processes
    pid = processes[rank].pid
    assert pid is not None
    if kind in ("SIGKILL", "SIGSTOP", "SIGTERM"):
        os.kill(pid, signal.Signals[kind])
    elif kind in ("bad shard", "bad checkpoint", "torn files"):
        ranks.kill()
    elif kind == "no tracking":
        close_server()
    elif kind == "full disk":
        before = {p.pid: resource.prlimit(p.pid, resource.RLIMIT_FSIZE) for p in processes if p.pid}
        for each, (_, hard) in before.items():
            resource.prlimit(each, resource.RLIMIT_FSIZE, (DISK_BYTES, hard))
        time.sleep(FULL_SECONDS)
        for process in processes:
            if process.pid in before and process.is_alive():
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before[process.pid])


def _await_end(ranks: Ranks[None]) -> int:
    """Waits as a launcher does: once a rank has failed, the others have a short grace period."""
    end = time.monotonic() + PATIENCE_SECONDS
    while ranks.are_running and time.monotonic() < end:
        if any(process.exitcode for process in ranks.processes):
            end = min(end, time.monotonic() + LAST_WORDS_SECONDS)
        time.sleep(0.02)
    ranks.kill()
    codes = [process.exitcode or 0 for process in ranks.processes]
    for status in (HANG_STATUS, REPLAY_STATUS, PREEMPTED_STATUS):
        if status in codes:
            return status
    return next((code for code in codes if code), 0)


def _victim(kind: str, recipe: Recipe, folder: Path) -> Path | None:
    """The file to corrupt."""
    if kind == "bad shard":
        files = sorted(Path(recipe.data.shards).glob("*/train/*.mds"))
        return files[0] if files else None
    checkpoint, _ = newest_whole_checkpoint(folder / CHECKPOINTS_FOLDER)
    if checkpoint is None:
        return None
    return max(
        (path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def _flip_byte(file: Path | None) -> None:
    if file is None:
        return
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 0xFF]))


def _tear(file: Path | None, folder: Path) -> None:
    """Leaves half of a checkpoint's file, and half of the last line of each log of steps."""
    if file is not None:
        os.truncate(file, file.stat().st_size // 2)
    for name in (METRICS_FILE, DATA_LOG_FILE):
        lines = (folder / name).read_bytes().splitlines(keepends=True)
        os.truncate(folder / name, sum(map(len, lines)) - len(lines[-1]) // 2)


def _start_again(recipe: Recipe, folder: Path) -> str:
    """Starts the run once more, as a person might; returns what is wrong with the answer, if anything is."""

    def work(topology: Topology) -> None:
        del os.environ[RECORDS_VARIABLE]
        trainer(recipe)(topology)

    log = folder.with_suffix(".second")
    with Ranks(1, _as_a_process(work), log) as second:
        codes = second.exit_codes(PATIENCE_SECONDS)
    said = log.read_text()
    # It may also have come when the run was just done.
    is_refused = "is in use by process" in said and codes == [1]
    return "" if is_refused or "is complete" in said else f"a second start ended with {codes}: {said[-300:]}"


def _server() -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields the address of a server that listens but never answers, and a function that closes it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", listener.close


def _misnamed(fault: InjectedFault, line: dict[str, object], records: Path) -> Iterator[str]:
    """Yields where the supervisor's log disagrees with the injected fault."""
    expected = KINDS[fault.what][1]
    if line["kind"] != expected:
        yield f"{fault.what} on rank {fault.rank} ended as {line['kind']} ({line['line']}), not as {expected}"
    if fault.what in ("SIGSTOP", "SIGKILL") and line["rank"] != fault.rank:
        yield f"{fault.what} on rank {fault.rank}, but rank {line['rank']} was named: {line['line']}"
    if fault.what == "slow rank":
        named_ranks = {rank for row in read_steps(records / STRAGGLERS_FILE) for rank in row["slow"]}
        if fault.rank not in named_ranks:
            yield f"rank {fault.rank} was slow and not named (named: {sorted(named_ranks)})"
    if fault.what == "flipped bit":
        file = records / CORRUPTION_FILE
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        if not any(fault.rank in found["ranks"] for found in lines):
            yield f"a bit of rank {fault.rank} was flipped and it was not named (found: {lines})"
