"""Second stage, in one process: removes duplicates and assigns splits. Needs 60 bytes per document."""

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.text.clean import STAGE as CLEAN
from data.text.clean import read_documents
from data.text.duplicates import PERMUTATIONS, Resolution, resolve
from data.text.inputs import Chunk
from data.text.job import PreparationJob, Result, save_array
from data.text.split import held_out, share_of
from train.record.files import write_whole

# N documents of all chunks in order.

STAGE = "decide"
REMOVED, TRAIN, VALIDATION = 0, 1, 2


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


def decide(job: PreparationJob, chunks: list[Chunk], cleaned: list[Result]) -> Decision:
    """Writes the split or removal of each document, an array per chunk, and the list of copies.

    Args:
        job: the job.
        chunks: all chunks.
        cleaned: the first stage's result for each chunk.
    """
    bounds = np.cumsum([0, *(result["kept"] for result in cleaned)])
    domains = [job.sources[chunk.source].domain for chunk in chunks]
    domain_of_N = np.repeat(np.array([*domains, ""]), [*np.diff(bounds), 0])
    digests_N2, sizes_N, keys_N = _gather(job, chunks)
    found = _resolve(job, chunks, bounds, digests_N2)
    stays_N = found.keeper == np.arange(bounds[-1])
    fate_N = np.where(stays_N, TRAIN, REMOVED).astype(np.uint8)
    kept = np.flatnonzero(stays_N)
    names, of_domain = np.unique(domain_of_N[kept], return_inverse=True)
    bytes_of = np.bincount(of_domain, sizes_N[kept], minlength=names.size)
    shares = np.array([share_of(job.preparation, int(size)) for size in bytes_of])
    fate_N[kept[held_out(keys_N[kept], found.group[kept], of_domain, shares)]] = VALIDATION
    (job.work / STAGE).mkdir(exist_ok=True)
    keepers = _keeper_names(job, chunks, bounds, found, stays_N)
    copies, copied_bytes = [], []
    for chunk, start, end in zip(chunks, bounds, bounds[1:], strict=False):
        save_array(job.file(STAGE, chunk.number, "npy"), fate_N[start:end])
        copies.append(_list_copies(job, chunk, range(start, end), found, keepers))
        copied_bytes.append(int(sizes_N[start:end][~stays_N[start:end]].sum()))
    documents = {domain: int((stays_N & (domain_of_N == domain)).sum()) for domain in domains}
    return Decision(documents, int(sizes_N[fate_N == TRAIN].sum()), copies, copied_bytes)


def _gather(
    job: PreparationJob, chunks: list[Chunk]
) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.uint64]]:
    """Half of each digest [N, 2] for comparison, sizes [N], and other digest bits [N] to assign splits."""
    halves, sizes, keys = [np.empty((0, 2), np.uint64)], [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for chunk in chunks:
        whole = np.load(job.file(CLEAN, chunk.number, "digests.npy")).view(np.uint64).reshape(-1, 4)
        halves.append(whole[:, :2].copy())
        keys.append(whole[:, 2].copy())
        sizes.append(np.load(job.file(CLEAN, chunk.number, "sizes.npy")))
    return np.concatenate(halves), np.concatenate(sizes), np.concatenate(keys)


def _resolve(
    job: PreparationJob, chunks: list[Chunk], bounds: NDArray[np.int64], digests_N2: NDArray[np.uint64]
) -> Resolution:
    path = job.work / "signatures.npy"
    shape = (int(bounds[-1]), PERMUTATIONS)
    signatures = _mapped(path, shape) if shape[0] else np.empty(shape, np.uint32)
    for chunk, start, end in zip(chunks, bounds, bounds[1:], strict=False):
        signatures[start:end] = np.load(job.file(CLEAN, chunk.number, "signatures.npy"))
    found = resolve(digests_N2, signatures, job.preparation.near_duplicates)
    if job.spooled:  # Given documents are already deduplicated.
        return Resolution(np.arange(bounds[-1]), np.zeros(bounds[-1], bool), found.group)
    return found


def _mapped(path: Path, shape: tuple[int, int]) -> NDArray[np.uint32]:
    """A new array in a file.

    Raises:
        OSError: if the disk is full: writing to a map of a file without space would kill the process.
    """
    mapped = np.lib.format.open_memmap(path, "w+", np.uint32, shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return mapped


def _keeper_names(
    job: PreparationJob,
    chunks: list[Chunk],
    bounds: NDArray[np.int64],
    found: Resolution,
    stays_N: NDArray[np.bool_],
) -> dict[int, str]:
    """Names of the documents that have copies."""
    wanted = np.unique(found.keeper[~stays_N])
    names = {}
    for chunk, start, end in zip(chunks, bounds, bounds[1:], strict=False):
        inside = set(wanted[(wanted >= start) & (wanted < end)].tolist())
        if inside:
            for number, (name, _) in enumerate(read_documents(job, chunk.number), int(start)):
                if number in inside:
                    names[number] = name
    return names


def _list_copies(
    job: PreparationJob, chunk: Chunk, numbers: range, found: Resolution, names: dict[int, str]
) -> Counter[str]:
    """Writes the list of the chunk's documents that are removed as copies, and counts them by reason."""
    reasons: Counter[str] = Counter()
    lines = []
    if any(found.keeper[n] != n for n in numbers):
        for number, (name, _) in zip(numbers, read_documents(job, chunk.number), strict=True):
            keeper = int(found.keeper[number])
            if keeper != number:
                reason = "exact duplicate" if found.is_exact[number] else "near duplicate"
                reasons[reason] += 1
                lines.append({"place": name, "reason": reason, "of": names[keeper]})
    text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
    write_whole(job.file(STAGE, chunk.number, "rejected.jsonl"), text, sync=False)
    return reasons
