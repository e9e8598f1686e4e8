"""Joins the files of a repository into documents, with any engine and a fixed amount of memory.

It comes after the removal of copies and the decision on sides, and before anything is tokenised. The files of
a repository on one side of the split are joined in an order that follows from their paths, imports or places
in the source, up to ``data.preparation.max_document_bytes``. Documents are in the order of a hash of the
repository's name, so they depend neither on workers nor on chunks.

1. send: each batch of chunks writes its texts by partition of the hash.
2. join: each partition sorts what it was sent and writes the documents of its repositories.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from data.text.clean import REPOSITORIES, TEXTS, line_of, read_documents
from data.text.clean import STAGE as CLEAN
from data.text.decide import REMOVED, TRAIN, VALIDATION
from data.text.decide import STAGE as DECIDE
from data.text.dependencies import in_order, references_of
from data.text.documents import batches_of
from data.text.engines import Engine
from data.text.inputs import Chunk, places_of_sources
from data.text.job import ArrayFile, PreparationJob, Result
from data.text.row_files import Rows, WrittenRows, partition_of, read_rows, remove_rows, sort_rows, write_rows
from train.recipe.errors import UserError
from train.recipe.preparation import FileOrder, Repositories
from train.record.files import whole_file

# N files.

SEND, JOIN = "send", "join"
FATES, FILES = "npy", "files.jsonl"
"""Of joined documents, besides `TEXTS`: the side of each, and the names of its files and their bytes."""
_FILE = np.dtype(
    [
        *(("high", "<u8"), ("low", "<u8"), ("document", "<i8"), ("task", "<i8")),
        *(("offset", "<i8"), ("head", "<i8"), ("bytes", "<i8"), ("side", "u1")),
    ]
)
"""A file: the hash of its repository, its number in the source, and where its head and its text are."""
_OPEN_FILES = 64
_ROW_BYTES = 200
"""Memory of a file's row, about."""
_HEADS = 4
"""Memory of a head as a multiple of its bytes, about."""


@dataclass(frozen=True)
class Portion:
    """Documents that one task tokenises: those of a chunk, or of some repositories."""

    number: int
    source: int
    texts: str
    """Path of the file of names and texts."""
    fates: str
    """Path of the array of their fates."""
    files: str = ""
    """Path of the list of what they were joined of; empty if they are files themselves."""


@dataclass(frozen=True)
class _SendTask:
    number: int
    source: int
    chunks: tuple[int, ...]
    first: int
    """Number of the first document in the source."""
    partitions: int


@dataclass(frozen=True)
class _PartTask:
    """The task of joining a part of a source's repositories."""

    number: int
    source: int
    reads: WrittenRows


def require_repositories(job: PreparationJob, chunks: list[Chunk], cleaned: list[Result]) -> None:
    """Refuses a source whose records have no repository, though a column is named.

    Raises:
        UserError: one line that names the column's key.
    """
    for n, at in places_of_sources(chunks).items():
        of = job.sources[n].repositories
        if of is None or not any(cleaned[place]["kept"] for place in at):
            continue
        if not any(cleaned[place]["in_repositories"] for place in at):
            key = f"data.sources[{n}].repositories"
            if of.column is not None:
                what = f"no record of {job.sources[n].dataset} has a name in {of.column!r}"
                raise UserError(
                    what, key=f"{key}.column", remedy="name the column of the repository, or remove it"
                )
            what = f"is {of.folders}, but no file of {job.sources[n].dataset} is in so many folders"
            raise UserError(what, key=f"{key}.folders", remedy="set it to fewer, or name a folder above")


def join_repositories(
    job: PreparationJob, chunks: list[Chunk], cleaned: list[Result], engine: Engine
) -> list[Portion]:
    """Joins the documents of sources with repositories; returns what is to be tokenised, in order.

    Args:
        job: the job, whose documents have been decided.
        chunks: all chunks.
        cleaned: the first stage's result for each chunk.
        engine: runs the tasks.
    """
    portions: list[Portion] = []
    for n, at in places_of_sources(chunks).items():
        of_source = [chunks[place].number for place in at]
        if job.sources[n].repositories is None or job.spooled:
            for number in of_source:
                paths = job.file(CLEAN, number, TEXTS), job.file(DECIDE, number, FATES)
                portions.append(Portion(len(portions), n, *map(str, paths)))
            continue
        stage = f"{JOIN}-{n}"
        for number in range(_join_source(job, n, of_source, [cleaned[place] for place in at], engine)):
            texts, fates, files = (str(job.file(stage, number, name)) for name in (TEXTS, FATES, FILES))
            portions.append(Portion(len(portions), n, texts, fates, files))
    return portions


def _join_source(
    job: PreparationJob, source: int, chunks: list[int], cleaned: list[Result], engine: Engine
) -> int:
    """Joins the documents of a source; returns the number of partitions."""
    kept = [result["kept"] for result in cleaned]
    partitions = max(-(-sum(result["kept_bytes"] for result in cleaned) // job.limits.sort_bytes), 1)
    tasks, first = [], 0
    for n, batch in enumerate(batches_of(kept, job.limits.span_documents)):
        tasks.append(_SendTask(n, source, tuple(chunks[it] for it in batch), first, partitions))
        first += sum(kept[batch.start : batch.stop])
    engine.run("repositories: files", _send, job, tasks)
    sent = WrittenRows(f"{SEND}-{source}", "rows", len(tasks))
    joins = [_PartTask(n, source, sent) for n in range(partitions)]
    engine.run("repositories: documents", _join, job, joins)
    remove_rows(job, [sent])
    for task in tasks:
        job.file(sent.stage, task.number, "text").unlink(missing_ok=True)
    return partitions


def _send(job: PreparationJob, task: _SendTask) -> Result:
    """Writes the files of some chunks that are kept, each with a head, by partition of their repositories."""
    stage = f"{SEND}-{task.source}"

    def make() -> Result:
        with ExitStack() as opened:
            writer = opened.enter_context(write_rows(job, stage, task.number, "rows", task.partitions))
            blob = opened.enter_context(whole_file(job.file(stage, task.number, "text")))
            offset = size = 0
            waiting: list[tuple[Any, bytes]] = []

            def flush() -> None:
                nonlocal offset
                rows = np.array([row for row, _ in waiting], _FILE)
                partition = partition_of(rows["high"], task.partitions)
                for place in np.argsort(partition, kind="stable").tolist():
                    rows["offset"][place] = offset
                    offset += blob.write(waiting[place][1])
                writer.add(rows, partition)

            for row, content in _files_of(job, task):
                waiting.append((row, content))
                size += len(content) + _ROW_BYTES
                if size >= job.limits.buffer_bytes:
                    flush()
                    waiting, size = [], 0
            flush()
        return {"files": writer.rows}

    return job.once(stage, task.number, make)


def _files_of(job: PreparationJob, task: _SendTask) -> Iterator[tuple[tuple[int, ...], bytes]]:
    """Yields a row of each kept file of some chunks, and its head and text."""
    document, of = task.first, _repositories(job, task.source)
    for chunk in task.chunks:
        fates = np.load(job.file(DECIDE, chunk, FATES), mmap_mode="r")
        with job.file(CLEAN, chunk, REPOSITORIES).open("rb") as lines:
            for (name, text), line, fate in zip(read_documents(job, chunk), lines, fates, strict=True):
                if fate != REMOVED:
                    repository, path = json.loads(line)
                    # A file of no repository is one by itself, and has a hash by itself.
                    whole = f"/{repository}" if repository else name
                    digest = hashlib.sha256(whole.encode("utf-8", "replace")).digest()
                    high, low = np.frombuffer(digest[:16], "<u8").tolist()
                    is_ordered = of.order is FileOrder.dependencies
                    references = references_of(path, text) if is_ordered else []
                    head, content = line_of([repository, path, name, references]), text.encode()
                    row = (high, low, document, task.number, 0, len(head), len(content), int(fate))
                    yield row, head + content
                document += 1


def _join(job: PreparationJob, task: _PartTask) -> Result:
    """Writes the documents of a partition's repositories."""
    stage = f"{JOIN}-{task.source}"

    def make() -> Result:
        rows = read_rows(job, [task.reads], task.number, _FILE)
        ordered = sort_rows(rows, ["high", "low", "document"], job.limits, job.work)
        count, number, before = 0, 0, ""
        with ExitStack() as opened:
            texts, listing = (
                opened.enter_context(whole_file(job.file(stage, task.number, it))) for it in (TEXTS, FILES)
            )
            fates = opened.enter_context(ArrayFile(job.file(stage, task.number, FATES), np.uint8))
            blobs = opened.enter_context(_Blobs(job, task.reads.stage))
            for files in _repositories_of(ordered, job.limits.buffer_bytes // _HEADS):
                for document in _documents(job, task.source, files, blobs):
                    number = number + 1 if document.name == before else 0
                    before = document.name
                    name = f"{document.name}#{number}" if number else document.name
                    texts.write(line_of([name, document.text]))
                    listing.write(line_of([document.files, document.file_bytes]))
                    fates.add([document.side])
                    count += 1
        return {"documents": count}

    return job.once(stage, task.number, make)


@dataclass(frozen=True)
class _Joined:
    name: str
    text: str
    side: int
    files: list[str]
    file_bytes: int


def _repositories_of(blocks: Iterable[Rows], most_bytes: int) -> Iterator[Rows]:
    """Yields the files of each repository; of one whose heads take more memory, in parts.

    ``blocks``: sorted by repository.
    """
    waiting: list[Rows] = []
    size = 0
    for block in blocks:
        is_new = (block["high"][1:] != block["high"][:-1]) | (block["low"][1:] != block["low"][:-1])
        # Parts end where a part of so many bytes is full, wherever blocks do.
        for group in np.split(block, np.flatnonzero(is_new) + 1):
            if not group.size:
                continue
            if waiting and _hash_of(group[0]) != _hash_of(waiting[-1][0]):
                yield np.concatenate(waiting)
                waiting, size = [], 0
            for at in range(group.size):
                size += int(group["head"][at]) + _ROW_BYTES
                waiting.append(group[at : at + 1])
                if size >= most_bytes:
                    yield np.concatenate(waiting)
                    waiting, size = [], 0
    if waiting:
        yield np.concatenate(waiting)


def _hash_of(row: Any) -> tuple[int, int]:
    return int(row["high"]), int(row["low"])


def _documents(job: PreparationJob, source: int, files: Rows, blobs: "_Blobs") -> Iterator[_Joined]:
    """Yields the documents of a repository, those for training first."""
    of, most = _repositories(job, source), job.preparation.max_document_bytes
    heads = [blobs.head(row) for row in files]
    repository = heads[0][0]
    name = f"{job.sources[source].dataset}/{repository}" if repository else heads[0][2]
    for side in (TRAIN, VALIDATION):
        parts: list[str] = []
        names: list[str] = []
        size = file_bytes = 0
        for number in (it for it in _ordered(of, heads) if files["side"][it] == side):
            heading = (
                of.heading.replace("{path}", heads[number][1]) + "\n" if of.heading and repository else ""
            )
            part = heading + blobs.text(files[number])
            part_bytes = len(part.encode())
            if parts and size + 1 + part_bytes > most:
                yield _Joined(name, "\n".join(parts), side, names, file_bytes)
                parts, names, size, file_bytes = [], [], 0, 0
            size += part_bytes + bool(parts)
            parts.append(part)
            names.append(heads[number][2])
            file_bytes += int(files["bytes"][number])
        if parts:
            yield _Joined(name, "\n".join(parts), side, names, file_bytes)


def _ordered(of: Repositories, heads: Sequence[Any]) -> list[int]:
    """The numbers of a repository's files in their order; they are given in that of the source."""
    paths = [path for _, path, _, _ in heads]
    if of.order is FileOrder.source:
        return list(range(len(heads)))
    if of.order is FileOrder.dependencies:
        return in_order(paths, [references for *_, references in heads])
    return sorted(range(len(heads)), key=lambda number: (paths[number], number))


def _repositories(job: PreparationJob, source: int) -> Repositories:
    of = job.sources[source].repositories
    assert of is not None
    return of


class _Blobs:
    """Heads and texts of files, in a ``with`` statement; few of the tasks' files are open at a time."""

    def __init__(self, job: PreparationJob, stage: str) -> None:
        self._job, self._stage = job, stage
        self._opened: dict[int, IO[bytes]] = {}

    def __enter__(self) -> "_Blobs":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def head(self, row: Any) -> Any:
        """Returns repository, path, name and references of a file."""
        return json.loads(self._read(int(row["task"]), int(row["offset"]), int(row["head"])))

    def text(self, row: Any) -> str:
        """Returns the text of a file."""
        return self._read(int(row["task"]), int(row["offset"] + row["head"]), int(row["bytes"])).decode()

    def _read(self, task: int, offset: int, size: int) -> bytes:
        if task not in self._opened:
            if len(self._opened) == _OPEN_FILES:
                self._close()
            self._opened[task] = self._job.file(self._stage, task, "text").open("rb")
        self._opened[task].seek(offset)
        return self._opened[task].read(size)

    def _close(self) -> None:
        for stream in self._opened.values():
            stream.close()
        self._opened.clear()
