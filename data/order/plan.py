"""Which sample of which domain stands at each position of training: a function, not a table.

Position n is the n-th sample of the run in global order, a sample being a sequence of the shards' length;
a phase of longer sequences takes several positions for each. It says nothing of ranks, workers, batches
or microbatches: those take their parts of it. Any position costs the same, the first or the 10^10-th.

Two functions make it up. :class:`data.order.mixture.Mixture` says which domain a position belongs to and how
many of that domain came before. :class:`data.order.shard_order.ShardOrder` says which sample of the domain
that is; it goes on through all phases, so that every sample is read once before any is read twice.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data.order.mixture import Mixture
from data.order.permutation import Indices
from data.order.shard_order import Grouping, ShardOrder, ShardSizes
from train.recipe.curriculum import MixtureSegment


class Picks(NamedTuple):
    """What stands at some positions, each int64 [N]."""

    domain: Indices
    """Index into the plan's ``domains``."""
    sample: Indices
    """Sample of that domain, counted through its shards in the index's order."""
    epoch: Indices
    """How often the domain had been read to its end before."""


class OrderPlan:
    """The order of all samples, from weights, sizes and a seed alone."""

    def __init__(
        self,
        segments: Sequence[MixtureSegment],
        shard_samples: Mapping[str, Sequence[int] | Indices],
        *,
        seed: int,
        window_shards: int,
    ) -> None:
        """Prepares the plan; nothing grows with the sizes.

        Args:
            segments: weights over the positions, see :class:`data.order.mixture.Mixture`.
            shard_samples: samples of each shard of these domains, each above 0.
            seed: selects the order within every domain and epoch.
            window_shards: shards of a domain whose samples are shuffled among each other.
        """
        self.mixture = Mixture(segments)
        changes = [(s.first, s.step) for s in segments]
        changes = [c for n, c in enumerate(changes) if not n or c[1] != changes[n - 1][1]]
        before = [self.mixture.consumed(first) for first, _ in changes]
        self._orders = {
            name: ShardOrder(
                name,
                ShardSizes.of(shard_samples[name]),
                seed=seed,
                window_shards=window_shards,
                groupings=[
                    Grouping(counts[name], step) for counts, (_, step) in zip(before, changes, strict=True)
                ],
            )
            for name in self.mixture.domains
        }
        self.sizes = tuple(self._orders[name].sizes.total for name in self.domains)
        """Samples of each domain."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Names that the indices in :class:`Picks` point to."""
        return self.mixture.domains

    def samples(self, start: int, count: int) -> Picks:
        """What stands at positions ``start`` to ``start + count``; O(count) time and memory."""
        return self.pick(np.arange(start, start + count))

    def pick(self, positions: Indices) -> Picks:
        """What stands at ascending positions [N]; O(N) time and memory."""
        domain, ordinal = self.mixture.assign(positions)
        sample, epoch = np.empty_like(domain), np.empty_like(domain)
        for index, name in enumerate(self.domains):
            slots = np.flatnonzero(domain == index)
            if slots.size:
                sample[slots], epoch[slots] = self._orders[name].samples(ordinal[slots])
        return Picks(domain, sample, epoch)

    def consumed(self, position: int) -> dict[str, int]:
        """Samples of each domain among the first ``position`` positions, in the order of ``domains``."""
        return self.mixture.consumed(position)

    def positions_of(self, domain: str, sample: int, end: int) -> list[int]:
        """The positions below ``end`` at which a sample stands, one for each epoch; nothing is searched."""
        order = self._orders[domain]
        read = self.consumed(end)[domain]
        ordinals = (order.ordinal_of(sample, epoch) for epoch in range(-(-read // order.sizes.total)))
        return [self.mixture.position_of(domain, ordinal) for ordinal in ordinals if ordinal < read]

    def order(self, domain: str) -> ShardOrder:
        """The order of one domain."""
        return self._orders[domain]

    def exhausted_at(self, domain: str, epochs: float, end: int) -> int | None:
        """The first position below ``end`` that would read a domain beyond ``epochs`` times; None: none."""
        most = int(epochs * self._orders[domain].sizes.total)
        if self.consumed(end)[domain] <= most:
            return None
        return bisect_left(range(end), most + 1, key=lambda at: self.consumed(at + 1)[domain])
