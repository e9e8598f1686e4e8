"""Finds the newest copy in the hosts' memory that all ranks can reach, and loads it under the same layout."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from train.checkpoint.files import CheckpointError, Progress, agree, set_random_states
from train.checkpoint.groups import first_difference, hyperparameters_of
from train.checkpoint.memory_files import (
    Head,
    as_bytes,
    describe,
    local_tensors,
    read_copy,
    read_head,
    require_whole,
    unpack,
    views,
)
from train.recipe.errors import UserError
from train.recipe.topology import Topology
from train.record.host_memory import TOKEN_FILE, copies_in, copy_name, memory_folder
from train.record.process import host_name

CHUNK_BYTES = 1 << 25
"""Sent and received at a time."""

Place = tuple[str, int]
"""A host, and the rank whose state it holds."""


@dataclass
class MemoryCopy:
    """A copy of the whole run's state, of which this rank holds its own part."""

    progress: Progress
    head: Head
    data: memoryview
    """This rank's tensors, until they are loaded."""
    sent: dict[int, str]
    """Ranks whose own host had no copy, with the host that sent theirs."""

    def load(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, topology: Topology, *, is_fork: bool = False
    ) -> None:
        """Loads model and optimizer in place; the optimizer keeps its groups, which are the recipe's.

        Args:
            model: a model of the layout that made the copy.
            optimizer: its optimizer.
            topology: this rank.
            is_fork: the run may train with other hyperparameters than the one that it came from.

        Raises:
            UserError: on every rank, if the copy does not fit or the weights are trained otherwise now.
        """
        model_state, optimizer_state = get_state_dict(model, optimizer)
        groups = optimizer_state.pop("param_groups")
        state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
        tensors = list(local_tensors(state))
        mismatch = ""
        if describe(tensors) != self.head.tensors:
            mismatch = "it holds other tensors than the model has"
        elif not is_fork:
            now = hyperparameters_of(model, optimizer.param_groups)
            mismatch = first_difference(self.head.hyperparameters, now)
        found = next(filter(None, agree(mismatch, topology)), "")
        if found:
            raise UserError(
                f"the copy in memory of batch {self.progress.batch} does not fit: {found}",
                key="checkpoint.memory_interval_batches",
                remedy="resume with the version that made it, or from the file system with null",
            )
        with torch.no_grad():
            for tensor, place in views(as_bytes(self.data), tensors):
                tensor.copy_(place)
        self.data = memoryview(b"")
        optimizer_state["param_groups"] = groups
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)

    def restore_random_states(self) -> None:
        """Restores this rank's random-number states, just before training continues."""
        set_random_states(self.head.randoms)


def find_copy(
    run: Path,
    layout: str,
    topology: Topology,
    at_least: int,
    refuse: Callable[[Progress], str] = lambda _: "",
) -> tuple[MemoryCopy | None, list[str]]:
    """Returns the newest copy of which every rank's part is whole on some host, and complaints.

    Every rank calls it. A rank takes its part from its own host, or else has another host send it.

    Args:
        run: the run's folder.
        layout: see :func:`train.checkpoint.memory_files.layout_digest`; copies of others are passed over.
        topology: this rank.
        at_least: copies of earlier batches are passed over.
        refuse: returns why a copy can't be used, or an empty string; identical on all ranks.

    Raises:
        CheckpointError: if a part came damaged from its host.
    """
    token = agree(_token(run) if topology.is_main else "", topology)[0]
    if not token:
        return None, []
    folder, hosts = memory_folder(run, token), agree(host_name(), topology)
    is_first = hosts.index(hosts[topology.rank]) == topology.rank
    listings = agree(_listed(folder, layout) if is_first else [], topology)
    places: dict[tuple[int, str], set[Place]] = {}
    progresses: dict[tuple[int, str], Progress] = {}
    complaints: list[str] = []
    for host, listing in zip(hosts, listings, strict=True):
        for found in listing:
            if isinstance(found, str):
                complaints.append(found)
                continue
            places.setdefault((found.batch, found.made_by), set()).add((host, found.rank))
            if found.progress is not None:
                progresses[found.batch, found.made_by] = Progress(**found.progress)
    for batch, made_by in sorted(places, reverse=True):
        if batch < at_least:
            break
        there = places[batch, made_by]
        holders = _holders(there, hosts)
        if holders is not None and (refused := refuse(progresses[batch, made_by])):
            complaints.append(refused)
            continue
        while holders is not None:
            opened, failures = _open(folder, batch, holders, topology, hosts)
            failed = [each for part in agree(failures, topology) for each in part]
            if not failed:
                head, data = _take(opened, holders, topology)
                sent = {r: hosts[h] for r, h in enumerate(holders) if hosts[h] != hosts[r]}
                return MemoryCopy(progresses[batch, made_by], head, data, sent), complaints
            for place, line in failed:
                there.discard(place)
                complaints.append(f"{line}; another copy is used instead")
            holders = _holders(there, hosts)
    return None, complaints


@dataclass(frozen=True)
class _Listed:
    """A copy that a host has."""

    rank: int
    batch: int
    made_by: str
    progress: dict[str, Any] | None
    """The run's; only with rank 0's."""


def _token(run: Path) -> str:
    try:
        return (run / TOKEN_FILE).read_text()
    except (OSError, ValueError):
        return ""


def _listed(folder: Path, layout: str) -> list["_Listed | str"]:
    """Lists this host's copies; of a damaged one, says why."""
    found: list[_Listed | str] = []
    for (rank, batch), file in sorted(copies_in(folder).items()):
        try:
            head = read_head(file)
        except CheckpointError as error:
            found.append(f"{error}; another copy is used instead")
            continue
        if (head.layout, head.rank, head.batch) == (layout, rank, batch):
            found.append(_Listed(rank, batch, head.made_by, head.progress if rank == 0 else None))
    return found


def _holders(places: set[Place], hosts: list[str]) -> list[int] | None:
    """Returns by rank which rank reads its part of a copy; None if there is not a part for each."""
    holders = []
    for rank, own in enumerate(hosts):
        there = sorted(host for host, whose in places if whose == rank)
        if not there:
            return None
        if own in there:
            holders.append(rank)
            continue
        ranks = [each for each, host in enumerate(hosts) if host == there[0]]
        holders.append(ranks[rank % len(ranks)])
    return holders


def _open(
    folder: Path, batch: int, holders: list[int], topology: Topology, hosts: list[str]
) -> tuple[dict[int, tuple[Head, memoryview]], list[tuple[Place, str]]]:
    """Reads the parts that this rank holds; returns them by rank, and those that are damaged."""
    opened, failures = {}, list[tuple[Place, str]]()
    for rank, holder in enumerate(holders):
        if holder == topology.rank:
            try:
                opened[rank] = read_copy(folder / copy_name(rank, batch))
            except CheckpointError as error:
                failures.append(((hosts[holder], rank), str(error)))
    return opened, failures


def _take(
    opened: dict[int, tuple[Head, memoryview]], holders: list[int], topology: Topology
) -> tuple[Head, memoryview]:
    """Sends other ranks the parts that this one has read for them, and returns its own."""
    mine = opened.get(topology.rank)
    for rank, holder in enumerate(holders):
        if holder == rank:
            continue
        if holder == topology.rank:
            head, data = opened[rank]
            dist.send_object_list([head.pack(head.sha256), len(data)], rank)
            for begin in range(0, len(data), CHUNK_BYTES):
                dist.send_object_list([bytes(data[begin : begin + CHUNK_BYTES])], rank)
        elif rank == topology.rank:
            described: list[Any] = [None, None]
            dist.recv_object_list(described, holder)
            content = memoryview(bytearray(described[1]))
            for begin in range(0, len(content), CHUNK_BYTES):
                chunk: list[Any] = [None]
                dist.recv_object_list(chunk, holder)
                content[begin : begin + CHUNK_BYTES] = chunk[0]
            name = f"the copy of rank {rank} that rank {holder} sent"
            head, _ = unpack(described[0], name)
            require_whole(head, content, name)
            mine = head, content
    assert mine is not None, "every rank has a holder"
    return mine
