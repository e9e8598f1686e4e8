"""Files: written whole or not at all, and their SHA-256."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: str | bytes | memoryview, *, sync: bool = True) -> Path:
    """Writes a file under a temporary name of this process's own, then renames it.

    A reader finds the file of before or the new one, and never a part. The folder must exist.

    Args:
        path: the file.
        content: text, in UTF-8, or bytes.
        sync: wait until the disk has the content, so that not even a power cut leaves an empty file. Without
            it, what is written often or can be made again costs no wait.

    Returns:
        The path.

    Raises:
        OSError: if the file can't be written; nothing is left of it then.
    """
    partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path


def write_json(path: Path, tree: Any, *, sync: bool = True, sort_keys: bool = False) -> Path:
    """Writes plain values as indented JSON, by :func:`write_whole`."""
    return write_whole(path, json.dumps(tree, indent=1, sort_keys=sort_keys) + "\n", sync=sync)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content.

    Raises:
        OSError: if the file can't be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
