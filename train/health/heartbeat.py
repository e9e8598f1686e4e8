"""Records that explain why a job ended: heartbeats, failures, and the diagnosis of a hang.

JSON files in one folder that all ranks share: the run's ``faults/``, or the folder that a supervisor names in
FINEGRAIN_RECORDS. Each is written atomically. No torch.
"""

import json
import os
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from train.recipe.secrets import without_secrets
from train.recipe.topology import Topology
from train.record.files import write_whole
from train.record.process import host_name

RECORDS_VARIABLE = "FINEGRAIN_RECORDS"
RECORDS_FOLDER = "faults"
FINDING_FILE = "hang.json"
ENDED_FILE = "ended.json"
LOST_HOST_FILE = "lost-host"
"""Names the first host whose connection a launcher lost; written by launch/submit/ssh_step.sh."""

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Heartbeat:
    """A rank's heartbeat, written every few seconds."""

    rank: int
    host: str
    pid: int
    pid_space: str
    """The space in which the pid is valid, see :func:`pid_space`."""
    count: int
    """Rises with every heartbeat; a rank whose count stays the same has stopped."""
    time: float
    """Seconds since 1970."""
    where: str
    """The part of the program that the rank started last."""
    batch: int
    """Batches trained."""
    run: str
    """Folder of the run."""


@dataclass(frozen=True)
class Failure:
    """The error that ended a rank."""

    rank: int
    host: str
    time: float
    batch: int
    """Batches trained before the failure."""
    error: str
    """One line."""
    trace: str = ""


@dataclass(frozen=True)
class Stuck:
    """The state of a rank that has not progressed for too long."""

    rank: int
    host: str
    batch: int
    where: str
    issued: dict[str, int]
    """Number of collectives issued, by group."""
    groups: dict[str, list[list[int]]]
    """Ranks of each group that it waits in, as :func:`runs`: thousands of ranks would list thousands each."""
    waiting: list[dict[str, Any]]
    """Collectives it waits in: :class:`train.health.snapshot.IssuedCollective` as plain values."""
    stacks: str
    """The stack of every thread."""


@dataclass(frozen=True)
class Suspect:
    """A rank that the others wait for."""

    rank: int
    host: str
    why: str
    stacks: str = ""


@dataclass(frozen=True)
class Finding:
    """The diagnosis of a hang."""

    time: float
    batch: int
    seconds: float
    """Seconds without progress."""
    collective: str
    """The collective that the others wait in; empty if no rank waits."""
    waiting: list[int]
    """Ranks that wait."""
    suspects: list[Suspect] = field(default_factory=list)
    recorded: list[str] = field(default_factory=list)
    """Each group's collective in a line, from the ranks' recorders; on NCCL torch's flight recorder."""

    @property
    def line(self) -> str:
        """The finding in one line."""
        names = "; ".join(f"rank {each.rank} on {each.host} {each.why}" for each in self.suspects)
        if not names:
            names = "every rank is in the same collective: check the network between them"
        held = f", held up in {self.collective}: ranks {ranges(self.waiting)}" if self.waiting else ""
        return f"HANG: no progress for {self.seconds:.0f} s after batch {self.batch}: {names}{held}"


@dataclass(frozen=True)
class Ended:
    """A record that all ranks exited together on purpose."""

    status: int
    """Exit status."""


def is_supervised() -> bool:
    """Returns whether a supervisor reads the records, and has removed those of the previous attempt."""
    return bool(os.environ.get(RECORDS_VARIABLE))


def records_folder(run_folder: Path) -> Path:
    """The folder of this run's records."""
    return Path(os.environ.get(RECORDS_VARIABLE) or run_folder / RECORDS_FOLDER)


def clear_records(folder: Path) -> None:
    """Removes the records of earlier attempts; one process calls it, before any rank writes."""
    for pattern in (
        "beat-*.json",
        "failed-*.json",
        "stuck-*.json",
        "stacks-*.txt",
        FINDING_FILE,
        ENDED_FILE,
        LOST_HOST_FILE,
    ):
        for file in folder.glob(pattern):
            file.unlink(missing_ok=True)


def heartbeat_file(folder: Path, rank: int) -> Path:
    """The file of a rank's heartbeat."""
    return folder / f"beat-{rank:05d}.json"


def failure_file(folder: Path, rank: int) -> Path:
    """The file of a rank's failure."""
    return folder / f"failed-{rank:05d}.json"


def stuck_file(folder: Path, rank: int) -> Path:
    """The file of a rank's state in a hang."""
    return folder / f"stuck-{rank:05d}.json"


def stacks_file(folder: Path, rank: int) -> Path:
    """The file to which a signal makes a rank write its stacks, even if Python no longer runs in it."""
    return folder / f"stacks-{rank:05d}.txt"


def write_record(file: Path, record: Any) -> None:
    """Writes a record atomically; on a full or missing disk only the record is lost."""
    with suppress(OSError):
        write_whole(file, json.dumps(asdict(record)), sync=False)


def read_record(file: Path, kind: type[Kind]) -> Kind | None:
    """Reads a record; None if there is none or it can't be read."""
    try:
        tree = json.loads(file.read_text())
        if kind is Finding:
            tree["suspects"] = [Suspect(**suspect) for suspect in tree["suspects"]]
        return kind(**tree)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_records(folder: Path, pattern: str, kind: type[Kind]) -> list[Kind]:
    """Reads every record of a kind, by rank."""
    found = [read_record(file, kind) for file in sorted(folder.glob(pattern))]
    return [record for record in found if record is not None]


def record_failure(folder: Path, topology: Topology, batch: int, error: BaseException) -> None:
    """Records the error that ends this rank."""
    line = without_secrets(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
    trace = without_secrets("".join(traceback.format_exception(error)))[-8000:]
    failure = Failure(topology.rank, host_name(), time.time(), batch, line, trace)
    write_record(failure_file(folder, topology.rank), failure)


def runs(ranks: list[int]) -> list[list[int]]:
    """Writes ascending ranks as runs of first, step and count: [[0, 8, 4]] for 0, 8, 16, 24."""
    found: list[list[int]] = []
    for rank in ranks:
        if found and found[-1][2] == 1:
            found[-1][1:] = [rank - found[-1][0], 2]
        elif found and rank == found[-1][0] + found[-1][1] * found[-1][2]:
            found[-1][2] += 1
        else:
            found.append([rank, 1, 1])
    return found


def ranks_of(written: list[list[int]]) -> list[int]:
    """Returns the ranks that :func:`runs` has written."""
    return [first + step * place for first, step, count in written for place in range(count)]


def ranges(ranks: list[int]) -> str:
    """Formats ranks as ranges: `0-3, 5` for 0, 1, 2, 3, 5."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][-1] == rank - 1:
            parts[-1] = [parts[-1][0], rank]
        else:
            parts.append([rank])
    return ", ".join("-".join(map(str, part)) for part in parts)
