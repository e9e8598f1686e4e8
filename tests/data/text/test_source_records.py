"""Nothing of a file disappears: damaged, cut off and empty files leave a rejected record, in every format."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from data.text.inputs import Chunk, cut, list_inputs
from data.text.source_records import SourceRecord, read_records
from train.recipe.preparation import Source, SourceKind

TEXTS = [f"text number {n}: " + " ".join(f"w{n * k}" for k in range(40)) for n in range(400)]
LINES = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]


def read(path: Path, kind: SourceKind = SourceKind.jsonl, chunk_bytes: int = 1 << 20) -> list[SourceRecord]:
    source = Source(domain="d", kind=kind, path=str(path), dataset="t", version="1", origin="o", licence="l")
    chunks: list[Chunk] = cut([list_inputs(0, source, None)], [kind], chunk_bytes)
    return [record for chunk in chunks for record in read_records(chunk, source, 1_000_000)]


def texts(records: list[SourceRecord]) -> list[str]:
    return [record.text for record in records if not record.reason]


def reasons(records: list[SourceRecord]) -> list[str]:
    return [record.reason for record in records if record.reason]


def zstd(lines: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(lines)


Pack = Callable[[bytes], bytes]
PACKED = pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".zst", zstd)])


@PACKED
def test_frames_are_read_one_after_the_other(tmp_path: Path, suffix: str, pack: Pack):
    frames = [pack(b"".join(LINES[at : at + 100])) for at in range(0, 400, 100)]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(b"".join(frames))
    records = read(tmp_path)
    assert texts(records) == TEXTS and not reasons(records)


@PACKED
@pytest.mark.parametrize("cut_at", [-1, -3, -9, 0.9, 0.5, 1, 3, 7, 20])
def test_a_frame_that_is_cut_off_is_named(tmp_path: Path, suffix: str, pack: Pack, cut_at: float):
    first, second = pack(b"".join(LINES[:100])), pack(b"".join(LINES[100:]))
    end = int(cut_at * len(second)) if 0 < cut_at < 1 else int(cut_at)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(first + second[:end])
    records = read(tmp_path)
    (reason,) = reasons(records)
    assert reason.startswith("unreadable file: ") and records[-1].reason == reason
    # What came before the cut is kept.
    kept = texts(records)
    assert kept == TEXTS[: len(kept)] and len(kept) >= (300 if (suffix, cut_at) == (".gz", 0.9) else 100)


@PACKED
def test_a_damaged_block_is_named(tmp_path: Path, suffix: str, pack: Pack):
    content = bytearray(pack(b"".join(LINES)))
    for at in range(len(content) // 2, len(content) // 2 + 20):
        content[at] ^= 0x55
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(b"".join(LINES[:50])) + content)
    records = read(tmp_path)
    assert any(reason.startswith("unreadable file: ") for reason in reasons(records))
    assert texts(records)[:50] == TEXTS[:50]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "a.txt"])
def test_an_empty_file_is_named(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"")
    kinds = {"parquet": SourceKind.parquet, "arrow": SourceKind.hf, "txt": SourceKind.text}
    records = read(tmp_path, kinds.get(name[2:], SourceKind.jsonl))
    if name == "a.txt":  # A document, of which the next step says that it is empty.
        assert texts(records) == [""]
    else:
        (reason,) = reasons(records)
        assert reason.partition(": ")[0] in ("empty file", "unreadable file")


def test_tables_without_rows_and_packed_files_without_lines_are_named(tmp_path: Path):
    table = pa.table({"text": pa.array([], pa.string())})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(tmp_path / "b.arrow", table.schema):
        pass
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b"\n\n"))
    assert reasons(read(tmp_path, SourceKind.hf)) == ["empty file"] * 3


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30])
def test_a_damaged_row_group_loses_its_own_rows_only(tmp_path: Path, chunk_bytes: int):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": TEXTS}), path, row_group_size=100, use_dictionary=False)
    column = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    records = read(path, SourceKind.parquet, chunk_bytes)
    (lost,) = [record for record in records if record.reason]
    assert lost.place == "a.parquet#100" and lost.reason.startswith("unreadable file: 100 rows: ")
    assert texts(records) == TEXTS[:100] + TEXTS[200:]


def test_the_columns_that_exist_are_named(tmp_path: Path):
    lines = [
        {"content": "x", "id": 1},
        {"text": None},
        {"text": ["x"]},
        {},
        [1],
        7,
        {"a": 1, "b": 2, "c": 3, "d": 4},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert reasons(read(tmp_path / "a.jsonl")) == [
        "no text: no 'text'; it has content, id",
        "no text: text is null",
        "no text: text is a list",
        "no text: no 'text'; it has nothing",
        "no text: a list instead of an object",
        "no text: a number instead of an object",
        "no text: no 'text'; it has a, b, c and 1 more",
    ]
    table = pa.table({"content": ["x", "y", "z"], "text": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "b.parquet", row_group_size=2)
    assert reasons(read(tmp_path / "b.parquet", SourceKind.parquet)) == [
        "no text: 2 rows: text is int64",
        "no text: 1 rows: text is int64",
    ]
    table = table.select(["content"])
    with pa.ipc.new_stream(tmp_path / "c.arrow", table.schema) as stream:
        stream.write_table(table)
    assert reasons(read(tmp_path / "c.arrow", SourceKind.hf)) == [
        "no text: 3 rows: no 'text'; they have content"
    ]


def test_categories_are_text(tmp_path: Path):
    table = pa.table({"text": pa.array(["x", "y", "x", None]).dictionary_encode()})
    parquet.write_table(table, tmp_path / "a.parquet")
    records = read(tmp_path, SourceKind.parquet)
    assert texts(records) == ["x", "y", "x"] and reasons(records) == ["no text: null"]
