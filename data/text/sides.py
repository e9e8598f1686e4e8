"""Stages that decide which side of the split each document is on, group by group of similar ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.text.documents import SIDES, AllDocuments, Span
from data.text.engines import Engine
from data.text.job import PreparationJob, Result, save_array
from data.text.row_files import WrittenRows, read_rows, remove_rows, write_rows
from data.text.split import Groups, is_held_out, moves_of, rank, tally

# S documents of a span, D domains.

MEMBER = np.dtype(
    [("group", "<i8"), ("document", "<i8"), ("key", "<u8"), ("domain", "<i4"), ("is_kept", "?")]
)
"""A document that is not the first of its group, and what its group needs to know of it."""
ROOT = np.dtype([("key", "<u8"), ("domain", "<i4"), ("is_root", "?")])
"""A document that may be the first of its group, as its span sends it to the group."""
_SIDE = np.dtype([("document", "<i8"), ("is_out", "?")])


@dataclass(frozen=True)
class _SideTask:
    span: Span
    partitions: int
    reads: WrittenRows
    shares: tuple[float, ...] = ()
    moves: tuple[tuple[int, bool], ...] = ()

    @property
    def number(self) -> int:
        return self.span.number


def decide_sides(
    job: PreparationJob,
    documents: AllDocuments,
    engine: Engine,
    members: WrittenRows,
    shares: Sequence[float],
) -> None:
    """Decides for each document whether its group is held out; :func:`read_sides` returns that.

    Args:
        job: the job.
        documents: all documents.
        engine: runs the tasks.
        members: rows of `MEMBER`, by span of the group; files of `ROOT` [S] are of the same stage.
        shares: share of each domain to hold out [D].
    """
    spans, count = documents.spans(), documents.partitions
    tasks = [_SideTask(span, count, members, tuple(shares)) for span in spans]
    tallies = engine.run("splits: groups", _groups, job, tasks)
    moves = moves_of([result["tally"] for result in tallies])
    size = job.limits.span_documents
    tasks = [
        _SideTask(
            span, count, members, moves=tuple(it for it in moves.items() if it[0] // size == span.number)
        )
        for span in spans
    ]
    engine.run("splits: members", _tell, job, tasks)
    told = WrittenRows("tell", "sides", len(tasks))
    engine.run("splits: documents", _hear, job, [_SideTask(span, count, told) for span in spans])
    remove_rows(job, [members, told])


def read_sides(job: PreparationJob, number: int) -> NDArray[np.bool_]:
    """Returns whether the group of each document [S] of a span is held out, mapped."""
    sides: NDArray[np.bool_] = np.load(job.file("hear", number, "npy"), mmap_mode="r")
    return sides


def _groups(job: PreparationJob, task: _SideTask) -> Result:
    def make() -> Result:
        documents, span = AllDocuments(job), task.span
        roots = np.load(job.file(task.reads.stage, span.number, "roots.npy"))
        shares_D = np.array(task.shares)
        is_new = np.arange(span.start, span.end) >= documents.known
        own = roots["is_root"] & is_new
        least = np.where(own, roots["key"], np.iinfo(np.uint64).max)
        share = np.where(own, shares_D[roots["domain"]], 0.0)
        count = max(shares_D.size, 1)
        codes = np.flatnonzero(own) * count + roots["domain"][own]  # of pairs of a group and a domain
        for rows in read_rows(job, [task.reads], span.number, MEMBER):
            kept = rows[rows["is_kept"]]
            at = kept["group"] - span.start
            np.minimum.at(least, at, kept["key"])
            np.maximum.at(share, at, shares_D[kept["domain"]])
            codes = np.union1d(codes, at * count + kept["domain"])
        ranks = rank(least)
        is_out = is_held_out(ranks, share) & roots["is_root"]
        for piece in documents.pieces(span.start, min(span.end, max(documents.known, span.start))):
            at = piece.start - span.start
            sides = piece.read(SIDES)
            is_out[at : at + sides.size] = sides
        members = np.stack([codes // count, codes % count], 1)
        groups = Groups(np.arange(span.start, span.end), ranks, is_out, ~is_new, members)
        save_array(job.file("groups", span.number, "npy"), is_out)
        return {"tally": tally(groups, shares_D.size)}

    return job.once("groups", task.number, make)


def _tell(job: PreparationJob, task: _SideTask) -> Result:
    """Sends each group's side to its documents in other spans, and writes it for those of this one."""

    def make() -> Result:
        is_out = np.load(job.file("groups", task.number, "npy"))
        for group, is_held in task.moves:
            is_out[group - task.span.start] = is_held
        with write_rows(job, "tell", task.number, "sides", task.partitions) as writer:
            for rows in read_rows(job, [task.reads], task.number, MEMBER):
                told = np.empty(rows.size, _SIDE)
                told["document"] = rows["document"]
                told["is_out"] = is_out[rows["group"] - task.span.start]
                writer.add(told, told["document"] // job.limits.span_documents)
        save_array(job.file("tell", task.number, "npy"), is_out)
        return {"rows": writer.rows}

    return job.once("tell", task.number, make)


def _hear(job: PreparationJob, task: _SideTask) -> Result:
    def make() -> Result:
        is_out = np.load(job.file("tell", task.number, "npy"))
        for rows in read_rows(job, [task.reads], task.number, _SIDE):
            is_out[rows["document"] - task.span.start] = rows["is_out"]
        save_array(job.file("hear", task.number, "npy"), is_out)
        return {}

    return job.once("hear", task.number, make)
