"""Rows on their way to experts in fp8: e4m3 in tiles of 1 x 128, each tile's scale a power of two.

So do DeepSeek-V3's tokens travel (arXiv 2412.19437, section 3.3.3); outputs come back, and gradients travel,
unrounded. Numbers of four bits times a power of two are exact in bf16, in which the rows arrive.

Shapes: R rows, D model.
"""

import torch
from torch import Tensor

from train.model.block_scaling import Scaled, dequantised, exponents, quantised
from train.recipe.sizes import EXCHANGED_TILE


def packed(rows_RD: Tensor) -> Tensor:
    """Returns a row's numbers and then its scales, a byte each: uint8 [R, D + D / 128]."""
    values, scales = quantised(rows_RD, 1, EXCHANGED_TILE, has_powers=True)
    return torch.cat([values.view(torch.uint8), exponents(scales)], dim=1)


def unpacked(bytes_R: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the rows that :func:`packed` packed, [R, D]."""
    D = bytes_R.shape[1] // (EXCHANGED_TILE + 1) * EXCHANGED_TILE
    values, codes = bytes_R[:, :D].contiguous(), bytes_R[:, D:]
    scales = (codes.to(torch.int32) << 23).view(torch.float32)
    return dequantised(Scaled(values.view(torch.float8_e4m3fn), scales)).to(dtype)
