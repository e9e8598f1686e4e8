"""Form of a copy in host memory: a head with two digests, then one rank's tensors as they lie in memory."""

import hashlib
import json
import mmap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from train.checkpoint.files import CheckpointError
from train.checkpoint.groups import Hyperparameters
from train.recipe.schema import Recipe

MARK = b"FGMEM001"
PREFIX_BYTES = len(MARK) + 8 + 32
"""Mark, length of the head, its SHA-256."""
ALIGNED = 64
"""Every tensor begins at a multiple of this many bytes."""

Described = tuple[str, str, tuple[int, ...]]
"""A tensor's name, data type and shape."""


@dataclass(frozen=True)
class Head:
    """All of a copy but its tensors."""

    rank: int
    layout: str
    """Digest of what decides which part of each tensor a rank holds, see :func:`layout_digest`."""
    made_by: str
    """Identifies the start of the run that made it: parts of two are never taken for one."""
    progress: dict[str, Any]
    """Fields of :class:`train.checkpoint.files.Progress`."""
    randoms: dict[str, Any]
    """See :func:`train.checkpoint.files.random_states`."""
    hyperparameters: Hyperparameters
    """With which each weight was trained."""
    tensors: list[Described]
    size: int
    """Length of the tensors, in bytes."""
    sha256: str = ""
    """Of the tensors."""

    @property
    def batch(self) -> int:
        """The batch after which the copy was made."""
        return int(self.progress["batch"])

    def pack(self, sha256: str) -> bytes:
        """Returns the first bytes of a file, up to its tensors."""
        text = json.dumps(asdict(replace(self, sha256=sha256))).encode()
        text = text.ljust(_aligned(PREFIX_BYTES + len(text)) - PREFIX_BYTES)
        return MARK + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + text


def unpack(content: bytes | memoryview, name: str) -> tuple[Head, int]:
    """Returns the head at the beginning of a file, and where the tensors begin.

    Raises:
        CheckpointError: if it is not as it was written.
    """
    prefix = bytes(content[:PREFIX_BYTES])
    length = int.from_bytes(prefix[len(MARK) : len(MARK) + 8], "little")
    end = PREFIX_BYTES + length
    text = bytes(content[PREFIX_BYTES : min(end, len(content))])
    if prefix[: len(MARK)] != MARK or hashlib.sha256(text).digest() != prefix[len(MARK) + 8 :]:
        raise CheckpointError(f"{name}: its head is not what was written (SHA-256 differs)")
    tree = json.loads(text)
    tensors = [(each, dtype, tuple(shape)) for each, dtype, shape in tree.pop("tensors")]
    return Head(**tree, tensors=tensors), end


def read_head(file: Path) -> Head:
    """Reads the head of a file.

    Raises:
        CheckpointError: if it can't be read, or the file is not as long as it should be.
    """
    try:
        with file.open("rb") as stream:
            prefix = stream.read(PREFIX_BYTES)
            length = int.from_bytes(prefix[len(MARK) : len(MARK) + 8], "little")
            size = file.stat().st_size
            head, begin = unpack(prefix + stream.read(min(length, size)), str(file))
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read ({type(error).__name__})") from None
    if size != begin + head.size:
        raise CheckpointError(f"{file}: has {size} bytes instead of {begin + head.size}")
    return head


def read_copy(file: Path) -> tuple[Head, memoryview]:
    """Reads a file and compares every byte with its digests; returns its head and tensors.

    The tensors stay where they are in memory, also when the file is removed.

    Raises:
        CheckpointError: if it is not as it was written.
    """
    read_head(file)
    try:
        with file.open("rb") as stream:
            # Nobody writes to it, but torch warns of memory that it may not write to.
            content = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: can't be read ({type(error).__name__})") from None
    head, begin = unpack(content, str(file))
    require_whole(head, content[begin:], str(file))
    return head, content[begin:]


def require_whole(head: Head, data: memoryview, name: str) -> None:
    """Raises CheckpointError if the tensors of a copy are not what was written."""
    if hashlib.sha256(data).hexdigest() != head.sha256:
        raise CheckpointError(f"{name}: its content is not what was written (SHA-256 differs)")


def local_tensors(state: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields this rank's part of every tensor in nested dictionaries, by its dotted name."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from local_tensors(value, f"{prefix}{key}.")
        else:
            assert isinstance(value, Tensor), f"{prefix}{key} is a {type(value).__name__}, not a tensor"
            yield f"{prefix}{key}", (value.to_local() if isinstance(value, DTensor) else value).detach()


def describe(tensors: list[tuple[str, Tensor]]) -> list[Described]:
    """Returns name, data type and shape of tensors."""
    return [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors]


def total_bytes(tensors: list[tuple[str, Tensor]]) -> int:
    """Returns the length of tensors in a copy, in bytes."""
    return sum(_aligned(tensor.nbytes) for _, tensor in tensors)


def views(data: Tensor, tensors: list[tuple[str, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields each tensor with its place in the bytes of a copy.

    Args:
        data: uint8, of :func:`total_bytes`.
        tensors: in the order in which they lie there.
    """
    begin = 0
    for _, tensor in tensors:
        yield tensor, data[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        begin += _aligned(tensor.nbytes)


def layout_digest(recipe: Recipe, world_size: int) -> str:
    """Returns a digest of what decides which part of each tensor a rank holds; `context` does not."""
    layout = replace(recipe.parallelism, context=1)
    text = json.dumps([world_size, asdict(layout)], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def as_bytes(data: memoryview) -> Tensor:
    """Returns memory as a tensor of bytes."""
    return torch.frombuffer(data, dtype=torch.uint8) if len(data) else torch.empty(0, dtype=torch.uint8)


def _aligned(count: int) -> int:
    return -(-count // ALIGNED) * ALIGNED
