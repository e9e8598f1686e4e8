"""A bounded cache on the node's disk for shards in an object store.

Streaming's downloaders access the store: ``s3://``, ``gs://``, ``azure://``, ``hf://``, ``dbfs:/Volumes``, a
path and others. This module adds reliability: every file's SHA-256 is checked before the file gets its final
name, failed and stalled downloads are retried with growing pauses, and if the disk or the cache is full, the
least recently read shards are evicted. Processes of a node share the cache: one of them fetches a file while
the others wait for it.
"""

import errno
import fcntl
import os
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.shards.index import PackedFile, ShardFile, file_mismatch
from data.shards.manifest import MANIFEST_FILE, Manifest, read_manifest
from data.shards.unpack import unpack
from train.recipe.errors import UserError
from train.recipe.schema import Recipe
from train.record import log

logger = log.get_logger(__name__)

if TYPE_CHECKING:
    from streaming.base.storage import CloudDownloader

LOCKS_FOLDER = ".locks"
PARTIAL = ".partial"
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
ABSENT = {"404", "NoSuchKey", "NoSuchBucket"}
REFUSED = {"403", "AccessDenied"}
"""Answers of a store that are not retried, like those in ABSENT."""


class AbsentError(UserError):
    """The store answered that it has no such file: not retried."""


@dataclass(frozen=True)
class Patience:
    """Retry policy for a store that fails."""

    attempts: int = 7
    first_pause_seconds: float = 0.5
    """Doubled after each failure, up to ``longest_pause_seconds``. The pause is drawn from the upper half, so
    that the nodes of a job don't all retry at once."""
    longest_pause_seconds: float = 30.0
    stall_seconds: float = 30.0
    """A connection that sends nothing for this long counts as failed."""

    def pause_seconds(self, failures: int) -> float:
        """Draws the pause after a number of failures, from 1."""
        longest = min(self.longest_pause_seconds, self.first_pause_seconds * 2 ** (failures - 1))
        # A separate generator: a failing store must not affect training's random-number state.
        return random.SystemRandom().uniform(longest / 2, longest)


class ShardCache:
    """A folder of shards that is filled from a store as it is read.

    Args:
        root: the folder on this node; file names are those of the store.
        remote: address of the folder of shards in the store.
        limit_bytes: bytes of shards to keep, exceeded at most by what other processes are fetching.
            None: as much as the disk holds.
        patience: retry policy.
    """

    def __init__(
        self, root: Path, remote: str, limit_bytes: int | None = None, patience: Patience | None = None
    ) -> None:
        self.root, self.remote, self.limit_bytes = root, remote.rstrip("/"), limit_bytes
        self.patience = patience or Patience()
        self._client: tuple[int, CloudDownloader] | None = None

    def fetch_manifest(self) -> Manifest:
        """Fetches the store's manifest into the cache; domains may have been added to it since the last time.

        Raises:
            UserError: if the cache holds other shards, or the store has none.
        """
        path = self.root / MANIFEST_FILE
        with self._locked(path):
            fresh = self._download(path)
            manifest = read_manifest(self.root, fresh.name)
            before = read_manifest(self.root) if path.is_file() else manifest
            if not before.domains.items() <= manifest.domains.items():
                fresh.unlink()
                raise UserError(
                    f"{self.root} caches other shards ({before.digest[:12]}) than {self.remote} holds "
                    f"({manifest.digest[:12]})",
                    key="data.remote",
                    remedy="give another folder as data.shards, or correct the address",
                )
            fresh.replace(path)
        return manifest

    def require(self, path: Path, sha256: str | None) -> None:
        """Fetches a file other than a shard into the cache, unless it is there and intact.

        Args:
            path: its path in the cache.
            sha256: hash of its content; None if the reader checks it.
        """
        with self._locked(path):
            if file_mismatch(path, None, sha256):
                self._fetch_checked(path, None, sha256).replace(path)

    def fetch(self, shard: ShardFile) -> None:
        """Fetches a shard into the cache, unless another process just has; makes room for it first.

        Raises:
            UserError: one line that names the shard, if the store does not provide it intact.
        """
        with self._locked(shard.path):
            if not file_mismatch(shard.path, shard.bytes, shard.sha256):
                return
            shard.path.unlink(missing_ok=True)
            if (packed := shard.packed) is None:
                self.make_room(shard.bytes)
                whole = self._fetch_checked(shard.path, shard.bytes, shard.sha256)
            else:
                self.make_room(shard.bytes + packed.bytes)
                whole = self._unpack(shard, packed)
            whole.replace(shard.path)

    def note_use(self, shard: ShardFile) -> None:
        """Marks a shard as the most recently read; its modification time is kept."""
        with suppress(OSError):
            os.utime(shard.path, ns=(time.time_ns(), shard.path.stat().st_mtime_ns))

    def make_room(self, needed: int) -> None:
        """Evicts the least recently read shards until ``needed`` more bytes fit into the limit.

        Raises:
            UserError: if ``needed`` exceeds the limit.
        """
        if self.limit_bytes is None:
            return
        if needed > self.limit_bytes:
            raise UserError(
                f"is {self.limit_bytes:,}, less than one shard of {needed:,} bytes",
                key="data.cache_bytes",
                remedy="make it large enough for several shards per loader process",
            )
        with self._locked(self.root / "room"):
            self._evict(self._kept_bytes() + needed - self.limit_bytes)

    def _evict(self, excess: int) -> int:
        """Removes the least recently read shards until ``excess`` bytes are freed; returns the bytes."""
        shards = _sizes(self.root.glob("*/*/*.mds"))
        freed = 0
        for path, status in sorted(shards, key=lambda it: it[1].st_atime_ns):
            if freed >= excess:
                break
            # Processes that have it mapped can still read it; the space is freed when the last map is closed.
            path.unlink(missing_ok=True)
            freed += status.st_size
        return freed

    def _kept_bytes(self) -> int:
        files = [*self.root.glob("*/*/*.mds"), *self.root.glob(f"*/*/*{PARTIAL}")]
        return sum(status.st_size for _, status in _sizes(files))

    def _fetch_checked(self, path: Path, size: int | None, sha256: str | None) -> Path:
        """Downloads to a temporary name and checks the file; fetches it again if it arrived altered."""
        mismatch = ""
        for _ in range(2):
            partial = self._download(path)
            mismatch = file_mismatch(partial, size, sha256)
            if not mismatch:
                return partial
            partial.unlink()
        raise _damaged(f"{self._address(path)} {mismatch}, also when fetched again")

    def _unpack(self, shard: ShardFile, packed: PackedFile) -> Path:
        """Fetches a compressed shard and unpacks it to a temporary name."""
        source = self._fetch_checked(packed.path, packed.bytes, packed.sha256)
        address, partial = self._address(packed.path), _partial_name(shard.path)
        try:
            content = unpack(packed.compression, source.read_bytes(), shard.bytes)
        except Exception as error:  # Each kind of compression has its own exceptions.
            raise _damaged(f"{address} can't be unpacked ({_line(error)})") from None
        finally:
            source.unlink()
        while True:
            try:
                partial.write_bytes(content)
                break
            except OSError as error:
                partial.unlink(missing_ok=True)
                if error.errno not in DISK_IS_FULL:
                    raise
                self._evict_one(address)
        if mismatch := file_mismatch(partial, shard.bytes, shard.sha256):
            partial.unlink()
            raise _damaged(f"the shard in {address} {mismatch}")
        return partial

    def _evict_one(self, address: str) -> None:
        """Evicts a shard when the disk is full.

        Raises:
            UserError: if there is none.
        """
        if not self._evict(1):
            raise _gave_up(address, f"{self.root} is full and holds no shard to evict")

    def _download(self, path: Path) -> Path:
        """Downloads a file to a temporary name beside ``path``, with retries.

        Raises:
            UserError: one line that names the file and the last failure.
        """
        address, failures = self._address(path), 0
        partial = _partial_name(path)
        while True:
            partial.unlink(missing_ok=True)
            try:
                self._downloader().download(address, str(partial), timeout=self.patience.stall_seconds)
                return partial
            except Exception as error:  # Each store's client has its own exceptions.
                self._client = None
                partial.unlink(missing_ok=True)
                if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
                    self._evict_one(address)
                    continue
                failures += 1
                if _is_absent(error):
                    raise _gave_up(address, f"{_line(error)} (not found)", AbsentError) from None
                if _answers(error) & REFUSED or failures >= self.patience.attempts:
                    raise _gave_up(address, f"{_line(error)} (tried {failures} times)") from None
                pause = self.patience.pause_seconds(failures)
                line = f"{address}: {_line(error)}; retrying in {pause:.1f} s"
                logger.warning(line, extra=log.ALL_RANKS)
                time.sleep(pause)

    def _downloader(self) -> "CloudDownloader":
        """Returns this process's connection to the store; a forked loader must not share its parent's."""
        from streaming.base.storage import CloudDownloader

        if self._client is None or self._client[0] != os.getpid():
            self._client = os.getpid(), CloudDownloader.get(self.remote)
        return self._client[1]

    def _address(self, path: Path) -> str:
        return f"{self.remote}/{self._name(path)}"

    def _name(self, path: Path) -> str:
        """A file's name in the store.

        Raises:
            UserError: if it is outside of the cache: the names come from the store.
        """
        if not path.is_relative_to(self.root) or ".." in path.parts[len(self.root.parts) :]:
            raise UserError(
                f"{self.remote} names a file outside of its folder: {path}",
                key="data.remote",
                remedy="do not read from this store",
            )
        return path.relative_to(self.root).as_posix()

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Locks a file against the other processes of this node."""
        locks, name = self.root / LOCKS_FOLDER, self._name(path).replace("/", "-")
        path.parent.mkdir(parents=True, exist_ok=True)
        locks.mkdir(exist_ok=True)
        with (locks / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _partial_name(path: Path) -> Path:
    return path.with_name(f".{path.name}{PARTIAL}")


def _sizes(paths: Iterable[Path]) -> list[tuple[Path, os.stat_result]]:
    """Sizes of the files that exist; another process may remove or rename any of them at any moment."""
    found = []
    for path in paths:
        with suppress(FileNotFoundError):
            found.append((path, path.stat()))
    return found


def open_cache(recipe: Recipe) -> ShardCache | None:
    """Opens the recipe's cache; None if its shards are local, in ``data.shards``."""
    data = recipe.data
    if data.remote is None:
        return None
    return ShardCache(Path(data.shards), data.remote, data.cache_bytes)


def _damaged(what: str) -> UserError:
    return UserError(what, key="data.remote", remedy="upload that file to the store again")


def _gave_up(address: str, what: str, kind: type[UserError] = UserError) -> UserError:
    return kind(
        f"{address} {what}", key="data.remote", remedy="the same command resumes from the last checkpoint"
    )


def _is_absent(error: Exception) -> bool:
    """Returns whether there is no such file, bucket or kind of store."""
    return bool(_answers(error) & ABSENT) or isinstance(error, FileNotFoundError | ValueError | ImportError)


def _answers(error: Exception) -> set[str]:
    """Error codes in a client's exception: botocore's code, or the status of Google's or Azure's."""
    answer = getattr(error, "response", None)
    code = answer.get("Error", {}).get("Code") if isinstance(answer, dict) else None
    return {str(it) for it in (code, getattr(error, "code", None), getattr(error, "status_code", None))}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
