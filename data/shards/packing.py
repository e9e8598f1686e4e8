"""Packs documents end to end into sequences of one length; boundaries are kept and no token is dropped."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# S tokens of a sequence, P pieces of documents in it.

PADDING = -1
"""Document number of the padding in the last sequence."""


@dataclass(frozen=True)
class Sample:
    """A sequence and the pieces of documents that it consists of."""

    tokens: NDArray[np.int32]
    """Token ids [S]."""
    lengths: NDArray[np.int32]
    """Tokens of each piece [P], in order; their sum is S."""
    documents: NDArray[np.int64]
    """Each piece's document [P], its number in the domain's list; :data:`PADDING` for padding."""


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


def _sample(tokens: list[NDArray[np.int32]], lengths: list[int], ordinals: list[int]) -> Sample:
    return Sample(
        np.concatenate(tokens, dtype=np.int32), np.array(lengths, np.int32), np.array(ordinals, np.int64)
    )
