"""Averages of weights: the exponential one of a checkpoint, or the mean of a run's newest checkpoints.

The mean of checkpoints from a stable learning rate comes close to weights after a decay, without one (Li et
al. 2025, arXiv 2505.12082).
"""

from pathlib import Path

import torch
from torch import Tensor

from train.checkpoint.files import CheckpointError, batches_of, check_checkpoint
from train.hf.average_option import OPTION
from train.hf.checkpoint_weights import CheckpointWeights
from train.recipe.errors import UserError
from train.record.run_folder import CHECKPOINTS_FOLDER


class MeanWeights:
    """The mean of the weights of several checkpoints; buffers, such as a balancing bias, too.

    Added up in float64 and returned as stored. One tensor is in memory at a time, and its mean.
    """

    def __init__(self, parts: list[CheckpointWeights]) -> None:
        self._parts = parts
        self.tensors = parts[0].tensors
        self._held: dict[str, Tensor] = {}

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Reads rows of a tensor."""
        if name not in self._held:
            self._held.clear()
            total = torch.zeros(self.tensors[name].shape, dtype=torch.float64)
            for part in self._parts:
                total += part.load(name)
            self._held[name] = (total / len(self._parts)).to(self.tensors[name].dtype)
        return self._held[name][first:last]


def newest_checkpoints(run: Path, count: int) -> list[Path]:
    """Returns the newest complete checkpoints of a run, the newest first.

    Raises:
        UserError: if it has fewer.
    """
    found: list[Path] = []
    for folder in batches_of(run / CHECKPOINTS_FOLDER).values():
        try:
            check_checkpoint(folder)
        except CheckpointError:
            continue
        found.append(folder)
        if len(found) == count:
            return found
    raise UserError(
        f"{run}: has {len(found)} complete checkpoints, not {count}",
        key=OPTION,
        remedy="checkpoint.keep_last says how many a run keeps",
    )
