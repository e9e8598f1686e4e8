"""Connected components of links between documents, by joins in files.

The alternating algorithm of Kiveris et al. 2014 ("Connected Components in MapReduce and Beyond", section 3):
each document links its neighbours to the least of them, in turn those with greater numbers (large star) and
those with smaller ones (small star), until every document is linked to the first of its component.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.text.documents import AllDocuments
from data.text.duplicates import first_of_component
from data.text.engines import Engine
from data.text.job import PreparationJob, Result
from data.text.row_files import Rows, WrittenRows, group_rows, read_rows, remove_rows, sort_rows, write_rows

LINK = np.dtype([("node", "<i8"), ("to", "<i8")])
"""A document and another one, which has a smaller number."""


@dataclass(frozen=True)
class _Round:
    number: int
    """Of the partition."""
    stage: str
    partitions: int
    reads: tuple[WrittenRows, ...]


def components(
    job: PreparationJob,
    documents: AllDocuments,
    engine: Engine,
    links: Sequence[WrittenRows],
    count: int,
    name: str,
) -> WrittenRows:
    """Links every document to the first one of its component, other than the first one itself.

    Args:
        job: the job.
        documents: all documents.
        engine: runs the tasks.
        links: the links, by span of the document with the greater number.
        count: number of the links; if all can be sorted at once, one task does it in memory.
        name: a name of these components among others of the job.

    Returns:
        The links, by the same spans.
    """
    partitions = documents.partitions
    reads, turn = tuple(links), 0
    if count * LINK.itemsize <= job.limits.sort_bytes:
        engine.run(f"duplicates: {name} groups", _in_memory, job, [_Round(0, name, partitions, reads)])
        return WrittenRows(name, "links", 1)
    while True:
        changes = 0
        for kind, stage in (("small", _small_star), ("large", _large_star)):
            of_turn = f"{name}-{kind}-{turn}"
            tasks = [_Round(n, of_turn, partitions, reads) for n in range(partitions)]
            title = f"duplicates: {name} groups, round {turn + 1}"
            results = engine.run(title, stage, job, tasks)
            if reads != tuple(links):
                remove_rows(job, reads)
            reads = (WrittenRows(of_turn, "links", partitions),)
            changes += sum(result["changes"] for result in results)
        if not changes:
            return reads[0]
        turn += 1


def _in_memory(job: PreparationJob, task: _Round) -> Result:
    """Does the same with all links of all partitions."""

    def make() -> Result:
        parts = [rows for n in range(task.partitions) for rows in read_rows(job, task.reads, n, LINK)]
        links = np.concatenate([np.empty(0, LINK), *parts])
        nodes, places = np.unique([links["to"], links["node"]], return_inverse=True)
        least = nodes[first_of_component(places.reshape(2, -1).T, nodes.size)]
        joined = np.flatnonzero(least != nodes)
        stars = np.empty(joined.size, LINK)
        stars["node"], stars["to"] = nodes[joined], least[joined]
        with write_rows(job, task.stage, 0, "links", task.partitions) as writer:
            writer.add(stars, stars["node"] // job.limits.span_documents)
        return {"rows": writer.rows}

    return job.once(task.stage, 0, make)


def _small_star(job: PreparationJob, task: _Round) -> Result:
    """Links each document's smaller neighbours, and itself, to the least of them; writes both directions."""

    def make() -> Result:
        changes = 0
        with write_rows(job, task.stage, task.number, "links", task.partitions) as writer:
            for links, least in _neighbours(job, task):
                # Neighbours but the least, each now linked to the least instead of to the document.
                others = links["to"] != least
                changes += int(others.sum())
                low = least.copy()
                high = np.where(others, links["to"], links["node"])
                for node, to in ((high, low), (low, high)):
                    both = np.empty(node.size, LINK)
                    both["node"], both["to"] = node, to
                    writer.add(both, both["node"] // job.limits.span_documents)
        return {"changes": changes, "rows": writer.rows}

    return job.once(task.stage, task.number, make)


def _large_star(job: PreparationJob, task: _Round) -> Result:
    """Links each document's greater neighbours to the least of its neighbours and itself."""

    def make() -> Result:
        changes = 0
        with write_rows(job, task.stage, task.number, "links", task.partitions) as writer:
            for links, least in _neighbours(job, task):
                greater = links["to"] > links["node"]
                made = np.empty(int(greater.sum()), LINK)
                made["node"] = links["to"][greater]
                made["to"] = np.minimum(least, links["node"])[greater]
                changes += int((made["to"] != links["node"][greater]).sum())
                writer.add(made, made["node"] // job.limits.span_documents)
        return {"changes": changes, "rows": writer.rows}

    return job.once(task.stage, task.number, make)


def _neighbours(job: PreparationJob, task: _Round) -> Iterator[tuple[Rows, NDArray[np.int64]]]:
    """Yields each distinct link of a partition's documents, with the least neighbour of its document."""

    def same(one: Rows, other: Rows) -> NDArray[np.bool_]:
        is_same: NDArray[np.bool_] = one["node"] == other["node"]
        return is_same

    rows = read_rows(job, task.reads, task.number, LINK)
    for block in group_rows(sort_rows(rows, ["node", "to"], job.limits, job.work), same):
        is_new = block.is_first | (block.rows["to"] != block.previous["to"])
        yield block.rows[is_new], block.first["to"][is_new]
