"""Initial weights from other training, into any layout; frozen weights; restored optimizer state.

Each rank copies only the rows of its shard; from safetensors it reads no others. Of the ranks that hold the
same shard, one reads it and sends it to the others.
"""

from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from train.checkpoint.files import ONE_RANK
from train.checkpoint.loading import load_checkpoint, read_once
from train.checkpoint.reading import CheckpointReader
from train.hf.folders import STATE_FOLDER
from train.hf.weights import WeightSource, newest, open_weights
from train.model.decoder import Decoder
from train.model.init import own_part
from train.recipe import sizes
from train.recipe.errors import UserError
from train.recipe.schema import OptimizerStart, Recipe
from train.recipe.topology import Topology
from train.record.run_folder import CHECKPOINTS_FOLDER

MOMENTS = "optimizer.state."
"""Prefix of the optimizer state's names in a checkpoint."""


def find_start(recipe: Recipe) -> Path | None:
    """Returns the weights that the recipe starts from; for a run, its newest complete checkpoint.

    To be called by one rank, as it reads the whole checkpoint.

    Raises:
        UserError: if the run has no complete checkpoint.
    """
    if recipe.start.weights is None:
        return None
    path = Path(recipe.start.weights)
    return newest(path) if (path / CHECKPOINTS_FOLDER).is_dir() else path


def start_from(
    path: Path,
    recipe: Recipe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    topology: Topology,
    replicas: dist.ProcessGroup | None = None,
) -> None:
    """Loads the initial weights and, if the recipe restores it, the optimizer state; every rank calls it.

    Args:
        path: the result of :func:`find_start` on rank 0.
        recipe: the recipe of this run.
        model: the trainer's model around a decoder; on its device, sharded, already initialised.
        optimizer: the model's optimizer, over the trained parameters.
        topology: this rank.
        replicas: the ranks that hold the same shards as this one, of which one reads them; None: each does.
    """
    load_initial_weights(next(m for m in model.modules() if isinstance(m, Decoder)), path, topology, replicas)
    if recipe.start.optimizer is OptimizerStart.restored:
        restore_optimizer(path, model, optimizer, topology, replicas)


def load_initial_weights(
    decoder: Decoder,
    path: Path,
    topology: Topology = ONE_RANK,
    replicas: dist.ProcessGroup | None = None,
) -> WeightSource:
    """Fills a decoder, whole or sharded, with existing weights.

    Args:
        decoder: on its device, sharded in the run's layout.
        path: a checkpoint or a folder of weights. A run's folder works too, but each rank would then verify
            the whole checkpoint: with several ranks, pass the result of :func:`train.hf.weights.newest`.
        topology: this rank; as it is, the rank reads by itself.
        replicas: as of :func:`start_from`.

    Returns:
        The source, with the model and recipe of the weights.

    Raises:
        UserError: if a tensor is missing or has another shape.
    """
    source = open_weights(path)
    fill(decoder, source, topology, replicas)
    return source


def fill(
    decoder: Decoder,
    source: WeightSource,
    topology: Topology = ONE_RANK,
    replicas: dist.ProcessGroup | None = None,
) -> None:
    """Fills a decoder as :func:`load_initial_weights` does, with weights that are open.

    Raises:
        UserError: if a tensor is missing or has another shape.
    """
    targets = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    targets |= {
        name: buffer for name, buffer in decoder.named_buffers() if name in source.weights.tensors
    }  # A balancing bias that the source lacks stays zero.
    if not source.model.mtp:  # a layer of multi-token prediction stays as it was drawn
        targets = {name: target for name, target in targets.items() if not name.startswith(sizes.MTP)}
    for name, target in targets.items():
        info = source.weights.tensors.get(name)
        if info is None:
            raise UserError(f"{source.path}: has no {name}")
        if info.shape != tuple(target.shape):
            raise UserError(
                f"{source.path}: {name} has shape {info.shape}, the recipe's has {tuple(target.shape)}"
            )

    def read() -> None:
        for name, target in targets.items():
            local, first, column = own_part(target)
            if local.numel():
                rows = source.weights.read(name, first, first + local.shape[0])
                local.copy_(rows[..., column : column + local.shape[-1]])

    read_once(targets, read, topology, replicas)


def freeze(decoder: Decoder, patterns: list[str]) -> int:
    """Freezes the parameters whose names match; returns the number of frozen elements.

    To be called after sharding and before the optimizer is built, which then excludes them.
    """
    frozen = 0
    for name, parameter in decoder.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
            frozen += parameter.numel()
    return frozen


def restore_optimizer(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    topology: Topology,
    replicas: dist.ProcessGroup | None = None,
) -> None:
    """Loads model and optimizer state from another run's checkpoint, keeping this recipe's rates and decay.

    Args:
        checkpoint: the other run's.
        model: as of :func:`start_from`.
        optimizer: its optimizer.
        topology: this rank.
        replicas: the ranks that hold the same shards as this one, of which one reads them; None: each does.

    Raises:
        UserError: if the checkpoint lacks the optimizer state of a trained parameter.
    """
    require_moments(checkpoint, model)
    load_checkpoint(checkpoint, model, optimizer, topology, replicas)


def require_moments(checkpoint: Path, model: nn.Module) -> None:
    """Raises if a checkpoint lacks the optimizer state of a parameter that the model trains.

    Raises:
        UserError: with the parameter's name.
    """
    saved = CheckpointReader(checkpoint / STATE_FOLDER).metadata.state_dict_metadata
    having = {key.removeprefix(MOMENTS).rpartition(".")[0] for key in saved if key.startswith(MOMENTS)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in having:
            raise UserError(f"{checkpoint}: has no optimizer state of {name}, which this run trains")
