"""The records of a chunk: texts with their places, and unreadable records with a reason."""

import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data.text.inputs import WHOLE, Chunk, SourceFile
from train.recipe.preparation import Source, SourceKind

_SLACK = 8
"""A line may be this many times longer than the largest document, for escapes and other columns."""


@dataclass(frozen=True)
class SourceRecord:
    """A text, or the reason why there is none."""

    place: str
    """The file; for lines and rows followed by `#` and the byte offset or row number."""
    text: str
    reason: str = ""
    """Empty for a text; `encoding`, `JSON`, `no text`, `size` or `unreadable file` otherwise."""


def read_records(chunk: Chunk, source: Source, max_bytes: int) -> Iterator[SourceRecord]:
    """Yields every record of a chunk, in order; a bad record has a reason and does not stop the task.

    Args:
        chunk: the chunk to read.
        source: names the text column.
        max_bytes: maximum size of a document.
    """
    for file in chunk.inputs:
        try:
            for record in _records_of(file, chunk, source, max_bytes):
                yield record if record.reason else _checked(record, max_bytes)
        except Exception as error:  # Readers raise unrelated classes for damaged files.
            yield SourceRecord(file.name, "", f"unreadable file: {_line(error)}")


def _records_of(file: SourceFile, chunk: Chunk, source: Source, max_bytes: int) -> Iterator[SourceRecord]:
    if source.kind is SourceKind.text:
        yield _whole_file(file, max_bytes)
    elif file.name.endswith((".parquet", ".arrow")):
        yield from _rows(file, chunk, source.text_column)
    else:
        for offset, line in _lines(file, chunk, _SLACK * max_bytes + 65_536):
            place = f"{file.name}#{offset}"
            if line is None:
                yield SourceRecord(place, "", "size")
            elif line.strip():
                yield _from_json(place, line, source.text_column)


def _checked(record: SourceRecord, max_bytes: int) -> SourceRecord:
    try:
        size = len(record.text.encode())
    except UnicodeEncodeError:  # A lone surrogate: valid in JSON, but not in UTF-8.
        return SourceRecord(record.place, "", "encoding")
    return record if size <= max_bytes else SourceRecord(record.place, "", "size")


def _whole_file(file: SourceFile, max_bytes: int) -> SourceRecord:
    if file.bytes > max_bytes:
        return SourceRecord(file.name, "", "size")
    return _decoded(file.name, Path(file.path).read_bytes())


def _decoded(place: str, content: bytes) -> SourceRecord:
    try:
        return SourceRecord(place, content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return SourceRecord(place, "", "encoding")


def _from_json(place: str, line: bytes, column: str) -> SourceRecord:
    try:
        tree = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return SourceRecord(place, "", "encoding")
    except (ValueError, RecursionError):
        return SourceRecord(place, "", "JSON")
    text = tree.get(column) if isinstance(tree, dict) else None
    return SourceRecord(place, text) if isinstance(text, str) else SourceRecord(place, "", "no text")


def _rows(file: SourceFile, chunk: Chunk, column: str) -> Iterator[SourceRecord]:
    for first, values in _groups(file, chunk, column):
        for row, value in enumerate(values, first):
            place = f"{file.name}#{row}"
            yield _decoded(place, value) if value is not None else SourceRecord(place, "", "no text")


def _groups(file: SourceFile, chunk: Chunk, column: str) -> Iterator[tuple[int, list[bytes | None]]]:
    """Yields the first row and the text column as bytes of each row group or record batch of the chunk."""
    import pyarrow
    from pyarrow import parquet

    first = 0
    if file.name.endswith(".parquet"):
        table = parquet.ParquetFile(file.path)
        for group in range(table.num_row_groups if chunk.end == WHOLE else chunk.end):
            if group >= chunk.start:
                yield first, _as_bytes(table.read_row_group(group, [column]).column(column))
            first += table.metadata.row_group(group).num_rows
        return
    with pyarrow.memory_map(file.path) as mapped:
        for group, batch in enumerate(pyarrow.ipc.open_stream(mapped)):
            if chunk.end != WHOLE and group >= chunk.end:
                return
            if group >= chunk.start:
                yield first, _as_bytes(batch.column(column))
            first += batch.num_rows


def _as_bytes(column: Any) -> list[bytes | None]:
    import pyarrow

    binary = pyarrow.large_binary() if pyarrow.types.is_large_string(column.type) else pyarrow.binary()
    values: list[bytes | None] = column.cast(binary).to_pylist()
    return values


def _lines(file: SourceFile, chunk: Chunk, longest: int) -> Iterator[tuple[int, bytes | None]]:
    """Yields the lines that begin in the chunk, with their offsets; None for a line that is too long."""
    with _open(file) as stream:
        offset = chunk.start
        if offset:
            stream.seek(offset - 1)
            # A line that begins before the chunk belongs to the previous chunk.
            skipped, _ = _next_line(stream, longest)
            offset += skipped - 1
        while chunk.end == WHOLE or offset < chunk.end:
            size, line = _next_line(stream, longest)
            if not size:
                return
            yield offset, line
            offset += size


def _next_line(stream: IO[bytes], longest: int) -> tuple[int, bytes | None]:
    """Reads the next line; returns its size and the line, or None for a line longer than ``longest``."""
    line = stream.readline(longest)
    size = len(line)
    if size < longest or line.endswith(b"\n"):
        return size, line
    while part := stream.readline(longest):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size, None


def _open(file: SourceFile) -> IO[bytes]:
    if file.name.endswith(".gz"):
        return io.BufferedReader(gzip.open(file.path))
    if file.name.endswith(".zst"):
        import zstandard

        return io.BufferedReader(zstandard.open(file.path, "rb"))
    return Path(file.path).open("rb")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
