"""The decoder's tensors in a checkpoint of a run, by rows and without loading any of them whole.

A checkpoint of torch.distributed.checkpoint keeps each rank's part of a tensor as an archive of `torch.save`,
one after the other in the rank's file. `dcp.load` unpacks whole parts, several copies at a time: 5.8 to 9.5
times the largest tensor at its peak. An archive has its bytes as they are: rows can be read where they lie.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.utils import _create_file_view

from train.hf.folders import STATE_FOLDER
from train.hf.safetensors_io import TensorInfo, new_rows
from train.recipe.errors import UserError

WRAPPER = "model.decoder."
"""What begins the decoder's names in a checkpoint of a run."""
STORAGE = "data/0"
"""Member of an archive that holds the bytes of the one tensor in it; torch.save does not compress."""


@dataclass(frozen=True)
class _Part:
    """A block of a tensor where it lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    first_byte: int


class CheckpointWeights:
    """Weights of a checkpoint, whatever its layout was; nothing is held between reads.

    Raises:
        UserError: if the folder holds no decoder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / STATE_FOLDER
        metadata = dcp.FileSystemReader(self._folder).read_metadata()
        entries = metadata.state_dict_metadata
        self._keys = {key.removeprefix(WRAPPER): key for key in entries if key.startswith(WRAPPER)}
        if not self._keys:
            raise UserError(f"{folder}: holds no decoder")
        self._places = metadata.storage_data
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {}
        self._parts: dict[str, list[_Part]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, key in self._keys.items():
            entry = entries[key]
            assert isinstance(entry, dcp.metadata.TensorStorageMetadata), key
            self.tensors[name] = TensorInfo(name, entry.properties.dtype, tuple(entry.size))
            self._chunks[name] = entry.chunks

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows of a tensor; no other byte of it is read."""
        info = self.tensors[name]
        last = info.shape[0] if last is None else last
        if name not in self._parts:
            self._parts[name] = [self._find(name, chunk) for chunk in self._chunks[name]]
        rows = new_rows((last - first, *info.shape[1:]), info.dtype)
        filled = 0
        for part in self._parts[name]:
            start, end = max(first, part.offsets[0]), min(last, part.offsets[0] + part.sizes[0])
            if start >= end:
                continue
            block = _read_rows(part, info.dtype, start - part.offsets[0], end - part.offsets[0])
            if block.shape == rows.shape:
                return block
            columns = zip(part.offsets[1:], part.sizes[1:], strict=True)
            rows[(slice(start - first, end - first), *(slice(at, at + size) for at, size in columns))] = block
            filled += block.numel()
        if filled != rows.numel():
            raise UserError(f"{self._folder}: parts of {name} are missing")
        return rows

    def _find(self, name: str, chunk: ChunkStorageMetadata) -> _Part:
        """Where a part's bytes begin."""
        place = self._places[MetadataIndex(self._keys[name], chunk.offsets)]
        file = self._folder / place.relative_path
        with file.open("rb") as stream:
            archive = cast(BinaryIO, _create_file_view(stream, place.offset, place.length))
            with FakeTensorMode():  # Its shape and strides; torch.load does not read the data then.
                stored = torch.load(archive, weights_only=True)
            archive.seek(0)
            reader = torch._C.PyTorchFileReader(archive)
            first_byte = place.offset + reader.get_record_offset(STORAGE)  # type: ignore[attr-defined]
        assert tuple(stored.shape) == tuple(chunk.sizes) and stored.dtype == self.tensors[name].dtype, name
        assert stored.is_contiguous(), f"{name} was saved with other strides"
        first_byte += stored.storage_offset() * stored.itemsize
        return _Part(tuple(chunk.offsets), tuple(chunk.sizes), file, first_byte)


def _read_rows(part: _Part, dtype: torch.dtype, first: int, last: int) -> Tensor:
    """Rows of a part, counted from its own first."""
    block = new_rows((last - first, *part.sizes[1:]), dtype)
    row_bytes = block[:1].numel() * block.itemsize
    with part.file.open("rb") as stream:
        stream.seek(part.first_byte + first * row_bytes)
        # NumPy has no bfloat16: the bytes are read as bytes.
        read = stream.readinto(block.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    if read != block.numel() * block.itemsize:
        raise UserError(f"{part.file}: ends too early")
    return block
