"""Ranks that start without importing: one process of the host has imported everything, and forks them.

`python -m launch.restart --warm` starts the server and names its socket in FINEGRAIN_WARM. A launcher starts
ranks as ever. Each checks its recipe, hands itself over to the server (:func:`hand_over`) with its arguments,
environment and output, and waits in place of the rank that the server forks: it passes on signals and ends
with the rank's status; if it is killed, so is the rank.

If a rank fails of a job whose ranks are all on this host, or on as many as the server was told, the processes
that stand in for them stay. Once all ranks have ended, whoever started the server may have them forked again
(:class:`WarmServer`): the launcher notices nothing of it, and neither it nor Python starts again.

The server imports when the first rank comes. It forks only ranks that would import the same: of the same
code, unchanged since, and of the same environment but for what differs between ranks. All others are told
that it is cold, and import for themselves. It never computes, so that no thread pool is lost in a fork, and
never touches a GPU, which a forked process could not use then. Linux only. Has not run on a GPU yet.
"""

import gc
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from train.leaving import Leaving
from train.recipe.exit_status import PREEMPTED_STATUS, USAGE_STATUS
from train.record.process import end_with_parent

WARM_VARIABLE = "FINEGRAIN_WARM"
"""Names the server's socket."""
COLD = "cold"
RANK = "rank "
"""Before the process id of the rank that was forked; 0 if it has ended and another may be forked."""
AGAIN, KILL, ENDED, BEGUN = "again", "kill", "ended", "begun"
"""Lines between the server and the process that started it: two commands and two reports."""
LAST_STATUSES = (0, USAGE_STATUS, PREEMPTED_STATUS)
"""A rank that ends with one of these is not forked again."""
DIFFERING = frozenset(
    {
        *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
        *("GROUP_RANK", "ROLE_RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
        *("CUDA_VISIBLE_DEVICES", "PWD", "OLDPWD", "SHLVL", "_", WARM_VARIABLE),
    }
)
"""Variables that no import reads; they may be another rank's."""
READ_BY_STREAMS = frozenset({"PYTHONUNBUFFERED", "PYTHONFAULTHANDLER"})
"""Variables that :func:`train.health.environment.set_defaults` puts into effect in a process that runs."""
ROOT = Path(__file__).resolve().parents[1]


def hand_over(arguments: Sequence[str]) -> int | None:
    """Has the server run this rank, if there is one that can; returns the rank's exit status.

    Args:
        arguments: the command line, program included.

    Returns:
        None if this process is to run the rank itself.
    """
    path = os.environ.get(WARM_VARIABLE)
    if not path:
        return None
    # Imported here: what a server forks has it already.
    from train.record.process import process_seconds

    request = {
        "arguments": list(arguments),
        "folder": str(Path.cwd()),
        "environment": dict(os.environ),
        "created": time.time() - process_seconds(),
    }
    sys.stdout.flush()
    sys.stderr.flush()
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(path)
            text = json.dumps(request).encode()
            socket.send_fds(server, [len(text).to_bytes(8, "big")], [0, 1, 2])
            server.sendall(text)
            with server.makefile("r") as answers:
                first = answers.readline().strip()
                return None if first in ("", COLD) else _stand_in(first, answers.readline)
        except OSError:
            return None


def _stand_in(answer: str, next_answer: Callable[[], str]) -> int:
    """Waits for the end of the ranks in this process's place, passing on signals; returns their status.

    Args:
        answer: the server's first.
        next_answer: waits for the next; empty if there is none.
    """
    rank_pid = told = 0

    def pass_on(number: int, _frame: FrameType | None) -> None:
        nonlocal told
        told = number
        if not rank_pid:  # It has ended, and perhaps another is forked.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        with suppress(ProcessLookupError):  # It has just ended.
            os.kill(rank_pid, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    while answer.startswith(RANK):
        rank_pid = int(answer.removeprefix(RANK))
        if told:
            pass_on(told, None)
        answer = next_answer().strip()
    status = int(answer) if answer else -signal.SIGKILL  # The server was killed, and its ranks with it.
    if status >= 0:
        return status
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
    return 1


@dataclass(frozen=True)
class Request:
    """A rank that is to be forked."""

    arguments: list[str]
    folder: str
    environment: dict[str, str]
    created: float
    """When the process that the launcher started began, in seconds since 1970."""
    files: list[int]
    """Its standard input, output and error."""


@dataclass
class RankSlot:
    """A rank's place: the process that stands in for it, and the rank that is forked for it now."""

    request: Request
    connection: socket.socket
    created: float
    """When the start of its rank began."""
    pid: int = 0
    """0: its rank has ended."""
    pidfd: int = -1


class WarmServer:
    """Forks ranks for the processes that come to its socket, until the process that started it ends.

    That process hears ``ended PID STATUS`` of each rank that ends in a job whose ranks may be forked again:
    if all ranks of this host are here and none has ended for good. It may ask to ``kill`` the others and,
    once all have ended, to fork all ``again``: then it hears ``begun``, or ``cold`` if that can't be.

    Args:
        listener: the socket.
        prepare: imports, with the environment of the first rank; returns whether this process can fork ranks.
        work: what a rank does with its arguments, program excluded; returns its exit status.
        life: a socket whose other end the process that started it holds.
        root: folder of the code that ranks run.
        nodes: hosts of a job whose ranks may be forked again; those of another number are not.
    """

    def __init__(
        self,
        listener: socket.socket,
        prepare: Callable[[], bool],
        work: Callable[[Sequence[str]], int],
        life: int,
        root: Path = ROOT,
        nodes: int = 1,
    ) -> None:
        self.listener, self.prepare, self.work, self.life = listener, prepare, work, life
        self.root, self.nodes = root, nodes
        self.own_environment = dict(os.environ)
        self.environment: dict[str, str] | None = None
        """That of the ranks that it can fork; None until the first has come."""
        self.changed: dict[str, float] = {}
        """When each imported file of ours was changed."""
        self.slots: list[RankSlot] = []
        self.is_failed = False
        """A rank has ended, and all may be forked again."""
        self.selector = selectors.DefaultSelector()

    def serve(self) -> int:
        """Forks ranks; returns 0 when the server is to end, and in each rank that rank's exit status."""
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(self.life, selectors.EVENT_READ)
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    request, connection = self._receive()
                    slot = self._start(request, connection) if request is not None else None
                    if slot is not None:
                        return self._be_rank(slot)
                elif key.fd == self.life:
                    asked = os.read(self.life, 64).decode().split()
                    if not asked:
                        return 0  # Its ranks end with it.
                    slot = self._do(asked)
                    if slot is not None:
                        return self._be_rank(slot)
                elif key.fd == key.data.pidfd:
                    self._finish(key.data)
                else:
                    self._leave(key.data)

    def _receive(self) -> tuple[Request | None, socket.socket]:
        connection, _ = self.listener.accept()
        files: list[int] = []
        try:
            head, files, _, _ = socket.recv_fds(connection, 8, 3)
            text = b""
            while len(text) < int.from_bytes(head, "big"):
                text += connection.recv(1 << 20) or b" " * (1 << 20)
            return Request(**json.loads(text), files=files), connection
        except (OSError, ValueError, TypeError):
            _close(connection, files)
            return None, connection

    def _start(self, request: Request, connection: socket.socket) -> RankSlot | None:
        """Forks a rank if this server can; returns its slot in the rank."""
        if self.environment is None and self._is_of_this_start(request):
            self._warm_up(request)
        if not self._can_be(request):
            with suppress(OSError):
                connection.sendall(f"{COLD}\n".encode())
            _close(connection, request.files)
            return None
        slot = RankSlot(request, connection, request.created)
        self.slots.append(slot)
        self.selector.register(connection, selectors.EVENT_READ, data=slot)
        return slot if self._fork(slot) else None

    def _fork(self, slot: RankSlot) -> bool:
        """Forks a rank; True in the rank."""
        with warnings.catch_warnings():
            # The threads are those of OpenBLAS, which waits for them before a fork.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            return True
        slot.pid, slot.pidfd = pid, os.pidfd_open(pid)
        self.selector.register(slot.pidfd, selectors.EVENT_READ, data=slot)
        self._tell(slot, f"{RANK}{pid}")
        return False

    def _finish(self, slot: RankSlot) -> None:
        """Reports the end of a rank: to its stand-in, or to the process that may have it forked again."""
        pid = slot.pid
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self.selector.unregister(slot.pidfd)
        os.close(slot.pidfd)
        slot.pid, slot.pidfd = 0, -1
        is_kept = slot in self.slots
        self.is_failed |= is_kept and code not in LAST_STATUSES and self._is_whole_job()
        if self.is_failed and is_kept:
            self._tell(slot, f"{RANK}0")
            self._report(f"{ENDED} {pid} {code}")
        else:
            self._tell(slot, str(code))
            self._remove(slot)

    def _leave(self, slot: RankSlot) -> None:
        """Ends the rank of a process that stood in for it and is gone."""
        self._remove(slot)
        if slot.pid:
            os.kill(slot.pid, signal.SIGKILL)

    def _remove(self, slot: RankSlot) -> None:
        if slot in self.slots:
            self.slots.remove(slot)
        with suppress(KeyError, ValueError):  # It has been removed already.
            self.selector.unregister(slot.connection)
        _close(slot.connection, slot.request.files)
        slot.request.files.clear()
        self.is_failed = self.is_failed and bool(self.slots)

    def _is_whole_job(self) -> bool:
        """Returns True if all ranks of this host are here, of a job on `nodes` hosts, and their stand-ins."""
        sizes = {
            (slot.request.environment.get("WORLD_SIZE"), slot.request.environment.get("LOCAL_WORLD_SIZE"))
            for slot in self.slots
        }
        return sizes == {(str(self.nodes * len(self.slots)), str(len(self.slots)))}

    def _do(self, asked: Sequence[str]) -> RankSlot | None:
        """Kills ranks or forks them again; returns the slot of a rank in that rank."""
        if KILL in asked:
            for slot in self.slots:
                if slot.pid:
                    os.kill(slot.pid, signal.SIGKILL)
        if AGAIN in asked:
            can = self.is_failed and self._is_whole_job() and not any(slot.pid for slot in self.slots)
            if not can or not all(self._can_be(slot.request) for slot in self.slots):
                self._report(COLD)
                return None
            self.is_failed, now = False, time.time()
            self._report(BEGUN)
            for slot in self.slots:
                slot.created = now
                if self._fork(slot):
                    return slot
        return None

    def _tell(self, slot: RankSlot, line: str) -> None:
        with suppress(OSError):
            slot.connection.sendall(f"{line}\n".encode())

    def _report(self, line: str) -> None:
        with suppress(OSError):
            os.write(self.life, f"{line}\n".encode())

    def _is_of_this_start(self, request: Request) -> bool:
        """Compares what only the start of Python and of the dynamic linker has read."""
        own, theirs = (
            {
                name: value
                for name, value in environment.items()
                if name.startswith(("PYTHON", "LD_")) and name not in READ_BY_STREAMS
            }
            for environment in (self.own_environment, request.environment)
        )
        return own == theirs and _is_below(request.arguments[0], self.root)

    def _warm_up(self, request: Request) -> None:
        os.environ.clear()
        os.environ.update(request.environment)
        os.environ.pop(WARM_VARIABLE, None)
        if not self.prepare():
            return
        self.environment = _common(request.environment)
        files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
        self.changed = {file: _changed(file) for file in files if file and _is_below(file, self.root)}
        gc.collect()
        gc.freeze()  # A rank's collector would otherwise copy all pages that it shares with the server.

    def _can_be(self, request: Request) -> bool:
        is_same = self.environment == _common(request.environment) and self._is_of_this_start(request)
        return is_same and all(_changed(file) == before for file, before in self.changed.items())

    def _be_rank(self, slot: RankSlot) -> int:
        """Runs the rank in the process that was forked for it; returns its exit status."""
        request = slot.request
        end_with_parent()
        self.selector.close()
        self.listener.close()
        for other in self.slots:
            if other.pidfd >= 0:
                os.close(other.pidfd)
            _close(other.connection, other.request.files if other is not slot else ())
        for number, file in enumerate(request.files):
            os.dup2(file, number)
            os.close(file)
        if self.life > 2:
            os.close(self.life)
        os.environ.clear()
        os.environ.update(request.environment)
        os.environ.pop(WARM_VARIABLE, None)
        os.chdir(request.folder)
        sys.argv = request.arguments
        from train.record.start_times import START_CLOCK

        START_CLOCK.continue_from(slot.created)
        try:
            return self.work(request.arguments[1:])
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            return 1


def _common(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in DIFFERING}


def _is_below(file: str, folder: Path) -> bool:
    return folder in Path(file).resolve().parents


def _changed(file: str) -> float:
    try:
        return Path(file).stat().st_mtime
    except OSError:
        return -1.0


def _close(connection: socket.socket | None, files: Sequence[int]) -> None:
    if connection is not None:
        connection.close()
    for file in files:
        os.close(file)


def _import_all() -> bool:
    """Imports all that a rank runs; returns whether no GPU was touched, which a fork could not use then."""
    # Asking whether there is a GPU leaves no trace then.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    import train.main
    import train.run  # noqa: F401

    return not torch.cuda.is_initialized()


def _train(arguments: Sequence[str]) -> int:
    from train.main import main

    return main(arguments)


def serve(path: str, nodes: str) -> int:
    """Serves a socket that it creates; its life is this process's standard input, a socket too."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(128)
        return WarmServer(listener, _import_all, _train, life=0, nodes=int(nodes)).serve()


if __name__ == "__main__":
    from train.warm import serve as serve_here  # as the module that the ranks import

    with Leaving():
        sys.exit(serve_here(*sys.argv[1:]))
