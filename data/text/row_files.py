"""Rows of numbers that pass from task to task through files: the joins of a job, on any engine.

A task writes rows with the number of the partition that each belongs to, and a later task reads one partition
of all files, sorted if it asks for it. Both use a fixed amount of memory, however many rows there are and
however uneven the partitions: rows are written as a buffer fills up, and more rows than can be sorted at once
are sorted in runs on disk and merged.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data.text.job import Limits, PreparationJob, save_array
from train.record.files import whole_file

# N rows, P partitions.

Rows = NDArray[np.void]
"""Rows [N] of a structured data type."""
_MOST_RUNS = 128
"""Sorted runs on disk, each an open file."""


@dataclass(frozen=True)
class WrittenRows:
    """Rows that the tasks of a stage have written."""

    stage: str
    name: str
    """Of these rows among those of the stage."""
    tasks: int


class RowWriter:
    """Writes rows by partition, as :func:`write_rows` opens it.

    Args:
        stream: the file.
        partitions: number of partitions.
        most_bytes: rows that are held in memory.
    """

    def __init__(self, stream: IO[bytes], partitions: int, most_bytes: int) -> None:
        self._stream, self._partitions, self._most_bytes = stream, partitions, most_bytes
        self._blocks: list[tuple[Rows, NDArray[np.integer[Any]]]] = []
        self._bytes, self._offset = 0, 0
        self._runs: list[NDArray[np.int64]] = []
        self.rows = 0
        """Number of rows so far."""

    def add(self, rows: Rows, partition: NDArray[np.integer[Any]]) -> None:
        """Adds rows [N], each of a partition [N]."""
        if not rows.size:
            return
        self._blocks.append((rows, partition))
        self._bytes += rows.nbytes
        self.rows += rows.size
        if self._bytes >= self._most_bytes:
            self._flush()

    def places(self) -> NDArray[np.int64]:
        """Writes what is left; returns where the partitions of each run begin in the file [run, P + 1]."""
        if self._blocks:
            self._flush()
        return np.array(self._runs, np.int64).reshape(-1, self._partitions + 1)

    def _flush(self) -> None:
        rows = np.concatenate([block for block, _ in self._blocks])
        partition = np.concatenate([block for _, block in self._blocks])
        order = np.argsort(partition, kind="stable")
        self._stream.write(rows[order].tobytes())
        counts = np.bincount(partition, minlength=self._partitions) * rows.itemsize
        self._runs.append(self._offset + np.r_[0, np.cumsum(counts)])
        self._offset += rows.nbytes
        self._blocks, self._bytes = [], 0


@contextmanager
def write_rows(
    job: PreparationJob, stage: str, number: int, name: str, partitions: int
) -> Iterator[RowWriter]:
    """Opens the file of a task's rows, which takes its place at the end.

    Args:
        job: the job.
        stage: the task's stage.
        number: the task's number.
        name: of these rows among those of the stage.
        partitions: number of partitions.
    """
    places, path = _paths(job, WrittenRows(stage, name, 0), number)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as stream:
        writer = RowWriter(stream, partitions, job.limits.buffer_bytes)
        yield writer
        save_array(places, writer.places())


def read_rows(
    job: PreparationJob, written: Iterable[WrittenRows], partition: int, dtype: np.dtype[np.void]
) -> Iterator[Rows]:
    """Yields the rows of a partition in blocks, in the order of the tasks that wrote them."""
    most = max(job.limits.buffer_bytes // dtype.itemsize, 1)
    for each in written:
        for task in range(each.tasks):
            places, path = _paths(job, each, task)
            runs = np.load(places, mmap_mode="r")
            for begin, end in np.array(runs[:, partition : partition + 2]).tolist():
                for at in range(begin, end, most * dtype.itemsize):
                    count = min(most, (end - at) // dtype.itemsize)
                    yield np.fromfile(path, dtype, count, offset=at)


def remove_rows(job: PreparationJob, written: Iterable[WrittenRows]) -> None:
    """Removes rows that no task needs any more; the records of the tasks that wrote them stay."""
    for each in written:
        for task in range(each.tasks):
            for path in _paths(job, each, task):
                path.unlink(missing_ok=True)


def partition_of(keys: NDArray[np.uint64], partitions: int) -> NDArray[np.int64]:
    """Returns the partition [N] of evenly spread keys [N]; equal keys have the same."""
    return ((keys >> np.uint64(32)) * np.uint64(partitions) >> np.uint64(32)).astype(np.int64)


def sort_rows(
    blocks: Iterable[Rows], by: Sequence[str], limits: Limits, scratch: Path | None = None
) -> Iterator[Rows]:
    """Yields all rows in blocks, sorted by some of their fields.

    Args:
        blocks: the rows.
        by: names of the fields, the first one first.
        limits: at most ``sort_bytes`` of rows are sorted at once.
        scratch: folder for what does not fit; None: the system's temporary folder.
    """
    with ExitStack() as files:
        runs: list[IO[bytes]] = []
        held: list[Rows] = []
        size = 0
        dtype: np.dtype[Any] | None = None
        for block in blocks:
            held.append(block)
            size, dtype = size + block.nbytes, block.dtype
            if size >= limits.sort_bytes:
                run = files.enter_context(tempfile.TemporaryFile(dir=scratch))
                run.write(_sorted(held, by).tobytes())
                runs.append(run)
                held, size = [], 0
                if len(runs) == _MOST_RUNS:
                    joined = files.enter_context(tempfile.TemporaryFile(dir=scratch))
                    for merged in _merged(runs, by, dtype, limits):
                        joined.write(merged.tobytes())
                    for done in runs:
                        done.close()
                    runs = [joined]
        if not runs:
            if held:
                yield _sorted(held, by)
            return
        assert dtype is not None
        if held:
            runs.append(files.enter_context(tempfile.TemporaryFile(dir=scratch)))
            runs[-1].write(_sorted(held, by).tobytes())
            held = []
        yield from _merged(runs, by, dtype, limits)


@dataclass(frozen=True)
class GroupedRows:
    """A block [N] of sorted rows, each with others of its group, which may be in an earlier block."""

    rows: Rows
    is_first: NDArray[np.bool_]
    """True [N] if no row of its group comes before."""
    first: Rows
    """The first row of each row's group [N]."""
    previous: Rows
    """The row before [N]; of a first row, any."""


def group_rows(
    blocks: Iterable[Rows], same: Callable[[Rows, Rows], NDArray[np.bool_]]
) -> Iterator[GroupedRows]:
    """Yields sorted rows with the first and the previous row of their groups.

    Args:
        blocks: rows, sorted so that those of a group follow each other.
        same: tells whether rows [N] are of the same group as others [N].
    """
    first = previous = None
    for block in blocks:
        if not block.size:
            continue
        before = np.empty_like(block)
        before[1:] = block[:-1]
        is_first = np.r_[True, ~same(block[1:], block[:-1])]
        if first is not None and previous is not None:
            before[:1] = previous
            is_first[:1] = ~same(block[:1], previous)
        else:
            first, before[:1] = block[:1], block[:1]
        at = np.maximum.accumulate(np.where(is_first, np.arange(block.size), -1))
        firsts = block[at]
        firsts[at < 0] = first
        yield GroupedRows(block, is_first, firsts, before)
        first, previous = firsts[-1:].copy(), block[-1:].copy()


def _paths(job: PreparationJob, written: WrittenRows, task: int) -> tuple[Path, Path]:
    return tuple(job.file(written.stage, task, f"{written.name}.{end}") for end in ("places.npy", "rows"))  # type: ignore[return-value]


def _sorted(blocks: list[Rows], by: Sequence[str]) -> Rows:
    rows = np.concatenate(blocks)
    return rows[np.lexsort([rows[name] for name in reversed(by)])]


def _merged(runs: list[IO[bytes]], by: Sequence[str], dtype: np.dtype[Any], limits: Limits) -> Iterator[Rows]:
    """Merges sorted runs, with a block of each in memory."""
    most = max(limits.sort_bytes // dtype.itemsize // len(runs), 1)
    for run in runs:
        run.seek(0)
    blocks = [_next(run, dtype, most) for run in runs]
    while True:
        blocks = [block if block.size else _next(run, dtype, most) for block, run in zip(blocks, runs)]  # noqa: B905
        live = [n for n, block in enumerate(blocks) if block.size]
        if not live:
            return
        # Rows up to the least of the blocks' last rows: none that is still on disk comes before them.
        lasts = _sorted([blocks[n][-1:] for n in live], by)
        cuts = {n: _count_up_to(blocks[n], by, lasts[0]) for n in live}
        yield _sorted([blocks[n][:cut] for n, cut in cuts.items()], by)
        for n, cut in cuts.items():
            blocks[n] = blocks[n][cut:]


def _next(run: IO[bytes], dtype: np.dtype[Any], most: int) -> Rows:
    return np.frombuffer(run.read(most * dtype.itemsize), dtype)


def _count_up_to(block: Rows, by: Sequence[str], bound: Any) -> int:
    """Number of rows of a sorted block that don't come after another row."""
    begin, end = 0, block.size
    for name in by:
        column = np.ascontiguousarray(block[name][begin:end])
        ends = (np.searchsorted(column, bound[name], side) for side in ("left", "right"))
        begin, end = (begin + int(it) for it in ends)
    return end
