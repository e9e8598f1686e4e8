"""Reads a checkpoint's files without running code from them.

torch.distributed.checkpoint unpickles ``.metadata``, and every value that is not a tensor, with pickle
itself: a folder from elsewhere would run whatever it names. Here only the names that a checkpoint consists of
are resolved, and values are read with ``weights_only=True``, as torch reads the tensors.
"""

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from train.recipe.errors import UserError

METADATA_FILE = ".metadata"
CLASSES = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
"""Types that torch.distributed.checkpoint.metadata writes: data classes, and an enumeration."""


class CheckpointReader(dcp.FileSystemReader):
    """Reads a folder of torch.distributed.checkpoint, its metadata once, and runs no code from it.

    Raises:
        UserError: if ``.metadata`` is missing or damaged, or names anything that no checkpoint contains.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.metadata = _read_metadata(folder / METADATA_FILE)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Returns the metadata that was checked."""
        storage = self.metadata.storage_meta
        assert storage is not None, "_read_metadata fills it in"
        # torch.distributed.checkpoint.load resets the reader, which gives it another id.
        storage.load_id = self.load_id
        return self.metadata

    def load(self, state: dict[str, Any]) -> None:
        """Fills a state in place, as ``torch.distributed.checkpoint.load`` does, without asking other ranks.

        Args:
            state: tensors and values to read, by name.

        Raises:
            UserError: if a value's bytes would run code.
            CheckpointException: if something is missing or does not fit.
        """
        try:
            with warnings.catch_warnings():
                # To ask no other ranks is what is wanted here.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(state, storage_reader=self, planner=_Planner(), no_dist=True)
        except dcp.CheckpointException as error:
            for failure, _ in error.failures.values():
                if isinstance(failure, UserError):
                    raise UserError(f"{self.checkpoint_id}: {failure}") from None
            raise


class _Planner(dcp.DefaultLoadPlanner):
    """Fills a state, and reads what is not a tensor as safely as tensors are read."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Reads a value by itself and hands on bytes of our own, which the parent unpickles freely."""
        try:
            found = torch.load(value, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
            name = read_item.storage_index.fqn
            raise UserError(f"{name} is no plain value and may run code; it was not loaded") from None
        clean = io.BytesIO()
        torch.save(found, clean)
        clean.seek(0)
        super().load_bytes(read_item, clean)


class _Unpickler(pickle.Unpickler):
    """Resolves only the names that a checkpoint's metadata consists of."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns what a name stands for, or refuses it."""
        match module, name:
            case "torch.distributed.checkpoint.metadata", _ if name in CLASSES:
                return getattr(dcp_metadata, name)
            case "torch.distributed.checkpoint.filesystem", "_StorageInfo":
                return _StorageInfo
            case "torch", "Size":
                return torch.Size
            case "torch", _ if isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
            case "torch.serialization", "_get_layout":
                return _layout
            # Python 3.13 has a module of its own for the class.
            case "pathlib" | "pathlib._local", "PosixPath":
                return Path
            # Python 3.11 writes a member of an enumeration as an attribute of it.
            case "builtins", "getattr":
                return _member
        raise UserError(f"names {module}.{name}")


def _layout(name: str) -> torch.layout:
    layout = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(layout, torch.layout):
        raise UserError(f"names the layout {name}")
    return layout


def _member(owner: object, name: str) -> object:
    if owner is not dcp_metadata._MEM_FORMAT_ENCODING:
        raise UserError("names builtins.getattr")
    return dcp_metadata._MEM_FORMAT_ENCODING[name]


def _read_metadata(file: Path) -> Metadata:
    """Reads ``.metadata`` as plain data."""
    try:
        with file.open("rb") as stream:
            found = _Unpickler(stream).load()
        assert isinstance(found, Metadata)
        paths = {info.relative_path for info in found.storage_data.values()}
        outside = [path for path in paths if Path(path).name != path]
    except UserError as refusal:
        what = "which no checkpoint contains and which may run code; it was not loaded"
        raise UserError(f"{file}: {refusal}, {what}") from None
    except Exception as error:  # Damaged bytes raise anything.
        raise UserError(f"{file}: cannot be read ({type(error).__name__})") from None
    if outside:
        raise UserError(f"{file}: points to {outside[0]}, outside its folder; it was not loaded")
    if getattr(found, "storage_meta", None) is None:
        found.storage_meta = StorageMeta()
    return found
