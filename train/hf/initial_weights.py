"""Weights of step 0 from elsewhere, into any layout; freezing; an optimizer's state restored.

Each rank takes only the rows that it holds; of a folder of safetensors it reads no others.
"""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from train.checkpoint.files import load_checkpoint
from train.hf.folders import STATE_FOLDER
from train.hf.weights import WeightSource, newest, open_weights
from train.model.decoder import Decoder
from train.recipe.errors import UserError
from train.recipe.schema import OptimizerStart, Recipe
from train.recipe.topology import Topology
from train.record.run_folder import CHECKPOINTS_FOLDER

MOMENTS = "optimizer.state."
"""What begins the names of the optimizer's state in a checkpoint."""


def find_start(recipe: Recipe) -> Path | None:
    """What the recipe starts from: of a run, its newest whole checkpoint; for one rank, as it reads it all.

    Raises:
        UserError: if the run has none.
    """
    if recipe.start.weights is None:
        return None
    path = Path(recipe.start.weights)
    return newest(path) if (path / CHECKPOINTS_FOLDER).is_dir() else path


def start_from(
    path: Path, recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, topology: Topology
) -> None:
    """Puts weights of step 0, and the optimizer's state where the recipe restores it, in their places.

    Args:
        path: what :func:`find_start` gave the main rank.
        recipe: the recipe of this run.
        model: the trainer's model around a decoder; on its device, sharded, already initialised.
        optimizer: this model's, over the parameters that are trained.
        topology: every rank calls this.
    """
    load_initial_weights(next(m for m in model.modules() if isinstance(m, Decoder)), path)
    if recipe.start.optimizer is OptimizerStart.restored:
        restore_optimizer(path, model, optimizer, topology)


def load_initial_weights(decoder: Decoder, path: Path) -> WeightSource:
    """Fills a decoder, whole or sharded, with weights that another training made.

    Args:
        decoder: on its device, sharded as the layout says.
        path: one checkpoint, or a folder of weights; a run's folder too, but each rank would then check
            the whole checkpoint, so that several ranks had better be given
            :func:`train.hf.weights.newest`.

    Returns:
        The source, with the model and the recipe that the weights come from.

    Raises:
        UserError: if a tensor is missing or of another shape.
    """
    source = open_weights(path)
    targets = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    targets |= {
        name: buffer for name, buffer in decoder.named_buffers() if name in source.weights.tensors
    }  # A balancing bias that the source does not have stays zero.
    for name, target in targets.items():
        info = source.weights.tensors.get(name)
        if info is None:
            raise UserError(f"{source.path}: has no {name}")
        if info.shape != tuple(target.shape):
            raise UserError(
                f"{source.path}: {name} is of shape {info.shape}, the recipe's of {tuple(target.shape)}"
            )
    for name, target in targets.items():
        first, local = _local_rows(target)
        if local.numel():
            local.copy_(source.weights.read(name, first, first + local.shape[0]))
    return source


def freeze(decoder: Decoder, patterns: list[str]) -> int:
    """Takes the parameters whose names match out of training; returns how many numbers stay fixed.

    To be called after sharding and before the optimizer is made, which then leaves them out.
    """
    frozen = 0
    for name, parameter in decoder.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
            frozen += parameter.numel()
    return frozen


def restore_optimizer(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, topology: Topology
) -> None:
    """Loads model and optimizer state from another run's checkpoint, keeping this recipe's rates and decay.

    Raises:
        UserError: if the checkpoint lacks the state of a parameter that is trained here.
    """
    saved = dcp.FileSystemReader(checkpoint / STATE_FOLDER).read_metadata().state_dict_metadata
    having = {key.removeprefix(MOMENTS).rpartition(".")[0] for key in saved if key.startswith(MOMENTS)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in having:
            raise UserError(f"{checkpoint}: has no optimizer state of {name}, which is trained here")
    settings = [_settings(group) for group in optimizer.param_groups]
    load_checkpoint(checkpoint, model, optimizer, topology)
    for group, before in zip(optimizer.param_groups, settings, strict=True):
        group.update(before)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _local_rows(target: Tensor) -> tuple[int, Tensor]:
    """First of the whole tensor's rows that this rank holds, and its part."""
    if not isinstance(target, DTensor):
        return 0, target
    _, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    return (offset[0] if offset else 0), target.to_local()
