"""Assigns documents to train or validation; near-identical documents always go to the same split.

A hash of a document's content decides; in a group of near-identical documents, of whichever domains, the
hash of one of them decides for all. So the split does not depend on the order of documents, and hardly on
other documents. A group of several domains is held out as often as their largest share says. If one split of
a domain would be empty and the domain has at least two groups, it gets the group with the least or greatest
hash, of those in no other domain if there are any.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.text.words import mix
from train.recipe.preparation import Preparation

# G groups of near-identical documents, M pairs of a group and a domain that it is in, D domains.

SPLITS = ("train", "validation")
BYTES_PER_TOKEN = 4
"""UTF-8 bytes of a token, about: splits are assigned before anything is tokenised."""


def share_of(preparation: Preparation, text_bytes: int) -> float:
    """Share of a domain's documents to hold out.

    Args:
        preparation: its ``validation_tokens``, at most ``validation_share`` of the domain.
        text_bytes: UTF-8 bytes of the domain.
    """
    wanted = preparation.validation_tokens * BYTES_PER_TOKEN / max(text_bytes, 1)
    return min(preparation.validation_share, wanted)


@dataclass(frozen=True)
class Groups:
    """Some groups of similar documents."""

    numbers: NDArray[np.int64]
    """Each group's number [G], the number of its first document, in ascending order."""
    ranks: NDArray[np.uint64]
    """A hash of each group [G], see :func:`rank`."""
    is_out: NDArray[np.bool_]
    """Whether a group is held out [G]."""
    is_fixed: NDArray[np.bool_]
    """Whether that has been decided with an earlier part [G]."""
    members: NDArray[np.int64]
    """Distinct pairs [M, 2] of the place of a group in 0..G-1 and a domain in 0..D-1."""


def rank(least: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Returns the hash [G] of groups, of the least key of the documents of each [G].

    Hashed again: the least of many hashes is small, so large groups would all be held out.
    """
    return mix(mix(least + np.uint64(1)))


def is_held_out(ranks: NDArray[np.uint64], shares: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Returns whether each group [G] is held out, by its hash and the share of groups like it [G]."""
    chosen: NDArray[np.bool_] = ranks < (shares * 2**64).astype(np.uint64)
    return chosen


def tally(groups: Groups, domains: int) -> list[dict[str, Any]]:
    """Counts groups by domain, and names those that would move if a split of the domain were empty.

    Returns:
        For each of the ``domains``, plain values: ``groups``, those held ``out``, and as ``own`` (in no other
        domain) and ``all`` the ``least`` and the ``greatest`` of the groups that may move: hash, number, and
        the domains that it is in.
    """
    domains_G = np.bincount(groups.members[:, 0], minlength=groups.numbers.size)
    free_G = ~groups.is_fixed
    order = np.argsort(groups.members[:, 0], kind="stable")
    by_group, starts = groups.members[order, 1], np.r_[0, np.cumsum(domains_G)]
    counts = []
    for domain in range(domains):
        mine = np.unique(groups.members[groups.members[:, 1] == domain, 0])
        count: dict[str, Any] = {"groups": mine.size, "out": int(groups.is_out[mine].sum())}
        mine = mine[free_G[mine]]
        for name, some in (("own", mine[domains_G[mine] == 1]), ("all", mine)):
            if some.size:
                ranks = groups.ranks[some]
                for which, at in (("least", ranks.argmin()), ("greatest", ranks.argmax())):
                    group = int(some[at])
                    inside = by_group[starts[group] : starts[group + 1]].tolist()
                    candidate = [int(groups.ranks[group]), int(groups.numbers[group]), inside]
                    count.setdefault(name, {})[which] = candidate
        counts.append(count)
    return counts


def moves_of(tallies: Sequence[list[dict[str, Any]]]) -> dict[int, bool]:
    """Decides which groups move to the other split, so that no split of a domain is empty.

    Args:
        tallies: of :func:`tally`, for each part of the groups.

    Returns:
        By number of the group, whether it is held out now.
    """
    moves: dict[int, bool] = {}
    domains = range(len(tallies[0]) if tallies else 0)
    groups = [sum(part[domain]["groups"] for part in tallies) for domain in domains]
    out = [sum(part[domain]["out"] for part in tallies) for domain in domains]
    for wanted in (True, False):
        for domain in domains:
            there = out[domain] if wanted else groups[domain] - out[domain]
            if groups[domain] < 2 or there:
                continue
            which, sign = ("least", 1) if wanted else ("greatest", -1)
            for name in ("own", "all"):
                found = [part[domain][name][which] for part in tallies if name in part[domain]]
                if found:
                    _, number, inside = min(found, key=lambda it: (sign * it[0], it[1]))
                    moves[number] = wanted
                    for other in inside:
                        out[other] += 1 if wanted else -1
                    break
    return moves
