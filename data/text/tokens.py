"""Third and fourth stage: tokenises each portion, then writes each shard from portions that overlap it.

A portion is the documents of a chunk, or of some repositories. The boundaries of shards follow from token
counts only, so shards are written in parallel, and no token is lost at the end of a portion. Packed by best
fit, a shard has the documents that begin between its boundaries.
"""

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.shards.packing import PADDING, Sample, mark, pack, pack_whole, unmark
from data.text.conversations import Spans
from data.text.decide import REMOVED, TRAIN, VALIDATION
from data.text.job import ArrayFile, PreparationJob, Result, save_array
from data.text.mds import (
    compress_shard,
    encode_shard,
    index_entry,
    packed_name,
    samples_per_shard,
    shard_name,
)
from data.text.repositories import Portion
from data.text.split import SPLITS
from data.tokenizer import TOKENIZER_FILE, TokenizerHandle, Tokens, open_tokenizer
from train.recipe.preparation import Packing, Source, SourceKind
from train.recipe.schema import Tokenizer
from train.record.files import whole_file, write_whole

ENCODE, WRITE = "encode", "write"
SIDES = dict(zip(SPLITS, (TRAIN, VALIDATION), strict=True))
BATCH = 512
"""Documents tokenised in one call."""
BATCH_CHARACTERS = 8_000_000
"""Characters of a batch, but for its last document: its texts and token ids are in memory at once."""


@dataclass(frozen=True)
class Segment:
    """A portion's tokens of one split, and their place in the domain's token stream of that split."""

    portion: int
    first_token: int
    first_document: int
    """Number of the portion's first document in the domain's list."""


@dataclass(frozen=True)
class ShardTask:
    """The task of writing one shard."""

    number: int
    """Number of the task."""
    domain: str
    split: str
    shard: int
    """Number of the shard within the split."""
    tokens: tuple[int, int]
    """The shard's range of the token stream, where its tokens lie or its whole documents begin."""
    segments: tuple[Segment, ...]
    """The segments that overlap the shard."""


def encode(job: PreparationJob, portion: Portion) -> Result:
    """Writes each split's token ids, with end-of-text tokens, and the portion's part of the documents' list.

    Returns:
        Per split: documents, tokens (end-of-text tokens included), text_bytes and trained_bytes, and the
        files and file_bytes that documents were joined of, or are; and the number of documents.
    """
    return job.once(ENCODE, portion.number, lambda: _encode(job, portion))


def write_shard(job: PreparationJob, task: ShardTask) -> Result:
    """Writes one shard, its compressed file if requested, its token counts and its samples' hashes.

    Returns:
        The shard's index entry (None for a shard without samples, which has no file), samples and padding.
    """
    return job.once(WRITE, task.number, lambda: _write(job, task))


def plan_shards(job: PreparationJob, portions: list[Portion], encoded: list[Result]) -> list[ShardTask]:
    """Plans all shards from the token counts of all portions, in time proportional to portions and shards."""
    tasks: list[ShardTask] = []
    size = samples_per_shard(job.sequence_tokens) * job.sequence_tokens
    by_domain: dict[str, list[tuple[Portion, Result]]] = {source.domain: [] for source in job.sources}
    for each in zip(portions, encoded, strict=True):
        by_domain[job.sources[each[0].source].domain].append(each)
    for domain, mine in by_domain.items():
        for split in SPLITS:
            segments, tokens, documents = [], 0, 0
            for portion, result in mine:
                if result[split]["tokens"]:
                    segments.append(Segment(portion.number, tokens, documents))
                tokens += result[split]["tokens"]
                documents += result["documents"]
            firsts = [segment.first_token for segment in segments]
            for shard, start in enumerate(range(0, tokens, size)):
                span = start, min(start + size, tokens)
                inside = segments[bisect_right(firsts, start) - 1 : bisect_left(firsts, span[1])]
                tasks.append(ShardTask(len(tasks), domain, split, shard, span, tuple(inside)))
    return tasks


def _encode(job: PreparationJob, portion: Portion) -> Result:
    """Writes a portion batch by batch: it may be of any size, as a compressed file is never split."""
    tokenizer = open_once(job.tokenizer, job.out)
    source, documents = job.sources[portion.source], 0
    with ExitStack() as files:
        listing = files.enter_context(whole_file(job.file(ENCODE, portion.number, "documents.jsonl")))
        sides = {
            side: files.enter_context(_EncodedSide(job, portion.number, split))
            for split, side in SIDES.items()
        }
        for batch in _batches_of(_kept(portion)):
            for each in batch:
                digest = hashlib.sha256(each.text.encode()).hexdigest()
                line = {"name": each.name, "sha256": digest, "split": SPLITS[each.side - TRAIN]}
                listing.write(json.dumps(line | each.joined_of, sort_keys=True).encode() + b"\n")
            for side, writer in sides.items():
                mine = [(documents + place, it) for place, it in enumerate(batch) if it.side == side]
                texts, spans = [it.text for _, it in mine], [it.spans or () for _, it in mine]
                ids = _documents_of(tokenizer, job, source, texts, spans)
                writer.add(mine, ids)
            documents += len(batch)
    return {"documents": documents} | {split: sides[side].result() for split, side in SIDES.items()}


@dataclass(frozen=True)
class _Kept:
    """A document that stays."""

    name: str
    text: str
    side: int
    spans: Spans | None
    """Of a conversation."""
    joined_of: dict[str, list[str]]
    """``files``, the names of what it was joined of, if it was."""
    file_bytes: int
    """Of these files."""


def _kept(portion: Portion) -> Iterator[_Kept]:
    """Yields the documents of a portion that stay."""
    fates = np.load(portion.fates, mmap_mode="r")
    with ExitStack() as opened:
        lines = opened.enter_context(Path(portion.texts).open("rb"))
        listed = opened.enter_context(Path(portion.files).open("rb")) if portion.files else None
        for line, fate in zip(lines, fates, strict=True):
            of = next(listed) if listed else b""
            if fate == REMOVED:
                continue
            name, text, *rest = json.loads(line)
            spans = tuple((begin, end) for begin, end in rest[0]) if rest else None
            names, size = json.loads(of) if of else ([], 0)
            joined_of = {"files": names} if of else {}
            yield _Kept(name, text, int(fate), spans, joined_of, size)


def _batches_of(documents: Iterable[_Kept]) -> Iterator[list[_Kept]]:
    """Yields documents in batches of limited number and length."""
    batch: list[_Kept] = []
    size = 0
    for each in documents:
        batch.append(each)
        size += len(each.text)
        if len(batch) == BATCH or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _EncodedSide:
    """Writes the token ids of a portion's documents of one split, in a ``with`` statement.

    Args:
        job: the job.
        number: the portion's number.
        split: name of the split.
    """

    def __init__(self, job: PreparationJob, number: int, split: str) -> None:
        self._arrays = {
            name: ArrayFile(job.file(ENCODE, number, f"{split}.{name}.npy"), dtype)
            for name, dtype in (("tokens", np.int32), ("lengths", np.int64), ("places", np.int64))
        }
        self._files = ExitStack()
        self._counts: Counter[str] = Counter()

    def __enter__(self) -> "_EncodedSide":
        for array in self._arrays.values():
            self._files.enter_context(array)
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.__exit__(*error)

    def add(self, documents: Sequence[tuple[int, _Kept]], ids: Sequence[Tokens]) -> None:
        """Adds documents, each with its place in the portion and its token ids."""
        self._arrays["places"].add([place for place, _ in documents])
        self._arrays["lengths"].add([it.size for it in ids])
        for each in ids:
            self._arrays["tokens"].add(each)
        for _, document in documents:
            size, spans = len(document.text.encode()), document.spans
            learnt = size if spans is None else sum(len(document.text[a:b].encode()) for a, b in spans)
            self._counts.update(documents=1, text_bytes=size, trained_bytes=learnt)
            if document.joined_of:
                self._counts.update(files=len(document.joined_of["files"]), file_bytes=document.file_bytes)
            else:
                self._counts.update(files=1, file_bytes=size)
        self._counts.update(tokens=sum(it.size for it in ids))

    def result(self) -> dict[str, int]:
        """Returns the counts of the split."""
        names = ("documents", "tokens", "text_bytes", "trained_bytes", "files", "file_bytes")
        return {name: int(self._counts[name]) for name in names}


def _documents_of(
    tokenizer: TokenizerHandle, job: PreparationJob, source: Source, texts: list[str], spans: list[Spans]
) -> list[Tokens]:
    """Returns the token ids of documents with what ends them, marked where only some have a loss.

    Chats end as their template says, all others with the end-of-text token, which is to be learnt.
    """
    if source.kind is SourceKind.chat:
        return [mark(*tokenizer.encode_chat(text, of)) for text, of in zip(texts, spans, strict=True)]
    end, is_masked = np.array([tokenizer.eos_id], np.int32), job.is_masked(source.domain)
    if source.kind is SourceKind.instructions:
        # Each by itself, as a prompt is by itself when it is answered.
        parts = [
            part for text, ((at, _),) in zip(texts, spans, strict=True) for part in (text[:at], text[at:])
        ]
        ids = _encoded(tokenizer, parts)
        pairs = zip(ids[::2], ids[1::2], strict=True)
        return [np.concatenate([prompt, mark(np.append(response, end))]) for prompt, response in pairs]
    documents = [np.concatenate([it, end]) for it in _encoded(tokenizer, texts)]
    return [mark(it) for it in documents] if is_masked else documents


def _encoded(tokenizer: TokenizerHandle, texts: list[str]) -> list[Tokens]:
    batches = [texts[at : at + BATCH] for at in range(0, len(texts), BATCH)]
    return [ids for batch in batches for ids in tokenizer.encode_documents(batch)]


def _write(job: PreparationJob, task: ShardTask) -> Result:
    tokenizer = open_once(job.tokenizer, job.out)
    samples = _samples(job, task, tokenizer.pad_id)
    if not samples:  # A document that began before is longer than the shard.
        return {"entry": None, "samples": 0, "padding": 0, "trained": 0}
    if is_masked := job.is_masked(task.domain):
        samples = [unmark(sample) for sample in samples]
    level = job.preparation.zstd_level
    content = encode_shard(samples, job.sequence_tokens, level)
    packed = None if level is None else (level, compress_shard(content, level))
    folder = job.out / task.domain / task.split
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / shard_name(task.shard), content, sync=False)
    if packed is not None:
        write_whole(folder / packed_name(task.shard), packed[1], sync=False)
    texts = [sample.tokens[: sample.lengths[sample.documents != PADDING].sum()] for sample in samples]
    tokens = np.concatenate(texts)
    padding = len(samples) * job.sequence_tokens - tokens.size
    counts = np.bincount(tokens, minlength=tokenizer.vocab_size)
    save_array(job.file(WRITE, task.number, "counts.npy"), counts)
    write_whole(job.file(WRITE, task.number, "digests"), b"".join(map(_digest, samples)), sync=False)
    entry = index_entry(task.shard, content, len(samples), job.sequence_tokens, packed, is_masked)
    trained = sum(int(sample.is_trained().sum()) for sample in samples) if is_masked else 0
    return {"entry": entry, "samples": len(samples), "padding": padding, "trained": trained}


def _samples(job: PreparationJob, task: ShardTask, pad_id: int) -> list[Sample]:
    size = job.sequence_tokens
    if job.preparation.packing is Packing.best_fit:
        return pack_whole(_pieces(job, task, are_whole=True), sequence_tokens=size, pad_id=pad_id)
    pieces = _pieces(job, task, are_whole=False)
    return list(pack(pieces, sequence_tokens=size, eos_id=None, pad_id=pad_id))


def _pieces(
    job: PreparationJob, task: ShardTask, *, are_whole: bool
) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """Yields the shard's documents or parts of documents, with their numbers in the domain's list.

    ``are_whole``: the documents that begin in its range, to their ends; otherwise what lies in it.
    """
    for segment in task.segments:
        files = {
            name: np.load(job.file(ENCODE, segment.portion, f"{task.split}.{name}.npy"), mmap_mode="r")
            for name in ("tokens", "lengths", "places")
        }
        ends = np.cumsum(files["lengths"])
        start = max(0, task.tokens[0] - segment.first_token)
        stop = min(int(ends[-1]), task.tokens[1] - segment.first_token)
        for document in range(int(np.searchsorted(ends, start, "right")), ends.size):
            first, last = int(ends[document] - files["lengths"][document]), int(ends[document])
            if first >= stop:
                break
            if are_whole and first < start:
                continue
            ids = (
                files["tokens"][first:last]
                if are_whole
                else files["tokens"][max(first, start) : min(last, stop)]
            )
            yield segment.first_document + int(files["places"][document]), np.asarray(ids)


def _digest(sample: Sample) -> bytes:
    digest = hashlib.sha256()
    for column in (sample.documents, sample.lengths, sample.tokens, sample.trained):
        digest.update(b"" if column is None else column.tobytes())
    return digest.digest()


_OPENED: dict[tuple[str, Path, tuple[int, int] | None], TokenizerHandle] = {}
"""The tokenizer that this process has opened last."""


def open_once(cfg: Tokenizer, folder: Path) -> TokenizerHandle:
    """Opens and checks the tokenizer once per process, and again if its file changes, as processes outlive a
    build.
    """
    mark = None
    with suppress(FileNotFoundError):
        status = (folder / TOKENIZER_FILE).stat()
        mark = status.st_ino, status.st_mtime_ns
    key = repr(cfg), folder, mark
    if key not in _OPENED:
        _OPENED.clear()
        _OPENED[key] = open_tokenizer(cfg, folder)
    return _OPENED[key]
