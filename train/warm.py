"""Ranks that start without importing: one process of the host has imported everything, and forks them.

`python -m launch.restart --warm` starts the server and names its socket in FINEGRAIN_WARM. A launcher starts
ranks as ever. Each checks its recipe, hands itself over to the server (:func:`hand_over`) with its arguments,
environment and output, and waits in place of the rank that the server forks: it passes on signals and ends
with the rank's status; if it is killed, so is the rank.

The server imports when the first rank comes. It forks only ranks that would import the same: of the same
code, unchanged since, and of the same environment but for what differs between ranks. All others are told
that it is cold, and import for themselves. It never computes, so that no thread pool is lost in a fork, and
never touches a GPU, which a forked process could not use then. Linux only. Has not run on a GPU yet.
"""

import ctypes
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

WARM_VARIABLE = "FINEGRAIN_WARM"
"""Names the server's socket."""
COLD = "cold"
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
WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2): the signal that a process gets when its parent ends."""
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
                return None if first in ("", COLD) else _stand_in(int(first), answers.readline)
        except OSError:
            return None


def _stand_in(rank_pid: int, next_answer: Callable[[], str]) -> int:
    """Waits for the end of a rank that has this process's place, passing on signals; returns its status."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(rank_pid, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
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


class WarmServer:
    """Forks ranks for the processes that come to its socket, until the process that started it ends.

    Args:
        listener: the socket.
        prepare: imports, with the environment of the first rank; returns whether this process can fork ranks.
        work: what a rank does with its arguments, program excluded; returns its exit status.
        life: a pipe whose other end the process that started it holds.
        root: folder of the code that ranks run.
    """

    def __init__(
        self,
        listener: socket.socket,
        prepare: Callable[[], bool],
        work: Callable[[Sequence[str]], int],
        life: int,
        root: Path = ROOT,
    ) -> None:
        self.listener, self.prepare, self.work, self.life = listener, prepare, work, life
        self.root = root
        self.own_environment = dict(os.environ)
        self.environment: dict[str, str] | None = None
        """That of the ranks that it can fork; None until the first has come."""
        self.changed: dict[str, float] = {}
        """When each imported file of ours was changed."""
        self.ranks: dict[int, tuple[int, socket.socket]] = {}
        """Process id of each rank and the connection of the process that stands in for it, by its pidfd."""
        self.selector = selectors.DefaultSelector()

    def serve(self) -> int:
        """Forks ranks; returns 0 when the server is to end, and in each rank that rank's exit status."""
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(self.life, selectors.EVENT_READ)
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    request, connection = self._receive()
                    if request is not None and self._start(request, connection):
                        return self._be_rank(request)
                elif key.fd == self.life:
                    return 0  # Its ranks end with it.
                elif key.fd in self.ranks:
                    self._finish(key.fd)
                else:  # The process that stands in for a rank is gone.
                    os.kill(self.ranks[key.data][0], signal.SIGKILL)
                    self.selector.unregister(key.fileobj)

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

    def _start(self, request: Request, connection: socket.socket) -> bool:
        """Forks a rank if this server can; True in the rank."""
        if self.environment is None and self._is_of_this_start(request):
            self._warm_up(request)
        if not self._can_be(request):
            with suppress(OSError):
                connection.sendall(f"{COLD}\n".encode())
            _close(connection, request.files)
            return False
        with warnings.catch_warnings():
            # The threads are those of OpenBLAS, which waits for them before a fork.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            connection.close()
            return True
        pidfd = os.pidfd_open(pid)
        self.ranks[pidfd] = pid, connection
        self.selector.register(pidfd, selectors.EVENT_READ)
        self.selector.register(connection, selectors.EVENT_READ, data=pidfd)
        _close(None, request.files)
        with suppress(OSError):
            connection.sendall(f"{pid}\n".encode())
        return False

    def _finish(self, pidfd: int) -> None:
        """Reports the end of a rank."""
        pid, connection = self.ranks.pop(pidfd)
        _, status = os.waitpid(pid, 0)
        with suppress(OSError):
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        self.selector.unregister(pidfd)
        with suppress(KeyError):
            self.selector.unregister(connection)
        connection.close()
        os.close(pidfd)

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

    def _be_rank(self, request: Request) -> int:
        """Runs the rank in the process that was forked for it; returns its exit status."""
        ctypes.CDLL(None).prctl(WITH_PARENT, signal.SIGKILL)
        self.selector.close()
        self.listener.close()
        for pidfd, (_, connection) in self.ranks.items():
            os.close(pidfd)
            connection.close()
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

        START_CLOCK.continue_from(request.created)
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


def serve(path: str) -> int:
    """Serves a socket that it creates; its life is this process's standard input."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(128)
        return WarmServer(listener, _import_all, _train, life=0).serve()


if __name__ == "__main__":
    from train.warm import serve as serve_here  # as the module that the ranks import

    sys.exit(serve_here(sys.argv[1]))
