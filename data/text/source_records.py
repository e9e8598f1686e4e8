"""The records of a chunk: texts with their places, and unreadable records with a reason."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.text.compressed import open_input
from data.text.conversations import ConversationError, Spans, Turn, turns_of
from data.text.file_listing import named
from data.text.inputs import WHOLE, Chunk, SourceFile
from data.text.licence_files import licence_of_file
from data.text.token_ids import (
    Ids,
    IdsRow,
    MegatronIndex,
    ids_of,
    mds_samples,
    open_source_tokenizer,
    spell,
)
from train.recipe.preparation import CONVERSATIONS, Source, SourceKind, TokenRows

_SLACK = 8
"""A line may be this many times longer than the largest document, for escapes and other columns."""
_MOST_ID = 1 << 31
_LONGEST_NAME = 1000
"""Characters of the name of a repository, or of a path in it."""
_KINDS = {str: "text", bool: "a truth value", type(None): "null", list: "a list", dict: "an object"}
UNREADABLE, EMPTY_FILE, NO_TEXT, BAD_JSON = "unreadable file", "empty file", "no text", "JSON"
"""Reasons of records that the reader finds, before `: ` and more words."""


@dataclass(frozen=True)
class SourceRecord:
    """A text, or the reason why there is none."""

    place: str
    """The file; for lines and rows followed by `#` and the byte offset or row number."""
    text: str
    reason: str = ""
    """Empty for a text; otherwise `encoding`, `JSON`, `no text`, `token ids`, `conversation`, `size`,
    `unreadable file` or `empty file`, some with more words after a colon."""
    size: int = 0
    """Without a text: bytes of the line, row or file, as far as they are known."""
    turns: tuple[Turn, ...] = ()
    """Of a conversation, whose words are the text."""
    spans: Spans = ()
    """Characters of a rendered conversation that are to be learnt."""
    ids: Ids | None = None
    """Token ids, which are yet to become a text."""
    licence: object = None
    """Value of the source's column of licences."""
    repository: str = ""
    """Name of the repository that it is a file of; empty if it is of none."""
    path: str = ""
    """Its path in the repository."""

    def with_columns(self, licence: object, repository: object, path: object) -> "SourceRecord":
        """Returns the record with the values of the columns of :func:`columns_of`."""
        return replace(self, licence=licence, repository=_name(repository), path=_name(path))


def read_records(chunk: Chunk, source: Source, max_bytes: int) -> Iterator[SourceRecord]:
    """Yields every record of a chunk, in order; a bad record has a reason and does not stop the task.

    Args:
        chunk: the chunk to read.
        source: names the text column.
        max_bytes: maximum size of a document.
    """
    for file in chunk.inputs:
        has_records = False
        try:
            for record in _records_of(file, chunk, source, max_bytes):
                has_records = True
                yield record if record.reason else _checked(record, max_bytes)
        except Exception as error:  # Readers raise unrelated classes for damaged files.
            # After the first record, nobody knows how much is missing.
            size = 0 if has_records else file.bytes
            yield SourceRecord(file.name, "", f"{UNREADABLE}: {_line(error)}", size)
        else:
            if not has_records and chunk.end == WHOLE:
                yield SourceRecord(file.name, "", EMPTY_FILE, file.bytes)


def columns_of(source: Source) -> tuple[str | None, str | None, str | None]:
    """The columns of a source for licence, repository and path in it; None for those that it has not."""
    of = source.repositories
    return source.licence_column, of.column if of else None, of.path_column if of else None


def _records_of(file: SourceFile, chunk: Chunk, source: Source, max_bytes: int) -> Iterator[SourceRecord]:
    if source.kind is SourceKind.text:
        yield _of_tree(_whole_file(file, max_bytes), file, source)
    elif source.tokenizer is None:
        yield from _rows_of(file, chunk, source, max_bytes)
    else:
        tokenizer, is_stream = open_source_tokenizer(source.tokenizer), source.token_rows is TokenRows.stream
        rows = (
            IdsRow(it.place, it.ids, it.reason, it.size) for it in _rows_of(file, chunk, source, max_bytes)
        )
        for document in spell(rows, tokenizer, is_stream=is_stream):
            yield SourceRecord(document.place, document.text, document.reason, document.size)


def _rows_of(file: SourceFile, chunk: Chunk, source: Source, max_bytes: int) -> Iterator[SourceRecord]:
    """Yields the rows of a chunk, with texts or token ids."""
    if source.kind is SourceKind.megatron:
        yield from _megatron_rows(file, chunk)
    elif source.kind is SourceKind.mds:
        yield from _mds_rows(file, source)
    elif file.name.endswith((".parquet", ".arrow")):
        rows_of = _parquet_rows if file.name.endswith(".parquet") else _arrow_rows
        yield from rows_of(file, chunk, source)
    else:
        for offset, size, line in _lines(file, chunk, _SLACK * max_bytes + 65_536):
            place = f"{file.name}#{offset}"
            if line is None:
                yield SourceRecord(place, "", "size", size)
            elif line.strip():
                yield _from_json(place, line, source)


def _checked(record: SourceRecord, max_bytes: int) -> SourceRecord:
    try:
        size = len(record.text.encode())
    except UnicodeEncodeError:  # A lone surrogate: valid in JSON, but not in UTF-8.
        return SourceRecord(record.place, "", "encoding", len(record.text))
    return record if size <= max_bytes else SourceRecord(record.place, "", "size", size)


def _whole_file(file: SourceFile, max_bytes: int) -> SourceRecord:
    if file.bytes > max_bytes:
        return SourceRecord(file.name, "", "size", file.bytes)
    return _decoded(file.name, Path(file.path).read_bytes())


def _of_tree(record: SourceRecord, file: SourceFile, source: Source) -> SourceRecord:
    """Returns a text file's record with its licence and its repository, where the source has them."""
    licence = (
        licence_of_file(Path(file.path), file.name.count("/"), record.text) if source.licence_files else None
    )
    folders = source.repositories.folders if source.repositories else None
    parts = file.name.split("/")
    if folders is None or len(parts) <= folders:
        return record.with_columns(licence, "", file.name)
    return record.with_columns(licence, "/".join(parts[:folders]), "/".join(parts[folders:]))


def _name(value: object) -> str:
    """A name in a record's column, without the end of a very long one; empty if there is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)[:_LONGEST_NAME]
    return value[:_LONGEST_NAME].encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def _decoded(place: str, content: bytes) -> SourceRecord:
    try:
        return SourceRecord(place, content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return SourceRecord(place, "", "encoding", len(content))


def _from_json(place: str, line: bytes, source: Source) -> SourceRecord:
    try:
        tree = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return SourceRecord(place, "", "encoding", len(line))
    except (ValueError, RecursionError):
        return SourceRecord(place, "", BAD_JSON, len(line))
    licence, *file = (None if it is None else _value_at(tree, it) for it in columns_of(source))
    if source.kind in CONVERSATIONS:
        try:
            turns = turns_of(tree, source.kind)
        except ConversationError as error:
            return SourceRecord(place, "", str(error), len(line))
        text = "\n".join(words for _, words in turns)
        return SourceRecord(place, text, turns=tuple(turns), licence=licence)
    value = _value_at(tree, source.text_column)
    if source.tokenizer is not None:
        if isinstance(value, list) and all(type(it) is int and -_MOST_ID <= it <= _MOST_ID for it in value):
            return SourceRecord(place, "", size=len(line), ids=np.array(value, np.int64))
    elif isinstance(value, str):
        return SourceRecord(place, value).with_columns(licence, *file)
    return SourceRecord(place, "", f"{NO_TEXT}: {_why_no_text(tree, source.text_column)}", len(line))


def _value_at(tree: object, column: str) -> object:
    """The value of a key, or of a path of keys with points between them; None if there is none."""
    for key in (column,) if isinstance(tree, dict) and column in tree else column.split("."):
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    return tree


def _why_no_text(tree: object, column: str) -> str:
    if not isinstance(tree, dict):
        return f"{_KINDS.get(type(tree), 'a number')} instead of an object"
    first, *rest = (column,) if column in tree else column.split(".")
    if first in tree and rest and isinstance(tree[first], dict):
        return f"in {first} {_why_no_text(tree[first], '.'.join(rest))}"
    if first in tree:
        return f"{first} is {_KINDS.get(type(tree[first]), 'a number')}"
    keys = [key[:40].encode("ascii", "backslashreplace").decode() for key in tree]
    return f"no {column!r}; it has {named(keys) or 'nothing'}"


def _megatron_rows(file: SourceFile, chunk: Chunk) -> Iterator[SourceRecord]:
    index = MegatronIndex.read(Path(file.path), file.modified_ns)
    end = index.offsets.size - 1 if chunk.end == WHOLE else chunk.end
    for number, ids in index.rows(Path(file.path), chunk.start, end):
        yield SourceRecord(f"{file.name}#{number}", "", size=ids.nbytes, ids=ids)


def _mds_rows(file: SourceFile, source: Source) -> Iterator[SourceRecord]:
    if file.name.endswith(".mds"):
        content: Any = np.memmap(file.path, np.uint8, "r")
    else:
        with open_input(Path(file.path)) as stream:
            content = stream.read()
    for number, encoding, value, others in mds_samples(content, source.text_column, columns_of(source)):
        place = f"{file.name}#{number}"
        if source.tokenizer is not None:
            yield SourceRecord(place, "", size=len(value), ids=ids_of(encoding, value))
        elif encoding in ("str", "bytes"):
            yield _decoded(place, value).with_columns(*others)
        else:
            yield SourceRecord(place, "", f"{NO_TEXT}: {source.text_column} is {encoding}", len(value))


def _parquet_rows(file: SourceFile, chunk: Chunk, source: Source) -> Iterator[SourceRecord]:
    """Yields the rows of the chunk's row groups; a damaged group loses its own rows only."""
    from pyarrow import parquet

    first = 0
    with parquet.ParquetFile(file.path) as table:
        for group in range(table.num_row_groups if chunk.end == WHOLE else chunk.end):
            about = table.metadata.row_group(group)
            if group >= chunk.start:
                place, rows = f"{file.name}#{first}", f"{about.num_rows:,} rows"
                why = _why_no_column(table.schema_arrow, source)
                try:
                    if why:
                        yield SourceRecord(place, "", f"{NO_TEXT}: {rows}: {why}", about.total_byte_size)
                    else:
                        wanted = [it for it in (source.text_column, *columns_of(source)) if it]
                        rows_of_group = table.read_row_group(group, wanted)
                        yield from _values_of(file, first, rows_of_group, source)
                except Exception as error:  # Readers raise unrelated classes for damaged files.
                    what = f"{UNREADABLE}: {rows}: {_line(error)}"
                    yield SourceRecord(place, "", what, about.total_byte_size)
            first += about.num_rows


def _arrow_rows(file: SourceFile, chunk: Chunk, source: Source) -> Iterator[SourceRecord]:
    import pyarrow

    first = 0
    with pyarrow.memory_map(file.path) as mapped:
        stream = pyarrow.ipc.open_stream(mapped)
        why = _why_no_column(stream.schema, source)
        for group, batch in enumerate(stream):
            if chunk.end != WHOLE and group >= chunk.end:
                return
            if group >= chunk.start:
                if why:
                    what = f"{NO_TEXT}: {batch.num_rows:,} rows: {why}"
                    yield SourceRecord(f"{file.name}#{first}", "", what, batch.nbytes)
                else:
                    yield from _values_of(file, first, batch, source)
            first += batch.num_rows


def _values_of(file: SourceFile, first: int, table: Any, source: Source) -> Iterator[SourceRecord]:
    """Yields the rows of a table or record batch whose column may have texts, or token ids."""
    import pyarrow

    column = _column(table, source.text_column)
    if source.tokenizer is None:
        values: list[Any] = _as_bytes(column)
    else:
        values = column.cast(pyarrow.list_(pyarrow.int64())).to_pylist()
    others: list[Iterable[Any]] = [
        _column(table, it).to_pylist() if it and _has(table.schema, it) else itertools.repeat(None)
        for it in columns_of(source)
    ]
    for row, (value, beside) in enumerate(zip(values, zip(*others, strict=False), strict=False), first):
        place = f"{file.name}#{row}"
        if value is None or (source.tokenizer is not None and None in value):
            yield SourceRecord(place, "", f"{NO_TEXT}: null")
        elif source.tokenizer is None:
            yield _decoded(place, value).with_columns(*beside)
        else:
            yield SourceRecord(place, "", size=8 * len(value), ids=np.array(value, np.int64))


def _column(table: Any, column: str) -> Any:
    """A column of a table or record batch, which may be within structures."""
    from pyarrow import compute

    name, *rest = _path(table.schema.names, column)
    values = table.column(name)
    for part in rest:
        values = compute.struct_field(values, part)
    return values


def _has(schema: Any, column: str) -> bool:
    """Returns whether a schema has a column, or a structure with it."""
    from pyarrow import types

    names, fields = list(schema.names), schema
    for name in _path(names, column):
        if name not in names:
            return False
        kind = fields.field(name).type
        fields, names = kind, [it.name for it in kind] if types.is_struct(kind) else []
    return True


def _path(names: Sequence[str], column: str) -> list[str]:
    """The name of a column, or names of structures and of a column in them."""
    return [column] if column in names else column.split(".")


def _why_no_column(schema: Any, source: Source) -> str:
    """Why rows of a schema have no text, or no token ids; empty if they may have."""
    from pyarrow import types

    fields, kind, names = schema, schema, list(schema.names)
    for name in _path(names, source.text_column):
        if name not in names:
            return f"no {source.text_column!r}; they have {named(list(schema.names)) or 'nothing'}"
        kind = fields.field(name).type
        fields, names = kind, [it.name for it in kind] if types.is_struct(kind) else []
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if source.tokenizer is not None:
        is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        return "" if is_list and types.is_integer(kind.value_type) else f"{source.text_column} is {kind}"
    tests = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return "" if any(is_kind(kind) for is_kind in tests) else f"{source.text_column} is {kind}"


def _as_bytes(column: Any) -> list[bytes | None]:
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    binary = pyarrow.large_binary() if pyarrow.types.is_large_string(column.type) else pyarrow.binary()
    values: list[bytes | None] = column.cast(binary).to_pylist()
    return values


def _lines(file: SourceFile, chunk: Chunk, longest: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Yields the lines that begin in the chunk, with offset and size; None for a line that is too long."""
    with open_input(Path(file.path)) as stream:
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
            yield offset, size, line
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


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
