"""The process of a supervised job that has imported everything, from which this host's ranks are forked."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from train.warm import WARM_VARIABLE

LISTEN_SECONDS = 10.0


class Warmth:
    """Keeps one server of :mod:`train.warm`, over all tries of a job.

    Its ranks end with it, and it ends with this process.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
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

    def end(self) -> None:
        """Ends the server."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._folder is not None:
            self._folder.cleanup()

    def _start(self, environment: Mapping[str, str]) -> None:
        self.end()
        # Sockets have short paths, and others must not send it commands: this folder is its owner's.
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        words = [sys.executable, "-m", "train.warm", str(Path(self._folder.name) / "socket")]
        root = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(
            words, env=dict(environment), cwd=root, stdin=subprocess.PIPE, start_new_session=True
        )
