"""InjectedFault injection: `python -m launch.verify.fault_injection RECIPE.yaml --faults 50` changes nothing.

The recipe's shrunken form trains on two forked ranks below the real supervisor, watchdog and guard. Faults
are drawn at random and put in one by one, several per run; every run must end with the losses, the data_log,
the weights, the optimizer and the random numbers of one that nothing disturbed, bit for bit, and every fault
must have been called by its name.
"""

import argparse
import importlib
import json
import os
import random
import resource
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch
from torch.distributed.tensor import DTensor

from launch.restart.history import Policy, read_log
from launch.restart.supervisor import Supervisor
from launch.verify.cases import Layout
from launch.verify.forked_ranks import Ranks
from launch.verify.parity_report import write_certificate
from launch.verify.resumption import differences, named, prepare, steps, tail, trainer, uninterrupted
from train.checkpoint.files import newest_whole_checkpoint
from train.health.heartbeat import RECORDS_VARIABLE
from train.health.stragglers import STRAGGLERS_FILE, HeartbeatCallback
from train.recipe.errors import UserError
from train.recipe.exit_status import HANG_STATUS, PREEMPTED_STATUS, REPLAY_STATUS, USAGE_STATUS
from train.recipe.reading import load_recipe
from train.recipe.reliability import Watch
from train.recipe.rules import validate
from train.recipe.schema import Data, Recipe
from train.recipe.topology import Topology
from train.record.run_folder import CHECKPOINTS_FOLDER
from train.record.step_log import read_steps
from train.step.update import BeforeUpdate

LAYOUT = Layout(1, 1, 2)
FAULTS_PER_RUN = 5
HANG_SECONDS = 6.0
SLOW_SECONDS = 0.3
"""How much longer the slow rank takes for each step, several times a step of the shrunken recipe."""
DISK_BYTES = 200_000
"""No file may grow beyond this while the disk is "full": less than a checkpoint, more than a log."""
FULL_SECONDS = 1.0
PATIENCE_SECONDS = 180.0
LAST_WORDS_SECONDS = 10.0
"""How long ranks may outlive the first that has failed."""

PAGE_TEXT = (
    "Faults put into runs of the shrunken recipe, several per run. Every run must end with the losses, data "
    "log, weights, optimizer and random numbers of one that nothing disturbed, bit for bit, and every fault "
    "must be called by its name."
)
KINDS: dict[str, tuple[str, str]] = {
    "SIGKILL": ("a rank is killed", "killed"),
    "SIGSTOP": ("a rank is stopped", "hang"),
    "SIGTERM": ("a rank is told to end", "preempted"),
    "full disk": ("no file may grow for a second", "finished"),
    "bad shard": ("a byte of a cached shard changes while the job is down", "killed"),
    "bad checkpoint": ("a byte of the newest checkpoint changes while the job is down", "killed"),
    "no tracking": ("the tracking server goes away", "finished"),
    "NaN": ("a gradient of one rank is not a number", "replay"),
    "slow rank": ("a rank takes longer for every step", "finished"),
}
"""What is done, and how the try must have ended; a try that is "finished" may also be ended by the next."""


@dataclass
class InjectedFault:
    """One fault that was put in, and what became of it."""

    kind: str
    rank: int
    run: str
    batch: int
    ending: str = ""
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    """What is not as it must be."""


@dataclass
class Drill:
    """Runs with faults, one run after the other."""

    small: Recipe
    whole: Path
    generator: random.Random
    kinds: list[str]
    """Faults that are still to be put in."""
    done: list[InjectedFault] = field(default_factory=list)
    runs: int = 0

    def run(self) -> Iterator[InjectedFault]:
        """One run with up to :data:`FAULTS_PER_RUN` faults, supervised to its end."""
        recipe = named(self.small, LAYOUT, f"drill-{self.runs}")
        self.runs += 1
        folder = Path(recipe.runs_dir) / recipe.name
        records = folder.with_suffix(".restarts")
        found: list[InjectedFault] = []
        wanted = min(FAULTS_PER_RUN, len(self.kinds))

        def attempt(_hosts: tuple[str, ...]) -> int:
            if len(found) == wanted:
                return one_try(recipe, None, 0, records, folder)
            kind, rank = self.kinds[0], self.generator.randrange(LAYOUT.world_size)
            fault = InjectedFault(kind, rank, recipe.name, 0)
            begun = time.monotonic()
            status = one_try(recipe, fault, steps(folder) + self.generator.randint(1, 3), records, folder)
            fault.seconds = round(time.monotonic() - begun, 1)
            if fault.batch:
                found.append(fault)
                self.kinds.pop(0)
            return status

        said: list[str] = []
        policy = Policy(same_batch=FAULTS_PER_RUN + 1, backoff_seconds=0.0)
        status = Supervisor(attempt, policy, records, say=said.append).run()
        problems = [f"{recipe.name} ended with {status}: {tail(folder)}"] if status else []
        problems += [] if status else list(differences(self.whole, folder, 0.0))
        log = read_log(records)
        for fault, line in zip(found, log, strict=False):
            fault.ending = line["kind"]
            fault.faults = problems + list(_misnamed(fault, line, records))
            self.done.append(fault)
            yield fault


def one_try(recipe: Recipe, fault: InjectedFault | None, after: int, records: Path, folder: Path) -> int:
    """One try of the job with one fault; returns the status that a launcher would."""
    kind = fault.kind if fault is not None else ""
    rank = fault.rank if fault is not None else -1
    with (
        contextmanager(_server)() as (uri, close_server),
        mock.patch.dict(os.environ, {RECORDS_VARIABLE: str(records)}),
    ):
        if kind == "no tracking":
            recipe = replace(recipe, tracking=replace(recipe.tracking, mlflow=True, uri=uri))
        work = _as_a_process(_disturbed(trainer(recipe), kind, rank, after))
        with Ranks(LAYOUT.world_size, work, folder.with_suffix(".log")) as ranks:
            while fault is not None and ranks.are_running and steps(folder) < after:
                time.sleep(0.005)
            if fault is not None and (ranks.are_running or kind in ("NaN", "slow rank")):
                fault.batch = max(1, steps(folder))
                _strike(kind, rank, ranks, close_server)
            status = _await_end(ranks)
    if fault is not None and fault.batch and kind in ("bad shard", "bad checkpoint"):
        _flip_byte(_victim(kind, recipe, folder))
    return status


def _as_a_process(work: Callable[[Topology], None]) -> Callable[[Topology], None]:
    """Work that ends with a status where it fails, as a process of a launcher's does."""

    def process(topology: Topology) -> None:
        try:
            work(topology)
        except Exception:
            traceback.print_exc()
            raise SystemExit(1) from None

    return process


def _disturbed(
    work: Callable[[Topology], None], kind: str, rank: int, after: int
) -> Callable[[Topology], None]:
    """The work of a rank, with the faults that only it can put in."""

    def disturbed(topology: Topology) -> None:
        if topology.rank != rank or kind not in ("NaN", "slow rank"):
            return work(topology)
        if kind == "slow rank":
            move = HeartbeatCallback.before_forward

            def slowly(self, state, logger) -> None:  # type: ignore[no-untyped-def]
                time.sleep(SLOW_SECONDS)
                move(self, state, logger)

            with mock.patch.object(HeartbeatCallback, "before_forward", slowly):
                return work(topology)
        judge = BeforeUpdate.after_train_batch

        def poisoned(self, state, logger) -> None:  # type: ignore[no-untyped-def]
            if state.timestamp.batch.value == after:
                gradient = next(p.grad for p in state.model.parameters() if p.grad is not None)
                local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                local.view(-1)[0] = torch.nan
            judge(self, state, logger)

        with mock.patch.object(BeforeUpdate, "after_train_batch", poisoned):
            return work(topology)

    return disturbed


def _strike(kind: str, rank: int, ranks: Ranks[None], close_server: Callable[[], None]) -> None:
    """Puts in the faults that come from outside."""
    processes = ranks.processes
    pid = processes[rank].pid
    assert pid is not None
    if kind in ("SIGKILL", "SIGSTOP", "SIGTERM"):
        os.kill(pid, signal.Signals[kind])
    elif kind in ("bad shard", "bad checkpoint"):
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
    """Waits as a launcher does: once a rank has failed, the others are given a moment."""
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
    """The file whose content is to change."""
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


def _server() -> Iterator[tuple[str, Callable[[], None]]]:
    """An address at which something listens and never answers, until it is closed."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", listener.close


def _misnamed(fault: InjectedFault, line: dict[str, object], records: Path) -> Iterator[str]:
    """What the supervisor's log says otherwise than what was done."""
    expected = KINDS[fault.kind][1]
    if line["kind"] != expected:
        yield f"{fault.kind} on rank {fault.rank} ended as {line['kind']} ({line['line']}), not as {expected}"
    if fault.kind in ("SIGSTOP", "SIGKILL") and line["rank"] != fault.rank:
        yield f"{fault.kind} on rank {fault.rank}, but rank {line['rank']} was named: {line['line']}"
    if fault.kind == "slow rank":
        named_ranks = {rank for row in read_steps(records / STRAGGLERS_FILE) for rank in row["slow"]}
        if fault.rank not in named_ranks:
            yield f"rank {fault.rank} was slow and not named (named: {sorted(named_ranks)})"


def draw(faults: int, generator: random.Random) -> list[str]:
    """As many faults of every kind, in random order."""
    kinds = [list(KINDS)[number % len(KINDS)] for number in range(faults)]
    generator.shuffle(kinds)
    return kinds


def drill(recipe: Recipe, faults: list[str], seed: int, folder: Path) -> Iterator[InjectedFault]:
    """Puts in every fault of the list."""
    importlib.import_module("llmfoundry.optim.lion")
    small = replace(
        prepare(recipe, folder),
        watch=Watch(hang_seconds=HANG_SECONDS, start_seconds=60.0, straggler_interval_batches=3),
    )
    whole = uninterrupted(small, LAYOUT)
    cached = replace(
        small.data,
        remote=str(Path(small.data.shards).resolve()),
        corpus=None,
        corpus_bytes=Data().corpus_bytes,
    )
    cached = replace(cached, shards=str(folder / "shards"))
    disturbed = Drill(replace(small, data=cached), whole, random.Random(seed), list(faults))
    while disturbed.kinds:
        yield from disturbed.run()


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status (1: a fault was not survived exactly)."""
    parser = argparse.ArgumentParser(prog="python -m launch.verify.fault_injection", description=__doc__)
    parser.add_argument("recipe", help="YAML file, for example yamls/smoke.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the file")
    parser.add_argument("--faults", type=int, default=50, metavar="N", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default %(default)s)")
    parser.add_argument("--only", choices=list(KINDS), help="one kind of fault alone")
    parser.add_argument("--json", metavar="FILE", help="write every fault and what became of it")
    parser.add_argument("--html", metavar="FILE", help="write the table as a page")
    options = parser.parse_intermixed_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        validate(recipe, Topology(), options.recipe)
    except UserError as error:
        print(error.at(options.recipe), file=sys.stderr)
        return USAGE_STATUS
    kinds = (
        [options.only] * options.faults if options.only else draw(options.faults, random.Random(options.seed))
    )
    begun, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        for fault in drill(recipe, kinds, options.seed, Path(folder)):
            rows.append(fault)
            verdict = "FAIL" if fault.faults else "pass"
            print(
                f"{len(rows):3d}/{options.faults}  {fault.kind:<14}  rank {fault.rank}  "
                f"batch {fault.batch:2d}  {fault.run:<9}  {fault.ending:<9}  "
                f"{fault.seconds:5.1f} s  {verdict}",
                flush=True,
            )
    passed = sum(not fault.faults for fault in rows)
    seconds = round(time.monotonic() - begun)
    for problem in dict.fromkeys(problem for fault in rows for problem in fault.faults):
        print(f"FAIL: {problem}")
    print(f"{passed} of {len(rows)} faults survived, every run equal bit for bit, in {seconds} s")
    summary = {"recipe": recipe.name, "faults": len(rows), "passed": passed, "seconds": seconds}
    if options.json:
        Path(options.json).write_text(json.dumps(summary | {"rows": [asdict(row) for row in rows]}, indent=1))
    if options.html:
        table = [
            (row.kind, str(LAYOUT), f"rank {row.rank}, batch {row.batch}: {row.ending}", row.faults)
            for row in rows
        ]
        write_certificate(Path(options.html), summary, table, "Faults put into", PAGE_TEXT)
    return 0 if passed == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
