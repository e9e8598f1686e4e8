"""Silent corruption: a step's gradients are computed again from the same data and compared bit for bit.

A chip that computes wrongly now and then raises no error (Dixit et al. 2021, arXiv 2102.11245; Llama 3, 2024,
arXiv 2407.21783, table 5). At an interval, and where the guard would raise an alarm, a step runs again before
its update. Three comparisons, each of which sees what the others cannot:

- **in place**: the same rank on the same data. Losses, each rank's own gradients and the summed ones must be
  equal: errors that come and go. A third run decides: equal to either, the error was transient, and training
  continues with the outvoted step's sound gradients; equal to neither, it recurs, and the run ends.
- **elsewhere**: each group of ranks that share out experts computes the next group's data. Losses and own
  gradients must be those of the rank whose data it was: errors that a rank always makes in the same way.
- **at rest**: weights, buffers and moments must be bit for bit what the last update left, every step, and
  equal on all replicas: errors of memory, and of the update itself.

Nothing of it changes a sound run: the gradients that the last run in place leaves are the step's own bits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from train.recipe.errors import RecordedError
from train.recipe.schema import Compile, Recipe
from train.recipe.topology import Topology
from train.step.digests import LocalGradients, digest_all, state_digest
from train.step.language_model import LanguageModel
from train.step.microbatch import Batch

LOSSES, GRADIENTS, SUMMED, STATE = range(4)
"""Columns of a table of digests, [R ranks, 4]: each microbatch's loss on the rank; its own gradients, 0 where
they were not seen; its part of the summed and clipped ones; weights, buffers and moments."""


class CorruptionError(RecordedError):
    """A machine computes wrongly, or its memory changes."""


@dataclass(frozen=True)
class Corruption:
    """The finding of a recheck."""

    batch: int
    """Batches trained before the step."""
    what: str
    """The comparison that failed, in words."""
    ranks: tuple[int, ...]
    """Ranks that it may have been; usually one, or one group that shares out experts."""
    is_persistent: bool
    """False: outvoted by a third run."""
    sound_until: int
    """Batches after which a checkpoint is still known to be of sound machines."""

    @property
    def line(self) -> str:
        """The finding in one line."""
        kind = "persistent" if self.is_persistent else "transient"
        ranks = ", ".join(map(str, self.ranks)) or "unknown"
        return f"CORRUPTION, {kind}: batch {self.batch + 1}: {self.what}; rank {ranks}"


def differing(one: Tensor, other: Tensor) -> tuple[int, ...]:
    """The ranks at which two runs in place differ, in the first column that differs anywhere.

    A wrong loss or gradient of one rank is in the sums of all, so an earlier column says more.

    Args:
        one: table of digests.
        other: the same of another run.
    """
    for column in (LOSSES, GRADIENTS, SUMMED):
        is_seen = (one[:, column] != 0) & (other[:, column] != 0)
        differs = one[:, column] != other[:, column]
        found = (differs & is_seen) if column == GRADIENTS else differs
        if found.any():
            return tuple(found.nonzero().flatten().tolist())
    return ()


def differing_elsewhere(in_place: Tensor, elsewhere: Tensor, shift: int) -> tuple[int, ...]:
    """The ranks to suspect if data came out differently on another rank.

    Of data that differ, both ranks that computed them are suspects; whoever is twice is the one. With two
    groups all are.

    Args:
        in_place: table of digests.
        elsewhere: the same of a run in which rank r had the data of rank r + ``shift``.
        shift: ranks between the two.
    """
    ranks, suspicions = len(in_place), [0] * len(in_place)
    for rank in range(ranks):
        owner = (rank + shift) % ranks
        if not torch.equal(elsewhere[rank, :SUMMED], in_place[owner, :SUMMED]):
            suspicions[rank] += 1
            suspicions[owner] += 1
    most = max(suspicions)
    return tuple(rank for rank in range(ranks) if most and suspicions[rank] == most)


def differing_replicas(table: Tensor, replicas: int) -> tuple[int, ...]:
    """The ranks whose weights are not those of most ranks that hold the same shard; of two, both."""
    size, found = len(table) // replicas, []
    for shard in range(size):
        held = table[shard::size, STATE].tolist()
        counts = {value: held.count(value) for value in held}
        if len(counts) > 1:
            most = max(counts.values())
            sound = [value for value, count in counts.items() if count == most]
            usual = sound[0] if len(sound) == 1 else None
            found += [shard + size * place for place, value in enumerate(held) if value != usual]
    return tuple(sorted(found))


class Recheck:
    """Compares runs of a step; every rank calls every method.

    Args:
        recipe: with `guard.recheck_interval_batches`.
        model: the model to train, already sharded.
        topology: this rank.
        first_batch: batches trained before this process began.
        report: called on every rank with what is found.
        moved: called before each further run, so that no watchdog takes it for a hang.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: LanguageModel,
        topology: Topology,
        first_batch: int = 0,
        report: Callable[[Corruption], None] = lambda _: None,
        moved: Callable[[str], None] = lambda _: None,
    ) -> None:
        assert recipe.guard.recheck_interval_batches is not None
        self.interval, self.layout = recipe.guard.recheck_interval_batches, recipe.parallelism
        self.model, self.topology, self.report, self.moved = model, topology, report, moved
        self.sound_until = first_batch // self.interval * self.interval
        """Batches after which a checkpoint is known to be of sound machines: those of the last recheck."""
        self.runs = 0
        """Further runs of steps so far: the cost."""
        # A hook inside a compiled block would have it compiled again.
        has_own = topology.world_size > 1 and recipe.training.compile is Compile.off
        self._own = LocalGradients(model.decoder) if has_own else None
        device = next(model.parameters()).device
        self.has_changed = torch.zeros((), dtype=torch.float64, device=device)
        """1 if weights, buffers or moments are not what the last update left; else 0."""
        self._at_rest: Tensor | None = None
        self._state = torch.zeros((), dtype=torch.int64, device=device)

    def is_due(self, batch: int) -> bool:
        """Returns whether the step after so many batches is run again."""
        return (batch + 1) % self.interval == 0

    def begin(self, batch: int, optimizer: Optimizer) -> None:
        """Before a step: compares the state with what the last update left."""
        self._state = state_digest(self.model, optimizer)
        if self._at_rest is not None:
            self.has_changed = (self._state != self._at_rest).double()
        if self._own is not None and self.is_due(batch):
            self._own.listen()

    def end(self, optimizer: Optimizer) -> None:
        """After a step's update: notes the state."""
        self._at_rest = state_digest(self.model, optimizer)

    def find_changed(self, batch: int) -> Corruption:
        """Names the ranks whose state changed at rest, once the ranks have agreed that some did."""
        changed = self._gather(self.has_changed.long()[None])[:, 0]
        what = "weights or optimizer state changed between two steps"
        return self._found(
            Corruption(batch, what, tuple(changed.nonzero().flatten().tolist()), True, batch - 1)
        )

    def compare(
        self, batch: int, parts: Sequence[Batch], losses: Callable[[], Tensor], run: Callable[..., None]
    ) -> Corruption | None:
        """Runs a step again and compares; its sums and gradients are then those of a sound run.

        Args:
            batch: batches trained before the step.
            parts: this rank's microbatches.
            losses: each microbatch's loss in the last run.
            run: runs the step again on given microbatches, up to clipping.

        Returns:
            What was found; None: every comparison held.
        """

        def again(which: Sequence[Batch]) -> Tensor:
            self.moved("computing a step again")
            self.runs += 1
            if self._own is not None:
                self._own.listen()
            run(which)
            return self._table(losses())

        first = self._table(losses())
        if ranks := differing_replicas(first, self.layout.replicate):
            what = "replicas hold different weights"
            return self._found(Corruption(batch, what, ranks, True, self.sound_until))
        # To ranks with the same place among those that share experts, and among those that share sequences.
        shift = math.lcm(self.layout.expert, self.layout.sharing)
        moved_parts = None
        if self.topology.world_size > shift:
            moved_parts = [self._from_rank(part, shift) for part in parts]
        elsewhere = None if moved_parts is None else again(moved_parts)
        second = again(parts)
        if ranks := differing(first, second):
            third = again(parts)
            is_outvoted = not differing(third, second) or not differing(third, first)
            what = "the same step gave other losses or gradients"
            return self._found(Corruption(batch, what, ranks, not is_outvoted, self.sound_until))
        if moved_parts is not None and elsewhere is not None:
            ranks = differing_elsewhere(second, elsewhere, shift)
            if ranks:
                still = differing_elsewhere(second, again(moved_parts), shift)
                again(parts)  # Gradients and sums are this rank's own again.
                what = "the same data gave other losses or gradients on another rank"
                return self._found(Corruption(batch, what, still or ranks, bool(still), self.sound_until))
        self.sound_until = batch + 1
        return None

    def _table(self, losses: Tensor) -> Tensor:
        """Digests of the last run on all ranks, int64 [R, 4], on the host."""
        own = torch.zeros((), dtype=torch.int64) if self._own is None else self._own.take()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        row = [digest_all([losses]), own, digest_all(gradients), self._state]
        return self._gather(torch.stack([each.to(losses.device) for each in row]))

    def _gather(self, row: Tensor) -> Tensor:
        """Gathers a row of integers from every rank, on the host."""
        if self.topology.world_size == 1:
            return row[None].cpu()
        table = row.new_zeros(self.topology.world_size, len(row))
        table[self.topology.rank] = row
        dist.all_reduce(table)
        return table.cpu()

    def _from_rank(self, part: Batch, shift: int) -> Batch:
        """Returns the microbatch of the rank ``shift`` places on, and sends this rank's the other way."""
        rank, ranks = self.topology.rank, self.topology.world_size
        found = {}
        for key, value in part.items():
            sent, received = [0] * ranks, [0] * ranks
            sent[(rank - shift) % ranks] = received[(rank + shift) % ranks] = len(value)
            theirs = torch.empty_like(value)
            dist.all_to_all_single(theirs, value.contiguous(), received, sent)
            found[key] = theirs
        return found

    def _found(self, corruption: Corruption) -> Corruption:
        self.report(corruption)
        return corruption
