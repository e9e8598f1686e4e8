"""Train or validation, by document: near-identical documents always go the same way."""

import hashlib
import zlib

from data.corpus import Document

SPLITS = ("train", "validation")
VALIDATION_SHARE = 0.03
"""Share of the documents that training never sees."""

_HASHES = 64
_SIMILARITY = 0.5
"""Jaccard similarity of the sets of lines from which on documents count as near-identical."""


def split_documents(documents: list[Document]) -> list[str]:
    """The side of each document of one domain.

    A document goes by a hash of its content or, among near-identical ones, of one of theirs. So
    its side does not depend on the order, and hardly on the other documents. Where chance leaves a
    side empty, the group with the least or greatest hash makes it up, if there are two groups.

    Args:
        documents: all documents of the domain.

    Returns:
        ``train`` or ``validation`` for each.
    """
    digests = [hashlib.sha256(document.text.encode()).digest() for document in documents]
    groups = near_identical_groups([document.text for document in documents])
    least: dict[int, bytes] = {}
    for digest, group in zip(digests, groups, strict=True):
        least[group] = min(digest, least.get(group, digest))
    # Hashed anew: the least of many hashes is small, and large groups would all be held out.
    keys = {group: hashlib.sha256(digest).digest() for group, digest in least.items()}
    bound = int(VALIDATION_SHARE * 2**64)
    held_out = {key for key in keys.values() if int.from_bytes(key[:8]) < bound}
    if len(keys) > 1:
        held_out = held_out or {min(keys.values())}
        if len(held_out) == len(keys):
            held_out.remove(max(held_out))
    return [SPLITS[keys[group] in held_out] for group in groups]


def near_identical_groups(texts: list[str]) -> list[int]:
    """A number for each text, equal for texts that share about half of their lines, or a chain of such.

    MinHash (Broder 1997) over the set of lines, candidates by locality-sensitive hashing.
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=_SIMILARITY, num_perm=_HASHES)
    parent = list(range(len(texts)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    sketches: list[MinHash] = []
    for number, text in enumerate(texts):
        sketch = MinHash(num_perm=_HASHES, hashfunc=zlib.crc32)
        sketch.update_batch({line.strip().encode() for line in text.split("\n") if line.strip()})
        for other in index.query(sketch):
            if sketch.jaccard(sketches[other]) >= _SIMILARITY:
                parent[root(number)] = root(other)
        index.insert(number, sketch)
        sketches.append(sketch)
    return [root(number) for number in range(len(texts))]
