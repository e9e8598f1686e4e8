"""Token ids and shards of others: what comes out is the text that went in, and damage is named."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from streaming import MDSWriter

from data.text.bpe import train_bpe
from data.text.inputs import cut, list_inputs
from data.text.source_keys import check_sources
from data.text.source_records import SourceRecord, read_records
from data.tokenizer import TokenizerHandle
from data.write_shards import build_shards
from train.recipe.errors import UserError
from train.recipe.preparation import Source, SourceKind, TokenRows
from train.recipe.schema import Data, Recipe, Tokenizer, TokenizerKind

TEXTS = [f"text number {n}: " + " ".join(f"w{n * k}ß中" for k in range(n % 9 + 1)) + "\n" for n in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenizerHandle, str]:
    """A tokenizer, and its folder."""
    handle = train_bpe(Tokenizer(TokenizerKind.bpe, 300), iter(TEXTS))
    handle.to_hugging_face(folder := tmp_path_factory.mktemp("tokenizer"))
    return handle, str(folder)


@pytest.fixture(scope="module")
def ids(tokenizer: tuple[TokenizerHandle, str]) -> list[list[int]]:
    return [it.tolist() for it in tokenizer[0].encode_documents(TEXTS)]


def source_of(path: Path, kind: SourceKind, **keys: Any) -> Source:
    about = {"dataset": "t", "version": "1", "origin": "o", "licence": "l"}
    return Source(domain="d", kind=kind, path=str(path), **(about | keys))


def read(source: Source, chunk_bytes: int = 1 << 20) -> list[SourceRecord]:
    whole = [0] if source.token_rows is TokenRows.stream else []
    chunks = cut([list_inputs(0, source, None)], [source.kind], chunk_bytes, whole=whole)
    return [record for chunk in chunks for record in read_records(chunk, source, 1_000_000)]


def texts(records: list[SourceRecord]) -> list[str]:
    assert all(record.text or record.reason for record in records)
    return [record.text for record in records if not record.reason]


def reasons(records: list[SourceRecord]) -> list[str]:
    return [record.reason for record in records if record.reason]


def stream_of(ids: list[list[int]], eos: int, size: int) -> list[np.ndarray[Any, Any]]:
    """Sequences of LLM Foundry's converter: documents end to end, the rest left out."""
    tokens = [number for document in ids for number in [*document, eos]]
    return [np.array(tokens[at : at + size]) for at in range(0, len(tokens) - size + 1, size)]


@pytest.mark.parametrize("compression", [None, "zstd:3", "gz"])
def test_text_of_streaming_is_read(tmp_path: Path, compression: str | None) -> None:
    columns = {"id": "int", "text": "str", "more": "json"}
    with MDSWriter(out=str(tmp_path), columns=columns, size_limit=2000, compression=compression) as out:
        for number, text in enumerate(TEXTS):
            out.write({"id": number, "text": text, "more": {"a": [1]}})
    assert len(list(tmp_path.glob("shard.*"))) > 1
    assert texts(read(source_of(tmp_path, SourceKind.mds))) == TEXTS
    (first, *_) = reasons(read(source_of(tmp_path, SourceKind.mds, text_column="data")))
    assert first.endswith("no column 'data'; it has id, more, text")
    assert (
        reasons(read(source_of(tmp_path, SourceKind.mds, text_column="more")))[0] == "no text: more is json"
    )


def test_a_shard_and_its_compressed_form_are_read_once(tmp_path: Path) -> None:
    with MDSWriter(out=(str(tmp_path)), columns={"text": "str"}, compression="zstd", keep_local=True) as out:
        for text in TEXTS:
            out.write({"text": text})
    (packed,) = tmp_path.glob("*.zstd")
    import zstandard

    packed.with_suffix("").write_bytes(zstandard.ZstdDecompressor().decompress(packed.read_bytes()))
    assert texts(read(source_of(tmp_path, SourceKind.mds))) == TEXTS


@pytest.mark.parametrize(
    "column", ["bytes", "ndarray", "ndarray:int32", "ndarray:int32:16", "ndarray:uint16:16"]
)
def test_streams_of_llm_foundry_become_documents_again(
    tmp_path: Path, tokenizer: tuple[TokenizerHandle, str], ids: list[list[int]], column: str
) -> None:
    handle, folder = tokenizer
    rows = stream_of(ids, handle.eos_id, 16)
    dtype = column.split(":")[1] if ":" in column else "int64"
    with MDSWriter(out=str(tmp_path), columns={"tokens": column}) as out:
        for row in rows:
            out.write({"tokens": row.tobytes() if column == "bytes" else row.astype(dtype)})
    keys: dict[str, Any] = {"text_column": "tokens", "tokenizer": folder}
    found = texts(read(source_of(tmp_path, SourceKind.mds, token_rows=TokenRows.stream, **keys)))
    # The converter leaves the last tokens out, so the last document may be cut.
    whole = len(found) - 1
    assert (
        whole >= len(TEXTS) - 2 and found[:whole] == TEXTS[:whole] and TEXTS[whole].startswith(found[-1][:-1])
    )
    # Without it, a row's end would end a document.
    assert len(texts(read(source_of(tmp_path, SourceKind.mds, **keys)))) > len(TEXTS)


def test_a_cut_or_damaged_shard_is_named(tmp_path: Path) -> None:
    with MDSWriter(out=str(tmp_path), columns={"text": "str"}) as out:
        for text in TEXTS:
            out.write({"text": text})
    (shard,) = tmp_path.glob("*.mds")
    content = shard.read_bytes()
    for broken in (content[:-3], content[:100], content[:3], b"", b"\xff" * 50):
        shard.write_bytes(broken)
        (reason,) = reasons(read(source_of(tmp_path, SourceKind.mds)))
        assert reason.startswith(("unreadable file: ", "empty file"))


def write_megatron(
    path: Path, documents: list[list[list[int]]], dtype: str, code: int, *, begins_at_0: bool = True
) -> None:
    """Writes the format of `megatron/core/datasets/indexed_dataset.py`; a document has sequences."""
    sequences = [np.array(sequence, dtype) for document in documents for sequence in document]
    sizes = [sequence.size for sequence in sequences]
    pointers = np.cumsum([0, *(sequence.nbytes for sequence in sequences)])[:-1]
    ends = np.cumsum([0, *(len(document) for document in documents)])[0 if begins_at_0 else 1 :]
    path.with_suffix(".bin").write_bytes(b"".join(sequence.tobytes() for sequence in sequences))
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sequences), len(ends))
        + np.array(sizes, np.int32).tobytes()
        + pointers.astype(np.int64).tobytes()
        + ends.astype(np.int64).tobytes()
    )


@pytest.mark.parametrize(("dtype", "code"), [("u2", 8), ("i4", 4), ("i8", 5)])
@pytest.mark.parametrize("chunk_bytes", [1, 500, 1 << 20])
def test_megatrons_files_are_read(
    tmp_path: Path,
    tokenizer: tuple[TokenizerHandle, str],
    ids: list[list[int]],
    dtype: str,
    code: int,
    chunk_bytes: int,
) -> None:
    handle, folder = tokenizer
    # As sentences, of which some documents have several; with --append-eod.
    documents = [[it[:3], [*it[3:], handle.eos_id]] if n % 2 else [it] for n, it in enumerate(ids)]
    write_megatron(tmp_path / "a", documents, dtype, code)
    write_megatron(tmp_path / "b", documents, dtype, code, begins_at_0=False)
    source = source_of(tmp_path, SourceKind.megatron, tokenizer=folder)
    records = read(source, chunk_bytes)
    assert texts(records) == TEXTS + TEXTS
    assert [records[0].place, records[-1].place] == ["a.bin#0", "b.bin#59"]
    (tmp_path / "b.bin").write_bytes((tmp_path / "b.bin").read_bytes()[:-3])
    found = read(source, chunk_bytes)
    assert texts(found) == TEXTS
    assert reasons(found) == ["unreadable file: ValueError: does not fit b.bin"]
    (tmp_path / "a.idx").unlink()
    with pytest.raises(UserError, match=r"data.sources\[0\].path: a.bin has no .idx"):
        read(source)


@pytest.mark.parametrize("form", ["parquet", "arrow", "jsonl"])
def test_columns_of_ids_are_read(
    tmp_path: Path, tokenizer: tuple[TokenizerHandle, str], ids: list[list[int]], form: str
) -> None:
    handle, folder = tokenizer
    rows: list[Any] = [
        *ids,
        None,
        [299, 300],
        [-1],
        [*ids[0], handle.eos_id, *ids[1], handle.pad_id, handle.pad_id],
    ]
    if form == "jsonl":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"input_ids": it}) + "\n" for it in rows))
    elif form == "parquet":
        parquet.write_table(pa.table({"input_ids": rows}), tmp_path / "a.parquet", row_group_size=7)
    else:
        table = pa.table({"input_ids": pa.array(rows, pa.large_list(pa.int32()))})
        with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as out:
            out.write_table(table)
    found = read(source_of(tmp_path, SourceKind.hf, text_column="input_ids", tokenizer=folder), 400)
    assert texts(found) == [*TEXTS, TEXTS[0], TEXTS[1]]
    null = "no text: input_ids is null" if form == "jsonl" else "no text: null"
    assert reasons(found) == [
        null,
        "token ids: 300 is no id of a tokenizer with 300",
        "token ids: -1 is no id of a tokenizer with 300",
    ]
    assert [it.place.partition("#")[2].partition(".")[2] for it in found[-2:]] == ["0", "1"]
    other = read(source_of(tmp_path, SourceKind.hf, text_column="ids", tokenizer=folder))
    assert all("no 'ids'; " in reason for reason in reasons(other)) and not texts(other)


@pytest.mark.parametrize("form", ["parquet", "arrow", "jsonl"])
def test_a_column_within_another_is_read(tmp_path: Path, form: str) -> None:
    rows: list[Any] = [{"data": {"text": text, "id": n}, "x.y": f"{n}"} for n, text in enumerate(TEXTS)]
    rows += [{"data": None, "x.y": "z"}, {"data": {"text": None, "id": 1}, "x.y": "z"}]
    if form == "jsonl":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(it) + "\n" for it in rows))
    elif form == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    else:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as out:
            out.write_table(table)
    found = read(source_of(tmp_path, SourceKind.hf, text_column="data.text"), 400)
    assert texts(found) == TEXTS and len(reasons(found)) == 2
    # A name with a point in it is a name.
    assert texts(read(source_of(tmp_path, SourceKind.hf, text_column="x.y")))[:2] == ["0", "1"]
    for column in ("data.words", "data.text.more", "data"):
        assert not texts(read(source_of(tmp_path, SourceKind.hf, text_column=column)))


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: tuple[TokenizerHandle, str]) -> Callable[[Source], Recipe]:
    """Makes a recipe of a source, with the tokenizer."""

    def made(source: Source) -> Recipe:
        data = Data(shards=str(tmp_path / "shards"), domains={"d": 1.0}, sequence_tokens=32, sources=[source])
        made_by = Tokenizer(TokenizerKind.hf, path=tokenizer[1])
        return replace(Recipe(tokenizer=made_by, data=data), model=replace(Recipe().model, vocab_size=300))

    return made


def test_shards_are_made_of_them_with_a_manifest(
    tmp_path: Path,
    recipe: Callable[[Source], Recipe],
    tokenizer: tuple[TokenizerHandle, str],
    ids: list[list[int]],
) -> None:
    """The same tokenizer gives the tokens back: as many, and the same documents in the list."""
    (tmp_path / "in").mkdir()
    write_megatron(tmp_path / "in" / "a", [[it] for it in ids], "u2", 8)
    manifest = build_shards(recipe(source_of(tmp_path / "in", SourceKind.megatron, tokenizer=tokenizer[1])))
    splits = manifest.domains["d"].splits.values()
    assert sum(split.documents for split in splits) == len(TEXTS)
    assert sum(split.tokens for split in splits) == sum(len(it) + 1 for it in ids)
    assert sum(split.text_bytes for split in splits) == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize(
    ("kind", "keys", "expected"),
    [
        ("megatron", {}, "data.sources[0].tokenizer: is null, but kind megatron has token ids"),
        (
            "jsonl",
            {"token_rows": TokenRows.stream},
            "data.sources[0].token_rows: is stream, but the source has text",
        ),
        (
            "chat",
            {"tokenizer": "cl100k_base"},
            "data.sources[0].tokenizer: is set, but kind chat has no token ids",
        ),
        (
            "mds",
            {"tokenizer": "/nowhere"},
            "data.sources[0].tokenizer: no /nowhere; name cl100k_base, a Hugging",
        ),
    ],
)
def test_keys_that_contradict_are_refused(
    recipe: Callable[[Source], Recipe], kind: str, keys: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_sources(recipe(source_of(Path("in"), SourceKind(kind), **keys)))
    assert str(caught.value).startswith(expected)
