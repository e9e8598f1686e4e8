"""Packed documents for attention of variable length: where they lie in a batch, or in a part of one."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from train.model.context import Context


class Documents(NamedTuple):
    """Where the N packed documents of a batch lie among its T tokens."""

    offsets: Tensor
    """Where each begins, and T: int32 [N + 1]."""
    longest: int
    """Tokens of the longest."""


class Reach(NamedTuple):
    """The keys that a rank with a part of a sequence attends to: those of its documents, from their start."""

    queries: Documents
    """Of the rank's tokens, chunk by chunk; a document in both chunks of a sequence is there twice."""
    keys: Documents
    """Of the keys, likewise; a document's last queries and last keys are the same tokens."""
    spans: tuple[tuple[int, int, int], ...]
    """Of each chunk, its sequence, and where the keys begin and end in that."""


def document_reach(document_ids_BS: Tensor, context: Context) -> Reach:
    """Finds the documents of this rank's chunks; the host waits once, for a copy."""
    length, device = document_ids_BS.shape[1], document_ids_BS.device
    on_host_BS = document_ids_BS.cpu()
    begins_BS = functional.pad(on_host_BS[:, 1:] != on_host_BS[:, :-1], (1, 0), value=True)
    chunk = length // (2 * context.ranks)
    queries, keys, spans = [0], [0], []
    for sequence, begins_S in enumerate(begins_BS):
        starts = begins_S.nonzero().flatten().tolist()
        for number in (context.rank, 2 * context.ranks - 1 - context.rank):
            first, end = number * chunk, (number + 1) * chunk
            begin = max(start for start in starts if start <= first)
            spans.append((sequence, begin, end))
            borders = [first, *(start for start in starts if first < start < end), end]
            lengths = [stop - start for start, stop in itertools.pairwise(borders)]
            queries += lengths
            keys += [lengths[0] + first - begin, *lengths[1:]]
    return Reach(_documents(queries, device), _documents(keys, device), tuple(spans))


def _documents(lengths: list[int], device: torch.device) -> Documents:
    """Documents from their lengths, after a zero."""
    offsets = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Documents(offsets.to(device, non_blocking=True), max(lengths))
