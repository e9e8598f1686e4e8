"""Leases: one process at a time writes to a folder, on any file system and whichever hosts ask for it.

The lease of a folder is the newest file in its ``lease/``, numbered from 1. It names the process that holds
it and is rewritten every few seconds. All it needs of a file system is that a file can be created exclusively
and that whoever opens it sees what was written, which NFS gives too. Clocks are never compared.

A holder on this host is looked up by its process id. Any other is watched: one that renews lives, and one
that does not for :data:`EXPIRY_SECONDS` is dead. A dead holder's lease is followed by the next number, which
only one process can create. A holder that was taken for dead, because its host or the file system stood
still, finds the newer file and ends at once, before it writes anything else.
"""

import json
import os
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from train.recipe.errors import UserError
from train.recipe.exit_status import USAGE_STATUS
from train.record import log
from train.record.process import host_name, pid_space, process_start

LEASE_FOLDER = "lease"
RENEWAL_SECONDS = 5.0
EXPIRY_SECONDS = 30.0
GRACE_SECONDS = 2.0
"""A holder on this host that is ending gets this long."""
LOOK_SECONDS = 0.25
RECORD_BYTES = 512
"""A record is padded to this length, so that rewriting it in place never leaves a rest."""

logger = log.get_logger(__name__)


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease."""

    host: str
    pid: int
    pid_space: str
    """The space in which the pid is valid, see :func:`train.record.process.pid_space`."""
    started: int
    """Distinguishes it from a later process with the same pid."""
    since: str
    """When it took the lease, for people."""
    token: str
    count: int = 0
    """Rises with every renewal."""
    has_ended: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class Lease:
    """A lease that this process holds, and the thread that renews it."""

    def __init__(self, file: Path, holder: Holder, renewal_seconds: float) -> None:
        self.file, self.holder, self.renewal_seconds = file, holder, renewal_seconds
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_end, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Ends the lease, so that the next process need not wait."""
        self._end.set()
        self._thread.join()
        with suppress(OSError):
            if not self.is_lost():
                self.holder = replace(self.holder, has_ended=True)
                _write(self.file, self.holder)

    def is_lost(self) -> bool:
        """Returns True if another process has taken the lease over."""
        if _newest(self.file.parent) > int(self.file.stem):
            return True
        found, mine = _parse(_read(self.file)), self.holder
        # Somebody may have removed the folder and begun another; one damaged byte is no other process.
        return (
            found is not None
            and found.token != mine.token
            and (found.host, found.pid, found.started) != (mine.host, mine.pid, mine.started)
        )

    def _renew_until_end(self) -> None:
        has_warned = False
        while not self._end.wait(self.renewal_seconds):
            try:
                if self.is_lost():
                    newer = self.file.with_name(_name(_newest(self.file.parent)))
                    self._give_up(_parse(_read(newer)))
                self.holder = replace(self.holder, count=self.holder.count + 1)
                _write(self.file, self.holder)
                has_warned = False
            except OSError as error:
                # The disk may be full: training continues, and whoever comes next may take the folder over.
                if not has_warned:
                    logger.warning(f"{self.file}: NOT renewed ({error.strerror}); training continues")
                has_warned = True

    def _give_up(self, other: Holder | None) -> None:
        """Ends this process at once: it must not write to the folder any more."""
        folder = self.file.parent.parent
        logger.error(f"{folder} was taken over by {other or 'another process'}: ended without saving")
        os._exit(USAGE_STATUS)


_held: dict[Path, tuple[int, Lease]] = {}
"""By folder, with the process that took it: a forked child holds nothing."""


def hold(
    folder: Path,
    *,
    key: str,
    remedy: str,
    grace_seconds: float = GRACE_SECONDS,
    expiry_seconds: float = EXPIRY_SECONDS,
    renewal_seconds: float = RENEWAL_SECONDS,
) -> None:
    """Takes the lease of a folder for this process, until :func:`release` or its end.

    Args:
        folder: created if it does not exist.
        key: named by the error.
        remedy: likewise.
        grace_seconds: how long to wait for a holder that this host knows to be alive.
        expiry_seconds: how long a holder on another host may be silent.
        renewal_seconds: time between two renewals.

    Raises:
        UserError: if another process holds it and is alive.
        OSError: if the folder can't be written.
    """
    place = folder.resolve()
    if _held.get(place, (0,))[0] == os.getpid():
        return
    leases = folder / LEASE_FOLDER
    leases.mkdir(parents=True, exist_ok=True)
    while True:
        number = _newest(leases)
        if number:
            alive = _wait_for_end(leases / _name(number), grace_seconds, expiry_seconds)
            if alive is not None:
                raise UserError(f"{folder} is in use by {alive}", key=key, remedy=remedy)
        mine = _create(leases, number + 1)
        if mine is not None:
            break
    _held[place] = os.getpid(), Lease(leases / _name(number + 1), mine, renewal_seconds)
    for old in leases.glob("*.json"):
        if old.stem.isdecimal() and int(old.stem) <= number:
            old.unlink(missing_ok=True)


def seen_holder(folder: Path) -> Holder | None:
    """Returns the process that seems to hold a folder's lease, for people to read.

    It does not wait, so on another host it goes by the time of the last renewal. :func:`hold` makes sure.
    """
    leases = folder / LEASE_FOLDER
    file = leases / _name(_newest(leases))
    holder = _parse(_read(file))
    if holder is None or holder.has_ended:
        return None
    if holder.pid_space == pid_space():
        return holder if process_start(holder.pid) == holder.started else None
    with suppress(OSError):
        return holder if time.time() - file.stat().st_mtime < EXPIRY_SECONDS else None
    return None


def follow_rename(place: Path, renamed: Path) -> None:
    """Keeps this process's lease of a folder that it has renamed; ``place`` is its resolved path before."""
    if (held := _held.pop(place, None)) is not None:
        held[1].file = renamed / LEASE_FOLDER / held[1].file.name
        _held[renamed.resolve()] = held


def release(folder: Path) -> None:
    """Ends this process's lease of a folder, if it holds it."""
    place = folder.resolve()
    if _held.get(place, (0,))[0] == os.getpid():
        _held.pop(place)[1].release()


def _create(leases: Path, number: int) -> Holder | None:
    """Creates the lease with this number; None if another process came first."""
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    pid = os.getpid()
    holder = Holder(host_name(), pid, pid_space(), process_start(pid) or 0, since, secrets.token_hex(8))
    file = leases / _name(number)
    try:
        with file.open("xb") as stream:
            stream.write(_format(holder))
    except FileExistsError:
        return None
    if _newest(leases) > number:
        # Others came and went between this process's look at the newest lease and now.
        file.unlink(missing_ok=True)
        return None
    return holder


def _wait_for_end(file: Path, grace_seconds: float, expiry_seconds: float) -> Holder | str | None:
    """Returns the holder of a lease if it is alive, None once it is not."""
    first = _read(file)
    holder = _parse(first)
    is_here = holder is not None and holder.pid_space == pid_space()
    begun = time.monotonic()
    if not is_here and first and not (holder and holder.has_ended):
        logger.warning(
            f"{file.parent.parent} was left by {holder or 'an unknown process'} without an end; waiting "
            f"{expiry_seconds:.0f} s for a sign of life"
        )
    while True:
        content = _read(file)
        found = _parse(content)
        if content is None or (found is not None and found.has_ended):
            return None
        waited = time.monotonic() - begun
        if is_here and holder is not None:
            if process_start(holder.pid) != holder.started:
                return None
            if waited >= grace_seconds:
                return holder
        elif content != first:
            return found or "another process"
        elif waited >= expiry_seconds:
            return None
        time.sleep(min(LOOK_SECONDS, grace_seconds / 4 if is_here else expiry_seconds / 8))


def _newest(leases: Path) -> int:
    """Returns the number of the newest lease; 0 if there is none."""
    return max((int(file.stem) for file in leases.glob("*.json") if file.stem.isdecimal()), default=0)


def _name(number: int) -> str:
    return f"{number:06d}.json"


def _format(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode().ljust(RECORD_BYTES - 1) + b"\n"


def _write(file: Path, holder: Holder) -> None:
    """Rewrites a record in place: on NFS, others might not see a new file under its name for a while."""
    descriptor = os.open(file, os.O_WRONLY)
    try:
        os.pwrite(descriptor, _format(holder), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(file: Path) -> bytes | None:
    """Reads a record; None if it has been removed, which only a newer lease's holder does."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


def _parse(content: bytes | None) -> Holder | None:
    """Returns the holder that a record names; None if it can't be read."""
    try:
        return Holder(**json.loads(content or b""))
    except (ValueError, TypeError):
        return None
