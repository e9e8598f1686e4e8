"""The sample order of a run: a function from positions to samples, not a table.

Position n is the n-th sample of the run in global order; a sample is a sequence of the shards' length. A
phase of longer sequences uses several positions for each. The order is independent of ranks, workers, batches
and microbatches. Every position costs the same, the first or the 10^10-th.

It is composed of two functions. :class:`data.order.mixture.Mixture` gives the domain of a position and the
number of earlier samples of that domain. :class:`data.order.shard_order.ShardOrder` gives the sample of the
domain; it continues through all phases, so every sample is read once before any is read twice.
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
    """The samples at some positions; each field is int64 [N]."""

    domain: Indices
    """Index into the plan's ``domains``."""
    sample: Indices
    """Sample of that domain, counted through its shards in the index's order."""
    epoch: Indices
    """Number of complete earlier passes over the domain."""


class OrderPlan:
    """The order of all samples, which depends only on weights, sizes and a seed."""

    def __init__(
        self,
        segments: Sequence[MixtureSegment],
        shard_samples: Mapping[str, Sequence[int] | Indices],
        *,
        seed: int,
        window_shards: int,
    ) -> None:
        """Prepares the plan; time and memory do not depend on the number of samples.

        Args:
            segments: weights over the positions, see :class:`data.order.mixture.Mixture`.
            shard_samples: samples of each shard, by domain, each above 0.
            seed: selects the order within every domain and epoch.
            window_shards: shards of a domain whose samples are shuffled together.
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
        """Names of the domains, indexed by :class:`Picks`."""
        return self.mixture.domains

    def samples(self, start: int, count: int) -> Picks:
        """The samples at positions ``start`` to ``start + count``; O(count) time and memory."""
        return self.pick(np.arange(start, start + count))

    def pick(self, positions: Indices) -> Picks:
        """The samples at ascending positions [N]; O(N) time and memory."""
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
        """The positions of a sample below ``end``, one per epoch, computed without a search."""
        order = self._orders[domain]
        read = self.consumed(end)[domain]
        ordinals = (order.ordinal_of(sample, epoch) for epoch in range(-(-read // order.sizes.total)))
        return [self.mixture.position_of(domain, ordinal) for ordinal in ordinals if ordinal < read]

    def order(self, domain: str) -> ShardOrder:
        """The order of one domain."""
        return self._orders[domain]

    def exhausted_at(self, domain: str, epochs: float, end: int) -> int | None:
        """The first position below ``end`` that would exceed ``epochs`` passes over a domain; None: none."""
        most = int(epochs * self._orders[domain].sizes.total)
        if self.consumed(end)[domain] <= most:
            return None
        return bisect_left(range(end), most + 1, key=lambda at: self.consumed(at + 1)[domain])
