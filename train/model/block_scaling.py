"""Block-scaled fp8: numbers in e4m3, and a scale for each tile of them. Needs no GPU.

Two formats, of :class:`train.recipe.schema.ExpertPrecision`:

- ``fp8`` (DeepSeek-V3 2024, arXiv 2412.19437, section 3.3.2): tiles of 1 x 128 along the dimension that a
  product sums over, and blocks of 128 x 128 of weights; scales in fp32, which send a tile's largest magnitude
  to the largest of e4m3, 448.
- ``mxfp8`` (OCP Microscaling Formats 1.0): tiles of 1 x 32 of both operands; scales are powers of two
  (e8m0), rounded up, so that nothing saturates (Mishra et al. 2025, arXiv 2506.08027, section 3).

A tile's numbers are divided by its scale and rounded to the nearest of e4m3, ties to even: a relative error
of at most 2**-4, or, below 2**-6 of the scale, an absolute one of 2**-10 of it. NaN and infinity make their
tile's numbers NaN.

Shapes: N rows, K elements of a row, over which a product sums.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from train.recipe.schema import ExpertPrecision
from train.recipe.sizes import TILE

LARGEST = 448.0
"""Largest number of e4m3."""
LEAST_SCALE = 2.0**-100
"""Scale of tiles that are zero or nearly; far above fp32's least, by which quotients would be infinite."""


class Scaled(NamedTuple):
    """A matrix, or a stack of them, in tiles."""

    values: Tensor
    """float8_e4m3fn, [..., N, K]."""
    scales: Tensor
    """fp32, [..., N / rows of a tile, K / its width]: what its values are multiplied by."""


@dataclass(frozen=True)
class Format:
    """The tiles of a precision."""

    width: int
    """Elements of a row in a tile."""
    weight_rows: int
    """Rows of a tile of weights."""
    has_powers: bool
    """Scales are powers of two."""

    def rows(self, x_NK: Tensor) -> Scaled:
        """Quantises rows of activations or gradients, or any operand along K."""
        return quantised(x_NK, 1, self.width, has_powers=self.has_powers)

    def weights(self, w_ENK: Tensor) -> Scaled:
        """Quantises matrices, for products that sum over K."""
        return quantised(w_ENK, self.weight_rows, self.width, has_powers=self.has_powers)

    def turned(self, w_ENK: Tensor) -> Scaled:
        """Quantises matrices transposed, [E, K, N], for products that sum over N."""
        if self.weight_rows == 1:
            return self.weights(w_ENK.mT.contiguous())
        values, scales = self.weights(w_ENK)  # Square blocks are the same in both directions.
        return Scaled(values.mT.contiguous(), scales.mT.contiguous())


FORMATS = {
    ExpertPrecision.fp8: Format(TILE[ExpertPrecision.fp8], TILE[ExpertPrecision.fp8], has_powers=False),
    ExpertPrecision.mxfp8: Format(TILE[ExpertPrecision.mxfp8], 1, has_powers=True),
}


def quantised(x: Tensor, rows: int, width: int, *, has_powers: bool) -> Scaled:
    """Quantises a matrix, or a stack of them, in tiles.

    Args:
        x: [..., N, K], of whole tiles; any floating-point type, from which it is rounded once.
        rows: rows of a tile.
        width: elements of a row in a tile.
        has_powers: round scales up to powers of two.
    """
    tiles = x.unflatten(-1, (-1, width)).unflatten(-3, (-1, rows))
    scales = tiles.abs().amax(dim=(-3, -1), keepdim=True).float().div_(LARGEST).clamp_(min=LEAST_SCALE)
    if has_powers:
        scales = _next_power(scales)
    values = (tiles / scales).to(torch.float8_e4m3fn)
    return Scaled(values.reshape(x.shape), scales.squeeze((-3, -1)))


def dequantised(x: Scaled) -> Tensor:
    """Returns the numbers that values and scales stand for, fp32, [..., N, K]."""
    *_, N, K = x.values.shape
    *_, rows, columns = x.scales.shape
    if not N or not K:
        return x.values.float()
    tiles = x.values.float().unflatten(-1, (columns, K // columns)).unflatten(-3, (rows, N // rows))
    return (tiles * x.scales[..., :, None, :, None]).reshape(x.values.shape)


def _next_power(x: Tensor) -> Tensor:
    """Returns the least power of two that is not below a normal positive fp32 number."""
    mantissa = (1 << 23) - 1
    powers = ((x.view(torch.int32) + mantissa) & ~mantissa).view(torch.float32)
    return torch.where(x.isfinite(), powers, x)


def exponents(scales: Tensor) -> Tensor:
    """Returns scales that are powers of two as the bytes of float8_e8m0fnu, uint8: biased exponents.

    torch has few operations for that type itself.
    """
    return (scales.view(torch.int32) >> 23).to(torch.uint8)
