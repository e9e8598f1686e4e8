"""Plan of a corpus of any size by the numbers of a built one: files, bytes, partitions, and memory.

Everything is computed: what a document has in the built shards is multiplied, and the sizes of rows and the
limits of tasks are those of the code that makes them.
"""

import json
import tracemalloc
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data.shards.manifest import DOCUMENTS_FILE, Manifest
from data.text.clean import KEPT
from data.text.duplicates import BANDS, SKETCH
from data.text.find_duplicates import BAND, DIGEST, SENT, partitions_of
from data.text.inputs import Chunk, SourceFile
from data.text.job import Limits
from data.text.mds import samples_per_shard
from train.recipe.preparation import Preparation
from train.record.tables import text_table

MOST_DOCUMENTS = 1e12
_DIGEST_BYTES, _SIZE_BYTES = 32, 8
_NAMES_READ = 1000
_SIMULATED_CHUNKS = 2000
_SPAN_BYTES = 60
"""Of the arrays that a task has of each document of its span."""
_SORT_COPIES, _BUFFERS = 4, 3
"""Of rows that are sorted at once, and of rows that wait, with what sorting and joining them copies."""
_FILES_OF_CHUNK = 20
"""Of all stages."""


@dataclass(frozen=True)
class GrowthPlan:
    """Files, bytes, tasks and memory that the preparation of a number of documents takes."""

    documents: int
    """That reach the decision, copies included."""
    text_bytes: int
    chunks: int
    chunk_files: int
    spans: int
    """Tasks of each step of the joins."""
    digest_partitions: int
    band_partitions: int
    signature_bytes: int
    """Sketches, digests, sizes and names, until the shards are complete."""
    band_bytes: int
    """Rows of the bands, the most that lies on disk for the joins at a time."""
    sent_bytes: int
    """Sketches sent for comparison, two for each near-duplicate."""
    token_bytes: int
    shards: int
    task_memory_bytes: int
    driver_memory_bytes: int


def plan_growth(
    manifest: Manifest, root: Path, preparation: Preparation, documents: int, limits: Limits | None = None
) -> GrowthPlan:
    """Plans the preparation of a number of documents like those of built shards.

    Args:
        manifest: of the built shards.
        root: their folder.
        preparation: the recipe's preparation.
        documents: number of documents after the filters, before copies are removed.
        limits: of the tasks; None: the default.
    """
    limits = limits or Limits()
    splits = [split for domain in manifest.domains.values() for split in domain.splits.values()]
    kept = sum(split.documents for split in splits)
    reasons = sum((Counter(domain.rejected) for domain in manifest.domains.values()), Counter[str]())
    there = kept + reasons["exact duplicate"] + reasons["near duplicate"]
    distinct = round(documents * (there - reasons["exact duplicate"]) / there)
    stays = documents * kept / there
    text_bytes = round(documents * sum(split.text_bytes for split in splits) / kept)
    tokens = stays * sum(split.tokens for split in splits) / kept
    chunks = -(-text_bytes // preparation.chunk_bytes)
    name_bytes = _mean_name_bytes(root, list(manifest.domains))
    of_document = SKETCH.itemsize + _DIGEST_BYTES + _SIZE_BYTES + name_bytes
    per_shard = samples_per_shard(manifest.sequence_tokens) * manifest.sequence_tokens
    band_bytes = distinct * BANDS * BAND.itemsize
    return GrowthPlan(
        documents=documents,
        text_bytes=text_bytes,
        chunks=chunks,
        chunk_files=_FILES_OF_CHUNK * chunks,
        spans=-(-documents // limits.span_documents),
        digest_partitions=partitions_of(limits, documents * DIGEST.itemsize),
        band_partitions=partitions_of(limits, documents * BANDS * BAND.itemsize),
        signature_bytes=round(documents * of_document),
        band_bytes=band_bytes,
        sent_bytes=round(2 * documents * reasons["near duplicate"] / there) * SENT.itemsize,
        token_bytes=round(4 * tokens),
        shards=-(-round(tokens) // per_shard),
        task_memory_bytes=_SORT_COPIES * limits.sort_bytes
        + _BUFFERS * limits.buffer_bytes
        + _SPAN_BYTES * limits.span_documents,
        driver_memory_bytes=chunks * bytes_of_chunk_record(),
    )


def bytes_of_chunk_record() -> int:
    """Memory of the driver for each chunk: measured on chunks that are made up, with a usual result."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    held = [_simulated(n) for n in range(_SIMULATED_CHUNKS)]
    size = (tracemalloc.get_traced_memory()[0] - before) // len(held)
    tracemalloc.stop()
    return size


def _simulated(number: int) -> tuple[object, ...]:
    file = SourceFile(0, f"part-{number:06}.jsonl", f"/corpus/part-{number:06}.jsonl", number, number)
    cleaned = {
        "kept": number,
        "rejected": {f"rule {n}": number + n for n in range(12)},
        "rejected_bytes": number,
        "languages": {code: {KEPT: number, "language": number + 1} for code in ("en", "de", "fr", "und")},
    }
    encoded = {"documents": number} | {
        split: {name: number for name in ("documents", "tokens", "text_bytes", "trained_bytes")}
        for split in ("train", "validation")
    }
    copies = Counter({"exact duplicate": number, "near duplicate": number})
    # As results are read again from their records.
    return (
        Chunk(number, 0, (file,), 0, number),
        *(json.loads(json.dumps(it)) for it in (cleaned, encoded)),
        copies,
    )


def describe_growth(plan: GrowthPlan) -> str:
    """Formats a plan as a table."""
    gigabytes = {
        "text": plan.text_bytes,
        "signatures and names": plan.signature_bytes,
        "rows of bands, for a time": plan.band_bytes,
        "sketches sent, for a time": plan.sent_bytes,
        "token ids": plan.token_bytes,
    }
    rows = [
        ("chunks", f"{plan.chunks:,}"),
        ("files of chunks, about", f"{plan.chunk_files:,}"),
        ("spans: tasks of a step, partitions by document", f"{plan.spans:,}"),
        ("partitions by digest", f"{plan.digest_partitions:,}"),
        ("partitions by band", f"{plan.band_partitions:,}"),
        *((name, f"{size / 1e9:,.1f} GB") for name, size in gigabytes.items()),
        ("shards", f"{plan.shards:,}"),
        ("memory of a task, about", f"{plan.task_memory_bytes / 1e9:,.2f} GB"),
        ("memory of the driver for chunks, about", f"{plan.driver_memory_bytes / 1e9:,.2f} GB"),
    ]
    head = f"computed: {plan.documents:,} documents like those of the shards, copies included"
    return f"{head}\n{text_table((), rows, '<>')}"


def _mean_name_bytes(root: Path, domains: list[str]) -> float:
    """Bytes of a document's name in a line of its own, the mean over the first of each domain."""
    sizes = []
    for domain in domains:
        with (root / domain / DOCUMENTS_FILE).open("rb") as lines:
            sizes += [len(json.loads(line)["name"].encode()) + 3 for line in islice(lines, _NAMES_READ)]
    return sum(sizes) / max(len(sizes), 1)
