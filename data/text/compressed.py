"""Compressed files, read as a stream whatever their size."""

import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

_READ_BYTES = 4096
"""Compressed bytes unpacked at a time: few, since each may unpack to 32 thousand."""
_GZIP = 31
"""Window bits by which zlib reads and checks gzip's members."""
_MOST_WINDOW_BYTES = 1 << 31
"""Window of a Zstandard file, as `zstd --long=31` makes it."""


def open_input(path: Path) -> IO[bytes]:
    """Opens a file for reading, unpacked if its name ends in .gz, .zst or .zstd.

    Reading raises an error if a packed file is damaged or ends too early.
    """
    if path.name.endswith(".gz"):
        return io.BufferedReader(_Unpacked(path.open("rb"), lambda: zlib.decompressobj(wbits=_GZIP), b"\0"))
    if path.name.endswith((".zst", ".zstd")):
        import zstandard

        unpacker = zstandard.ZstdDecompressor(max_window_size=_MOST_WINDOW_BYTES)
        return io.BufferedReader(_Unpacked(path.open("rb"), unpacker.decompressobj))
    return path.open("rb")


class _Unpacked(io.RawIOBase):
    """Unpacks a file frame by frame (gzip calls them members).

    Unlike python-zstandard's own reader, it raises an error if the file ends inside a frame, and unlike
    Python's gzip, it first gives all text before the damage.

    Args:
        source: the packed file.
        new_frame: makes a decompressor of one frame.
        padding: bytes between frames that mean nothing.
    """

    def __init__(self, source: IO[bytes], new_frame: Callable[[], Any], padding: bytes = b"") -> None:
        self._source, self._new_frame, self._padding = source, new_frame, padding
        self._frame: Any = None
        self._packed, self._text = b"", memoryview(b"")

    def readable(self) -> bool:
        """Returns true."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer as far as text is at hand; returns the number of bytes, 0 at the end.

        Raises:
            EOFError: if the file ends inside a frame.
        """
        while not self._text:
            packed = self._packed or self._source.read(_READ_BYTES)
            if not packed:
                if self._frame is not None:
                    raise EOFError("Compressed file ended inside a frame")
                return 0
            if self._frame is None:
                packed = packed.lstrip(self._padding)
                if not packed:
                    self._packed = b""
                    continue
                self._frame = self._new_frame()
            self._text, self._packed = memoryview(self._frame.decompress(packed)), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size

    def close(self) -> None:
        """Closes the file."""
        self._source.close()
        super().close()
