"""Train or validation, by document: near-identical documents always go the same way."""

import numpy as np
from numpy.typing import NDArray

from data.text.words import mix

SPLITS = ("train", "validation")
VALIDATION_SHARE = 0.03
"""Share of the documents that training never sees."""


def held_out(keys: NDArray[np.uint64], groups: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each document of one domain is held out for validation.

    A document goes by a hash of its content or, among near-identical ones, of one of theirs. So its
    side does not depend on the order, and hardly on the other documents. Where chance leaves a
    side empty, the group with the least or greatest hash makes it up, if there are two groups.

    Args:
        keys: 64 bits of a hash of each document's text [N].
        groups: a number [N], equal for near-identical documents.
    """
    _, group_of = np.unique(groups, return_inverse=True)
    least = np.full(int(group_of.max(initial=-1)) + 1, np.iinfo(np.uint64).max)
    np.minimum.at(least, group_of, keys)
    # Hashed anew: the least of many hashes is small, and large groups would all be held out.
    least = mix(mix(least + np.uint64(1)))
    is_out = least < np.uint64(VALIDATION_SHARE * 2**64)
    if is_out.size > 1:
        if not is_out.any():
            is_out[np.argmin(least)] = True
        elif is_out.all():
            is_out[np.argmax(least)] = False
    chosen: NDArray[np.bool_] = is_out[group_of]
    return chosen
