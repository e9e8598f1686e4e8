"""The documents of a job in order, those of earlier parts first, and where what is known of each is stored.

A document's number is its place among all. Tasks take spans of numbers, which need not end where chunks do.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.text.clean import NAMES
from data.text.clean import STAGE as CLEAN
from data.text.job import PreparationJob
from train.record.files import write_whole

_BOUNDS, _PLACES = "bounds.npy", "places.json"
STAGE = "documents"
SIDES = "sides.npy"
"""File of an earlier part: whether each document's group is held out [N]."""


@dataclass(frozen=True)
class Span:
    """Some documents of a job, in order: the input of a task."""

    number: int
    start: int
    end: int


@dataclass(frozen=True)
class StoredPiece:
    """The documents of a span that are in one file of each kind."""

    path: str
    """The files' path, to which their kind is added."""
    chunk: int
    """Place of the chunk among all chunks; -1 for documents of earlier parts."""
    start: int
    """Number of its first document of the span."""
    within: slice
    """The documents' place in the files."""

    def read(self, kind: str) -> NDArray[Any]:
        """Returns an array of its documents, mapped."""
        array: NDArray[Any] = np.load(self.path + kind, mmap_mode="r")
        return array[self.within]

    def names(self) -> Iterator[str]:
        """Yields its documents' names."""
        with Path(self.path + NAMES).open("rb") as lines:
            for number, line in enumerate(lines):
                if number >= self.within.stop:
                    return
                if number >= self.within.start:
                    yield json.loads(line)


class AllDocuments:
    """All documents of a job, as :func:`write_documents` has recorded them.

    Args:
        job: the job.
    """

    def __init__(self, job: PreparationJob) -> None:
        self._chunks = str(job.work / CLEAN)
        folder = job.work / STAGE
        self._bounds: NDArray[np.int64] = np.load(folder / _BOUNDS, mmap_mode="r")
        recorded = json.loads((folder / _PLACES).read_text())
        self._earlier: list[str] = recorded["earlier"]
        self.known: int = recorded["known"]
        """Number of documents of earlier parts."""
        self.count = int(self._bounds[-1])
        """Number of all documents."""
        self.span_documents = job.limits.span_documents

    def spans(self, first: int = 0) -> list[Span]:
        """Returns spans of all documents from a number on; each other than the last has as many."""
        size = self.span_documents
        numbers = range(first // size, -(-self.count // size))
        return [Span(n, max(first, n * size), min((n + 1) * size, self.count)) for n in numbers]

    @property
    def partitions(self) -> int:
        """Number of spans, which are the partitions of rows of documents."""
        return max(-(-self.count // self.span_documents), 1)

    def pieces(self, start: int, end: int) -> Iterator[StoredPiece]:
        """Yields the pieces of some documents."""
        first = int(np.searchsorted(self._bounds, start, "right")) - 1
        for n in range(max(first, 0), len(self._bounds) - 1):
            low, high = (int(it) for it in self._bounds[n : n + 2])
            if low >= end:
                return
            within = slice(max(start, low) - low, min(end, high) - low)
            if within.stop > within.start:
                chunk = n - len(self._earlier)
                path = self._earlier[n] if chunk < 0 else f"{self._chunks}/{chunk:06}."
                yield StoredPiece(path, max(chunk, -1), low + within.start, within)

    def chunk_start(self, chunk: int) -> int:
        """Number of a chunk's first document."""
        return int(self._bounds[len(self._earlier) + chunk])


def write_documents(
    job: PreparationJob, earlier: Sequence[tuple[str, int]], kept: Sequence[int]
) -> AllDocuments:
    """Records the documents of a job for its tasks.

    Args:
        job: the job.
        earlier: paths of files of earlier parts, and their numbers of documents.
        kept: number of documents of each chunk.
    """
    folder = job.work / STAGE
    folder.mkdir(parents=True, exist_ok=True)
    counts = [*(count for _, count in earlier), *kept]
    np.save(folder / _BOUNDS, np.cumsum([0, *counts], dtype=np.int64))
    record = {"earlier": [path for path, _ in earlier], "known": sum(count for _, count in earlier)}
    write_whole(folder / _PLACES, json.dumps(record), sync=False)
    return AllDocuments(job)


def batches_of(kept: Sequence[int], most: int) -> list[range]:
    """Returns batches of following chunks that together have about as many documents as a span."""
    ends, size = [0], 0
    for n, count in enumerate(kept):
        if size and size + count > most:
            ends.append(n)
            size = 0
        size += count
    ends.append(len(kept))
    return [range(*pair) for pair in pairwise(ends) if pair[0] < pair[1]]
