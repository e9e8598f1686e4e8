"""The decoder's tensors in a run's checkpoint, loaded one at a time from any layout."""

import math
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from train.checkpoint.reading import CheckpointReader
from train.hf.folders import STATE_FOLDER
from train.hf.safetensors_io import TensorInfo
from train.recipe.errors import UserError

WRAPPER = "model.decoder."
"""Prefix of the decoder's names in a run's checkpoint."""


class CheckpointWeights:
    """Weights of a checkpoint; the last tensor read stays in memory for its next rows.

    Raises:
        UserError: if the folder contains no decoder, or only parts of a tensor, or would run code.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / STATE_FOLDER
        self._reader = CheckpointReader(self._folder)
        self.tensors: dict[str, TensorInfo] = {}
        for key, entry in self._reader.metadata.state_dict_metadata.items():
            if not key.startswith(WRAPPER):
                continue
            assert isinstance(entry, dcp.metadata.TensorStorageMetadata), key
            name = key.removeprefix(WRAPPER)
            self.tensors[name] = TensorInfo(name, entry.properties.dtype, tuple(entry.size))
            if sum(math.prod(chunk.sizes) for chunk in entry.chunks) < math.prod(entry.size):
                raise UserError(f"{self._folder}: parts of {name} are missing")
        if not self.tensors:
            raise UserError(f"{folder}: contains no decoder")
        self._held: dict[str, Tensor] = {}

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Reads rows of a tensor, as a view of the whole."""
        if name not in self._held:
            self._held.clear()  # Before the next one is loaded: never two in memory.
            self._held[name] = self._load(name)
        return self._held[name][first:last]

    def _load(self, name: str) -> Tensor:
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        try:
            # Reads only the tensors named in the dictionary; ranks can do so independently.
            self._reader.load({WRAPPER + name: tensor})
        except dcp.CheckpointException as error:
            _, (reason, _) = error.failures.popitem()
            raise UserError(f"{self._folder}: {name} cannot be loaded ({reason})") from None
        return tensor
