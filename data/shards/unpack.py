"""Unpacks compressed shards, but never beyond the size that their index states: few bytes may mean many."""

import io
import zlib
from bz2 import BZ2Decompressor
from typing import Any

_GZIP = 31
"""Window bits by which zlib reads and checks gzip's members."""


def unpack(compression: str, content: bytes, most_bytes: int) -> bytes:
    """Unpacks the content of a compressed shard.

    Args:
        compression: in Streaming's notation, for example ``zstd:3``.
        content: the compressed file.
        most_bytes: bytes of the shard, as its index states.

    Raises:
        ValueError: if it holds more, or ``compression`` is none that Streaming knows.
        Exception: if it is damaged; each kind of compression has its own exceptions.
    """
    kind = compression.partition(":")[0]
    if kind not in _KINDS:
        raise ValueError(f"{compression} is no known compression")
    found = _KINDS[kind](content, most_bytes + 1)
    if len(found) > most_bytes:
        raise ValueError(f"holds more than the {most_bytes} bytes that the index states")
    return found


def _zstd(content: bytes, most: int) -> bytes:
    import zstandard

    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content), read_across_frames=True) as stream:
        return bytes(stream.read(most))


def _gz(content: bytes, most: int) -> bytes:
    parts, left = [], content
    while left and most > 0:
        member = zlib.decompressobj(wbits=_GZIP)
        parts.append(member.decompress(left, most))
        most -= len(parts[-1])
        if not member.eof and most > 0:
            raise EOFError("the compressed file ends too early")
        left = member.unused_data
    return b"".join(parts)


def _bz2(content: bytes, most: int) -> bytes:
    parts, left = [], content
    while left and most > 0:
        stream = BZ2Decompressor()
        parts.append(stream.decompress(left, most))
        most -= len(parts[-1])
        if not stream.eof and most > 0:
            raise EOFError("the compressed file ends too early")
        left = stream.unused_data
    return b"".join(parts)


def _br(content: bytes, most: int) -> bytes:
    import brotli

    stream: Any = brotli.Decompressor()
    found = stream.process(content, output_buffer_limit=most)
    while len(found) < most and not stream.is_finished():
        more = stream.process(b"", output_buffer_limit=most - len(found))
        if not more:
            raise EOFError("the compressed file ends too early")
        found += more
    return bytes(found)


def _snappy(content: bytes, most: int) -> bytes:
    import snappy

    stated = shift = 0
    for byte in content[:5]:  # The size comes first, seven bits a byte, the lowest first.
        stated |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    if stated >= most:
        raise ValueError(f"states {stated} bytes, more than the index does")
    return bytes(snappy.uncompress(content))


_KINDS = {"zstd": _zstd, "gz": _gz, "bz2": _bz2, "br": _br, "snappy": _snappy}
