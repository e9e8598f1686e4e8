"""Assigns documents to train or validation; near-identical documents always go to the same split."""

import numpy as np
from numpy.typing import NDArray

from data.text.words import mix

SPLITS = ("train", "validation")
VALIDATION_SHARE = 0.03
"""Share of documents held out for validation."""


def held_out(keys: NDArray[np.uint64], groups: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Returns whether each document of one domain is held out for validation.

    A hash of the document's content decides; in a group of near-identical documents, the hash of one of them
    decides for all. So the split does not depend on the order of documents, and hardly on the other
    documents. If one split would be empty and there are at least two groups, it gets the group with the least
    or greatest hash.

    Args:
        keys: 64 bits of a hash of each document's text [N].
        groups: a number [N], equal for near-identical documents.
    """
    _, group_of = np.unique(groups, return_inverse=True)
    least = np.full(int(group_of.max(initial=-1)) + 1, np.iinfo(np.uint64).max)
    np.minimum.at(least, group_of, keys)
    # Hashed again: the least of many hashes is small, so large groups would all be held out.
    least = mix(mix(least + np.uint64(1)))
    is_out = least < np.uint64(VALIDATION_SHARE * 2**64)
    if is_out.size > 1:
        if not is_out.any():
            is_out[np.argmin(least)] = True
        elif is_out.all():
            is_out[np.argmax(least)] = False
    chosen: NDArray[np.bool_] = is_out[group_of]
    return chosen
