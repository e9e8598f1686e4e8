"""Products of rows sorted by expert in block-scaled fp8: torch's kernels on a GPU, an emulation on a CPU.

Operands are quantised by :mod:`train.model.block_scaling` on either. What torch 2.15 has for them:

- ``fp8``: ``torch.nn.functional.scaled_mm`` with tiles of 1 x 128 and blocks of 128 x 128, by cuBLASLt on
  GPUs of compute capability 9.0, one product for each expert. torch's grouped product has no such tiles.
- ``mxfp8``: ``torch.nn.functional.scaled_grouped_mm`` with tiles of 1 x 32, on capability 10.0, one kernel
  for all experts.

No GPU has run either; torch's own checks of their operands, and which kernels they ask for, were run on a GPU
that is not there (tests/cuda_standin). A CPU multiplies the same quantised numbers in fp32. Tensor cores add
products with fewer bits than fp32, so a GPU's results are not those of the emulation bit for bit.

Shapes: R rows sorted by expert, M and N rows of the operands, K what a product sums over, E experts.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from train.model.block_scaling import FORMATS, Scaled, dequantised, exponents
from train.recipe.errors import UserError
from train.recipe.schema import ExpertPrecision

KERNELS = {ExpertPrecision.fp8: "scaled_mm", ExpertPrecision.mxfp8: "scaled_grouped_mm"}
CAPABILITIES = {ExpertPrecision.fp8: ((9, 0), "H100s"), ExpertPrecision.mxfp8: ((10, 0), "B200s")}
LEAST_CUDA = (12, 9)
"""First version of CUDA whose cuBLASLt scales tiles of 128."""
PADDED_ROWS = 16
"""Rows of a product of one expert are padded to a multiple of this: 16 bytes of fp8."""
PADDED_TOKENS = 128
"""Tokens that a product sums over are padded to a multiple of this, with zeros."""

TRIED_ROWS, TRIED_WIDTH = 168, 256
LARGEST_ERROR = 2.0**-7
"""Of a product in bf16, relative to its largest number: its rounding, and that of sums in tensor cores."""

ran: Counter[str] = Counter()
"""Products that ran, by kernel; `emulation` on a CPU, `idle` of experts without rows."""


class Products:
    """The products of a layer's experts in a precision, for some numbers of rows.

    Args:
        precision: fp8 or mxfp8.
        spans: each expert's rows.
    """

    def __init__(self, precision: ExpertPrecision, spans: list[slice]) -> None:
        self.precision, self.spans, self.format = precision, spans, FORMATS[precision]

    def columns(self, x_RM: Tensor) -> list[Scaled]:
        """Quantises each expert's rows transposed, [M, its rows], for products that sum over tokens.

        A tile is of one expert's tokens only: rows of another, or beyond the last, are in none of its tiles.
        """
        found = []
        for rows in self.spans:
            x_MR = x_RM[rows].t()
            missing = -x_MR.shape[1] % PADDED_TOKENS
            found.append(self.format.rows(functional.pad(x_MR, (0, missing))))
        return found

    def by_matrices(self, a_RK: Scaled, b_ENK: Scaled, dtype: torch.dtype) -> Tensor:
        """Returns each row's products with the rows of its expert's matrix, [R, N].

        Rows that no expert has are not written.
        """
        R, N = a_RK.values.shape[0], b_ENK.values.shape[1]
        if self.precision is ExpertPrecision.mxfp8 and a_RK.values.is_cuda:
            return self._grouped_by_matrices(a_RK, b_ENK, dtype)
        out_RN = a_RK.values.new_empty(R, N, dtype=dtype)
        for expert, rows in self._busy():
            a, b = (Scaled(*(part[at] for part in whole)) for whole, at in ((a_RK, rows), (b_ENK, expert)))
            out_RN[rows] = _product(a, b, dtype)
        return out_RN

    def by_rows(self, a: list[Scaled], b: list[Scaled], dtype: torch.dtype) -> Tensor:
        """Returns for each expert the products of its columns, [E, M, N]; zeros for one without rows."""
        if self.precision is ExpertPrecision.mxfp8 and a[0].values.is_cuda:
            return self._grouped_by_rows(a, b, dtype)
        M, N = a[0].values.shape[0], b[0].values.shape[0]
        out_EMN = a[0].values.new_zeros(len(self.spans), M, N, dtype=dtype)
        for expert, _ in self._busy():
            out_EMN[expert] = _product(a[expert], b[expert], dtype)
        return out_EMN

    def _busy(self) -> list[tuple[int, slice]]:
        """Returns the experts that have rows, with them."""
        busy = [(expert, rows) for expert, rows in enumerate(self.spans) if rows.start < rows.stop]
        ran["idle"] += len(self.spans) - len(busy)
        return busy

    def _grouped_by_matrices(self, a_RK: Scaled, b_ENK: Scaled, dtype: torch.dtype) -> Tensor:
        scales = [swizzled(exponents(a_RK.scales[rows])) for rows in self.spans]
        tiles = -(-a_RK.scales.shape[-1] // 4) * 4
        of_a = torch.cat(scales).view(-1, tiles)
        of_b = swizzled(exponents(b_ENK.scales))
        return self._grouped(a_RK.values, of_a, b_ENK.values.mT, of_b, self._ends(padded=1)).to(dtype)

    def _grouped_by_rows(self, a: list[Scaled], b: list[Scaled], dtype: torch.dtype) -> Tensor:
        values, scales = [], []
        for operand in (a, b):
            bytes_of = [each.values.view(torch.uint8) for each in operand]
            values.append(torch.cat(bytes_of, dim=1).view(torch.float8_e4m3fn))
            padded = -(-len(values[-1]) // 128) * 128
            scales.append(torch.cat([swizzled(exponents(each.scales)) for each in operand]).view(padded, -1))
        ends_E = self._ends(padded=PADDED_TOKENS)
        out_EMN = self._grouped(values[0], scales[0], values[1].t(), scales[1], ends_E)
        for expert, rows in enumerate(self.spans):
            if rows.start == rows.stop:
                out_EMN[expert].zero_()
        return out_EMN.to(dtype)

    def _grouped(self, a: Tensor, of_a: Tensor, b: Tensor, of_b: Tensor, ends_E: Tensor) -> Tensor:
        ran["scaled_grouped_mm"] += 1
        torch_functional: Any = functional
        scaling, swizzle = torch_functional.ScalingType, torch_functional.SwizzleType
        out: Tensor = torch_functional.scaled_grouped_mm(
            a,
            b,
            of_a.view(torch.float8_e8m0fnu),
            scaling.BlockWise1x32,
            of_b.view(torch.float8_e8m0fnu),
            scaling.BlockWise1x32,
            swizzle_a=swizzle.SWIZZLE_32_4_4,
            swizzle_b=swizzle.SWIZZLE_32_4_4,
            offs=ends_E.to(a.device, non_blocking=True),
            output_dtype=torch.bfloat16,
        )
        return out

    def _ends(self, *, padded: int) -> Tensor:
        counts = [-(-(rows.stop - rows.start) // padded) * padded for rows in self.spans]
        return torch.tensor(counts).cumsum(0).int()


def _product(a_MK: Scaled, b_NK: Scaled, dtype: torch.dtype) -> Tensor:
    """Returns the product of one expert, [M, N]."""
    if not a_MK.values.is_cuda:
        ran["emulation"] += 1
        with torch.autocast("cpu", enabled=False):
            return (dequantised(a_MK) @ dequantised(b_NK).mT).to(dtype)
    ran["scaled_mm"] += 1
    torch_functional: Any = functional
    tiles, blocks = (
        torch_functional.ScalingType.BlockWise1x128,
        torch_functional.ScalingType.BlockWise128x128,
    )
    M, missing = len(a_MK.values), -len(a_MK.values) % PADDED_ROWS
    # Scales of tiles lie column by column, those of blocks row by row, in rows of whole 16 bytes.
    a = functional.pad(a_MK.values.view(torch.uint8), (0, 0, 0, missing)).view(torch.float8_e4m3fn)
    of_a = functional.pad(a_MK.scales, (0, 0, 0, missing), value=1.0).t().contiguous().t()
    is_blocks = len(b_NK.scales) < len(b_NK.values)
    of_b = b_NK.scales.t().contiguous().t()
    if is_blocks:
        of_b = functional.pad(b_NK.scales, (0, -b_NK.scales.shape[1] % 4), value=1.0).t()
    out: Tensor = torch_functional.scaled_mm(
        a,
        b_NK.values.t(),
        of_a,
        tiles,
        of_b,
        blocks if is_blocks else tiles,
        output_dtype=dtype,
    )
    return out[:M]


def swizzled(scales: Tensor) -> Tensor:
    """Orders scales as Blackwell's tensor cores read them, padded to 128 rows and 4 tiles (cuBLAS, "1D block
    scaling factors layout").

    Args:
        scales: their bytes, [..., N, tiles].

    Returns:
        [..., padded N x padded tiles]; rows of whole tiles are not kept together.
    """
    *_, N, tiles = scales.shape
    padded = functional.pad(scales, (0, -tiles % 4, 0, -N % 128))
    blocks = padded.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 4, 32))
    *lead, rows, quarters, of_quarter, columns, four = blocks.shape
    ordered = blocks.movedim((-5, -2, -3, -4, -1), (-5, -4, -3, -2, -1))
    size = rows * quarters * of_quarter * columns * four
    return ordered.reshape(*lead, size)


def require_kernels(precision: ExpertPrecision, device: str, *, is_bf16: bool) -> None:
    """Checks that torch and the GPU have the kernels of a precision; a CPU always can emulate it.

    Args:
        precision: of the experts.
        device: `cpu` or `cuda`.
        is_bf16: the other products are bf16.

    Raises:
        UserError: one line that says what is missing.
    """
    if precision is ExpertPrecision.same or device != "cuda":
        return

    def missing(what: str, remedy: str) -> UserError:
        return UserError(f"{precision.value} {what}", key="training.expert_precision", remedy=remedy)

    if not is_bf16:
        raise missing("on a GPU has bf16 results, but the run is in fp32", "set training.precision=bf16")
    kernel = KERNELS[precision]
    cuda = torch.version.cuda or "0.0"
    if not hasattr(functional, kernel) or not hasattr(functional, "ScalingType"):
        what = f"needs torch.nn.functional.{kernel}, which torch {torch.__version__} does not have"
        raise missing(what, "install a newer torch, or set it to same")
    if tuple(int(part) for part in cuda.split(".")[:2]) < LEAST_CUDA:
        raise missing(
            f"needs CUDA 12.9, and torch is built for {cuda}", "install a newer one, or set it to same"
        )
    capability, names = CAPABILITIES[precision]
    found = torch.cuda.get_device_capability(device)
    if found != capability:
        name = torch.cuda.get_device_name(device)
        what = f"is for {names}, but {name} has compute capability {found[0]}.{found[1]}"
        other = next(
            (each.value for each, (needed, _) in CAPABILITIES.items() if needed == found),
            ExpertPrecision.same.value,
        )
        raise missing(what, f"set it to {other}")


def try_kernels(precision: ExpertPrecision, device: str) -> float:
    """Multiplies some rows as experts do, and compares with the same quantised numbers in fp32.

    Returns:
        The largest error, relative to the largest number.

    Raises:
        UserError: one line, if another kernel ran or its numbers are not those of the format.
    """
    generator = torch.Generator().manual_seed(0)
    x_RK = torch.randn(TRIED_ROWS, TRIED_WIDTH, generator=generator).to(device, torch.bfloat16)
    w_ENK = torch.randn(3, TRIED_WIDTH, TRIED_WIDTH, generator=generator).to(device, torch.bfloat16)
    products = Products(precision, [slice(0, 40), slice(40, 40), slice(40, TRIED_ROWS)])
    before = ran.copy()
    ran.clear()
    rows, matrices, columns = (
        products.format.rows(x_RK),
        products.format.weights(w_ENK),
        products.columns(x_RK),
    )
    found = [
        products.by_matrices(rows, matrices, torch.bfloat16),
        products.by_rows(columns, columns, torch.bfloat16),
    ]
    kernels = set(ran) - {"idle"}
    ran.clear()
    ran.update(before)
    rows_hat, matrices_hat = dequantised(rows), dequantised(matrices)
    wanted = [
        torch.cat([rows_hat[span] @ w.t() for span, w in zip(products.spans, matrices_hat, strict=True)]),
        torch.stack([hat @ hat.t() for hat in map(dequantised, columns)]),
    ]
    error = max(
        float((mine.float() - other).abs().max() / other.abs().max())
        for mine, other in zip(found, wanted, strict=True)
    )
    intended = KERNELS[precision] if device == "cuda" else "emulation"
    if kernels != {intended} or not error < LARGEST_ERROR:
        what = (
            f"{precision.value} ran {', '.join(sorted(kernels))} for {intended}, with an error of {error:.2g}"
        )
        remedy = "report it with the versions of torch and driver, and set it to same"
        raise UserError(what, key="training.expert_precision", remedy=remedy)
    return error


def require_ran(precision: ExpertPrecision, device: str) -> None:
    """Checks that the products of a batch ran in the kernels of a precision, and in no other.

    Raises:
        AssertionError: if not; such a run would train in another precision than its recipe says.
    """
    intended = KERNELS[precision] if device == "cuda" else "emulation"
    assert ran and set(ran) <= {intended, "idle"}, (
        f"experts in {precision.value} ran {dict(ran) or 'nothing'}"
    )
