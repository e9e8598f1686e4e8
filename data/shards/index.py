"""The index of a folder of shards, opened instantly however many shards it lists.

Streaming's ``index.json`` has some 450 bytes of text per shard. Twelve trillion tokens are 720,000 shards of
64 MB: parsing that and keeping it as objects takes a process most of a minute and 2.6 GB. So the first
process that opens a large index writes it as a binary table beside it, which all processes then map into
memory.
"""

import fcntl
import json
import mmap
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from json.decoder import WHITESPACE  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.recipe.errors import UserError
from train.recipe.names import unfit_as_file
from train.record import files
from train.record.files import write_whole

INDEX_FILE = "index.json"
TABLE = ".index-{size}-{modified_ns}.table"
SMALL_BYTES = 4_000_000
"""Indexes up to this size, 9,000 shards, are parsed at each start, in a tenth of a second."""
HAS_HASH, IS_PACKED, PACKED_HAS_HASH = 1, 2, 4

# N shards.

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class PackedFile:
    """A compressed shard as described by its index."""

    path: Path
    bytes: int
    sha256: str | None
    compression: str
    """In Streaming's notation, for example ``zstd:3``."""


@dataclass(frozen=True)
class ShardFile:
    """One shard as described by its index."""

    path: Path
    bytes: int
    sha256: str | None
    """None if an index from elsewhere has no hashes; then only the file's size is checked."""
    packed: PackedFile | None = None
    """The compressed file that a store holds instead; None: the store holds the shard itself."""


class ShardIndex:
    """The shards of a folder, in the index's order.

    Args:
        folder: folder of the shards.
        configs: index entries without files and samples, one for each distinct entry.
        columns: the rest of each shard's entry [N].
    """

    def __init__(self, folder: Path, configs: list[dict[str, Any]], columns: Columns) -> None:
        self.folder, self.configs = folder, configs
        self.samples: NDArray[np.int64] = columns["samples"]
        """Samples of each shard [N]."""
        self._columns = columns
        self._sound: dict[int, tuple[int, ...]] = {}
        """Inode, modification time and size of each shard when its content was checked."""

    def __len__(self) -> int:
        """Number of shards N."""
        return self.samples.size

    def __iter__(self) -> Iterator[ShardFile]:
        """Yields every shard."""
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> ShardFile:
        """Returns one shard, of 0..N-1."""
        flags = int(self._columns["flags"][number])
        packed = None
        if flags & IS_PACKED:
            compression = self.configs[self.config_of(number)]["compression"]
            packed = PackedFile(*self._file("packed_", number, bool(flags & PACKED_HAS_HASH)), compression)
        return ShardFile(*self._file("", number, bool(flags & HAS_HASH)), packed)

    def config_of(self, number: int) -> int:
        """Index of a shard's config."""
        return int(self._columns["config"][number])

    def mismatch(self, number: int) -> str:
        """Checks a shard's file, see :func:`file_mismatch`.

        Its content is hashed once per process, and again if the file was replaced or written to.
        """
        file = self[number]
        try:
            status = file.path.stat()
        except OSError:
            return file_mismatch(file.path, file.bytes, file.sha256)
        mark = status.st_ino, status.st_mtime_ns, status.st_size
        if self._sound.get(number) == mark:
            return ""
        if not (mismatch := file_mismatch(file.path, file.bytes, file.sha256)):
            self._sound[number] = mark
        return mismatch

    def entry(self, config: int) -> dict[str, Any]:
        """An index entry for Streaming's readers, with this config and an empty file."""
        return self.configs[config] | {
            "raw_data": {"basename": "", "bytes": 0, "hashes": {}},
            "samples": 0,
            "zip_data": None,
        }

    def _file(self, kind: str, number: int, has_hash: bool) -> tuple[Path, int, str | None]:
        name, sha256 = (self._columns[f"{kind}{it}"][number] for it in ("name", "sha256"))
        size = int(self._columns[f"{kind}bytes"][number])
        return self.folder / name.decode(), size, sha256.tobytes().hex() if has_hash else None


def file_mismatch(path: Path, size: int | None, sha256: str | None) -> str:
    """Checks a file and returns the mismatch, worded to follow its name; empty if there is none.

    Args:
        path: the file.
        size: expected size in bytes; None: not compared.
        sha256: expected hash of its content; None: not compared, and nothing is read.
    """
    try:
        actual = path.stat().st_size
        if size is not None and actual != size:
            return f"has {actual} bytes instead of {size}"
        if sha256 is not None and files.sha256(path) != sha256:
            return "is altered: its SHA-256 differs"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"can't be read ({error.strerror})"
    return ""


def open_index(folder: Path) -> ShardIndex:
    """Opens the index of a folder; writes its table if it is large and has none.

    Raises:
        UserError: if it is damaged, or names files outside of the folder.
    """
    path = folder / INDEX_FILE
    status = path.stat()
    if status.st_size <= SMALL_BYTES:
        return _parsed(folder, path)
    table = folder / TABLE.format(size=status.st_size, modified_ns=status.st_mtime_ns)
    if not table.is_file():
        try:
            with (folder / ".index.lock").open("w") as lock:
                # One process per node parses; the others wait for its table.
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not table.is_file():
                    _write(table, _parsed(folder, path))
        except OSError:  # The folder is not writable.
            return _parsed(folder, path)
    return _mapped(folder, table)


def _entries(text: str) -> Iterator[dict[str, Any]]:
    """Yields an index's entries one at a time: all at once they would take six times the text's memory."""
    decoder = json.JSONDecoder()
    start = at = text.index("[", text.index('"shards"')) + 1
    while text[at := WHITESPACE.match(text, at).end()] != "]":
        entry, at = decoder.raw_decode(text, at)
        yield entry
        at = WHITESPACE.match(text, at).end()
        at += text[at] == ","
    json.loads(text[:start] + text[at:])  # The rest must be valid JSON too.


def _parsed(folder: Path, path: Path) -> ShardIndex:
    try:
        return _parse(folder, path.read_text())
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path} is damaged ({error})",
            key="data.shards",
            remedy="restore it, or build the shards again",
        ) from None


def _parse(folder: Path, text: str) -> ShardIndex:
    configs: dict[str, int] = {}
    samples, sizes, packed_sizes = array("q"), array("q"), array("q")
    hashes, packed_hashes, flags, numbers = bytearray(), bytearray(), bytearray(), array("i")
    names: list[bytes] = []
    packed_names: list[bytes] = []
    for entry in _entries(text):
        raw, zipped, count = (entry.pop(key) for key in ("raw_data", "zip_data", "samples"))
        numbers.append(configs.setdefault(json.dumps(entry, sort_keys=True), len(configs)))
        samples.append(count)
        flag = IS_PACKED if zipped else 0
        for file, to_sizes, to_names, to_hashes, bit in (
            (raw, sizes, names, hashes, HAS_HASH),
            (zipped or {}, packed_sizes, packed_names, packed_hashes, PACKED_HAS_HASH),
        ):
            sha256 = file.get("hashes", {}).get("sha256")
            to_sizes.append(file.get("bytes", 0))
            name = file.get("basename", "")
            if file and (unfit := unfit_as_file(name)):
                raise ValueError(f"the shard's name {name!r} {unfit}")
            to_names.append(name.encode())
            to_hashes.extend(bytes.fromhex(sha256 or "00" * 32))
            flag |= bit if sha256 else 0
        flags.append(flag)
    columns: Columns = {
        "samples": np.array(samples, np.int64),
        "bytes": np.array(sizes, np.int64),
        "sha256": np.frombuffer(bytes(hashes), "V32"),
        "name": np.array(names, "S"),
        "packed_bytes": np.array(packed_sizes, np.int64),
        "packed_sha256": np.frombuffer(bytes(packed_hashes), "V32"),
        "packed_name": np.array(packed_names, "S"),
        "flags": np.frombuffer(bytes(flags), np.uint8),
        "config": np.array(numbers, np.int32),
    }
    return ShardIndex(folder, [json.loads(config) for config in configs], columns)


def _write(table: Path, index: ShardIndex) -> None:
    """Writes a line of JSON that describes the columns, then the columns; removes tables of older indexes."""
    columns = index._columns
    ends = list(accumulate(column.nbytes for column in columns.values()))
    kinds = {
        name: [column.dtype.str, end - column.nbytes]
        for (name, column), end in zip(columns.items(), ends, strict=True)
    }
    head = json.dumps({"shards": len(index), "configs": index.configs, "columns": kinds}).encode() + b"\n"
    head = head[:-1] + b" " * (-len(head) % 64) + b"\n"
    for old in table.parent.glob(".index-*.table"):
        old.unlink(missing_ok=True)
    write_whole(table, head + b"".join(column.tobytes() for column in columns.values()))


def _mapped(folder: Path, table: Path) -> ShardIndex:
    with table.open("rb") as file:
        head = file.readline()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tree = json.loads(head)
    columns = {
        name: np.frombuffer(mapped, kind, tree["shards"], len(head) + start)
        for name, (kind, start) in tree["columns"].items()
    }
    return ShardIndex(folder, tree["configs"], columns)
