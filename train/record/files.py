"""Files: atomic writes and SHA-256."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


def write_whole(path: Path, content: str | bytes | memoryview, *, sync: bool = True) -> Path:
    """Writes a file atomically: under a temporary name of this process, then renamed.

    A reader sees the old file or the new one, never a partial one. The folder must exist.

    Args:
        path: the file.
        content: text, in UTF-8, or bytes.
        sync: wait until the content is on disk, so that not even a power cut leaves an empty file. False
            saves the wait for files that are written often or can be recreated.

    Returns:
        The path.

    Raises:
        OSError: if the file can't be written; no partial file remains.
    """
    with whole_file(path, sync=sync) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
    return path


@contextmanager
def whole_file(path: Path, *, sync: bool = False) -> Iterator[IO[bytes]]:
    """Opens a file that is written bit by bit and takes its place at the end, as :func:`write_whole` does.

    Args:
        path: the file.
        sync: wait until the content is on disk.

    Raises:
        OSError: if the file can't be written; after any error nothing remains of it.
    """
    partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            yield stream
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        partial.replace(path)
        if sync:
            _sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Waits until a folder's names are on disk, where its file system can say so."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, tree: Any, *, sync: bool = True, sort_keys: bool = False) -> Path:
    """Writes plain values as indented JSON with :func:`write_whole`."""
    return write_whole(path, json.dumps(tree, indent=1, sort_keys=sort_keys) + "\n", sync=sync)


def sha256(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file's content.

    Raises:
        OSError: if the file can't be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
