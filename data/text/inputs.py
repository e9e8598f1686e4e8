"""The files of the recipe's sources, and their split into numbered chunks, which depends only on the files.

A chunk is the input of one task: a range of bytes of a JSONL file, of row groups of a Parquet file, of record
batches of an Arrow file, or of the list of a source's text files.
"""

import fnmatch
import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.text.language import LANGUAGES
from train.recipe.errors import UserError
from train.recipe.keys import out_of_range
from train.recipe.phases import domains_of
from train.recipe.preparation import Preparation, Source, SourceKind
from train.recipe.schema import Recipe

COMPRESSED = (".gz", ".zst")
JSONL = (".jsonl", ".ndjson", ".json")
SUFFIXES = {
    SourceKind.jsonl: tuple(s + c for s in JSONL for c in ("", *COMPRESSED)),
    SourceKind.parquet: (".parquet",),
    SourceKind.hf: (".arrow", ".parquet", ".jsonl"),
}
BOOKKEEPING = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
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
    """Bytes, row groups or record batches; unused for `text`."""


def is_remote(path: str) -> bool:
    """Returns whether a path is an address in an object store."""
    return "://" in path or path.startswith("dbfs:/")


def check_sources(recipe: Recipe) -> None:
    """Rejects sources that contradict the recipe.

    Raises:
        UserError: one line that names the key.
    """
    data = recipe.data
    if data.corpus is not None:
        raise UserError("conflicts with data.sources", key="data.corpus", remedy="remove either")
    there = {source.domain for source in data.sources}
    for domain in [*domains_of(recipe), *data.validation_domains]:
        if domain not in there:
            remedy = f"they have {', '.join(sorted(there))}"
            raise UserError(f"no source has domain {domain}", key="data.sources", remedy=remedy)
    for n, source in enumerate(data.sources):
        unknown = sorted(set(source.languages) - LANGUAGES)
        if unknown:
            raise UserError(
                f"{unknown[0]} is not a language that can be detected",
                key=f"data.sources[{n}].languages",
                remedy=f"choose from {', '.join(sorted(LANGUAGES))}",
            )
        if not source.domain or "/" in source.domain or source.domain.startswith("."):
            key = f"data.sources[{n}].domain"
            raise UserError(
                f"{source.domain!r} is not a valid folder name", key=key, remedy="use letters and digits"
            )


def check_preparation(preparation: Preparation) -> None:
    """Rejects numbers out of range.

    Raises:
        UserError: one line that names the key.
    """
    for violation in out_of_range(preparation, "data.preparation."):
        raise UserError(violation.what, key=violation.key, remedy=violation.remedy)


def list_inputs(n: int, source: Source, fetched: dict[str, Path] | None) -> list[SourceFile]:
    """Lists the files of a source, sorted by name.

    Args:
        n: index of the source in the recipe.
        source: the source.
        fetched: local copies of the files of a source in a store, by name relative to its folder.

    Raises:
        UserError: if there are none.
    """
    named = _files_of(source.path) if fetched is None else fetched
    chosen = [
        SourceFile(n, name, str(file), file.stat().st_size, file.stat().st_mtime_ns)
        for name, file in sorted(named.items())
        if is_wanted(name, source.kind)
    ]
    if not chosen:
        suffixes = SUFFIXES.get(source.kind)
        wanted = f" that ends in {', '.join(suffixes)}" if suffixes else ""
        raise UserError(
            f"{source.path} has no file{wanted}",
            key=f"data.sources[{n}].path",
            remedy="correct the path or the kind",
        )
    return chosen


def is_wanted(name: str, kind: SourceKind) -> bool:
    """Returns whether a source of this kind reads a file: not hidden, no metadata, with the right suffix."""
    path, suffixes = Path(name), SUFFIXES.get(kind)
    is_hidden = any(part.startswith(".") for part in path.parts)
    return not is_hidden and path.name not in BOOKKEEPING and (suffixes is None or name.endswith(suffixes))


def cut(inputs: list[list[SourceFile]], kinds: list[SourceKind], chunk_bytes: int) -> list[Chunk]:
    """Splits all sources into chunks, numbered in order."""
    pieces: list[tuple[int, tuple[SourceFile, ...], int, int]] = []
    for n, (files, kind) in enumerate(zip(inputs, kinds, strict=True)):
        if kind is SourceKind.text:
            group: list[SourceFile] = []
            for file in files:
                group.append(file)
                if sum(it.bytes for it in group) >= chunk_bytes or file is files[-1]:
                    pieces.append((n, tuple(group), 0, WHOLE))
                    group = []
        else:
            pieces += [(n, (file,), *span) for file in files for span in _spans(file, chunk_bytes)]
    return [Chunk(number, *piece) for number, piece in enumerate(pieces)]


def match(name: str, path: str) -> bool:
    """Returns whether an object's address equals a source's path, lies below it, or matches its pattern."""
    return name == path or name.startswith(path.rstrip("/") + "/") or fnmatch.fnmatch(name, path)


def _files_of(path: str) -> dict[str, Path]:
    """Files of a local path or pattern, by name relative to its folder."""
    found = [Path(it) for it in glob.glob(path, recursive=True)]  # noqa: PTH207  (may be absolute)
    named: dict[str, Path] = {}
    for place in found:
        if place.is_dir():
            named |= {str(file.relative_to(place)): file for file in place.rglob("*") if file.is_file()}
        else:
            named[place.name if len(found) == 1 else str(place.relative_to(_fixed_part(path)))] = place
    return named


def _spans(file: SourceFile, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    if file.name.endswith((".parquet", ".arrow")):
        try:
            sizes = _group_bytes(file)
        except (OSError, ValueError):  # The task that reads the file records the error.
            yield 0, WHOLE
            return
        start = 0
        for end in range(1, len(sizes) + 1):
            if sum(sizes[start:end]) >= chunk_bytes or end == len(sizes):
                yield start, end
                start = end
    elif file.name.endswith(COMPRESSED):
        yield 0, WHOLE
    else:
        for start in range(0, file.bytes, chunk_bytes):
            yield start, min(start + chunk_bytes, file.bytes)


def _group_bytes(file: SourceFile) -> list[int]:
    """Size in bytes of each row group or record batch."""
    if file.name.endswith(".parquet"):
        from pyarrow import parquet

        meta = parquet.ParquetFile(file.path).metadata
        return [meta.row_group(n).total_byte_size for n in range(meta.num_row_groups)]
    import pyarrow

    with pyarrow.memory_map(file.path) as mapped:
        return [batch.nbytes for batch in pyarrow.ipc.open_stream(mapped)]


def _fixed_part(pattern: str) -> Path:
    """The folders of a pattern before the first wildcard."""
    parts = Path(pattern).parts
    varying = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return Path(*parts[:varying])
