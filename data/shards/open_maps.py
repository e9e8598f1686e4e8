"""The memory maps of a process, over all its folders of shards: one bound, from the limit of open files.

Every map holds a file descriptor. A limit for each folder would not help: a run reads as many folders as it
has domains, and the usual limit, 1,024 files, is the process's.
"""

import errno
import mmap
import os
import resource
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from train.recipe.errors import UserError

OPEN_SHARDS = 256
"""Maximum number of open maps, however many files the process may open: it is within what a rank raises its
limit to (:mod:`train.health.descriptors`). A shard is hashed only once, so opening it again takes no time."""
SPARE_FILES = 8
"""Descriptors that must be free before a shard is opened: to hash it, fetch it, lock it and map it."""
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)

Key = tuple[int, int]
"""A folder's number, and a shard's number in it."""


class OpenMaps:
    """Memory maps by folder and shard; the least recently read are closed first."""

    def __init__(self) -> None:
        self._maps: OrderedDict[Key, mmap.mmap] = OrderedDict()
        self._folders = 0

    def new_folder(self) -> int:
        """Returns the number of another folder."""
        self._folders += 1
        return self._folders

    def get(self, key: Key) -> mmap.mmap | None:
        """Returns a shard's map if it is open, and counts it as read."""
        mapped = self._maps.get(key)
        if mapped is not None:
            self._maps.move_to_end(key)
        return mapped

    def put(self, key: Key, path: Path) -> mmap.mmap:
        """Maps a file; call :meth:`make_room` first.

        Raises:
            OSError: if the file can't be opened.
        """
        with path.open("rb") as stream:
            self._maps[key] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[key]

    def close(self, key: Key) -> None:
        """Closes a shard's map."""
        self._maps.pop(key).close()

    def close_folder(self, folder: int) -> None:
        """Closes all maps of a folder."""
        for shard in self.shards_of(folder):
            self.close((folder, shard))

    def shards_of(self, folder: int) -> list[int]:
        """The open shards of a folder."""
        return [shard for number, shard in self._maps if number == folder]

    def make_room(self) -> None:
        """Closes maps until another shard can be opened.

        Raises:
            UserError: if the process has no descriptor left without any map.
        """
        while self._maps and (len(self._maps) >= most_open() or not _has_spare_files()):
            self._maps.popitem(last=False)[1].close()
        if not self._maps and not _has_spare_files():
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            raise UserError(
                f"this process has no file left to open a shard with: its limit is {soft:,} (hard: {hard:,})",
                key="data.workers",
                remedy="raise the limit where the job starts, for example ulimit -n 4096",
            )


def most_open() -> int:
    """Returns how many shards the process may keep open: half of its limit of open files at most."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_SHARDS if soft == resource.RLIM_INFINITY else max(1, min(OPEN_SHARDS, soft // 2))


def _has_spare_files() -> bool:
    """Returns whether the process can open a few more files, which its limit does not tell."""
    opened: list[int] = []
    try:
        for _ in range(SPARE_FILES):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        if error.errno not in NO_DESCRIPTORS:
            raise
        return False
    finally:
        for descriptor in opened:
            with suppress(OSError):
                os.close(descriptor)
    return True
