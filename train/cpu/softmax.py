"""The softmax of the loss on a CPU: one block of rows at a time, so that its passes stay in the cache.

Shapes: C tokens of a chunk, V vocabulary, N rows of a block.
"""

import torch
from torch import Tensor

CACHED_ELEMENTS = 2**18
"""Logits per block: 1 MB in fp32, half of a core's L2 cache."""


def softmax_in_place(logits_CV: Tensor, write: bool) -> Tensor:
    """:func:`train.model.loss.softmax_in_place`, block by block."""
    dtype = torch.promote_types(logits_CV.dtype, torch.float32)
    rows = max(1, CACHED_ELEMENTS // logits_CV.shape[1])
    probs = logits_CV.new_empty(min(rows, len(logits_CV)), logits_CV.shape[1], dtype=dtype)
    log_sums = []
    for block_NV in logits_CV.split(rows):
        logits_NV = block_NV.to(dtype)
        probs_NV = torch.softmax(logits_NV, dim=-1, out=probs[: len(block_NV)])
        log_sums.append(logits_NV.amax(dim=-1) - probs_NV.amax(dim=-1).log())
        if write:
            block_NV.copy_(probs_NV)
    return torch.cat(log_sums)
