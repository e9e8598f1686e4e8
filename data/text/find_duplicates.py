"""Exact and near duplicates of any number of documents, by joins in files that any engine runs.

The verdicts are those of :func:`data.text.duplicates.resolve`, document by document. Each step is a stage of
tasks: tasks of spans of documents write rows by key, tasks of keys sort them and write rows by document. No
process ever holds more than a span's numbers and a buffer of rows (:class:`data.text.job.Limits`).

1. digests: equal texts meet; each but the first is a copy of the first.
2. bands: of the other documents, those of a bucket meet; each is paired with the first and the previous one.
3. pairs: a pair's first sketch is sent to its second, which compares them.
4. components: pairs that are similar enough are joined to groups (:mod:`data.text.components`).
"""

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.text.clean import DIGESTS, SKETCHES
from data.text.components import LINK, components
from data.text.documents import AllDocuments, Span
from data.text.duplicates import BANDS, PERMUTATIONS, SAME_SIDE, matches_of
from data.text.engines import Engine
from data.text.job import Limits, PreparationJob, Result
from data.text.row_files import (
    Rows,
    WrittenRows,
    group_rows,
    partition_of,
    read_rows,
    remove_rows,
    sort_rows,
    write_rows,
)

# N documents, M pairs.

DIGEST = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<i8")])
BAND = np.dtype([("key", "<u8"), ("place", "<i8")])
"""A band of a document: its hash; the band's number in the upper 16 bits, the document's in the lower 48."""
_PAIR = np.dtype([("first", "<i8"), ("second", "<i8")])
SENT = np.dtype([("first", "<i8"), ("second", "<i8"), ("values", "u1", (PERMUTATIONS,))])
_BAND_SHIFT = 48


@dataclass(frozen=True)
class Found:
    """Rows of links: each similar document, and the first of its group; by span of the former."""

    equal: WrittenRows
    """Documents that are equal to an earlier one."""
    near: WrittenRows
    """Copies of any kind."""
    similar: WrittenRows
    """Documents that are on the same side of the split."""


@dataclass(frozen=True)
class _JoinTask:
    number: int
    partitions: int
    """Of the rows that it writes."""
    reads: tuple[WrittenRows, ...] = ()
    span: Span | None = None
    near: float | None = None


def find_duplicates(
    job: PreparationJob, documents: AllDocuments, engine: Engine, near: float | None
) -> Found:
    """Finds the copies and groups of all documents of a job.

    Args:
        job: the job.
        documents: all documents.
        engine: runs the tasks.
        near: minimum Jaccard similarity of copies; None: only equal texts are.
    """
    spans, by_document = documents.spans(), documents.partitions
    by_digest = partitions_of(job.limits, documents.count * DIGEST.itemsize)
    tasks = [_JoinTask(span.number, by_digest, span=span) for span in spans]
    engine.run("duplicates: hashes of texts", _digests, job, tasks)
    digests = WrittenRows("digests", "rows", len(tasks))
    tasks = [_JoinTask(n, by_document, (digests,)) for n in range(by_digest)]
    copies = sum(result["rows"] for result in engine.run("duplicates: equal texts", _equal, job, tasks))
    equal = WrittenRows("equal", "links", len(tasks))
    remove_rows(job, [digests])

    by_band = partitions_of(job.limits, documents.count * BANDS * BAND.itemsize)
    tasks = [_JoinTask(span.number, by_band, (equal,), span) for span in spans]
    engine.run("duplicates: bands", _bands, job, tasks)
    bands = WrittenRows("bands", "rows", len(tasks))
    tasks = [_JoinTask(n, by_document, (bands,)) for n in range(by_band)]
    engine.run("duplicates: buckets", _buckets, job, tasks)
    candidates = WrittenRows("buckets", "pairs", len(tasks))
    remove_rows(job, [bands])

    tasks = [_JoinTask(span.number, by_document, (candidates,), span) for span in spans]
    engine.run("duplicates: pairs", _pairs, job, tasks)
    sent = WrittenRows("pairs", "sent", len(tasks))
    tasks = [_JoinTask(span.number, by_document, (sent,), span, near) for span in spans]
    compared = engine.run("duplicates: similarity", _compare, job, tasks)
    remove_rows(job, [candidates, sent])
    links = {name: WrittenRows("compare", name, len(tasks)) for name in ("near", "similar")}
    stars = {}
    for name, written in links.items():
        count = copies + sum(result[name] for result in compared)
        stars[name] = components(job, documents, engine, [equal, written], count, name)
    remove_rows(job, links.values())
    return Found(equal, **stars)


def partitions_of(limits: Limits, row_bytes: int) -> int:
    """Number of partitions of evenly spread rows that can each be sorted at once."""
    return max(-(-2 * row_bytes // limits.sort_bytes), 1)


def _digests(job: PreparationJob, task: _JoinTask) -> Result:
    def make() -> Result:
        with write_rows(job, "digests", task.number, "rows", task.partitions) as writer:
            for piece in AllDocuments(job).pieces(*_bounds(task)):
                halves = np.ascontiguousarray(piece.read(DIGESTS)[:, :16]).view("<u8")
                rows = np.empty(len(halves), DIGEST)
                rows["high"], rows["low"] = halves.T
                rows["document"] = np.arange(piece.start, piece.start + rows.size)
                writer.add(rows, partition_of(rows["high"], task.partitions))
        return {"rows": writer.rows}

    return job.once("digests", task.number, make)


def _equal(job: PreparationJob, task: _JoinTask) -> Result:
    def same(one: Rows, other: Rows) -> NDArray[np.bool_]:
        return (one["high"] == other["high"]) & (one["low"] == other["low"])

    def make() -> Result:
        with write_rows(job, "equal", task.number, "links", task.partitions) as writer:
            rows = read_rows(job, task.reads, task.number, DIGEST)
            ordered = sort_rows(rows, ["high", "low", "document"], job.limits, job.work)
            for block in group_rows(ordered, same):
                copies = ~block.is_first
                links = np.empty(int(copies.sum()), LINK)
                links["node"], links["to"] = block.rows["document"][copies], block.first["document"][copies]
                writer.add(links, links["node"] // job.limits.span_documents)
        return {"rows": writer.rows}

    return job.once("equal", task.number, make)


def _bands(job: PreparationJob, task: _JoinTask) -> Result:
    def make() -> Result:
        start, end = _bounds(task)
        is_copy = np.zeros(end - start, bool)
        for links in read_rows(job, task.reads, task.number, LINK):
            is_copy[links["node"] - start] = True
        most = max(job.limits.buffer_bytes // (4 * BANDS * BAND.itemsize), 1)
        of_band = np.arange(BANDS, dtype=np.int64) << _BAND_SHIFT
        with write_rows(job, "bands", task.number, "rows", task.partitions) as writer:
            for piece in AllDocuments(job).pieces(start, end):
                sketches = piece.read(SKETCHES)
                for at in range(0, len(sketches), most):
                    bands = np.array(sketches["bands"][at : at + most])
                    numbers = np.arange(piece.start + at, piece.start + at + len(bands))
                    stays = ~is_copy[numbers - start]
                    rows = np.empty((int(stays.sum()), BANDS), BAND)
                    rows["key"], rows["place"] = bands[stays], numbers[stays, None] + of_band
                    writer.add(rows.ravel(), partition_of(rows["key"].ravel(), task.partitions))
        return {"rows": writer.rows}

    return job.once("bands", task.number, make)


def _buckets(job: PreparationJob, task: _JoinTask) -> Result:
    def same(one: Rows, other: Rows) -> NDArray[np.bool_]:
        is_same_band = (one["place"] >> _BAND_SHIFT) == (other["place"] >> _BAND_SHIFT)
        return (one["key"] == other["key"]) & is_same_band

    def make() -> Result:
        low = (1 << _BAND_SHIFT) - 1
        with write_rows(job, "buckets", task.number, "pairs", task.partitions) as writer:
            rows = read_rows(job, task.reads, task.number, BAND)
            for block in group_rows(sort_rows(rows, ["key", "place"], job.limits, job.work), same):
                follows = ~block.is_first
                pairs = np.empty((2, int(follows.sum())), _PAIR)
                for mates, row in zip((block.first, block.previous), pairs, strict=True):
                    row["first"] = mates["place"][follows] & low
                    row["second"] = block.rows["place"][follows] & low
                some = np.unique(pairs)
                writer.add(some, some["first"] // job.limits.span_documents)
        return {"rows": writer.rows}

    return job.once("buckets", task.number, make)


def _pairs(job: PreparationJob, task: _JoinTask) -> Result:
    def same(one: Rows, other: Rows) -> NDArray[np.bool_]:
        return (one["first"] == other["first"]) & (one["second"] == other["second"])

    def make() -> Result:
        documents = AllDocuments(job)
        most = max(job.limits.buffer_bytes // SENT.itemsize, 1)
        with write_rows(job, "pairs", task.number, "sent", task.partitions) as writer:
            rows = read_rows(job, task.reads, task.number, _PAIR)
            for block in group_rows(sort_rows(rows, ["first", "second"], job.limits, job.work), same):
                pairs = block.rows[block.is_first]
                for at in range(0, pairs.size, most):
                    some = pairs[at : at + most]
                    sent = np.empty(some.size, SENT)
                    sent["first"], sent["second"] = some["first"], some["second"]
                    sent["values"] = _values(documents, some["first"])
                    writer.add(sent, sent["second"] // job.limits.span_documents)
        return {"rows": writer.rows}

    return job.once("pairs", task.number, make)


def _compare(job: PreparationJob, task: _JoinTask) -> Result:
    def make() -> Result:
        documents = AllDocuments(job)
        least = {"similar": matches_of(SAME_SIDE)}
        if task.near is not None:
            least["near"] = matches_of(task.near)
        with ExitStack() as files:
            writers = {
                name: files.enter_context(write_rows(job, "compare", task.number, name, task.partitions))
                for name in ("near", "similar")
            }
            for block in read_rows(job, task.reads, task.number, SENT):
                some = block[np.argsort(block["second"], kind="stable")]
                matches = (some["values"] == _values(documents, some["second"])).sum(1)
                for name, wanted in least.items():
                    enough = some[matches >= wanted]
                    links = np.empty(enough.size, LINK)
                    links["node"], links["to"] = enough["second"], enough["first"]
                    writers[name].add(links, links["node"] // job.limits.span_documents)
        return {name: writer.rows for name, writer in writers.items()}

    return job.once("compare", task.number, make)


def _values(documents: AllDocuments, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Values of the sketches [M, P] of documents [M], whose numbers ascend."""
    values = np.empty((numbers.size, PERMUTATIONS), np.uint8)
    if numbers.size:
        for piece in documents.pieces(int(numbers[0]), int(numbers[-1]) + 1):
            size = piece.within.stop - piece.within.start
            begin, end = np.searchsorted(numbers, [piece.start, piece.start + size])
            if end > begin:
                values[begin:end] = piece.read(SKETCHES)["values"][numbers[begin:end] - piece.start]
    return values


def _bounds(task: _JoinTask) -> tuple[int, int]:
    assert task.span is not None
    return task.span.start, task.span.end
