"""The largest attention logit of each head, which no kernel of attention returns: QK-clip needs it.

The logits are those that attention takes the softmax of: scaled, of the positions that a query sees. They are
computed once more, by chunks of queries, so that never more than :data:`ELEMENTS` of them are in memory.

Shapes: B batch, S this rank's positions, P positions of the whole sequences, H query heads, G key heads,
R width of a head.
"""

# ruff: noqa: N815  (shape suffixes)

import math
from typing import NamedTuple

import torch
from torch import Tensor

from train.model.documents import Reach
from train.model.recompute import is_recomputing

ELEMENTS = 2**24
"""Logits in memory at a time: 64 MiB in fp32, and as many bytes of a mask."""


class Sight(NamedTuple):
    """The positions that each query sees."""

    place_S: Tensor
    """int64: place of each query in its sequence."""
    is_part: bool
    """The queries are a part of the sequences, whose other parts other ranks have."""
    own_BS: Tensor | None
    """Document of each query; None: each sequence is one document."""
    document_BP: Tensor | None
    """Document of each key."""


class LargestLogits:
    """The largest logit of each head of one layer, over the microbatches that it has seen."""

    def __init__(self) -> None:
        self.of_heads_H: Tensor | None = None
        """fp32; None: none was seen since :meth:`forget`."""

    def forget(self) -> None:
        """Begins a new batch."""
        self.of_heads_H = None

    def see(self, q_BSHR: Tensor, k_BPGR: Tensor, sight: Sight, scale: float) -> None:
        """Looks at a microbatch's queries and keys; not at those that a backward pass makes again.

        Args:
            q_BSHR: queries, rotated.
            k_BPGR: keys, rotated.
            sight: the keys that each query sees.
            scale: factor of the logits.
        """
        if not torch.is_grad_enabled() or is_recomputing():
            return
        found_H = largest_logits(q_BSHR.detach(), k_BPGR.detach(), sight) * scale
        before_H = self.of_heads_H
        self.of_heads_H = found_H if before_H is None else torch.maximum(before_H, found_H)

    def see_reach(self, q_BSHR: Tensor, k_1THR: Tensor, sight: Sight, reach: Reach, scale: float) -> None:
        """Looks at queries whose keys are only those that their documents reach, chunk by chunk.

        Args:
            q_BSHR: queries, rotated, two chunks of each sequence.
            k_1THR: keys, rotated, those of each chunk after the chunk's before it.
            sight: the documents of the whole sequences.
            reach: where the keys of each chunk lie.
            scale: factor of the logits.
        """
        chunk = q_BSHR.shape[1] // 2
        queries = q_BSHR.flatten(0, 1).split(chunk)
        keys = k_1THR[0].split([end - begin for _, begin, end in reach.spans])
        for q_CHR, k_NHR, (sequence, begin, end) in zip(queries, keys, reach.spans, strict=True):
            place_C = torch.arange(end - begin - chunk, end - begin, device=q_CHR.device)
            documents, own = sight.document_BP, None
            if documents is not None:
                documents = documents[sequence, begin:end][None]
                own = documents[:, -chunk:]
            self.see(q_CHR[None], k_NHR[None], Sight(place_C, True, own, documents), scale)


@torch.no_grad()
def largest_logits(q_BSHR: Tensor, k_BPGR: Tensor, sight: Sight) -> Tensor:
    """Returns the largest product of a query with a key that it sees, of each head: fp32 [H]."""
    batch, length, heads, _ = q_BSHR.shape
    whole, key_heads = k_BPGR.shape[1:3]
    k_BGRP = k_BPGR.permute(0, 2, 3, 1)
    rows = max(1, ELEMENTS // (batch * heads * whole))
    found = []
    for first in range(0, length, rows):
        own = slice(first, min(first + rows, length))
        # A query that has all of its sequence before it sees no later key.
        seen = whole if sight.is_part else own.stop
        q_BGQR = q_BSHR[:, own].unflatten(2, (key_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        logits_BHSP = (q_BGQR @ k_BGRP[..., :seen]).view(batch, heads, -1, seen)
        hidden = sight.place_S[own, None] < torch.arange(seen, device=k_BPGR.device)
        if sight.own_BS is not None and sight.document_BP is not None:
            other_BSP = sight.own_BS[:, own, None] != sight.document_BP[:, None, :seen]
            hidden = (hidden | other_BSP)[:, None]
        logits_BHSP.masked_fill_(hidden, -math.inf)
        found.append(logits_BHSP.amax(dim=(0, 2, 3)))
    return torch.stack(found).amax(dim=0).float()
