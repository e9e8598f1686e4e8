"""Records that say why a job ended: heartbeats, failures, and the finding of a hang.

Files of JSON in one folder that all ranks share: the run's ``faults/``, or the folder that a supervisor
names in FINEGRAIN_RECORDS. Each is written whole or not at all. Needs no torch.
"""

import json
import os
import socket
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from train.recipe.topology import Topology
from train.record.files import write_whole

RECORDS_VARIABLE = "FINEGRAIN_RECORDS"
HOST_VARIABLE = "FINEGRAIN_HOST"
"""The node's name in the job's list of hosts, from the launcher: its own may be another, as a pod's is."""
RECORDS_FOLDER = "faults"
FINDING_FILE = "hang.json"
ENDED_FILE = "ended.json"
LOST_HOST_FILE = "lost-host"
"""The host whose connection a launcher lost first: launch/submit/ssh_step.sh writes its name."""

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Heartbeat:
    """A rank's sign of life, written every few seconds."""

    rank: int
    host: str
    pid: int
    pid_space: str
    """Where the pid means this process: see :func:`pid_space`."""
    count: int
    """Rises with every sign; what has the same count later has not lived in between."""
    time: float
    """Seconds since 1970."""
    where: str
    """The part of the program that the rank began last."""
    batch: int
    """Batches trained."""
    run: str
    """Folder of the run."""


@dataclass(frozen=True)
class Failure:
    """How a rank failed, in its own words."""

    rank: int
    host: str
    time: float
    batch: int
    """Batches trained before it."""
    error: str
    """One line."""
    trace: str = ""


@dataclass(frozen=True)
class Stuck:
    """A rank's knowledge when nothing has moved for too long."""

    rank: int
    host: str
    batch: int
    where: str
    issued: dict[str, int]
    """Collectives issued by group."""
    groups: dict[str, list[int]]
    """Ranks by group."""
    waiting: list[dict[str, Any]]
    """Collectives that it waits in, :class:`train.health.snapshot.IssuedCollective` as plain values."""
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
    """How long nothing had moved."""
    collective: str
    """The collective that the others wait in; empty if nobody waits."""
    waiting: list[int]
    """Ranks that wait."""
    suspects: list[Suspect] = field(default_factory=list)

    @property
    def line(self) -> str:
        """All of it in one line."""
        names = "; ".join(f"rank {each.rank} on {each.host} {each.why}" for each in self.suspects)
        if not names:
            names = "every rank is in the same collective: look at the network between them"
        held = f", held up in {self.collective}: ranks {ranges(self.waiting)}" if self.waiting else ""
        return f"HANG: nothing has moved for {self.seconds:.0f} s after batch {self.batch}: {names}{held}"


@dataclass(frozen=True)
class Ended:
    """That all ranks left together, of their own will."""

    status: int
    """Exit status."""


def host_name() -> str:
    """This machine's name as lists of hosts have it: the launcher's or SLURM's, which may not be its own."""
    return os.environ.get(HOST_VARIABLE) or os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def pid_space() -> str:
    """Where a process id means the same process: this boot of this machine, and a container of it."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [boot.read_text().strip() if boot.is_file() else socket.gethostname()]
    return " ".join([*parts, str(namespace.readlink())] if namespace.is_symlink() else parts)


def is_supervised() -> bool:
    """Whether somebody else reads the records, and has removed those of the try before."""
    return bool(os.environ.get(RECORDS_VARIABLE))


def records_folder(run_folder: Path) -> Path:
    """Where this run's ranks leave their records."""
    return Path(os.environ.get(RECORDS_VARIABLE) or run_folder / RECORDS_FOLDER)


def clear_records(folder: Path) -> None:
    """Removes what an earlier try left; one process calls it, before any rank writes."""
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
    """File of a rank's heartbeat."""
    return folder / f"beat-{rank:05d}.json"


def failure_file(folder: Path, rank: int) -> Path:
    """A rank's failure."""
    return folder / f"failed-{rank:05d}.json"


def stuck_file(folder: Path, rank: int) -> Path:
    """File of a rank's knowledge when nothing moved."""
    return folder / f"stuck-{rank:05d}.json"


def stacks_file(folder: Path, rank: int) -> Path:
    """Where a signal makes a rank write its stacks, even one that Python no longer runs in."""
    return folder / f"stacks-{rank:05d}.txt"


def write_record(file: Path, record: Any) -> None:
    """Writes a record whole; a disk that is full or gone costs the record and nothing else."""
    with suppress(OSError):
        write_whole(file, json.dumps(asdict(record)), sync=False)


def read_record(file: Path, kind: type[Kind]) -> Kind | None:
    """A record, or None where there is none that can be read."""
    try:
        tree = json.loads(file.read_text())
        if kind is Finding:
            tree["suspects"] = [Suspect(**suspect) for suspect in tree["suspects"]]
        return kind(**tree)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_records(folder: Path, pattern: str, kind: type[Kind]) -> list[Kind]:
    """Every record of a kind, by rank."""
    found = [read_record(file, kind) for file in sorted(folder.glob(pattern))]
    return [record for record in found if record is not None]


def record_failure(folder: Path, topology: Topology, batch: int, error: BaseException) -> None:
    """Leaves word of the error that ends this rank."""
    line = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    trace = "".join(traceback.format_exception(error))[-8000:]
    failure = Failure(topology.rank, host_name(), time.time(), batch, line, trace)
    write_record(failure_file(folder, topology.rank), failure)


def ranges(ranks: list[int]) -> str:
    """Ranks in words: `0-3, 5` for 0, 1, 2, 3, 5."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][-1] == rank - 1:
            parts[-1] = [parts[-1][0], rank]
        else:
            parts.append([rank])
    return ", ".join("-".join(map(str, part)) for part in parts)
