"""Which sample of which domain stands at each position of training: a function, not a table.

Position n is the n-th sample of the run in global order. It says nothing of ranks, workers, batches or
microbatches: those take their parts of it. Any position costs the same, the first or the 10^10-th.

Two functions make it up. :class:`Mixture` says which domain a position belongs to and how many of that
domain came before: cumulated quotas are rounded, so that the error is carried over and never drawn at
random. :class:`data.permutation.KeyedPermutation` says which sample of the domain that is; every
sample is read once before any is read twice, and each epoch has an order of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.permutation import Indices, KeyedPermutation


@dataclass(frozen=True)
class _Branch:
    """Two groups of domains; the lighter one gets ``share`` of what arrives here, at most a half."""

    share: float
    light: "_Branch | int"
    heavy: "_Branch | int"


class _Subtree(NamedTuple):
    """A tree over some of the domains."""

    weight: float
    slack: float
    node: "_Branch | int"


class Picks(NamedTuple):
    """What stands at consecutive positions, each int64 [N]."""

    domain: Indices
    """Index into the plan's ``domains``."""
    sample: Indices
    """Sample of that domain."""
    epoch: Indices
    """How often the domain had been read to its end before."""


class Mixture:
    """Positions to domains in proportion to constant weights, in closed form.

    The domains are the leaves of a binary tree. At every node the first m arrivals give
    ``floor(share * m + 1/2)`` to the lighter side and the rest to the other, so that both sides are
    within half a sample of their quota at every m. Deviations add up along a path, each weakened by
    the share that passes on: :attr:`worst_error` is their sum.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Builds the tree.

        Args:
            weights: share of the samples per domain, each above 0; they are normalised.
        """
        assert weights and all(weight > 0 for weight in weights.values()), weights
        self.domains = tuple(sorted(weights))
        """Names in alphabetical order, so that the recipe's order of keys changes nothing."""
        total = sum(weights[name] for name in self.domains)
        self._weights = [weights[name] / total for name in self.domains]
        self._root = _best_tree(self._weights)

    @property
    def worst_error(self) -> float:
        """Bound on ``|samples of a domain - weight * n|`` over all domains and all n.

        A path's sum over its nodes, the root left out, of leaf weight / (2 * node weight). 1/2 for two
        domains, below 1 for three and four, seldom above 1 for more (1.6 for extreme weights).
        """

        def bound(node: _Branch | int, inverse_weights: float) -> float:
            weight = self._weight(node)
            here = inverse_weights + 1 / weight
            if isinstance(node, int):
                return 0.5 * weight * here
            return max(bound(node.light, here), bound(node.heavy, here))

        if isinstance(self._root, int):
            return 0.0
        return max(bound(self._root.light, 0.0), bound(self._root.heavy, 0.0))

    def assign(self, start: int, count: int) -> tuple[Indices, Indices]:
        """The domain of each position and the number of that domain's samples before it.

        Args:
            start: first position.
            count: number of positions N.

        Returns:
            Domain indices and ordinals, both int64 [N].
        """
        domain = np.empty(count, np.int64)
        ordinal = np.empty(count, np.int64)

        def descend(node: _Branch | int, slots: Indices, arrivals: Indices) -> None:
            if isinstance(node, int):
                domain[slots], ordinal[slots] = node, arrivals
                return
            before = _light_part(node.share, arrivals)
            is_light = _light_part(node.share, arrivals + 1) > before
            descend(node.light, slots[is_light], before[is_light])
            descend(node.heavy, slots[~is_light], (arrivals - before)[~is_light])

        descend(self._root, np.arange(count), np.arange(start, start + count))
        return domain, ordinal

    def consumed(self, position: int) -> dict[str, int]:
        """Samples of each domain among the first ``position`` positions."""
        counts: dict[str, int] = {}

        def descend(node: _Branch | int, arrivals: int) -> None:
            if isinstance(node, int):
                counts[self.domains[node]] = arrivals
                return
            light = int(_light_part(node.share, np.array([arrivals]))[0])
            descend(node.light, light)
            descend(node.heavy, arrivals - light)

        descend(self._root, position)
        return dict(sorted(counts.items()))

    def _weight(self, node: _Branch | int) -> float:
        if isinstance(node, int):
            return self._weights[node]
        return self._weight(node.light) + self._weight(node.heavy)


class Plan:
    """The order of all samples, from weights, sizes and a seed alone."""

    def __init__(
        self, weights: Mapping[str, float], samples_per_domain: Mapping[str, int], seed: int
    ) -> None:
        """Prepares the plan; nothing grows with the sizes.

        Args:
            weights: share of the samples per domain, each above 0.
            samples_per_domain: size of each of these domains in samples, above 0.
            seed: selects the order within every domain and epoch.
        """
        self.mixture = Mixture(weights)
        self.sizes = tuple(samples_per_domain[name] for name in self.mixture.domains)
        assert all(size > 0 for size in self.sizes), samples_per_domain
        self.seed = seed

    @property
    def domains(self) -> tuple[str, ...]:
        """Names that the indices in :class:`Picks` point to."""
        return self.mixture.domains

    def samples(self, start: int, count: int) -> Picks:
        """What stands at positions ``start`` to ``start + count``; O(count) time and memory."""
        domain, ordinal = self.mixture.assign(start, count)
        sample = np.empty(count, np.int64)
        epoch = np.empty(count, np.int64)
        for index, (name, size) in enumerate(zip(self.domains, self.sizes, strict=True)):
            slots = np.flatnonzero(domain == index)
            epoch[slots], within = np.divmod(ordinal[slots], size)
            for turn in np.unique(epoch[slots]):
                these = epoch[slots] == turn
                # The domain's name, not its index: a domain that joins later leaves the others' order.
                permute = KeyedPermutation(size, self.seed, name, int(turn))
                sample[slots[these]] = permute(within[these])
        return Picks(domain, sample, epoch)


def _best_tree(weights: list[float]) -> _Branch | int:
    """The tree in which every domain stays nearest to its quota.

    A leaf of weight w stays within one sample if w times the sum of 1/weight over the inner nodes
    above it, the root left out, is at most 1. So a subtree has a slack, the sum that it tolerates from
    above: 1/w for a leaf, and for a node the smaller of its sides' less the node's own 1/weight. Of
    all splits the one with the greatest slack is taken; beyond 8 subtrees the lightest are joined first.
    """
    trees: list[_Subtree] = [_Subtree(w, 1 / w, leaf) for leaf, w in enumerate(weights)]
    while len(trees) > 8:
        trees.sort(key=lambda tree: -tree.weight)
        trees.append(_join(trees.pop(), trees.pop()))
    known: dict[int, _Subtree] = {1 << bit: tree for bit, tree in enumerate(trees)}
    for mask in range(1, 1 << len(trees)):
        if mask in known:
            continue
        part = (mask - 1) & mask
        joined = []
        while part > mask ^ part:
            joined.append(_join(known[part], known[mask ^ part]))
            part = (part - 1) & mask
        known[mask] = max(joined, key=lambda tree: tree.slack)
    return known[(1 << len(trees)) - 1].node


def _join(one: _Subtree, other: _Subtree) -> _Subtree:
    light, heavy = sorted((one, other), key=lambda tree: tree.weight)
    weight = one.weight + other.weight
    node = _Branch(light.weight / weight, light.node, heavy.node)
    return _Subtree(weight, min(one.slack, other.slack) - 1 / weight, node)


def _light_part(share: float, arrivals: NDArray[np.int64]) -> Indices:
    """How many of the first ``arrivals`` go to the lighter side."""
    return np.floor(share * arrivals + 0.5).astype(np.int64)
