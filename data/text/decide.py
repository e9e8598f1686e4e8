"""Second stage: removes duplicates and assigns splits, with any engine and a fixed amount of memory.

Copies are found by :mod:`data.text.find_duplicates`, and sides of the split decided by
:mod:`data.text.sides`. The process that drives the tasks knows counts of chunks and spans, no documents.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from data.text.clean import DIGESTS, NAMES, SIZES
from data.text.clean import STAGE as CLEAN
from data.text.components import LINK
from data.text.documents import STAGE as DOCUMENTS
from data.text.documents import AllDocuments, Span, batches_of, write_documents
from data.text.engines import Engine
from data.text.find_duplicates import Found, find_duplicates
from data.text.inputs import Chunk
from data.text.job import PreparationJob, Result, save_array
from data.text.row_files import Rows, WrittenRows, read_rows, sort_rows, write_rows
from data.text.sides import MEMBER, ROOT, decide_sides, read_sides
from data.text.signature_store import GROUPS, KnownPart, earlier_parts, pieces_of, store_part
from data.text.split import share_of
from train.record import log
from train.record.files import whole_file, write_whole

logger = log.get_logger(__name__)

# S documents of a span.

STAGE = "decide"
REMOVED, TRAIN, VALIDATION = 0, 1, 2
_VERDICT = np.dtype([("keeper", "<i8"), ("is_exact", "?")])
_COPY = np.dtype([("keeper", "<i8"), ("document", "<i8")])
_NAME = np.dtype([("document", "<i8"), ("task", "<i8"), ("offset", "<i8"), ("bytes", "<i8")])
_OPEN_FILES = 64
_RECORD = "decision.json"
_DOMAINS, _HELD_TO = "domains.json", "held_to.json"
_LATER = ("send-*", "join-*", "encode", "write", "out")
"""Folders of later stages."""
_INTERMEDIATE = (
    *("digests", "equal", "bands", "buckets", "pairs", "compare", "verdict", "groups", "tell", "hear"),
    *("lists", "names", "near", "near-*", "similar", "similar-*"),
)


@dataclass(frozen=True)
class Decision:
    """The stage's results for later stages."""

    documents: dict[str, int]
    """Number of documents kept, by domain."""
    train_bytes: int
    """UTF-8 bytes of the training documents."""
    copies: list[Counter[str]]
    """Number of documents removed from each chunk, by reason."""
    copied_bytes: list[int]
    """UTF-8 bytes of the documents removed from each chunk."""


@dataclass(frozen=True)
class _SpanTask:
    span: Span
    partitions: int
    found: Found

    @property
    def number(self) -> int:
        return self.span.number


@dataclass(frozen=True)
class _NameTask:
    span: Span
    partitions: int
    reads: WrittenRows

    @property
    def number(self) -> int:
        return self.span.number


@dataclass(frozen=True)
class _ListTask:
    number: int
    chunks: range
    kept: tuple[int, ...]
    """Documents of each chunk before any is removed."""
    reads: WrittenRows


def decide(job: PreparationJob, chunks: list[Chunk], cleaned: list[Result], engine: Engine) -> Decision:
    """Writes the split or removal of each document, an array per chunk, and the list of copies.

    Args:
        job: the job.
        chunks: all chunks.
        cleaned: the first stage's result for each chunk.
        engine: runs the tasks.
    """
    record = job.work / STAGE / _RECORD
    kept = [result["kept"] for result in cleaned]
    parts = earlier_parts(job)
    held_to = [[part.number, part.name, sum(part.documents)] for part in parts]
    started = job.work / DOCUMENTS / _HELD_TO
    if started.is_file() and json.loads(started.read_text()) != held_to:
        logger.info("deciding again: the store of signatures has other parts than before")
        for name in (STAGE, DOCUMENTS, *_INTERMEDIATE, *_LATER):
            _remove(job, name)
        job.out.mkdir()
    if not record.is_file():
        (job.work / DOCUMENTS).mkdir(exist_ok=True)
        write_whole(started, json.dumps(held_to), sync=False)
        decision = _decide(job, chunks, kept, parts, engine)
        write_whole(record, json.dumps(vars(decision)), sync=False)
    for stage in _INTERMEDIATE:
        _remove(job, stage)
    tree = json.loads(record.read_text())
    return Decision(**tree | {"copies": [Counter(reasons) for reasons in tree["copies"]]})


def store_signatures(job: PreparationJob, cleaned: list[Result], engine: Engine) -> None:
    """Adds a job's documents to its store of signatures, if it has one, once its shards are complete.

    Raises:
        UserError: if another part was added since they were decided.
    """
    held_to = json.loads((job.work / DOCUMENTS / _HELD_TO).read_text())
    parts = [part for part in earlier_parts(job) if [part.number, part.name, sum(part.documents)] in held_to]
    batches = batches_of([result["kept"] for result in cleaned], job.limits.span_documents)
    store_part(job, engine, parts, batches)


def _remove(job: PreparationJob, name: str) -> None:
    for folder in job.work.glob(name):
        shutil.rmtree(folder)


def _decide(
    job: PreparationJob, chunks: list[Chunk], kept: list[int], parts: list[KnownPart], engine: Engine
) -> Decision:
    documents = write_documents(job, pieces_of(parts), kept)
    names = sorted({job.sources[chunk.source].domain for chunk in chunks})
    of_chunk = [names.index(job.sources[chunk.source].domain) for chunk in chunks]
    write_whole(job.work / DOCUMENTS / _DOMAINS, json.dumps(of_chunk), sync=False)
    (job.work / STAGE).mkdir(exist_ok=True)
    found = find_duplicates(job, documents, engine, job.preparation.near_duplicates)
    spans, count = documents.spans(), documents.partitions
    tasks = [_SpanTask(span, count, found) for span in spans]
    verdicts = engine.run("duplicates: verdicts", _verdict, job, tasks)
    totals = {
        kind: [sum(result[kind][n] for result in verdicts) for n in range(len(names))]
        for kind in ("documents", "bytes")
    }
    shares = [share_of(job.preparation, size) for size in totals["bytes"]]
    decide_sides(job, documents, engine, WrittenRows("verdict", "members", len(tasks)), shares)
    copies = WrittenRows("verdict", "copies", len(tasks))
    engine.run("duplicates: names", _names, job, [_NameTask(span, count, copies) for span in spans])
    told = WrittenRows("names", "rows", len(tasks))
    batches = [
        _ListTask(n, batch, tuple(kept[batch.start : batch.stop]), told)
        for n, batch in enumerate(batches_of(kept, job.limits.span_documents))
    ]
    listed = engine.run("duplicates: lists", _list, job, batches)
    return Decision(
        documents=dict(zip(names, totals["documents"], strict=True)),
        train_bytes=sum(result["train_bytes"] for result in listed),
        copies=[Counter(reasons) for result in listed for reasons in result["copies"]],
        copied_bytes=[size for result in listed for size in result["copied_bytes"]],
    )


def _verdict(job: PreparationJob, task: _SpanTask) -> Result:
    """Writes which documents stay; sends copies to what they are of, and members to their groups."""

    def make() -> Result:
        documents, span = AllDocuments(job), task.span
        numbers = np.arange(span.start, span.end)
        keeper, group, is_exact = numbers.copy(), numbers.copy(), np.zeros(numbers.size, bool)
        for links in read_rows(job, [task.found.similar], span.number, LINK):
            group[links["node"] - span.start] = links["to"]
        if not job.spooled:  # Given documents are already deduplicated.
            for links in read_rows(job, [task.found.near], span.number, LINK):
                keeper[links["node"] - span.start] = links["to"]
            for links in read_rows(job, [task.found.equal], span.number, LINK):
                is_exact[links["node"] - span.start] = True
        verdicts = np.empty(numbers.size, _VERDICT)
        verdicts["keeper"], verdicts["is_exact"] = keeper, is_exact
        save_array(job.file("verdict", span.number, "npy"), verdicts)
        stays = keeper == numbers
        key, domain, size = _facts(job, documents, span)
        is_new = numbers >= documents.known
        # A store knows the sides of near copies too, which others may be like.
        is_told = stays | ~is_exact if job.preparation.signatures else stays
        members = np.flatnonzero((group != numbers) & is_new & is_told)
        with write_rows(job, "verdict", span.number, "members", task.partitions) as writer:
            rows = np.empty(members.size, MEMBER)
            rows["group"], rows["document"] = group[members], numbers[members]
            rows["is_kept"] = stays[members]
            rows["key"], rows["domain"] = key[members], domain[members]
            writer.add(rows, rows["group"] // job.limits.span_documents)
        roots = np.empty(numbers.size, ROOT)
        roots["key"], roots["domain"], roots["is_root"] = key, domain, group == numbers
        save_array(job.file("verdict", span.number, "roots.npy"), roots)
        copies = np.flatnonzero(~stays & is_new)
        with write_rows(job, "verdict", span.number, "copies", task.partitions) as writer:
            rows = np.empty(copies.size, _COPY)
            rows["keeper"], rows["document"] = keeper[copies], numbers[copies]
            writer.add(rows, rows["keeper"] // job.limits.span_documents)
        counted = stays & is_new
        most = max(json.loads((job.work / DOCUMENTS / _DOMAINS).read_text()), default=-1) + 1
        return {
            "documents": np.bincount(domain[counted], minlength=most).tolist(),
            "bytes": [int(it) for it in np.bincount(domain[counted], size[counted], minlength=most)],
        }

    return job.once("verdict", task.number, make)


def _facts(
    job: PreparationJob, documents: AllDocuments, span: Span
) -> tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.int64]]:
    """Key of the split, domain and bytes of each new document [S] of a span."""
    count = span.end - span.start
    key, domain, size = np.zeros(count, np.uint64), np.zeros(count, np.int32), np.zeros(count, np.int64)
    of_chunk = json.loads((job.work / DOCUMENTS / _DOMAINS).read_text())
    for piece in documents.pieces(max(span.start, documents.known), span.end):
        digests = np.ascontiguousarray(piece.read(DIGESTS)[:, 16:24])
        at = slice(piece.start - span.start, piece.start - span.start + len(digests))
        key[at], domain[at], size[at] = digests.view("<u8")[:, 0], of_chunk[piece.chunk], piece.read(SIZES)
    return key, domain, size


def _names(job: PreparationJob, task: _NameTask) -> Result:
    """Sends the names of documents that have copies to these."""

    def make() -> Result:
        documents, offset = AllDocuments(job), 0
        with ExitStack() as files:
            writer = files.enter_context(write_rows(job, "names", task.number, "rows", task.partitions))
            blob = files.enter_context(whole_file(job.file("names", task.number, "text")))
            rows = read_rows(job, [task.reads], task.number, _COPY)
            for block in sort_rows(rows, ["keeper", "document"], job.limits, job.work):
                keepers, of_row = np.unique(block["keeper"], return_inverse=True)
                places = np.empty((keepers.size, 2), np.int64)
                for n, name in enumerate(_names_of(documents, keepers)):
                    text = name.encode("utf-8", "surrogatepass")
                    blob.write(text)
                    places[n] = offset, len(text)
                    offset += len(text)
                told = np.empty(block.size, _NAME)
                told["document"], told["task"] = block["document"], task.number
                told["offset"], told["bytes"] = places[of_row].T
                writer.add(told, told["document"] // job.limits.span_documents)
        return {"rows": writer.rows}

    return job.once("names", task.number, make)


def _names_of(documents: AllDocuments, numbers: NDArray[np.int64]) -> Iterator[str]:
    """Yields the names of documents, whose numbers ascend."""
    if not numbers.size:
        return
    for piece in documents.pieces(int(numbers[0]), int(numbers[-1]) + 1):
        size = piece.within.stop - piece.within.start
        begin, end = np.searchsorted(numbers, [piece.start, piece.start + size])
        wanted = set(numbers[begin:end].tolist())
        if wanted:
            yield from (name for number, name in enumerate(piece.names(), piece.start) if number in wanted)


def _list(job: PreparationJob, task: _ListTask) -> Result:
    """Writes the fate of each document of some chunks, and the list of those that are copies."""

    def make() -> Result:
        documents = AllDocuments(job)
        result: Result = {"copies": [], "copied_bytes": [], "train_bytes": 0}
        start = documents.chunk_start(task.chunks.start)
        named = _keeper_names(job, start, start + sum(task.kept), task.reads)
        for chunk, count in zip(task.chunks, task.kept, strict=True):
            verdicts, sides = _of_chunk(job, start, count)
            stays = verdicts["keeper"] == np.arange(start, start + count)
            fate = np.where(stays, np.where(sides, VALIDATION, TRAIN), REMOVED).astype(np.uint8)
            save_array(job.file(STAGE, chunk, "npy"), fate)
            if job.preparation.signatures:
                groups = np.where(verdicts["is_exact"], 0, np.where(sides, 2, 1)).astype(np.uint8)
                save_array(job.file(STAGE, chunk, GROUPS), groups)
            reasons: Counter[str] = Counter()
            with whole_file(job.file(STAGE, chunk, "rejected.jsonl")) as listing:
                # A chunk's copies first: the other iterator must not be asked for one too many.
                mine = _names_at(job, chunk, np.flatnonzero(~stays))
                for (place, name), (number, of) in zip(mine, named, strict=False):
                    assert number == start + place
                    reason = "exact duplicate" if verdicts["is_exact"][place] else "near duplicate"
                    reasons[reason] += 1
                    line = {"place": name, "reason": reason, "of": of}
                    listing.write(json.dumps(line, sort_keys=True).encode() + b"\n")
            sizes = np.load(job.file(CLEAN, chunk, SIZES), mmap_mode="r")
            result["copies"].append(dict(reasons))
            result["copied_bytes"].append(int(sizes[~stays].sum()))
            result["train_bytes"] += int(sizes[fate == TRAIN].sum())
            start += count
        return result

    return job.once("lists", task.number, make)


def _of_chunk(job: PreparationJob, start: int, count: int) -> tuple[NDArray[np.void], NDArray[np.bool_]]:
    """Verdicts, and sides of the split, of a chunk's documents."""
    size = job.limits.span_documents
    verdicts, sides = [np.empty(0, _VERDICT)], [np.empty(0, bool)]
    for span in range(start // size, -(-(start + count) // size)):
        inside = slice(max(start - span * size, 0), start + count - span * size)
        verdicts.append(np.load(job.file("verdict", span, "npy"), mmap_mode="r")[inside])
        sides.append(read_sides(job, span)[inside])
    return np.concatenate(verdicts), np.concatenate(sides)


def _names_at(job: PreparationJob, chunk: int, places: NDArray[np.int64]) -> Iterator[tuple[int, str]]:
    """Yields some documents of a chunk, whose places ascend, with their names."""
    wanted = set(places.tolist())
    if wanted:
        with job.file(CLEAN, chunk, NAMES).open("rb") as lines:
            for place, line in enumerate(lines):
                if place in wanted:
                    yield place, json.loads(line)


def _keeper_names(
    job: PreparationJob, start: int, end: int, written: WrittenRows
) -> Iterator[tuple[int, str]]:
    """Yields the copies among some documents, in order, with the names of what they are copies of."""

    def inside() -> Iterator[Rows]:
        size = job.limits.span_documents
        for span in range(start // size, -(-end // size)):
            for rows in read_rows(job, [written], span, _NAME):
                yield rows[(rows["document"] >= start) & (rows["document"] < end)]

    with ExitStack() as files:
        texts: dict[int, IO[bytes]] = {}
        for block in sort_rows(inside(), ["document"], job.limits, job.work):
            for document, task, offset, size in block.tolist():
                if task not in texts:
                    if len(texts) == _OPEN_FILES:
                        files.close()
                        texts.clear()
                    texts[task] = files.enter_context(job.file("names", task, "text").open("rb"))
                texts[task].seek(offset)
                yield document, texts[task].read(size).decode("utf-8", "surrogatepass")
