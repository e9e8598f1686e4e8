"""Time that each part of a start takes, from the creation of the process to the end of its first step.

Rank 0 writes a line for each start to ``starts.jsonl`` in the run's folder::

    {"batch": 40, "created": 1795921730.1, "parts": {"process": [0.31, 0.29], "imports": [7.9, 6.2], ...}}

``batch`` is the batch from which the run resumed, ``created`` when the process began, in seconds since 1970.
A part has its seconds, and those that the process spent on a core. No torch, as the clock runs before it.
"""

import json
import time
from contextlib import suppress
from pathlib import Path

from train.record.process import process_seconds

STARTS_FILE = "starts.jsonl"


class StartClock:
    """Measures the parts of a start, one after the other.

    The first part, ``process``, begins with the process; each :meth:`begin` ends one and begins another.
    """

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {}
        """Seconds, and seconds on a core, by part."""
        self.created: float | None = None
        """Seconds since 1970; None until something is measured."""
        self._part = "process"
        self._at = self._on_core = 0.0
        self._is_over = False

    def begin(self, part: str) -> None:
        """Ends the part that is measured and begins another; nothing once the start is over."""
        if self._is_over:
            return
        at, on_core = time.time(), time.process_time()
        if self.created is None:
            self.created = self._at = at - process_seconds()
        before = self.parts.setdefault(self._part, [0.0, 0.0])
        before[0] += at - self._at
        before[1] += on_core - self._on_core
        self._part, self._at, self._on_core = part, at, on_core

    def continue_from(self, created: float) -> None:
        """Counts from the creation of another process, which has handed its start over to this one."""
        self.parts, self._part, self._is_over = {}, "process", False
        self.created = self._at = created
        self._on_core = time.process_time()

    def write(self, run_folder: Path, batch: int) -> None:
        """Ends the start and adds its line, if it has been measured; a full disk loses no more than that.

        Args:
            run_folder: folder of the run.
            batch: the batch from which the run resumed.
        """
        if self._is_over or self.created is None:
            return
        self.begin("")
        self._is_over = True
        parts = {name: [round(each, 3) for each in spent] for name, spent in self.parts.items()}
        line = {"batch": batch, "created": round(self.created, 3), "parts": parts}
        with suppress(OSError), (run_folder / STARTS_FILE).open("a") as log:
            log.write(json.dumps(line) + "\n")


START_CLOCK = StartClock()
"""This process's."""
