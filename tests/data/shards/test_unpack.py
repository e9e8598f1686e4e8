"""Compressed shards unpack to what was packed, and never to more than their index states."""

import bz2
import gzip
import io
import resource

import brotli
import pytest
import snappy
import zstandard
from streaming.base.compression import compress

from data.shards.unpack import unpack

KINDS = ("zstd:3", "gz:6", "bz2:1", "br:4", "snappy")
BOMB_BYTES = 1 << 30
MOST_KIB = 1 << 18


@pytest.mark.parametrize("kind", KINDS)
def test_what_streaming_packs_is_unpacked(kind: str) -> None:
    content = bytes(range(256)) * 999
    packed = compress(kind, content)
    assert unpack(kind, packed, len(content)) == content
    assert unpack(kind, packed, len(content) + 9) == content
    with pytest.raises(ValueError, match=r"more than the"):
        unpack(kind, packed, len(content) - 1)
    try:
        assert unpack(kind, packed[: len(packed) // 2], len(content)) != content
    except Exception as error:  # Each kind has its own.
        assert not isinstance(error, MemoryError | AssertionError)


@pytest.mark.parametrize("pack", [zstandard.compress, gzip.compress, bz2.compress])
def test_parts_that_were_packed_one_after_the_other(pack) -> None:  # type: ignore[no-untyped-def]
    kind = {zstandard.compress: "zstd", gzip.compress: "gz", bz2.compress: "bz2"}[pack]
    assert unpack(kind, pack(b"one") + pack(b"two"), 6) == b"onetwo"


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="lzma is no known compression"):
        unpack("lzma", b"", 1)


def bomb(kind: str) -> bytes:
    """Packs a gigabyte of zeros, piece by piece."""
    piece = bytes(1 << 20)
    if kind == "snappy":  # Nothing but the size that it states: snappy makes room for it at once.
        return b"\xff\xff\xff\xff\x0f" + snappy.compress(b"x" * 99)[1:]
    if kind == "zstd":
        out = io.BytesIO()
        with zstandard.ZstdCompressor().stream_writer(out, closefd=False) as stream:
            for _ in range(BOMB_BYTES >> 20):
                stream.write(piece)
        return out.getvalue()
    if kind in ("gz", "bz2"):
        part = {"gz": gzip.compress, "bz2": bz2.compress}[kind](bytes(1 << 24))
        return part * (BOMB_BYTES >> 24)
    packer = brotli.Compressor(quality=1)
    return b"".join([*(packer.process(piece) for _ in range(BOMB_BYTES >> 20)), packer.finish()])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zstd", "gz", "bz2", "br", "snappy"])
def test_a_bomb_takes_no_memory(kind: str) -> None:
    packed = bomb(kind)
    assert len(packed) < BOMB_BYTES // 200
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"more than the (5000 bytes that the )?index"):
        unpack(kind, packed, 5000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KIB
