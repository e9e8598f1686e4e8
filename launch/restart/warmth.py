"""The process of a supervised job that has imported everything, from which this host's ranks are forked."""

import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from train.warm import AGAIN, BEGUN, ENDED, KILL, WARM_VARIABLE

LISTEN_SECONDS = 10.0


class Warmth:
    """Keeps one server of :mod:`train.warm`, over all tries of a job.

    Its ranks end with it, and it ends with this process.

    Args:
        nodes: hosts of the job that fork their ranks again together.
    """

    def __init__(self, nodes: int = 1) -> None:
        self.nodes = nodes
        self._process: subprocess.Popen[bytes] | None = None
        self._life: socket.socket | None = None
        self._heard = ""
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def variables(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Returns the variable by which ranks find the server; empty if it does not come up.

        Args:
            environment: of the training command, from which it starts a server if none lives.
        """
        if self._process is None or self._process.poll() is not None:
            self._start(environment)
        assert self._folder is not None
        path = Path(self._folder.name) / "socket"
        end = time.monotonic() + LISTEN_SECONDS
        while not path.exists():
            if time.monotonic() > end or self._process is None or self._process.poll() is not None:
                return {}
            time.sleep(0.01)
        return {WARM_VARIABLE: str(path)}

    def wait(
        self, launcher: "subprocess.Popen[bytes]", seconds: float | None = None
    ) -> tuple[int, int] | None:
        """Waits for the end of a rank that can be forked again, or of the launcher.

        Args:
            launcher: its ranks are those of the server.
            seconds: at most; None: without a limit.

        Returns:
            Process id and status of the rank; None if the launcher has ended, or the time.
        """
        end = None if seconds is None else time.monotonic() + seconds
        ended = os.pidfd_open(launcher.pid)
        try:
            while (line := self._next_line()) is None:
                left = None if end is None else max(0.0, end - time.monotonic())
                life = [self._life.fileno()] if self._life is not None else []
                ready, _, _ = select.select([ended, *life], [], [], left)
                if set(life) & set(ready):
                    self._hear()
                else:
                    return None
        finally:
            os.close(ended)
        word, *numbers = line.split()
        return (int(numbers[0]), int(numbers[1])) if word == ENDED else None

    def kill_ranks(self) -> None:
        """Kills the ranks that are left of a job."""
        self._ask(KILL)

    def begin_again(self) -> bool:
        """Forks all ranks of a job again, which have ended; False if that can't be."""
        self._ask(AGAIN)
        while True:
            line = self._next_line()
            if line is not None and not line.startswith(ENDED):
                return line == BEGUN
            if line is None and self._life is None:
                return False
            if line is None:
                self._hear()

    def _ask(self, word: str) -> None:
        with suppress(OSError):
            if self._life is not None:
                self._life.sendall(f"{word}\n".encode())

    def _hear(self) -> None:
        assert self._life is not None
        text = self._life.recv(4096).decode()
        if not text:  # The server has been killed, and its ranks with it: the launcher ends.
            self._life.close()
            self._life = None
        self._heard += text

    def _next_line(self) -> str | None:
        line, end, rest = self._heard.partition("\n")
        if not end:
            return None
        self._heard = rest
        return line

    def end(self) -> None:
        """Ends the server."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._life is not None:
            self._life.close()
            self._life = None
        self._heard = ""
        if self._folder is not None:
            self._folder.cleanup()

    def _start(self, environment: Mapping[str, str]) -> None:
        self.end()
        # Sockets have short paths, and others must not send it commands: this folder is its owner's.
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        words = [sys.executable, "-m", "train.warm", str(Path(self._folder.name) / "socket"), str(self.nodes)]
        root = Path(__file__).resolve().parents[2]
        self._life, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                words, env=dict(environment), cwd=root, stdin=theirs.fileno(), start_new_session=True
            )
