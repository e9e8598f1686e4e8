"""Loads a checkpoint into a run of any layout; of the ranks that hold the same shard, one reads it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from train.checkpoint.files import (
    STATE_FOLDER,
    CheckpointError,
    Progress,
    agree,
    read_progress,
    writing_ranks,
)
from train.checkpoint.reading import CheckpointReader
from train.recipe.errors import UserError
from train.recipe.topology import Topology


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    topology: Topology,
    replicas: dist.ProcessGroup | None = None,
) -> Progress:
    """Loads model and optimizer in place, under this run's layout, and returns the progress.

    The optimizer keeps its groups with their rates and decay, which are the recipe's.

    Of the ranks that hold the same shard, one reads it (:func:`writing_ranks`) and sends it to the others.
    Random-number states are restored by :func:`restore_random_states`, just before training continues.

    Args:
        folder: the checkpoint.
        model: a model of any layout.
        optimizer: its optimizer.
        topology: this rank.
        replicas: the ranks that hold the same shards as this one, see
            :func:`train.layout.mesh.replicas_of`; None: each rank reads its own.

    Raises:
        UserError: on every rank, if a file of the checkpoint would run code.
        CheckpointError: on the ranks that could read, if others could not.
    """
    model_state, optimizer_state = get_state_dict(model, optimizer)
    # Saved by place in a list, though a layout with sharded weights has a group more: they stay as they are.
    groups = optimizer_state.pop("param_groups")
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    read_once(state, lambda: CheckpointReader(folder / STATE_FOLDER).load(state), topology, replicas)
    state["optimizer"]["param_groups"] = groups
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return read_progress(folder)


def read_once(
    state: dict[str, Any],
    read: Callable[[], None],
    topology: Topology,
    replicas: dist.ProcessGroup | None = None,
) -> None:
    """Fills a state on every rank: of those that hold the same shards, one reads and sends it to the others.

    Args:
        state: tensors and values, in nested dictionaries; filled in place.
        read: fills them from files.
        topology: this rank.
        replicas: the ranks that hold the same shards as this one; None: each reads its own.

    Raises:
        UserError: on every rank, if reading raises it on any.
        CheckpointError: on the ranks that could read, if reading raised anything else on others.
    """
    readers = writing_ranks(topology.world_size, replicas.size() if replicas is not None else 1)
    failure: BaseException | None = None
    if topology.rank in readers:
        try:
            read()
        except (Exception, CheckpointException) as error:  # The latter is no Exception.
            failure = error
    _raise_together(failure, topology)
    if replicas is not None:
        (source,) = set(dist.get_process_group_ranks(replicas)) & set(readers)
        _send_state(state, source, replicas)


def _raise_together(failure: BaseException | None, topology: Topology) -> None:
    """Raises this rank's failure, or another rank's; every rank calls it.

    Raises:
        UserError: for a user error on any rank.
        CheckpointError: for any other, on the ranks without one.
    """
    failures = agree((isinstance(failure, UserError), str(failure)) if failure else None, topology)
    if failure is not None:
        raise failure
    for is_users, text in filter(None, failures):
        raise UserError(text) if is_users else CheckpointError(text)


def _send_state(state: dict[str, Any], source: int, group: dist.ProcessGroup) -> None:
    """Fills the states of a group with that of one of its ranks, in place."""
    places = list(_leaves(state))
    values = [(tree, key) for tree, key in places if not isinstance(tree[key], Tensor)]
    sent = [[tree[key] for tree, key in values]]
    dist.broadcast_object_list(sent, source, group)
    for (tree, key), value in zip(values, sent[0], strict=True):
        tree[key] = value
    tensors = [tree[key].detach() for tree, key in places if isinstance(tree[key], Tensor)]
    shards = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    device = next(shard.device for shard, whole in zip(shards, tensors, strict=True) if shard is not whole)
    for shard in shards:
        if shard.numel():
            # An optimizer's count of steps may be on the CPU, where NCCL has no tensors.
            there = shard.to(device)
            dist.broadcast(there, source, group)
            shard.copy_(there)


def _leaves(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yields each value of nested dictionaries and lists by what it is in and its key there."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        if isinstance(value, dict | list):
            yield from _leaves(value)
        else:
            yield tree, key
