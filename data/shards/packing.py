"""Packs documents into sequences of one length, end to end or whole; no boundary and no token is lost."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

# S tokens of a sequence, P pieces of documents in it.

PADDING = -1
"""Document number of padding, which ends a sequence."""
PIECES = {"documents": "<i8", "lengths": "<i4"}
"""The columns of a shard with one number for each piece of a document, and its form there."""


@dataclass(frozen=True)
class Sample:
    """A sequence and the pieces of documents that it consists of."""

    tokens: NDArray[np.int32]
    """Token ids [S]."""
    lengths: NDArray[np.int32]
    """Tokens of each piece [P], in order; their sum is S."""
    documents: NDArray[np.int64]
    """Each piece's document [P], its number in the domain's list; :data:`PADDING` for padding."""
    trained: NDArray[np.uint8] | None = None
    """Whether each token has a loss where it is the next one, a bit each, [S / 8] rounded up. None: all."""

    def is_trained(self) -> NDArray[np.bool_]:
        """Returns whether each token has a loss, [S]."""
        if self.trained is None:
            return np.ones(self.tokens.size, np.bool_)
        return np.unpackbits(self.trained, count=self.tokens.size).astype(np.bool_)


def sample_of(columns: dict[str, Any]) -> Sample:
    """Returns the sample that Streaming's reader gives as columns; older shards have arrays for bytes."""
    pieces = {
        name: np.frombuffer(columns[name], kind)
        for name, kind in PIECES.items()
        if isinstance(columns[name], bytes)
    }
    return Sample(**(columns | pieces))


_TRAINED = 1 << 30
"""Added to a token that has a loss, above all ids, until its place in a sequence is fixed."""


def mark(tokens: NDArray[np.int32], is_trained: NDArray[np.bool_] | None = None) -> NDArray[np.int32]:
    """Returns tokens that carry their loss mask through packing, for :func:`unmark`; None: all have one."""
    return tokens + np.int32(_TRAINED) * (1 if is_trained is None else is_trained.astype(np.int32))


def unmark(sample: Sample) -> Sample:
    """Returns a sample of marked tokens as their ids and a loss mask; padding is never trained."""
    return replace(
        sample,
        tokens=sample.tokens & np.int32(_TRAINED - 1),
        trained=np.packbits(sample.tokens >= _TRAINED),
    )


def pack(
    documents: Iterable[tuple[int, NDArray[np.int32]]],
    *,
    sequence_tokens: int,
    eos_id: int | None,
    pad_id: int,
) -> Iterator[Sample]:
    """Joins documents, each ended by the end-of-text token, and cuts the stream into sequences.

    A document that does not fit continues in the next sequence. The last sequence is padded.

    Args:
        documents: number in the domain's list and token ids of each document.
        sequence_tokens: S.
        eos_id: appended to each document; None: nothing is appended (already done, or parts of documents).
        pad_id: pads the last sequence.
    """
    tokens: list[NDArray[np.int32]] = []
    lengths: list[int] = []
    ordinals: list[int] = []
    free = sequence_tokens
    for ordinal, ids in documents:
        rest = ids if eos_id is None else np.append(ids, np.int32(eos_id))
        while rest.size:
            piece, rest = rest[:free], rest[free:]
            tokens.append(piece)
            lengths.append(piece.size)
            ordinals.append(ordinal)
            free -= piece.size
            if not free:
                yield _sample(tokens, lengths, ordinals)
                tokens, lengths, ordinals, free = [], [], [], sequence_tokens
    if tokens:
        tokens.append(np.full(free, pad_id, np.int32))
        yield _sample(tokens, [*lengths, free], [*ordinals, PADDING])


def pack_whole(
    documents: Iterable[tuple[int, NDArray[np.int32]]], *, sequence_tokens: int, pad_id: int
) -> list[Sample]:
    """Packs documents by best fit decreasing, so that none is cut that fits into a sequence.

    The longest goes first, each into the sequence with the least room that suffices (Ding et al. 2024, "Fewer
    truncations improve language modeling", section 3). A longer one than a sequence fills sequences; what is
    left of it is packed like a document, and lies in a later one. Sequences are in the order of the documents
    that they begin with. They begin with rests, so that most continue the sequence before them.

    Args:
        documents: number in the domain's list and token ids of each document, numbers rising.
        sequence_tokens: S.
        pad_id: pads sequences.
    """
    pieces: list[tuple[int, int, NDArray[np.int32]]] = []
    for ordinal, ids in documents:
        for part, begin in enumerate(range(0, ids.size, sequence_tokens)):
            pieces.append((ordinal, part, ids[begin : begin + sequence_tokens]))
    rows = [[pieces[n] for n in of] for of in _best_fit([ids.size for *_, ids in pieces], sequence_tokens)]
    for row in rows:
        # Rests falling, so that none is last before another part of its document.
        row.sort(key=lambda piece: (piece[1] == 0, piece[0] if piece[1] == 0 else -piece[0]))
    rows.sort(key=lambda row: row[0][:2])
    return [_padded(row, sequence_tokens, pad_id) for row in rows]


def _best_fit(sizes: list[int], room: int) -> list[list[int]]:
    """Sorts items into bins of equal room by best fit decreasing; of bins that fit equally, into the newest.

    Takes time in proportion to the items, times the logarithm of ``room``.
    """
    bins: list[list[int]] = []
    # Bins by the room left in them, and the rooms that there are, rising.
    by_left: dict[int, list[int]] = {}
    rooms: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        at = bisect_left(rooms, sizes[item])
        if at < len(rooms):
            left = rooms[at]
            number = by_left[left].pop()
            if not by_left[left]:
                del by_left[left], rooms[at]
        else:
            left, number = room, len(bins)
            bins.append([])
        bins[number].append(item)
        if left := left - sizes[item]:
            if left not in by_left:
                insort(rooms, left)
            by_left.setdefault(left, []).append(number)
    return bins


def _padded(row: list[tuple[int, int, NDArray[np.int32]]], size: int, pad_id: int) -> Sample:
    tokens = [ids for _, _, ids in row]
    lengths, ordinals = [ids.size for ids in tokens], [ordinal for ordinal, _, _ in row]
    if free := size - sum(lengths):
        return _sample([*tokens, np.full(free, pad_id, np.int32)], [*lengths, free], [*ordinals, PADDING])
    return _sample(tokens, lengths, ordinals)


def _sample(tokens: list[NDArray[np.int32]], lengths: list[int], ordinals: list[int]) -> Sample:
    return Sample(
        np.concatenate(tokens, dtype=np.int32), np.array(lengths, np.int32), np.array(ordinals, np.int64)
    )
