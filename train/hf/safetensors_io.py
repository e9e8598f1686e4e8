"""Folders of safetensors files: checked and read by rows, written one file at a time with its SHA-256.

Such files cannot run code, so external weights are read only in this format. A folder has one file, or
several with an index; files and index are checked against each other before any weight is read.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from train.hf.folders import INDEX_FILE, SINGLE_FILE, read_json
from train.recipe.errors import UserError
from train.record.files import sha256

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Supported data types of weights, by their names in the format."""
DEFAULT_SHARD_BYTES = 5_000_000_000


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


@dataclass(frozen=True)
class FilePlan:
    """The contents of one file."""

    tensors: Sequence[TensorInfo]
    metadata: dict[str, str] | None = field(default_factory=lambda: {"format": "pt"})
    """Text in the header; transformers requires the format."""


class SafetensorsFolder:
    """The tensors of a folder: located, checked and read by rows.

    Raises:
        UserError: if files, headers and index do not agree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self.files = list(_files_of(folder))
        self._file_of: dict[str, str] = {}
        for file in self.files:
            for info in _read_infos(folder / file):
                if info.name in self.tensors:
                    raise UserError(f"{folder}: {info.name} is in two files")
                self.tensors[info.name] = info
                self._file_of[info.name] = file
        self._check_index()

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Reads rows ``first`` up to ``last`` (the end, if None) of a tensor, memory-mapped, not copied."""
        with safe_open(self.folder / self._file_of[name], framework="pt") as file:
            rows: Tensor = file.get_slice(name)[first:last]
        return rows

    def _check_index(self) -> None:
        path = self.folder / INDEX_FILE
        if not path.is_file():
            return
        listed = read_json(path).get("weight_map", {})
        for name, file in listed.items():
            if name not in self._file_of:
                raise UserError(f"{path}: lists {name}, which {file} does not contain")
            if self._file_of[name] != file:
                raise UserError(f"{path}: {name} is in {self._file_of[name]}, not in {file}")
        for name, file in self._file_of.items():
            if name not in listed:
                raise UserError(f"{self.folder / file}: contains {name}, which {path.name} does not list")


def plan_from_header(header: str) -> FilePlan:
    """Returns the contents of the file with this header."""
    tree = json.loads(header)
    metadata = tree.pop("__metadata__", None)
    infos = [TensorInfo(name, DTYPES[e["dtype"]], tuple(e["shape"])) for name, e in tree.items()]
    return FilePlan(infos, metadata)


def plan_files(tensors: Sequence[TensorInfo], shard_bytes: int) -> dict[str, FilePlan]:
    """Assigns tensors to files; only a file with a single tensor may exceed ``shard_bytes``."""
    infos = {info.name: info for info in tensors}
    shapes = {info.name: torch.empty(info.shape, dtype=info.dtype, device="meta") for info in tensors}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=shard_bytes)
    return {
        file: FilePlan([infos[name] for name in names]) for file, names in split.filename_to_tensors.items()
    }


def write_files(
    folder: Path, files: Mapping[str, FilePlan], read: Callable[[TensorInfo], Tensor]
) -> Iterator[tuple[str, str]]:
    """Writes files with one in memory at a time, while the previous one is hashed.

    Args:
        folder: destination.
        files: contents of each file.
        read: returns the tensor for an entry of the plan.

    Yields:
        Name and SHA-256 of each file once it is complete and on disk; no partial file remains.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        hashing: tuple[str, Future[str]] | None = None
        try:
            for name, plan in files.items():
                partial = _partial(folder / name)
                save_file(_tensors_of(plan, read), partial, plan.metadata)
                if hashing is not None:
                    yield _settle(folder, *hashing)
                hashing = name, pool.submit(_sync_and_hash, partial)
            if hashing is not None:
                yield _settle(folder, *hashing)
        finally:
            for name in files:
                _partial(folder / name).unlink(missing_ok=True)


def write_index(folder: Path, files: Mapping[str, FilePlan]) -> None:
    """Writes the index of several files; a single file needs none."""
    if list(files) == [SINGLE_FILE]:
        return
    total = sum(info.bytes for plan in files.values() for info in plan.tensors)
    weight_map = {info.name: file for file, plan in files.items() for info in plan.tensors}
    tree = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(tree, indent=2) + "\n")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises if a tensor contains NaN or infinity.

    Raises:
        UserError: naming the tensor.
    """
    if not torch.stack(tensor.aminmax()).isfinite().all():  # NaN anywhere makes both of them NaN.
        raise UserError(f"{name}: contains NaN or infinity")


def _files_of(folder: Path) -> Iterator[str]:
    index = folder / INDEX_FILE
    if index.is_file():
        for name in sorted(set(read_json(index).get("weight_map", {}).values())):
            if Path(name).name != name or not (folder / name).is_file():
                raise UserError(f"{index}: names {name}, which is not a file in the folder")
            yield name
        return
    if not (folder / SINGLE_FILE).is_file():
        pickles = sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth"})
        why = f"only {pickles[0]}, and pickles are not read" if pickles else "no weights"
        raise UserError(f"{folder}: has {why}; needs {INDEX_FILE} or {SINGLE_FILE}")
    yield SINGLE_FILE


def _read_infos(file: Path) -> Iterator[TensorInfo]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.offset_keys():
                entry = opened.get_slice(name)
                if entry.get_dtype() not in DTYPES:
                    raise UserError(f"{file}: {name} is {entry.get_dtype()}, not one of {', '.join(DTYPES)}")
                yield TensorInfo(name, DTYPES[entry.get_dtype()], tuple(entry.get_shape()))
    except SafetensorError as error:
        raise UserError(f"{file}: is not a complete safetensors file ({error})") from None


def _tensors_of(plan: FilePlan, read: Callable[[TensorInfo], Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    places: set[int] = set()
    for info in plan.tensors:
        tensor = read(info).contiguous()
        # safetensors refuses two tensors in the same memory, such as an embedding and its tied head.
        tensors[info.name] = tensor.clone() if tensor.data_ptr() in places else tensor
        places.add(tensor.data_ptr())
    return tensors


def _partial(file: Path) -> Path:
    return file.with_name(file.name + ".partial")


def _sync_and_hash(file: Path) -> str:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())  # A file listed in a manifest must survive a crash of the machine.
    return sha256(file)


def _settle(folder: Path, name: str, digest: Future[str]) -> tuple[str, str]:
    """Renames a file to its final name once it is on disk."""
    found = digest.result()
    _partial(folder / name).replace(folder / name)
    return name, found
