"""Signatures of the documents of earlier parts, to which a new part is held.

A store is a folder with a folder for each part, named after its domains. It has the sketch, the digest, the
name and the side of the split of every document of the part, of equal ones the first, and ``part.json`` with
the part's number and all on which sketches depend. A part is added whole or not at all, after its shards are
complete; preparing it again replaces it and holds it to the parts before it only.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.text.clean import DIGESTS, NAMES, SKETCHES
from data.text.clean import STAGE as CLEAN
from data.text.documents import SIDES
from data.text.duplicates import PARAMETERS, SKETCH
from data.text.engines import Engine
from data.text.job import ArrayFile, PreparationJob, Result
from train.recipe.errors import UserError
from train.record import log
from train.record.files import whole_file, write_json

logger = log.get_logger(__name__)

KEY = "data.preparation.signatures"
PART_FILE = "part.json"
GROUPS = "groups.npy"
"""File of a chunk with 0 for each document that is equal to an earlier one, else 1, or 2 if its group is held
out."""
_DIGEST_BYTES = 16
_AT_ONCE = 16_384


@dataclass(frozen=True)
class KnownPart:
    """A part of a store."""

    number: int
    """Its place among the parts, from 1."""
    name: str
    folder: Path
    documents: tuple[int, ...]
    """Number of documents in each of its pieces."""


@dataclass(frozen=True)
class _StoreTask:
    number: int
    chunks: range
    folder: str


def name_of_part(job: PreparationJob) -> str:
    """Returns the name of a job's part, which follows from its domains."""
    domains = sorted({source.domain for source in job.sources})
    return hashlib.sha256(json.dumps(domains).encode()).hexdigest()[:16]


def earlier_parts(job: PreparationJob) -> list[KnownPart]:
    """Returns the parts that a job's documents are held to, in order; none without a store.

    Raises:
        UserError: if the store was made with other parameters of MinHash, or can't be used.
    """
    if job.preparation.signatures is None or job.spooled:
        return []
    store = Path(job.preparation.signatures)
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"{store} can't be a folder ({error.strerror})"
        raise UserError(what, key=KEY, remedy="give another path") from None
    parts = _parts(store)
    own = next((part.number for part in parts if part.name == name_of_part(job)), None)
    return [part for part in parts if own is None or part.number < own]


def pieces_of(parts: Sequence[KnownPart]) -> list[tuple[str, int]]:
    """Returns the path of each piece, to which a kind of file is added, and its number of documents."""
    return [(f"{part.folder}/{n:06}.", count) for part in parts for n, count in enumerate(part.documents)]


def store_part(
    job: PreparationJob, engine: Engine, earlier: Sequence[KnownPart], batches: Sequence[range]
) -> None:
    """Adds a job's documents to its store, if it has one.

    Args:
        job: the job, whose documents are decided.
        engine: runs the tasks.
        earlier: the parts that its documents were held to.
        batches: the chunks of each piece.

    Raises:
        UserError: if another part was added in the meantime.
    """
    if job.preparation.signatures is None or job.spooled:
        return
    store, name = Path(job.preparation.signatures), name_of_part(job)
    partial = store / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    tasks = [_StoreTask(n, batch, str(partial)) for n, batch in enumerate(batches)]
    results = engine.run("storing signatures", _store, job, tasks)
    with (store / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        parts = _parts(store)
        own = next((part.number for part in parts if part.name == name), None)
        before = [part for part in parts if own is None or part.number < own]
        if before != list(earlier):
            what = f"{store} got another part while this one was prepared, which was not held to it"
            raise UserError(what, key=KEY, remedy="the same command decides again, and keeps the clean texts")
        number = own or max((part.number for part in parts), default=0) + 1
        record = {
            "number": number,
            "domains": sorted({source.domain for source in job.sources}),
            "documents": [result["documents"] for result in results],
            "minhash": PARAMETERS,
        }
        write_json(partial / PART_FILE, record)
        old = store / f".{name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if own is not None:
            (store / name).rename(old)
            if later := sum(part.number > own for part in parts):
                logger.warning(f"{later} later parts were held to what {store / name} was before")
        os.rename(partial, store / name)  # noqa: PTH104
        shutil.rmtree(old, ignore_errors=True)


def _parts(store: Path) -> list[KnownPart]:
    parts = []
    for path in store.glob(f"[!.]*/{PART_FILE}"):
        record: dict[str, Any] = json.loads(path.read_text())
        if record["minhash"] != PARAMETERS:
            there, here = (sorted(it.items()) for it in (record["minhash"], PARAMETERS))
            words = ", ".join(f"{name} {value}" for name, value in there if (name, value) not in here)
            what = f"{path} has sketches of other parameters ({words or 'fewer of them'})"
            raise UserError(what, key=KEY, remedy="give another folder, and prepare its parts again")
        counts = tuple(record["documents"])
        parts.append(KnownPart(record["number"], path.parent.name, path.parent, counts))
    return sorted(parts, key=lambda part: part.number)


def _store(job: PreparationJob, task: _StoreTask) -> Result:
    """Writes what is known of the documents of some chunks as a piece of a part."""
    path = Path(task.folder) / f"{task.number:06}."
    count = 0
    with (
        ArrayFile(Path(f"{path}{SKETCHES}"), SKETCH) as sketches,
        ArrayFile(Path(f"{path}{DIGESTS}"), np.uint8, (_DIGEST_BYTES,)) as digests,
        ArrayFile(Path(f"{path}{SIDES}"), np.bool_) as sides,
        whole_file(Path(f"{path}{NAMES}")) as names,
    ):
        for chunk in task.chunks:
            groups = np.load(job.file("decide", chunk, GROUPS))
            stays = np.flatnonzero(groups)
            count += stays.size
            sides.add(groups[stays] == 2)
            for name, file, columns in ((SKETCHES, sketches, None), (DIGESTS, digests, _DIGEST_BYTES)):
                array = np.load(job.file(CLEAN, chunk, name), mmap_mode="r")
                for at in range(0, stays.size, _AT_ONCE):
                    some = array[stays[at : at + _AT_ONCE]]
                    file.add(some if columns is None else some[:, :columns])
            with job.file(CLEAN, chunk, NAMES).open("rb") as lines:
                names.writelines(line for line, group in zip(lines, groups, strict=True) if group)
    return {"documents": count}
