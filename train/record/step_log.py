"""A file of JSON lines, one per step, that survives truncation at any byte.

Steps increase from line to line. Each line is written by one system call as soon as the step ends, so a
reader in another process sees only whole lines.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STEP = "step"
"""Batches trained, from 1."""
TOKENS = "tokens"
"""Tokens trained so far."""
TIMESTAMP = "time"
"""Seconds since 1970."""
EXPERT_LOAD_FILE = "expert_load.jsonl"
SHARES = "shares"
"""Shares of each layer's token assignments per expert."""


class StepLog:
    """Writes a step log; one process at a time."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._last: dict[str, Any] = {}
        self._start = self._end = os.fstat(self._file).st_size
        self._tail: list[bytes] = []
        """The last line, preceded by earlier lines that could not be written because the disk was full."""
        self._is_written = True

    def drop_after(self, step: int) -> int:
        """Drops every line of a later step and any partial line that a killed process left.

        A line that cannot be read stays where it is if a sound line to be kept follows it.

        Returns:
            The number of sound lines dropped.
        """
        self._last, self._start, self._end = {}, 0, 0
        self._tail, self._is_written = [], True
        dropped = 0
        for start, end, fields in lines_from(self.path, 0):
            if fields[STEP] > step:
                dropped += 1
            else:
                self._last, self._start, self._end = fields, start, end
        os.ftruncate(self._file, self._end)
        return dropped

    def write(self, step: int, fields: dict[str, Any]) -> None:
        """Appends a step; if it is the last step already, its fields are added to that line.

        Raises:
            OSError: if the disk is full; the line is kept and written with the next one.
        """
        if self._last.get(STEP) == step:
            self._last |= fields
            del self._tail[-1:]
        else:
            assert step > self._last.get(STEP, -1), f"{self.path}: step {step} after {self._last[STEP]}"
            self._last = {STEP: step, **fields}
            if self._is_written:
                self._start, self._tail = self._end, []
        self._tail.append((json.dumps(_finite(self._last), separators=(",", ":")) + "\n").encode())
        text = b"".join(self._tail)
        self._is_written = False
        # The line grows in place from the same start: a concurrent reader sees the old line or the new one.
        if os.pwrite(self._file, text, self._start) < len(text):
            raise OSError(f"{self.path}: no room for another line")
        self._is_written = True
        if self._start + len(text) < self._end:
            os.ftruncate(self._file, self._start + len(text))
        self._end = self._start + len(text)

    def close(self) -> None:
        """Closes the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def lines_from(path: Path, offset: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yields the sound lines from a byte offset on, as (start, end, fields).

    Lines that cannot be read are passed over, and so is a line whose step does not lie between those of its
    neighbours: a damaged byte may leave a line that reads as another step.
    """
    held: tuple[int, int, dict[str, Any]] | None = None
    last = -math.inf
    for line in _readable_lines(path, offset):
        step = line[2][STEP]
        if held is None:
            held = line
        elif step > held[2][STEP]:
            yield held
            last, held = held[2][STEP], line
        elif step > last:
            held = line
    if held is not None:
        yield held


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Reads every sound line of the file, see :func:`lines_from`; none if there is no file."""
    return [fields for _, _, fields in lines_from(path, 0)]


def _readable_lines(path: Path, offset: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
    if not path.is_file():
        return
    with path.open("rb") as stream:
        stream.seek(offset)
        for line in stream:
            start, offset = offset, offset + len(line)
            if not line.endswith(b"\n"):
                return
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(fields, dict) and isinstance(fields.get(STEP), int):
                yield start, offset, fields


def _finite(value: Any) -> Any:
    """Replaces NaN and infinities by None, as JSON has no literal for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
