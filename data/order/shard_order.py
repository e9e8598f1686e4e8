"""The order of a domain's samples: shards are shuffled, and samples within windows of shards.

Each epoch reads the shards in its own shuffled order, one window of shards at a time, and the samples of a
window in shuffled order. So every sample is read once per epoch, a shard is needed only during one window,
and a cache of two windows per domain holds everything being read. There are no tables: both orders are keyed
permutations, and memory does not grow with the domain.

**Longer sequences.** A sequence of ``step`` samples consists of ``step`` neighbours in one shard, so that
documents stay whole; a window shuffles such groups instead of samples. The step of a window is that of the
phase in which the window begins. If the step changes within a window, the window is finished in its original
order and its samples are joined as they come, so that a change of length neither skips nor repeats a sample;
the sequences affected, in at most one window per domain, are made of samples that are not neighbours. If the
samples of a shard are not a multiple of ``step``, its last samples are single. They are read at the end of
the window, except for a few read at its beginning to align its groups with sequences.
"""

import functools
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.order.permutation import Indices, KeyedPermutation

KEPT_WINDOWS = 4
"""Windows and epochs kept in memory: readers move between one and the next."""


class ShardSizes:
    """The sizes of a sequence of shards, in constant memory if almost all are equal."""

    def __init__(self, count: int, common: int, odd: Indices, excess: Indices) -> None:
        """Stores the common size and the exceptions.

        Args:
            count: number of shards.
            common: samples of every shard that is not an exception.
            odd: ascending numbers of the exceptions [O].
            excess: their samples minus ``common`` [O].
        """
        self.count, self.common = count, common
        self._odd, self._excess = odd, excess
        self._excess_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(excess)])
        self.total = count * common + int(self._excess_before[-1])
        """Samples of all shards."""

    @classmethod
    def of(cls, samples: Sequence[int] | Indices) -> "ShardSizes":
        """Builds it from the samples of each shard; the most frequent size becomes the common one."""
        sizes = np.asarray(samples, np.int64)
        assert sizes.size and sizes.min() > 0, "a shard is empty"
        values, counts = np.unique(sizes, return_counts=True)
        common = int(values[counts.argmax()])
        odd = np.flatnonzero(sizes != common)
        return cls(sizes.size, common, odd, sizes[odd] - common)

    def before(self, shards: Indices) -> Indices:
        """Samples of all shards before each of ``shards``."""
        return shards * self.common + self._excess_before[np.searchsorted(self._odd, shards)]

    def shuffled(self, order: KeyedPermutation) -> "ShardSizes":
        """Returns the same shards reordered, with shard ``order(place)`` at ``place``."""
        places = order.inverse(self._odd)
        ascending = np.argsort(places)
        return ShardSizes(self.count, self.common, places[ascending], self._excess[ascending])

    def holding(self, sample: int) -> int:
        """The shard that holds a sample, counted through all shards."""
        return bisect_right(range(self.count), sample, key=lambda n: int(self.before(np.array([n]))[0])) - 1


class Grouping(NamedTuple):
    """A change of sequence length: from sample ``first`` on, sequences hold ``step`` samples."""

    first: int
    """Samples of the domain read before the change, over all epochs."""
    step: int


class _Epoch(NamedTuple):
    shards: KeyedPermutation
    sizes: ShardSizes
    """Sizes of the shards in the epoch's order."""


class ShardOrder:
    """The order of one domain's samples over all epochs."""

    def __init__(
        self, name: str, sizes: ShardSizes, *, seed: int, window_shards: int, groupings: Sequence[Grouping]
    ) -> None:
        """Prepares the order; time and memory do not depend on the size of the domain.

        Args:
            name: the domain's name; not its index, so that adding a domain does not change the others' order.
            sizes: sizes of its shards.
            seed: selects the order.
            window_shards: shards per window.
            groupings: changes of sequence length, the first at 0.
        """
        assert groupings[0].first == 0 and window_shards > 0
        self.sizes = sizes
        self._key = (seed, name)
        self._window_shards = window_shards
        self._groupings = list(groupings)
        self._window = functools.lru_cache(KEPT_WINDOWS)(self._make_window)
        self._epoch = functools.lru_cache(KEPT_WINDOWS)(self._make_epoch)

    def samples(self, ordinals: Indices) -> tuple[Indices, Indices]:
        """Returns the domain's n-th samples.

        Args:
            ordinals: numbers n, ascending, int64 [N].

        Returns:
            Samples, counted through the shards in the index's order, and epochs, both int64 [N].
        """
        sample = np.empty(ordinals.size, np.int64)
        begin = 0
        while begin < ordinals.size:
            window = self._window_at(int(ordinals[begin]))
            end = int(np.searchsorted(ordinals, window.first + window.size))
            sample[begin:end] = window.samples(ordinals[begin:end] - window.first)
            begin = end
        return sample, ordinals // self.sizes.total

    def ordinal_of(self, sample: int, epoch: int) -> int:
        """The number of a sample among all samples read over all epochs, for its reading in an epoch."""
        turn = self._epoch(epoch)
        place = int(turn.shards.inverse(np.array([self.sizes.holding(sample)]))[0])
        window = self._window(epoch, place // self._window_shards)
        return window.first + window.place_of(sample)

    def window_shards(self, ordinal: int) -> list[int]:
        """The shards of the window that holds one of the domain's samples."""
        shards: list[int] = self._window_at(ordinal).shards.tolist()
        return shards

    def _window_at(self, ordinal: int) -> "_Window":
        epoch, within = divmod(ordinal, self.sizes.total)
        return self._window(epoch, self._epoch(epoch).sizes.holding(within) // self._window_shards)

    def _make_epoch(self, epoch: int) -> _Epoch:
        shards = KeyedPermutation(self.sizes.count, *self._key, epoch)
        return _Epoch(shards, self.sizes.shuffled(shards))

    def _make_window(self, epoch: int, number: int) -> "_Window":
        turn = self._epoch(epoch)
        begin = number * self._window_shards
        places = np.arange(begin, min(begin + self._window_shards, self.sizes.count))
        bounds = turn.sizes.before(np.append(places, places[-1] + 1))
        first = epoch * self.sizes.total + int(bounds[0])
        at = bisect_right(self._groupings, first, key=lambda grouping: grouping.first) - 1
        grouping = self._groupings[at]
        shards = turn.shards(places)
        return _Window(
            first,
            shards,
            self.sizes.before(shards),
            np.diff(bounds),
            step=grouping.step,
            lead=(grouping.first - first) % grouping.step,
            key=(*self._key, epoch, number),
        )


class _Window:
    """The order of the samples of a few shards."""

    def __init__(
        self,
        first: int,
        shards: Indices,
        firsts: Indices,
        sizes: Indices,
        *,
        step: int,
        lead: int,
        key: tuple[int | str, ...],
    ) -> None:
        """Builds tables of a few numbers per shard.

        Args:
            first: the domain's samples before the window, over all epochs.
            shards: numbers of the shards [W].
            firsts: number of each shard's first sample [W].
            sizes: samples of each shard [W].
            step: samples per group.
            lead: samples that complete the last sequence of the previous window.
            key: selects the order.
        """
        self.first, self.shards, self.size = first, shards, int(sizes.sum())
        self._step, self._firsts = step, firsts
        self._groups_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes // step)])
        groups = int(self._groups_before[-1])
        self._groups = KeyedPermutation(max(groups, 1), *key)
        singles = [np.arange(f + s - s % step, f + s) for f, s in zip(firsts, sizes, strict=True)]
        self._singles = np.concatenate(singles)
        self._lead = min(lead, self.size)
        self._grouped = groups * step
        if self._lead > self._singles.size:
            # The last group in the order is split into singles.
            self._grouped -= step
            last = self._of_groups(np.arange(self._grouped, self._grouped + step))
            self._singles = np.concatenate([self._singles, last])
        if self._singles.size:
            order = KeyedPermutation(self._singles.size, *key, "singles")
            self._singles = self._singles[order(np.arange(self._singles.size))]

    def samples(self, places: Indices) -> Indices:
        """Returns the samples at places 0..size-1 of the window."""
        shifted = places - self._lead
        in_group = (shifted >= 0) & (shifted < self._grouped)
        if in_group.all():
            return self._of_groups(shifted)
        samples = np.empty_like(places)
        samples[in_group] = self._of_groups(shifted[in_group])
        single = places[~in_group]
        samples[~in_group] = self._singles[np.where(single < self._lead, single, single - self._grouped)]
        return samples

    def place_of(self, sample: int) -> int:
        """Returns the place of a sample in the window."""
        single = np.flatnonzero(self._singles == sample)
        if single.size:
            number = int(single[0])
            return number if number < self._lead else number + self._grouped
        offsets = sample - self._firsts
        shard = int(np.flatnonzero(offsets >= 0)[offsets[offsets >= 0].argmin()])
        group, within = divmod(int(offsets[shard]), self._step)
        place = self._groups.inverse(self._groups_before[shard : shard + 1] + group)
        return self._lead + int(place[0]) * self._step + within

    def _of_groups(self, places: Indices) -> Indices:
        group, within = np.divmod(places, self._step)
        group = self._groups(group)
        shard = np.searchsorted(self._groups_before, group, side="right") - 1
        return self._firsts[shard] + (group - self._groups_before[shard]) * self._step + within
