"""Safetensors files read by rows and written as a stream: no tensor is ever whole in memory.

A file is eight bytes of header length, a header in JSON (name, type, shape, place of each tensor) and
the bytes of the tensors. Nothing of it can run code, which is why weights from elsewhere come in this
form alone. A folder is one file or several with an index; both are checked against each other before
a byte of weights is read.
"""

import hashlib
import json
import math
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.hf.folders import read_json
from train.recipe.errors import UserError
from train.recipe.topology import usable_cores

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""The types that weights may have, by the names that the format gives them."""
BITS = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
}
"""The integer of each type's width, and the bits of infinity."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK_BYTES = 1 << 21
"""Bytes read, checked, hashed and written at once: they stay in a core's cache from one to the next."""
MOST_THREADS = 8
"""Most files written at a time; each thread holds a block, or a tensor that has to be transposed."""
WAITING_THREADS = 2
"""Threads beyond the number of cores, for those that wait for the disk."""
MOST_SPARE_BLOCKS = 4
"""Blocks that a thread keeps to read into again."""
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
"""Memory that forked processes do not share, as mmap's own default would have it."""
LONGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a header describes it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Size of what one index of the first dimension holds."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def block_rows(self) -> int:
        """Rows of about a block."""
        return max(1, BLOCK_BYTES // self.row_bytes)


@dataclass(frozen=True)
class Placed:
    """A tensor in its file."""

    info: TensorInfo
    file: Path
    offset: int
    """Byte of the file at which the data begins."""


class SafetensorsFolder:
    """The tensors of a folder, found, checked and read by rows.

    Raises:
        UserError: if files, headers and index do not agree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.headers: dict[str, bytes] = {}
        """Each file's header, as it was written."""
        self._placed: dict[str, Placed] = {}
        for name in _files_of(folder):
            header, placed = read_header(folder / name)
            self.headers[name] = header
            for one in placed:
                if one.info.name in self._placed:
                    raise UserError(f"{folder}: {one.info.name} is in two files")
                self._placed[one.info.name] = one
        self._check_index()
        self.tensors = {name: placed.info for name, placed in self._placed.items()}

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows ``first`` up to ``last`` (the end, if None) of a tensor."""
        placed = self._placed[name]
        info = placed.info
        last = info.shape[0] if last is None else last
        assert 0 <= first <= last <= info.shape[0], (name, first, last, info.shape)
        rows = new_rows((last - first, *info.shape[1:]), info.dtype)
        wanted = rows.numel() * info.dtype.itemsize
        with placed.file.open("rb", buffering=0) as stream:
            stream.seek(placed.offset + first * info.row_bytes)
            view = _bytes_of(rows)
            done = 0
            while done < wanted:
                got = stream.readinto(view[done:])
                if not got:
                    raise UserError(f"{placed.file}: ends within {name}")
                done += got
        return rows

    def read_transposed(self, name: str) -> Tensor:
        """A whole matrix, its rows as columns."""
        return self.read(name).t()

    def _check_index(self) -> None:
        path = self.folder / INDEX_FILE
        if not path.is_file():
            return
        listed = read_json(path).get("weight_map", {})
        for name, file in listed.items():
            if name not in self._placed:
                raise UserError(f"{path}: lists {name}, which {file} does not hold")
            if self._placed[name].file.name != file:
                raise UserError(f"{path}: {name} is in {self._placed[name].file.name}, not in {file}")
        for name, placed in self._placed.items():
            if name not in listed:
                raise UserError(f"{placed.file}: holds {name}, which {path.name} does not list")


class _Spare(threading.local):
    """Memory that a thread's blocks lie in, one after the other."""

    def __init__(self) -> None:
        self.blocks: list[mmap.mmap] = []


_spare = _Spare()


def new_rows(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for rows: up to a block, what an earlier one of this thread lay in, once no tensor holds that.

    The arenas of malloc, one for each thread, would keep the room of many blocks; memory that is new for each
    block costs hundreds of page faults.
    """
    count = math.prod(shape)
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    if count * dtype.itemsize > BLOCK_BYTES:
        memory = mmap.mmap(-1, count * dtype.itemsize, flags=PRIVATE)
    else:
        for memory in _spare.blocks:
            if sys.getrefcount(memory) == 3:  # The list, the loop and the call; a tensor would be one more.
                break
        else:
            memory = mmap.mmap(-1, BLOCK_BYTES, flags=PRIVATE)
            if len(_spare.blocks) < MOST_SPARE_BLOCKS:
                _spare.blocks.append(memory)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(*shape)


class LastTensor(threading.local):
    """The tensor that a thread read last, kept for its next rows."""

    name: str | None = None
    value: Tensor | None = None

    def get(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor of a name, read if it is not the one that is kept; that one is let go before."""
        if self.value is None or self.name != name:
            self.value = None
            self.name, self.value = name, read(name)
        return self.value


def read_header(file: Path) -> tuple[bytes, list[Placed]]:
    """The header of a file as bytes, and its tensors in the order of their data.

    Raises:
        UserError: if the file is not whole or its header does not describe it.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(LONGEST_HEADER, size - 8):
            raise UserError(f"{file}: is not a whole safetensors file")
        header = stream.read(length)
    placed = parse_header(file, header)
    end = placed[-1].offset + placed[-1].info.bytes if placed else 8 + length
    if end != size:
        raise UserError(f"{file}: has {size} bytes, but its header describes {end}")
    return header, placed


def parse_header(file: Path, header: bytes) -> list[Placed]:
    """The tensors that a header describes, in the order of their data.

    Raises:
        UserError: if it is malformed, or leaves gaps.
    """
    try:
        tree = json.loads(header)
        tree.pop("__metadata__", None)
        placed = [_placed(file, 8 + len(header), name, entry) for name, entry in tree.items()]
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: has an unreadable header ({type(error).__name__})") from None
    placed.sort(key=lambda one: one.offset)
    end = 8 + len(header)
    for one in placed:
        if one.offset != end:
            raise UserError(f"{file}: {one.info.name} does not begin where the data before it ends")
        end += one.info.bytes
    return placed


def make_header(tensors: Sequence[TensorInfo]) -> bytes:
    """The header of a file that holds these tensors in this order."""
    tree: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for info in tensors:
        places = [offset, offset + info.bytes]
        tree[info.name] = {"dtype": NAMES[info.dtype], "shape": list(info.shape), "data_offsets": places}
        offset += info.bytes
    text = json.dumps(tree, separators=(",", ":")).encode()
    # Data that begins at a multiple of eight can be mapped into memory as it is.
    return text + b" " * (-len(text) % 8)


def write_files(
    folder: Path, files: Mapping[str, tuple[bytes, Iterable[Tensor]]]
) -> Iterator[tuple[str, str]]:
    """Writes files side by side: hashing takes a core longest of all and cannot be shared within a file.

    Args:
        folder: where they go.
        files: for each name the header, as :func:`make_header` or another file gave it, and the tensors' data
            in the header's order, cut anywhere.

    Yields:
        Name and SHA-256 of a file as soon as it is whole and on the disk; one that is not leaves nothing.

    Raises:
        Exception: the first that ``blocks`` raised, after all files that could be finished.
    """
    stop = threading.Event()
    threads = min(MOST_THREADS, usable_cores() + WAITING_THREADS, len(files))
    with _one_thread_each(), ThreadPoolExecutor(max(1, threads)) as pool:
        names = {
            pool.submit(_write_file, folder / name, header, blocks, stop): name
            for name, (header, blocks) in files.items()
        }
        failure: BaseException | None = None
        try:
            for future in as_completed(names):
                failure = failure or future.exception()
                if failure is None or future.exception() is None:
                    yield names[future], future.result()
                else:
                    stop.set()
        finally:
            stop.set()
        if failure is not None:
            raise failure


def plan_files(tensors: Sequence[TensorInfo], shard_bytes: int) -> dict[str, list[TensorInfo]]:
    """Which tensors go to which file, in order; a file is larger than asked only for a single tensor."""
    groups: list[list[TensorInfo]] = []
    room = 0
    for info in tensors:
        if not groups or info.bytes > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(info)
        room -= info.bytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_index(folder: Path, files: Mapping[str, Sequence[TensorInfo]]) -> None:
    """Writes the index of several files; one file needs none."""
    if list(files) == [SINGLE_FILE]:
        return
    total = sum(info.bytes for group in files.values() for info in group)
    weight_map = {info.name: file for file, group in files.items() for info in group}
    tree = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(tree, indent=2) + "\n")


def all_finite(block: Tensor) -> bool:
    """Whether there is no NaN and no infinity.

    Their bits are the largest integers of each sign (IEEE 754): two maxima of integers tell, exactly.
    """
    integer, infinity = BITS[block.dtype]
    bits = block.contiguous().view(integer).numpy()
    # Read as unsigned, negative numbers come after all others, minus infinity last but for NaN.
    largest, lowest = int(bits.max()), int(bits.view(f"u{bits.itemsize}").max())
    return largest < infinity and lowest < infinity + (1 << (8 * bits.itemsize - 1))


def _files_of(folder: Path) -> Iterator[str]:
    index = folder / INDEX_FILE
    if index.is_file():
        for name in sorted(set(read_json(index).get("weight_map", {}).values())):
            if Path(name).name != name or not (folder / name).is_file():
                raise UserError(f"{index}: names {name}, which is not a file of the folder")
            yield name
        return
    if not (folder / SINGLE_FILE).is_file():
        pickles = sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth"})
        why = f"only {pickles[0]}, and pickles are not read" if pickles else "no weights"
        raise UserError(f"{folder}: has {why}; needs {INDEX_FILE} or {SINGLE_FILE}")
    yield SINGLE_FILE


def _placed(file: Path, start: int, name: str, entry: Mapping[str, Any]) -> Placed:
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{file}: {name} is {entry['dtype']}, not one of {', '.join(DTYPES)}")
    shape = tuple(int(extent) for extent in entry["shape"])
    info = TensorInfo(name, DTYPES[entry["dtype"]], shape)
    first, last = entry["data_offsets"]
    if not shape or min(shape) < 1 or last - first != info.bytes:
        raise UserError(f"{file}: {name} of shape {shape} has {last - first} bytes")
    return Placed(info, file, start + first)


def _write_file(path: Path, header: bytes, blocks: Iterable[Tensor], stop: threading.Event) -> str:
    """Writes a file whole or not at all; returns its SHA-256."""
    digest = hashlib.sha256()
    partial = path.with_name(path.name + ".partial")
    start = len(header).to_bytes(8, "little") + header
    try:
        with partial.open("wb", buffering=0) as stream:
            stream.write(start)
            digest.update(start)
            for block in blocks:
                if stop.is_set():
                    raise UserError(f"{path}: was not finished")
                data = _bytes_of(block.contiguous())
                digest.update(data)
                _write_all(stream, data)
            # What a manifest calls whole must outlast the machine.
            os.fsync(stream.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)
    return digest.hexdigest()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """PyTorch's own threads, times those that write, would be more than there are cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _write_all(stream: Any, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += stream.write(data[done:])
