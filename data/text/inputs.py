"""The files of the recipe's sources, and their split into numbered chunks, which depends only on the files.

A chunk is the input of one task: a range of bytes of a JSONL file, of row groups of a Parquet file, of record
batches of an Arrow file, or of the list of a source's text files.
"""

import fnmatch
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.text import saved_datasets
from data.text.file_listing import files_of, named
from data.text.token_ids import MegatronIndex
from train.recipe.errors import UserError
from train.recipe.preparation import CONVERSATIONS, Source, SourceKind
from train.record import log

logger = log.get_logger(__name__)

COMPRESSED = (".gz", ".zst")
MDS_COMPRESSED, MDS_INDEX = (".mds.zstd", ".mds.gz"), "index.json"
JSONL = (".jsonl", ".ndjson", ".json")
SUFFIXES = {
    SourceKind.jsonl: tuple(s + c for s in JSONL for c in ("", *COMPRESSED)),
    SourceKind.parquet: (".parquet",),
    **dict.fromkeys(CONVERSATIONS, tuple(s + c for s in JSONL for c in ("", *COMPRESSED))),
    SourceKind.hf: (
        *(".arrow", ".parquet", ".jsonl"),
        *(s + c for s in (".jsonl", ".json") for c in COMPRESSED),
    ),
    SourceKind.mds: (".mds", *MDS_COMPRESSED),
    SourceKind.megatron: (".bin", ".idx"),
}
BOOKKEEPING = (
    *("dataset_info.json", "dataset_infos.json", "_SUCCESS"),
    *(saved_datasets.STATE, saved_datasets.SPLITS),
)
WHOLE = -1
"""The end of a chunk that covers its whole file."""


@dataclass(frozen=True)
class SourceFile:
    """A file of a source."""

    source: int
    """Index of its source in the recipe."""
    name: str
    """Path relative to the source's folder, independent of the folder's location."""
    path: str
    bytes: int
    modified_ns: int


@dataclass(frozen=True)
class Chunk:
    """The input of one task."""

    number: int
    source: int
    inputs: tuple[SourceFile, ...]
    """One file; several for `text` sources."""
    start: int
    end: int
    """Bytes, row groups, record batches or documents; unused for `text`."""


def is_remote(path: str) -> bool:
    """Returns whether a path is an address in an object store."""
    return "://" in path or path.startswith("dbfs:/")


def list_inputs(n: int, source: Source, fetched: dict[str, Path] | None) -> list[SourceFile]:
    """Lists the files of a source, sorted by name; what is passed over is named in a line.

    Args:
        n: index of the source in the recipe.
        source: the source.
        fetched: local copies of the files of a source in a store, by name relative to its folder.

    Raises:
        UserError: if there are none, none is a regular file, one can't be read, or a saved dataset lacks
            files or a training split.
    """
    key, kind = f"data.sources[{n}].path", source.kind
    found = files_of(source.path) if fetched is None else fetched
    wanted = {name: file for name, file in sorted(found.items()) if is_wanted(name, kind)}
    if wanted:
        report_passed_over(list(found), kind, key)
    if kind is SourceKind.hf:
        wanted = saved_datasets.data_files(wanted, key)
    elif kind is SourceKind.mds:
        wanted = {
            n: file
            for n, file in wanted.items()
            if n.rpartition(".mds")[0] + ".mds" not in wanted.keys() - {n}
        }
    elif kind is SourceKind.megatron:
        wanted = _with_indexes(wanted, key)
    if kind is not SourceKind.hf and (held_out := saved_datasets.held_out_beside_training(wanted)):
        what = f"reads {named(held_out)} as training text; a narrower pattern leaves them out"
        logger.warning(f"{key}: {what}")
    if not wanted:
        suffixes = SUFFIXES.get(kind)
        ending = f" that ends in {', '.join(suffixes)}" if suffixes else ""
        raise UserError(f"{source.path} has no file{ending}", key=key, remedy="correct the path or the kind")
    return _measured(n, wanted, key)


def _with_indexes(found: dict[str, Path], key: str) -> dict[str, Path]:
    """The `.bin` files among those found.

    Raises:
        UserError: if one has no `.idx`.
    """
    files = {name: file for name, file in found.items() if name.endswith(".bin")}
    for name in files:
        if f"{name.removesuffix('.bin')}.idx" not in found:
            remedy = "restore its .idx, or name the folder of both"
            raise UserError(f"{name} has no .idx", key=key, remedy=remedy)
    return files


def report_passed_over(names: list[str], kind: SourceKind, key: str) -> None:
    """Names files of a source that its kind does not read, in one line.

    Args:
        names: all files of the source.
        kind: its kind.
        key: its key in the recipe.
    """
    others = sorted(name for name in names if not is_wanted(name, kind) and not _is_bookkeeping(name))
    if kind is SourceKind.mds:
        others = [name for name in others if Path(name).name != MDS_INDEX]
    if others:
        what = f"passed over {named(others)}: kind {kind.value} reads {', '.join(SUFFIXES[kind])}"
        logger.warning(f"{key}: {what}")


def is_wanted(name: str, kind: SourceKind) -> bool:
    """Returns whether a source of this kind reads a file: not hidden, no metadata, with the right suffix."""
    suffixes = SUFFIXES.get(kind)
    return not _is_bookkeeping(name) and (suffixes is None or name.endswith(suffixes))


def is_fetched(name: str, kind: SourceKind) -> bool:
    """Returns whether a source needs a file of a store, to read it or to know which files are its data."""
    is_record = kind is SourceKind.hf and Path(name).name in (saved_datasets.STATE, saved_datasets.SPLITS)
    return is_record or is_wanted(name, kind)


def cut(
    inputs: list[list[SourceFile]], kinds: list[SourceKind], chunk_bytes: int, whole: Sequence[int] = ()
) -> list[Chunk]:
    """Splits all sources into chunks, numbered in order; files of the sources in ``whole`` are not split."""
    pieces: list[tuple[int, tuple[SourceFile, ...], int, int]] = []
    for n, (files, kind) in enumerate(zip(inputs, kinds, strict=True)):
        if kind is SourceKind.text:
            pieces += [(n, group, 0, WHOLE) for group in _groups_of(files, chunk_bytes)]
        else:
            for file in files:
                spans = [(0, WHOLE)] if n in whole else _spans(file, kind, chunk_bytes)
                pieces += [(n, (file,), *span) for span in spans]
    return [Chunk(number, *piece) for number, piece in enumerate(pieces)]


def places_of_sources(chunks: Sequence[Chunk]) -> dict[int, list[int]]:
    """Returns the places of each source's chunks in the list, in one pass; of a source without any, none."""
    places: dict[int, list[int]] = {}
    for place, chunk in enumerate(chunks):
        places.setdefault(chunk.source, []).append(place)
    return places


def match(name: str, path: str) -> bool:
    """Returns whether an object's address equals a source's path, lies below it, or matches its pattern."""
    return name == path or name.startswith(path.rstrip("/") + "/") or fnmatch.fnmatch(name, path)


def _is_bookkeeping(name: str) -> bool:
    path = Path(name)
    return path.name in BOOKKEEPING or any(part.startswith(".") for part in path.parts)


def _measured(n: int, files: dict[str, Path], key: str) -> list[SourceFile]:
    """The files with size and time; a file under two names, by links, is listed under the first."""
    chosen, seen, again = [], set(), []
    for name, file in files.items():
        try:
            status = file.stat()
        except OSError as error:
            remedy = "restore the file or what it is a link to"
            raise UserError(f"{file} can't be read ({error.strerror})", key=key, remedy=remedy) from None
        if not stat.S_ISREG(status.st_mode):  # Reading a pipe would wait for its writer.
            continue
        if status.st_ino and (status.st_dev, status.st_ino) in seen:
            again.append(name)
            continue
        seen.add((status.st_dev, status.st_ino))
        # A name need not be text: bytes that are no UTF-8 are spelt out in what is written.
        shown = name.encode("utf-8", "backslashreplace").decode()
        chosen.append(SourceFile(n, shown, str(file), status.st_size, status.st_mtime_ns))
    if not chosen:
        what = f"{named(list(files))}: no regular file, but a pipe or a device"
        raise UserError(what, key=key, remedy="write it to a file first")
    if again:
        logger.info(f"{key}: {named(again)}: links to files that are read under another name")
    return chosen


def _groups_of(files: list[SourceFile], least_bytes: int) -> Iterator[tuple[SourceFile, ...]]:
    """Yields the files in groups of at least so many bytes, but for the last."""
    group: list[SourceFile] = []
    size = 0
    for file in files:
        group.append(file)
        size += file.bytes
        if size >= least_bytes:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


def _spans(file: SourceFile, kind: SourceKind, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    if kind is SourceKind.megatron:
        try:
            yield from MegatronIndex.read(Path(file.path), file.modified_ns).spans(chunk_bytes) or [
                (0, WHOLE)
            ]
        except (OSError, ValueError):  # The task that reads the file records the error.
            yield 0, WHOLE
    elif kind is SourceKind.mds:
        yield 0, WHOLE
    elif file.name.endswith((".parquet", ".arrow")):
        try:
            sizes = _group_bytes(file)
        except Exception:  # Readers raise unrelated classes; the task that reads the file records the error.
            yield 0, WHOLE
            return
        if not sizes:  # The task lists it as empty.
            yield 0, WHOLE
        start = size = 0
        for end, one in enumerate(sizes, 1):
            size += one
            if size >= chunk_bytes or end == len(sizes):
                yield start, end
                start, size = end, 0
    elif file.name.endswith(COMPRESSED) or not file.bytes:
        yield 0, WHOLE
    else:
        for start in range(0, file.bytes, chunk_bytes):
            yield start, min(start + chunk_bytes, file.bytes)


def _group_bytes(file: SourceFile) -> list[int]:
    """Size in bytes of each row group or record batch; empty for a file without rows."""
    if file.name.endswith(".parquet"):
        from pyarrow import parquet

        meta = parquet.ParquetFile(file.path).metadata
        count = meta.num_row_groups if meta.num_rows else 0
        return [meta.row_group(n).total_byte_size for n in range(count)]
    import pyarrow

    with pyarrow.memory_map(file.path) as mapped:
        sizes = [(batch.nbytes, batch.num_rows) for batch in pyarrow.ipc.open_stream(mapped)]
    return [size for size, _ in sizes] if any(rows for _, rows in sizes) else []
