"""The end of a process that has failed: at once, without the interpreter's teardown.

That takes some time for each rank, and its connections stay open for so long. A rank that waits for it in a
collective hears nothing, and does not act on SIGTERM either, as it waits outside of Python; then its own
teardown begins, and the next one waits for that.
"""

import atexit
import os
import sys
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

LEAVE_SECONDS = 20.0
"""For what runs at the exit of a failed process: its part of a save that is being written, and trackers."""


class Leaving:
    """A context that ends its process at once if it is left with an error or with an exit status but 0.

    What was registered to run at exit runs first, for a limited time. Made before all else that registers
    something, as that runs in reverse order.

    Args:
        seconds: limit of that time.
    """

    def __init__(self, seconds: float = LEAVE_SECONDS) -> None:
        self.seconds, self._status = seconds, 0
        atexit.register(self._leave)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self._status = 1
        elif isinstance(error, SystemExit) and isinstance(error.code, int):
            self._status = error.code
        if self._status:
            limit = threading.Timer(self.seconds, self._leave)
            limit.daemon = True
            limit.start()

    def _leave(self) -> None:
        if self._status:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):  # Whoever read it has gone.
                    stream.flush()
            os._exit(self._status)
