"""Assigns documents to train or validation; near-identical documents always go to the same split."""

import numpy as np
from numpy.typing import NDArray

from data.text.words import mix
from train.recipe.preparation import Preparation

# N documents of all domains, G groups of near-identical ones, D domains.

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


def held_out(
    keys: NDArray[np.uint64],
    groups: NDArray[np.int64],
    domains: NDArray[np.integer],
    shares: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Returns whether each document is held out for validation.

    A hash of the document's content decides; in a group of near-identical documents, of whichever domains,
    the hash of one of them decides for all. So the split does not depend on the order of documents, and
    hardly on the other documents. A group of several domains is held out as often as their largest share
    says. If one split of a domain would be empty and the domain has at least two groups, it gets the group
    with the least or greatest hash, of those in no other domain if there are any.

    Args:
        keys: 64 bits of a hash of each document's text [N].
        groups: a number [N], equal for near-identical documents.
        domains: the domain of each document [N], in 0..D-1.
        shares: share of each domain to hold out [D].
    """
    _, group_of_N = np.unique(groups, return_inverse=True)
    count = int(group_of_N.max(initial=-1)) + 1
    least_G = np.full(count, np.iinfo(np.uint64).max)
    np.minimum.at(least_G, group_of_N, keys)
    # Hashed again: the least of many hashes is small, so large groups would all be held out.
    least_G = mix(mix(least_G + np.uint64(1)))
    share_G = np.zeros(count)
    np.maximum.at(share_G, group_of_N, shares[domains])
    is_out_G = least_G < (share_G * 2**64).astype(np.uint64)
    members = np.unique(np.stack([group_of_N, domains.astype(np.int64)], 1), axis=0)
    domains_G = np.bincount(members[:, 0], minlength=count)
    for wanted in (True, False):
        for domain in range(shares.size):
            mine = members[members[:, 1] == domain, 0]
            if mine.size < 2 or (is_out_G[mine] == wanted).any():
                continue
            own = mine[domains_G[mine] == 1]
            mine = own if own.size else mine
            is_out_G[mine[least_G[mine].argmin() if wanted else least_G[mine].argmax()]] = wanted
    chosen: NDArray[np.bool_] = is_out_G[group_of_N]
    return chosen
