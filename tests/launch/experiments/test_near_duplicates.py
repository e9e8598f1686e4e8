"""Pairs have the similarity that is counted, and verdicts follow it."""

import numpy as np
import pytest

from data.text.words import hash_words
from launch.experiments.near_duplicates import exact_similarity, measure, table


def test_similarity_is_that_of_sets():
    texts = ["one two three four five six seven", "one two three four five six eight one two three four five"]
    words = [text.split() for text in texts]
    grams = [{tuple(it[at : at + 5]) for at in range(len(it) - 4)} for it in words]
    wanted = len(grams[0] & grams[1]) / len(grams[0] | grams[1])
    assert exact_similarity(*map(hash_words, texts)) == pytest.approx(wanted) and 0 < wanted < 1


def test_pairs_are_removed_by_their_similarity():
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 2**32, size).astype(np.uint64) for size in (70, 300, 900)]
    found = measure(documents, 300, 0.8)
    assert sum(it.pairs for it in found) == 300 and len(found) > 9
    assert all(it.removed == 0 for it in found if it.most <= 0.7)
    assert all(it.removed > 0.9 for it in found if it.least >= 0.85)
    assert all(it.on_one_side > 0.9 for it in found if it.least >= 0.7)
    assert "0.85 to 0.9" in table(found, 0.8)
