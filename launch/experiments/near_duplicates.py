"""Near-duplicates against exact Jaccard similarity: `python -m launch.experiments.near_duplicates`.

Documents of the installed corpus are changed, in scattered words or in one piece, so that pairs of a known
similarity come about: of the sets of five-word sequences, counted exactly. The table says of how many pairs
of each similarity the second is removed as a near-duplicate of the first, and how many are kept on one side
of the split.
"""

import datetime
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data.text.duplicates import SHINGLE_WORDS, resolve, sketch
from data.text.installed import installed_corpus
from data.text.words import hash_ngrams, hash_words
from train.recipe.preparation import Preparation
from train.record.command import Figures, command
from train.record.provenance import git_commit
from train.record.tables import markdown_table

# W words of a document, G five-word sequences.

EDGES = (0.0, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0)
FEWEST_WORDS = 60

Words = NDArray[np.uint64]


@dataclass(frozen=True)
class SimilarityInterval:
    """Pairs whose similarity is in an interval."""

    least: float
    most: float
    pairs: int
    removed: float
    """Share of which the second document is removed."""
    on_one_side: float
    """Share whose documents are on the same side of the split for certain."""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--pairs", type=int, default=6000, help="pairs of documents (default 6000)")
    parser.add_argument("--megabytes", type=int, default=8, help="text per domain, at most (default 8)")
    parser.add_argument(
        "--near", type=float, default=Preparation.near_duplicates, help="similarity of copies"
    )


@command("python -m launch.experiments.near_duplicates", __doc__, add_arguments, json="write the figures")
def main(options: Namespace) -> Figures:
    """Makes the table."""
    texts = [hash_words(it.text) for it in installed_corpus(options.megabytes * 1_000_000)]
    found = measure([it for it in texts if it.size >= FEWEST_WORDS], options.pairs, options.near)
    print(table(found, options.near))
    where = {"commit": git_commit(), "date": datetime.date.today().isoformat(), "near": options.near}
    print("\n" + "\n".join(f"{name}: {value}" for name, value in where.items()))
    return Figures({"intervals": [asdict(it) for it in found], **where})


def measure(documents: Sequence[Words], count: int, near: float) -> list[SimilarityInterval]:
    """Compares the verdicts on pairs of documents with their exact similarity.

    Args:
        documents: hashes of the words [W] of each.
        count: number of pairs.
        near: minimum similarity of copies.
    """
    rows = np.array(
        [
            (exact_similarity(*pair), *verdict(*pair, near))
            for pair in tqdm(pairs_of(documents, count), total=count, unit="pair", mininterval=1)
        ]
    )
    intervals = []
    for least, most in pairwise(EDGES):
        inside = rows[(rows[:, 0] >= least) & (rows[:, 0] < most)]
        if len(inside):
            shares = inside[:, 1:].mean(0).tolist()
            intervals.append(SimilarityInterval(least, most, len(inside), *shares))
    return intervals


def pairs_of(documents: Sequence[Words], count: int) -> Iterator[tuple[Words, Words]]:
    """Yields documents and changed ones: in turn in scattered words or in one piece."""
    rng = np.random.default_rng(0)
    for number in range(count):
        words = documents[int(rng.integers(len(documents)))]
        wanted = rng.uniform(0.25, 1)
        # Of G sequences each, if k are other ones, the similarity is (G - k) / (G + k).
        changed = (words.size - SHINGLE_WORDS + 1) * (1 - wanted) / (1 + wanted)
        other = words.copy()
        if number % 2:
            at = rng.permutation(words.size)[: max(round(changed / SHINGLE_WORDS), 1)]
        else:
            start = int(rng.integers(words.size))
            at = (start + np.arange(max(round(changed), 1))) % words.size
        other[at] = rng.integers(0, 2**32, at.size)
        yield words, other


def exact_similarity(one: Words, other: Words) -> float:
    """Returns the Jaccard similarity of the sets of five-word sequences of two texts [W]."""
    first, second = (np.unique(hash_ngrams(words, SHINGLE_WORDS)) for words in (one, other))
    both = int(np.intersect1d(first, second, assume_unique=True).size)
    return both / (first.size + second.size - both)


def verdict(one: Words, other: Words, near: float) -> tuple[bool, bool]:
    """Returns whether the second of two texts is removed, and whether they are on one side for certain."""
    digests = np.array([[0, 0], [0, 1]], np.uint64)
    found = resolve(digests, np.concatenate([sketch(one), sketch(other)]), near)
    return bool(found.keeper[1] == 0), bool(found.group[1] == 0)


def table(intervals: Sequence[SimilarityInterval], near: float) -> str:
    """Formats the figures, and the share of removed pairs that are as similar as they should be."""
    rows = [
        (f"{it.least:g} to {it.most:g}", f"{it.pairs:,}", f"{it.removed:.1%}", f"{it.on_one_side:.1%}")
        for it in intervals
    ]
    removed = [(it.least >= near, it.removed * it.pairs) for it in intervals]
    right, pairs = (sum(n for is_near, n in removed if is_near or every) for every in (False, True))
    near_pairs = sum(it.pairs for it in intervals if it.least >= near)
    lines = markdown_table(("Jaccard similarity", "pairs", "removed", "on one side"), rows, "<>>>")
    if pairs and near_pairs:
        lines += f"\n\nOf pairs of {near:g} and more, {right / near_pairs:.1%} are removed; "
        lines += f"of those removed, {right / pairs:.1%} are such pairs."
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
