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
AVERAGE_OF = "optimizer.state.decoder.{}.average"
"""Name of a weight's exponential average, which the optimizer keeps (:mod:`train.layout.average`)."""


class CheckpointWeights:
    """Weights of a checkpoint; the last tensor read stays in memory for its next rows.

    Args:
        folder: the checkpoint.
        of_average: read the exponential average of the weights. What is not trained, and has none, is read
            itself, as are buffers.

    Raises:
        UserError: if the folder contains no decoder, or only parts of a tensor, or no average, or would run
            code.
    """

    def __init__(self, folder: Path, *, of_average: bool = False) -> None:
        self._folder = folder / STATE_FOLDER
        self._reader = CheckpointReader(self._folder)
        self.tensors: dict[str, TensorInfo] = {}
        self._keys: dict[str, str] = {}
        has_average = False
        known = self._reader.metadata.state_dict_metadata
        for key in known:
            if not key.startswith(WRAPPER):
                continue
            name = key.removeprefix(WRAPPER)
            average = AVERAGE_OF.format(name)
            is_averaged = of_average and average in known
            has_average |= is_averaged
            self._keys[name] = average if is_averaged else key
            entry = known[self._keys[name]]
            assert isinstance(entry, dcp.metadata.TensorStorageMetadata), key
            self.tensors[name] = TensorInfo(name, entry.properties.dtype, tuple(entry.size))
            if sum(math.prod(chunk.sizes) for chunk in entry.chunks) < math.prod(entry.size):
                raise UserError(f"{self._folder}: parts of {name} are missing")
        if not self.tensors:
            raise UserError(f"{folder}: contains no decoder")
        if of_average and not has_average:
            remedy = "a run with optimizer.average_decay keeps one"
            raise UserError(f"{folder}: contains no average of the weights", remedy=remedy)
        self._held: dict[str, Tensor] = {}

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Reads rows of a tensor, as a view of the whole."""
        if name not in self._held:
            self._held.clear()  # Before the next one is loaded: never two in memory.
            self._held[name] = self.load(name)
        return self._held[name][first:last]

    def load(self, name: str) -> Tensor:
        """Loads a whole tensor, and keeps nothing."""
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        try:
            # Reads only the tensors named in the dictionary; ranks can do so independently.
            self._reader.load({self._keys[name]: tensor})
        except dcp.CheckpointException as error:
            _, (reason, _) = error.failures.popitem()
            raise UserError(f"{self._folder}: {name} cannot be loaded ({reason})") from None
        return tensor
