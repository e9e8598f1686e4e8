"""Block-scaled fp8 against plain forms: e4m3 as a table of its numbers, scales in Python's own arithmetic."""

import bisect
import math

import pytest
import torch
from torch import Tensor

from train.model.block_scaling import FORMATS, dequantised, exponents, quantised
from train.model.scaled_products import swizzled
from train.recipe.schema import ExpertPrecision

FP8, MXFP8 = FORMATS[ExpertPrecision.fp8], FORMATS[ExpertPrecision.mxfp8]
SPREAD = 12.0
"""Tiles differ by up to e to the power of this, as those of gradients do."""


def number_of(code: int) -> float:
    """The number of e4m3 with a code: 4 bits of exponent, biased by 7, and 3 of mantissa."""
    exponent, mantissa = divmod(code, 8)
    return math.ldexp(8 + mantissa, exponent - 10) if exponent else math.ldexp(mantissa, -9)


NUMBERS = [number_of(code) for code in range(127)]


def code_of(magnitude: float) -> int:
    """The code of the number that is nearest; of two, the even code."""
    above = min(bisect.bisect_left(NUMBERS, magnitude), 126)
    return min((max(above - 1, 0), above), key=lambda code: (abs(NUMBERS[code] - magnitude), code % 2))


def as_fp32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float64).float().item()


def plain_tile(tile: Tensor, *, has_powers: bool) -> tuple[float, list[int]]:
    """The scale of a tile and the codes of its numbers, one by one."""
    numbers = [float(x) for x in tile.flatten()]
    scale = max(as_fp32(max(abs(x) for x in numbers) / 448), 2.0**-100)
    if has_powers:
        mantissa, exponent = math.frexp(scale)
        scale = math.ldexp(1.0, exponent - (mantissa == 0.5))
    codes = []
    for x in numbers:
        sign = 128 if math.copysign(1.0, x) < 0 else 0
        codes.append(sign + code_of(abs(as_fp32(x / scale))))
    return scale, codes


def sample(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    x *= torch.exp(SPREAD * (torch.rand(rows, 1, generator=generator, dtype=torch.float64) - 0.5))
    x[0, : width // 2] = 0.0
    x[-1] = 0.0
    x[1, 3] = -0.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "powers"), [(1, 128, False), (128, 128, False), (1, 32, True)])
def test_tiles_are_those_of_a_plain_form_bit_for_bit(
    dtype: torch.dtype, rows: int, width: int, powers: bool
) -> None:
    x = sample(2 * rows, 2 * width, dtype)
    found = quantised(x, rows, width, has_powers=powers)
    assert found.values.dtype == torch.float8_e4m3fn and found.scales.shape == (2, 2)
    for row in range(2):
        for column in range(2):
            tile = slice(row * rows, (row + 1) * rows), slice(column * width, (column + 1) * width)
            scale, codes = plain_tile(x[tile], has_powers=powers)
            assert found.scales[row, column].item() == scale
            assert found.values[tile].view(torch.uint8).flatten().tolist() == codes


@pytest.mark.parametrize("tiles", [FP8, MXFP8])
def test_matrices_are_the_same_in_both_directions(tiles: object) -> None:
    w = torch.stack([sample(256, 128, torch.bfloat16), sample(256, 128, torch.bfloat16).flip(0)])
    straight, turned = (getattr(tiles, name)(w) for name in ("weights", "turned"))
    assert turned.values.shape == (2, 128, 256) and turned.values.is_contiguous()
    if tiles is FP8:  # Square blocks: one rounding serves both.
        assert torch.equal(dequantised(turned), dequantised(straight).mT)
    else:
        assert torch.equal(dequantised(turned), dequantised(MXFP8.weights(w.mT.contiguous())))


@pytest.mark.parametrize("tiles", [FP8, MXFP8])
def test_errors_are_those_of_the_format(tiles: object) -> None:
    """Half a unit of three bits, or of the least numbers of e4m3."""
    x = sample(64, 256, torch.float32)
    scaled = tiles.rows(x)  # type: ignore[attr-defined]
    scales = scaled.scales.repeat_interleave(256 // scaled.scales.shape[1], dim=1).double()
    bound = (x.double().abs() / 16).maximum(scales * 2.0**-10) * (1 + 2.0**-20)
    assert ((dequantised(scaled).double() - x.double()).abs() <= bound).all()


@pytest.mark.parametrize("tiles", [FP8, MXFP8])
def test_casts_are_torchs_own(tiles: object) -> None:
    x = sample(64, 256, torch.float32)
    found = tiles.rows(x)  # type: ignore[attr-defined]
    wide = found.scales.repeat_interleave(256 // found.scales.shape[1], dim=1)
    assert torch.equal(found.values.view(torch.uint8), (x / wide).to(torch.float8_e4m3fn).view(torch.uint8))
    if tiles is MXFP8:
        cast = found.scales.to(torch.float8_e8m0fnu)
        assert torch.equal(cast.float(), found.scales)
        assert torch.equal(exponents(found.scales), cast.view(torch.uint8))


def test_an_exact_power_is_not_rounded_up() -> None:
    x = torch.zeros(3, 32)
    x[:, 0] = torch.tensor([448.0, 449.0, 447.0])
    assert MXFP8.rows(x).scales.flatten().tolist() == [1.0, 2.0, 1.0]


@pytest.mark.parametrize("tiles", [FP8, MXFP8])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so_and_in_its_tile(tiles: object, bad: float) -> None:
    x = sample(4, 256, torch.float32)
    x[2, 200] = bad
    out = dequantised(tiles.rows(x))  # type: ignore[attr-defined]
    assert not out[2, 200].isfinite()
    spoiled = ~out.isfinite()
    assert spoiled[2, 128:].any() and not spoiled[:2].any() and not spoiled[2, :128].any()


def test_nothing_is_quantised_to_nothing() -> None:
    for shape in ((0, 256), (256, 0)):
        scaled = FP8.rows(torch.zeros(shape))
        assert dequantised(scaled).shape == shape


@pytest.mark.parametrize(("rows", "tiles"), [(128, 4), (130, 5), (1, 1), (300, 8)])
def test_scales_lie_as_cublas_says(rows: int, tiles: int) -> None:
    """Offset of scale (row, tile), from cuBLAS' documentation of block scaling factors."""
    codes = torch.arange(2 * rows * tiles).remainder(251).to(torch.uint8).view(2, rows, tiles)
    found = swizzled(codes)
    padded, columns = -(-rows // 128) * 128, -(-tiles // 4)
    assert found.shape == (2, padded * columns * 4)
    for row in range(0, rows, 7):
        for tile in range(tiles):
            block = 512 * (row // 128 * columns + tile // 4)
            offset = block + row % 32 * 16 + row % 128 // 32 * 4 + tile % 4
            assert torch.equal(found[:, offset], codes[:, row, tile])
    assert torch.equal(swizzled(codes[0]), found[0])
