"""The start of one rank as in a run, at full size: mesh, shards, optimizer, saver; and the plan of its save.

Weights and moments are reserved and not written, so that a rank of DBRX takes a few hundred MB here. For a
process of its own.
"""

import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor

from launch.rehearse.alone import AskedGroup, join_alone
from launch.rehearse.plans import Planning, rehearse_planning
from launch.rehearse.store import Requests
from train import run  # all that a rank imports, for its memory
from train.checkpoint.saver import CheckpointSaver
from train.layout import mesh
from train.layout.optim import build_optimizer
from train.model.decoder import Decoder
from train.recipe import sizes
from train.recipe.schema import Precision, Recipe
from train.recipe.topology import Topology
from train.step.microbatch import MicrobatchModel


@dataclass
class StartCosts:
    """Costs of a rank's start on this machine."""

    rank: int
    seconds: dict[str, float] = field(default_factory=dict)
    """By part of the start."""
    groups: list[AskedGroup] = field(default_factory=list)
    store: Requests = field(default_factory=Requests)
    """Requests of this rank's Python to the store, without those of the backends."""
    shard_bytes: int = 0
    """Weights and optimizer state of this rank."""
    process_bytes: int = 0
    """Memory of this process once its model is built, without weights and moments."""
    memory_bytes: int = 0
    """Most memory of this process."""
    is_writer: bool = True
    planning: Planning | None = None
    """Of a rank that writes checkpoints."""


def rehearse_start(recipe: Recipe, world_size: int, rank: int, ranks_per_node: int) -> StartCosts:
    """Starts one rank of a job whose other ranks are not there, and plans its first save."""
    found = StartCosts(rank)
    with _timed(found, "process groups"):
        job = join_alone(world_size, rank)
        built = mesh.build_mesh(recipe.parallelism, world_size, "cpu")
    # Reserved memory stays unwritten; how long real weights take is measured on a few layers.
    mesh.initialize = lambda *_: None
    with _timed(found, "model and shards"):
        decoder = Decoder(
            recipe.model,
            device="meta",
            recompute=sizes.recomputed(recipe.training, sizes.layers(recipe.model)),
            loss_chunk_tokens=recipe.training.loss_chunk_tokens,
        )
        mesh.build_sharded(decoder, built, Precision.bf16, recipe.seed)
        run.freeze(decoder, recipe.training.frozen)
        model = MicrobatchModel(decoder, recipe, Precision.bf16)
        optimizer = build_optimizer(model, recipe.optimizer)
        reserve_moments(optimizer, build_optimizer(nn.Linear(2, 2), recipe.optimizer))
    found.process_bytes = _most_memory()
    topology = Topology(rank, world_size, rank % ranks_per_node, min(ranks_per_node, world_size))
    with tempfile.TemporaryDirectory() as folder, _timed(found, "saver"):
        replicas = mesh.replicas_of(model)
        saver = CheckpointSaver(Path(folder), topology, recipe.checkpoint.keep_last, replicas)
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    found.is_writer = saver.is_writer
    found.shard_bytes = sum(_local_bytes(value) for value in _tensors(state))
    if saver.is_writer:
        found.planning = rehearse_planning(state, saver.writers, rank)
    found.groups, found.store = job.groups, job.store.total()
    found.memory_bytes = _most_memory()
    return found


def reserve_moments(optimizer: torch.optim.Optimizer, like: torch.optim.Optimizer) -> None:
    """Gives an optimizer the state that it has after its first step, in memory that is not written.

    Args:
        optimizer: one that has not stepped yet.
        like: a small one of the same kind, which takes a step.
    """
    examples = {}
    for group in like.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
            examples[group.get("orthogonal")] = parameter  # Muon keeps other moments of some weights
    like.step()
    for group in optimizer.param_groups:
        example = examples[group.get("orthogonal")]
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                name: torch.empty_like(parameter, dtype=value.dtype)
                if value.shape == example.shape
                else value.clone()
                for name, value in like.state[example].items()
            }


def _most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _local_bytes(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors of nested dictionaries and lists."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(value)


@contextmanager
def _timed(found: StartCosts, part: str) -> Iterator[None]:
    """Notes the seconds of a part of the start."""
    begun = time.process_time()
    yield
    found.seconds[part] = time.process_time() - begun
