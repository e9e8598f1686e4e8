"""MegaBlocks' permutation of tokens on a CPU: sort by expert, gather, scatter and its weights' gradient.

They take the arguments of MegaBlocks' own kernels, which are written in Triton and run only on a GPU.

Shapes: T tokens, K experts per token, R = T x K routed rows (sorted by expert), D model.
``indices_R`` holds, for each sorted row, its place t x K + k in the unsorted order.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def sort(x_R: Tensor, _end_bit: int, sorted_R: Tensor, places_R: Tensor) -> None:
    """:func:`train.model.megablocks_ops.sort` in the smallest integer type that holds the values.

    NumPy's stable sort of up to 16 bits is a radix sort, ten times as fast as torch.sort here.
    """
    smallest = np.min_scalar_type(int(x_R.max()) if x_R.numel() else 0)
    # Not `places_R` as index: it has the type of `x_R`, and torch takes no index of 16 bits.
    order_R = torch.from_numpy(np.argsort(x_R.numpy().astype(smallest), kind="stable"))
    places_R.copy_(order_R)
    torch.index_select(x_R, 0, order_R, out=sorted_R)


def gather(
    x_TD: Tensor, indices_R: Tensor, _bin_ids: Tensor, weights_R: Tensor | None, _bins: Tensor, top_k: int
) -> Tensor:
    """Copies each token's row to its K places in expert order, multiplied by its weight if given."""
    tokens_R = indices_R if top_k == 1 else indices_R // top_k
    if weights_R is None:
        return x_TD.index_select(0, tokens_R)
    return _weighted_sums(x_TD, tokens_R.view(-1, 1), weights_R.index_select(0, indices_R).view(-1, 1))


def scatter(
    x_RD: Tensor, indices_R: Tensor, _bin_ids: Tensor, weights_R: Tensor | None, _bins: Tensor, top_k: int
) -> Tensor:
    """Sums each token's K rows, multiplied by their weights if given, back in token order."""
    places_R = _inverse(indices_R)
    if top_k == 1 and weights_R is None:
        return x_RD.index_select(0, places_R)
    weights_TK = None if weights_R is None else weights_R.view(-1, top_k)
    return _weighted_sums(x_RD, places_R.view(-1, top_k), weights_TK)


def scatter_wgrad(
    x_RD: Tensor, grad_TD: Tensor, indices_R: Tensor, _bin_ids: Tensor, _bins: Tensor, top_k: int
) -> Tensor:
    """Gradient of :func:`scatter`'s weights: the product of each row with its token's gradient."""
    rows_TKD = x_RD.index_select(0, _inverse(indices_R)).view(-1, top_k, x_RD.shape[1])
    return torch.bmm(rows_TKD, grad_TD.unsqueeze(2)).view(-1)


def _weighted_sums(rows_ND: Tensor, places_MK: Tensor, weights_MK: Tensor | None) -> Tensor:
    """Sum over K of ``weights[m, k] * rows[places[m, k]]``: [M, D]."""
    if rows_ND.dtype == torch.float64:
        picked_MKD = rows_ND[places_MK.long()]
        scaled_MKD = picked_MKD if weights_MK is None else picked_MKD * weights_MK.to(rows_ND).unsqueeze(2)
        return scaled_MKD.sum(dim=1)
    # One fused pass that accumulates in fp32, instead of three for select, scale and sum.
    weights_MK = None if weights_MK is None else weights_MK.to(rows_ND.dtype)
    return functional.embedding_bag(places_MK, rows_ND, mode="sum", per_sample_weights=weights_MK)


def _inverse(permutation_R: Tensor) -> Tensor:
    inverse_R = torch.empty_like(permutation_R)
    places_R = torch.arange(permutation_R.numel(), dtype=inverse_R.dtype, device=inverse_R.device)
    return inverse_R.index_copy_(0, permutation_R.long(), places_R)
