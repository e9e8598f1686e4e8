"""The mixture: the domain of each position of training, exact and in closed form over all phases.

Weights are constant over a :class:`train.recipe.curriculum.MixtureSegment` of positions; a ramp consists of
many segments. Within a segment the domains are the leaves of a binary tree. At every node, of the first m
arrivals ``floor(e + share * m + 1/2)`` go to one side and the rest to the other, so both stay within half a
sequence of their quota. The error at the end of a segment is carried over into the next. Nothing is drawn at
random, and all of it is integer arithmetic, equal on every machine.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.order.permutation import Indices
from train.recipe.curriculum import MixtureSegment

PARTS = 1_000_000_000
"""Weights are integers in units of 1/PARTS: decimal weights of up to nine digits are exact."""
EXHAUSTIVE_TREES = 8
"""Up to this many subtrees, all trees over them are compared."""

_Shape = tuple["_Shape", "_Shape"] | int
"""A tree over domains, which are its leaves."""


class _Branch(NamedTuple):
    """Of m arrivals ``(offset + part * m) // whole`` go to ``side``, within 0 and m."""

    part: int
    whole: int
    offset: int
    side: "_Branch | int"
    other: "_Branch | int"

    def to_side(self, arrivals: Indices) -> Indices:
        # By whole rounds and the rest of one: a part times all arrivals would not fit int64 from 2^33 on.
        rounds, rest = np.divmod(arrivals, self.whole)
        return np.clip(self.part * rounds + (self.offset + self.part * rest) // self.whole, 0, arrivals)


class _DomainTree(NamedTuple):
    """The tree over the domains of a segment."""

    segment: MixtureSegment
    root: _Branch | int
    consumed: list[int]
    """Samples of each domain before the segment."""


class Mixture:
    """Maps positions to domains and to the number of earlier samples of that domain.

    Within a segment of up to four domains, every domain stays within one sequence of its quota, whatever the
    weights. With more domains it is rarely more than one (1.6 in the worst case seen); where weights change,
    at most two.
    """

    def __init__(self, segments: Sequence[MixtureSegment]) -> None:
        """Builds the trees of the segments in O(segments x domains), whatever their lengths.

        Args:
            segments: in order, the first from position 0; each holds whole sequences.
        """
        assert segments and segments[0].first == 0
        self.domains = tuple(sorted({name for segment in segments for name in segment.weights}))
        """Names in alphabetical order, so that the order of keys in the recipe does not matter."""
        self._trees: list[_DomainTree] = []
        shapes: dict[tuple[int, tuple[int, ...]], _Shape] = {}
        consumed = [0] * len(self.domains)
        # In samples x PARTS: quota minus samples given.
        owed = [0] * len(self.domains)
        for number, segment in enumerate(segments):
            parts = _parts([segment.weights.get(name, 0.0) for name in self.domains])
            active = tuple(index for index, part in enumerate(parts) if part)
            if (segment.stage, active) not in shapes:
                shapes[segment.stage, active] = _best_shape({index: parts[index] for index in active})
            root = _plant(shapes[segment.stage, active], parts, owed, segment.step)[0]
            self._trees.append(_DomainTree(segment, root, consumed))
            if number + 1 < len(segments):
                length = segments[number + 1].first - segment.first
                assert length > 0 and length % segment.step == 0, (segment, length)
                after = self._consumed(self._trees[-1], segment.first + length)
                given = [now - before for now, before in zip(after, consumed, strict=True)]
                owed = [o + p * length - PARTS * g for o, p, g in zip(owed, parts, given, strict=True)]
                consumed = after
        self._firsts = [segment.first for segment in segments]

    def assign(self, positions: Indices) -> tuple[Indices, Indices]:
        """Returns the domain of each position, and the number of that domain's samples before it.

        Args:
            positions: ascending, int64 [N].

        Returns:
            Domain indices and ordinals, both int64 [N].
        """
        domain = np.empty(positions.size, np.int64)
        ordinal = np.empty(positions.size, np.int64)
        cuts = np.searchsorted(positions, self._firsts)
        for tree, begin, end in zip(self._trees, cuts, [*cuts[1:], positions.size], strict=True):
            if begin < end:
                segment = tree.segment
                sequences, within = np.divmod(positions[begin:end] - segment.first, segment.step)
                part = domain[begin:end]
                _descend(tree.root, np.arange(end - begin), sequences, part, ordinal[begin:end])
                ordinal[begin:end] *= segment.step
                ordinal[begin:end] += np.array(tree.consumed)[part] + within
        return domain, ordinal

    def consumed(self, position: int) -> dict[str, int]:
        """Samples of each domain among the first ``position`` positions; O(log segments + domains)."""
        tree = self._trees[bisect_right(self._firsts, position) - 1]
        return dict(zip(self.domains, self._consumed(tree, position), strict=True))

    def position_of(self, domain: str, ordinal: int) -> int:
        """The position of a domain's sample number ``ordinal``; it must have a weight in some phase."""
        high = 1
        while self.consumed(high)[domain] <= ordinal:
            high *= 2
            assert high < 1 << 62, f"{domain} never reaches sample {ordinal}"
        return bisect_right(range(high), ordinal, key=lambda position: self.consumed(position)[domain]) - 1

    def _consumed(self, tree: _DomainTree, position: int) -> list[int]:
        counts, segment = list(tree.consumed), tree.segment
        sequences, within = divmod(position - segment.first, segment.step)

        def descend(node: _Branch | int, arrivals: int) -> None:
            if isinstance(node, int):
                counts[node] += arrivals * segment.step
                return
            to_side = min(max((node.offset + node.part * arrivals) // node.whole, 0), arrivals)
            descend(node.side, to_side)
            descend(node.other, arrivals - to_side)

        descend(tree.root, sequences)
        if within:
            domain = np.empty(1, np.int64)
            _descend(tree.root, np.arange(1), np.array([sequences]), domain, np.empty(1, np.int64))
            counts[int(domain[0])] += within
        return counts


def _descend(
    node: _Branch | int, slots: Indices, arrivals: Indices, domain: Indices, ordinal: Indices
) -> None:
    """Writes the domain of each arrival, and the number of earlier arrivals of that domain."""
    if isinstance(node, int):
        domain[slots], ordinal[slots] = node, arrivals
        return
    before = node.to_side(arrivals)
    to_side = node.to_side(arrivals + 1) > before
    _descend(node.side, slots[to_side], before[to_side], domain, ordinal)
    _descend(node.other, slots[~to_side], (arrivals - before)[~to_side], domain, ordinal)


def _parts(weights: list[float]) -> list[int]:
    """Converts weights to integers that sum to :data:`PARTS`, by the method of largest remainders."""
    total = sum(weights)
    assert total > 0 and min(weights) >= 0, weights
    shares = [weight / total * PARTS for weight in weights]
    # Rounded to nine digits: what remains of a decimal weight is binary rounding error.
    shares = [float(round(share)) if abs(share - round(share)) < 1e-6 else share for share in shares]
    parts = [int(share) for share in shares]
    by_remainder = sorted(range(len(parts)), key=lambda index: parts[index] - shares[index])
    for index in by_remainder[: PARTS - sum(parts)]:
        parts[index] += 1
    return parts


def _plant(shape: _Shape, parts: list[int], owed: list[int], step: int) -> tuple[_Branch | int, int, int]:
    """Builds the tree of a segment; also returns the sums of parts and of debt over its leaves."""
    if isinstance(shape, int):
        return shape, parts[shape], owed[shape]
    side, side_parts, side_owed = _plant(shape[0], parts, owed, step)
    other, other_parts, other_owed = _plant(shape[1], parts, owed, step)
    whole, all_owed = side_parts + other_parts, side_owed + other_owed
    # The side's debt minus its share of the node's own debt, which the nodes above handle; in 1 / whole
    # sequences.
    debt = (side_owed * whole - side_parts * all_owed) // (PARTS * step)
    return _Branch(side_parts, whole, debt + whole // 2, side, other), whole, all_owed


class _Subtree(NamedTuple):
    """A tree over some of the domains."""

    weight: float
    slack: float
    shape: _Shape


def _best_shape(parts: dict[int, int]) -> _Shape:
    """Finds the tree in which every domain stays closest to its quota.

    A leaf of weight w stays within one sequence if w times the sum of 1/weight over the inner nodes above it,
    except the root, is at most 1. So a subtree has a slack, the largest such sum it tolerates from above: 1/w
    for a leaf; for a node, the smaller slack of its two sides minus the node's own 1/weight. The split with
    the greatest slack is taken; beyond 8 subtrees the lightest are joined first.
    """
    trees = [_Subtree(part / PARTS, PARTS / part, leaf) for leaf, part in parts.items()]
    while len(trees) > EXHAUSTIVE_TREES:
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
    return known[(1 << len(trees)) - 1].shape


def _join(one: _Subtree, other: _Subtree) -> _Subtree:
    light, heavy = sorted((one, other), key=lambda tree: tree.weight)
    weight = one.weight + other.weight
    return _Subtree(weight, min(one.slack, other.slack) - 1 / weight, (light.shape, heavy.shape))
