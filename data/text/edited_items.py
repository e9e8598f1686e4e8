"""Finds items of evaluation tasks in documents also where they were edited.

An item is found if a stretch of a document, half as long again as the item, has a given share of the item's
four-word sequences. Numbers are no words here, so that numbered lines and other amounts change nothing. Of an
item with one word in ten replaced 66% of the sequences are left on average (0.9^4); a share of 0.3 leaves
room for short items and for other edits. Of sequences of 13 words (Brown et al. 2020) 25% are left.
"""

import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.text.evaluation_overlap import texts_of
from data.text.words import hash_ngrams, hash_words

# G n-grams of a document, K of all items, H hits of items by n-grams of a document.

NGRAM = 4
FEWEST_WORDS = 20
"""Shorter items are found as a whole only: a common phrase would be half of one."""
STRETCH = 1.5
"""Length of the stretch, in lengths of the item."""
MOST_ITEMS = 10
"""N-grams in more items are phrases of their template, and tell nothing."""
_NUMBER = re.compile(r"\d+")


class EditedItems:
    """The four-word sequences of all items.

    Args:
        files: the task files.
        share: of an item's sequences, by which it counts as found.
    """

    def __init__(self, files: tuple[str, ...], share: float) -> None:
        grams, sizes, seen = [np.empty(0, np.uint64)], [], set()
        for file in files:
            for text in texts_of(Path(file)):
                words = _words(text)
                if words.size >= FEWEST_WORDS and (mark := words.tobytes()) not in seen:
                    seen.add(mark)
                    grams.append(np.unique(hash_ngrams(words, NGRAM)))
                    sizes.append(words.size)
        counts = np.array([it.size for it in grams[1:]], np.int64)
        self._needed = np.ceil(share * counts).astype(np.int64)
        self._stretch = np.ceil(STRETCH * np.array(sizes, np.float64)).astype(np.int64)
        every, items = np.concatenate(grams), np.repeat(np.arange(counts.size), counts)
        order = np.argsort(every, kind="stable")
        every, items = every[order], items[order]
        _, place, number = np.unique(every, return_inverse=True, return_counts=True)
        is_told = number[place] <= MOST_ITEMS
        self._grams_K, self._items_K = every[is_told], items[is_told]

    def touches(self, text: str) -> bool:
        """Returns whether a document has an item."""
        words = _words(text)
        if words.size < NGRAM or not self._grams_K.size:
            return False
        grams_G = hash_ngrams(words, NGRAM)
        first_G, end_G = (np.searchsorted(self._grams_K, grams_G, side) for side in ("left", "right"))
        count_G = end_G - first_G
        at_H = np.repeat(np.arange(grams_G.size), count_G)
        # The items of a hit's n-gram lie next to each other.
        within_H = np.arange(at_H.size) - np.repeat(np.cumsum(count_G) - count_G, count_G)
        items_H = self._items_K[first_G[at_H] + within_H]
        order = np.argsort(items_H, kind="stable")
        at_H, items_H = at_H[order], items_H[order]
        needed_H = self._needed[items_H]
        last_H = np.arange(at_H.size) + needed_H - 1
        is_inside = last_H < at_H.size
        last_H = np.where(is_inside, last_H, 0)
        near_H = is_inside & (items_H[last_H] == items_H) & (at_H[last_H] - at_H < self._stretch[items_H])
        for item in np.unique(items_H[near_H]).tolist():
            begin, end = np.searchsorted(items_H, [item, item + 1])
            if self._has_distinct(at_H[begin:end], grams_G, item):
                return True
        return False

    def _has_distinct(self, at_H: NDArray[np.int64], grams_G: NDArray[np.uint64], item: int) -> bool:
        """Returns whether a stretch has enough different n-grams of an item, given where its n-grams are."""
        inside: Counter[int] = Counter()
        start = 0
        for at in at_H.tolist():
            inside[int(grams_G[at])] += 1
            while at - at_H[start] >= self._stretch[item]:
                old = int(grams_G[at_H[start]])
                inside[old] -= 1
                if not inside[old]:
                    del inside[old]
                start += 1
            if len(inside) >= self._needed[item]:
                return True
        return False


@lru_cache(maxsize=1)
def open_edited_items(files: tuple[str, ...], share: float) -> EditedItems:
    """Reads the items of task files, once per process."""
    return EditedItems(files, share)


def _words(text: str) -> NDArray[np.uint64]:
    return hash_words(_NUMBER.sub(" ", text))
