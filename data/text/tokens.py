"""Third and fourth stage: tokenises each chunk, then writes each shard from the chunks that overlap it.

The boundaries of shards follow from token counts only, so shards are written in parallel, and no token is
lost at the end of a chunk. Packed by best fit, a shard has the documents that begin between its boundaries.
"""

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.shards.packing import PADDING, Sample, mark, pack, pack_whole, unmark
from data.text.clean import read_documents, read_spans
from data.text.conversations import Spans
from data.text.decide import REMOVED, TRAIN, VALIDATION
from data.text.decide import STAGE as DECIDE
from data.text.inputs import Chunk
from data.text.job import PreparationJob, Result, save_array
from data.text.mds import (
    compress_shard,
    encode_shard,
    index_entry,
    packed_name,
    samples_per_shard,
    shard_name,
)
from data.text.split import SPLITS
from data.tokenizer import TOKENIZER_FILE, TokenizerHandle, Tokens, open_tokenizer
from train.recipe.preparation import CONVERSATIONS, Packing, Source, SourceKind
from train.recipe.schema import Tokenizer
from train.record.files import write_whole

ENCODE, WRITE = "encode", "write"
SIDES = dict(zip(SPLITS, (TRAIN, VALIDATION), strict=True))
BATCH = 512
"""Documents tokenised in one call."""


@dataclass(frozen=True)
class Segment:
    """A chunk's tokens of one split, and their place in the domain's token stream of that split."""

    chunk: int
    first_token: int
    first_document: int
    """Number of the chunk's first document in the domain's list."""


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


def encode(job: PreparationJob, chunk: Chunk) -> Result:
    """Writes each split's token ids, with end-of-text tokens, and the chunk's part of the list of documents.

    Returns:
        Per split: documents, tokens (end-of-text tokens included), text_bytes; and the number of documents.
    """
    return job.once(ENCODE, chunk.number, lambda: _encode(job, chunk))


def write_shard(job: PreparationJob, task: ShardTask) -> Result:
    """Writes one shard, its compressed file if requested, its token counts and its samples' hashes.

    Returns:
        The shard's index entry (None for a shard without samples, which has no file), samples and padding.
    """
    return job.once(WRITE, task.number, lambda: _write(job, task))


def plan_shards(job: PreparationJob, chunks: list[Chunk], encoded: list[Result]) -> list[ShardTask]:
    """Plans all shards from the token counts of all chunks, in time proportional to chunks and shards."""
    tasks: list[ShardTask] = []
    size = samples_per_shard(job.sequence_tokens) * job.sequence_tokens
    by_domain: dict[str, list[tuple[Chunk, Result]]] = {source.domain: [] for source in job.sources}
    for each in zip(chunks, encoded, strict=True):
        by_domain[job.sources[each[0].source].domain].append(each)
    for domain, mine in by_domain.items():
        for split in SPLITS:
            segments, tokens, documents = [], 0, 0
            for chunk, result in mine:
                if result[split]["tokens"]:
                    segments.append(Segment(chunk.number, tokens, documents))
                tokens += result[split]["tokens"]
                documents += result["documents"]
            firsts = [segment.first_token for segment in segments]
            for shard, start in enumerate(range(0, tokens, size)):
                span = start, min(start + size, tokens)
                inside = segments[bisect_right(firsts, start) - 1 : bisect_left(firsts, span[1])]
                tasks.append(ShardTask(len(tasks), domain, split, shard, span, tuple(inside)))
    return tasks


def _encode(job: PreparationJob, chunk: Chunk) -> Result:
    tokenizer = open_once(job.tokenizer, job.out)
    fate = np.load(job.file(DECIDE, chunk.number, "npy"))
    kept = [(doc, f) for doc, f in zip(read_documents(job, chunk.number), fate, strict=True) if f != REMOVED]
    kept_spans: list[Spans] = []
    if job.sources[chunk.source].kind in CONVERSATIONS:
        spans_of = zip(read_spans(job, chunk.number), fate, strict=True)
        kept_spans = [spans for spans, f in spans_of if f != REMOVED]
    lines, result = [], {"documents": len(kept)}
    for (name, text), side in kept:
        split = SPLITS[side - TRAIN]
        lines.append({"name": name, "sha256": hashlib.sha256(text.encode()).hexdigest(), "split": split})
    listing = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
    write_whole(job.file(ENCODE, chunk.number, "documents.jsonl"), listing, sync=False)
    sides: dict[str, object] = {}
    for split, side in SIDES.items():
        places = [place for place, (_, f) in enumerate(kept) if f == side]
        texts = [kept[place][0][1] for place in places]
        spans = [kept_spans[place] for place in places] if kept_spans else []
        ids = _documents_of(tokenizer, job, job.sources[chunk.source], texts, spans)
        tokens = np.concatenate([np.empty(0, np.int32), *ids])
        arrays: dict[str, NDArray[np.integer[Any]]] = {
            "tokens": tokens.astype(np.int32, copy=False),
            "lengths": np.array([it.size for it in ids], np.int64),
            "places": np.array(places, np.int64),
        }
        for name, array in arrays.items():
            save_array(job.file(ENCODE, chunk.number, f"{split}.{name}.npy"), array)
        text_bytes = sum(len(text.encode()) for text in texts)
        learnt = [text[a:b] for text, of in zip(texts, spans, strict=False) for a, b in of]
        trained_bytes = sum(len(text.encode()) for text in learnt) if spans else text_bytes
        sides[split] = {
            "documents": len(texts),
            "tokens": tokens.size,
            "text_bytes": text_bytes,
            "trained_bytes": trained_bytes,
        }
    return result | sides


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
            name: np.load(job.file(ENCODE, segment.chunk, f"{task.split}.{name}.npy"), mmap_mode="r")
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
