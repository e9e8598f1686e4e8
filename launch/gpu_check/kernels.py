"""Checks of a device's kernels against plain float64 definitions on the CPU.

On a GPU these are MegaBlocks' Triton kernels (gather, scatter, their gradients), the grouped matrix product
and, if compiled, MegaBlocks' extension. On a CPU they are those of train/cpu.

Shapes: T tokens, K experts per token, R = T x K routed rows, D width, N outputs, E experts.
"""

import importlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from launch.gpu_check.rows import CheckRow, deviation_row
from train.model import megablocks_ops

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest error relative to the largest value: rounding of the type over sums of some hundred terms."""


def check_kernels(device: str, tokens: int = 4096, width: int = 1024) -> list[CheckRow]:
    """Checks every kernel in fp32 and bf16, with idle experts and with one expert that gets all tokens."""
    megablocks_ops.install()
    rows = []
    for dtype, bound in BOUNDS.items():
        for routing, busy in (("2 of 16 idle", range(14)), ("one takes all", range(1))):
            worst: dict[str, float] = {}
            for name, got, wanted in _pairs(device, dtype, tokens, width, list(busy)):
                worst[name] = max(worst.get(name, 0.0), relative_error(got, wanted))
            label = f"{str(dtype).removeprefix('torch.')}, {routing}"
            rows += [
                deviation_row("kernels", f"{name} ({label})", error, bound) for name, error in worst.items()
            ]
    return rows


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Returns the largest difference over the largest wanted value; infinity if that is NaN."""
    difference = (got.detach().cpu().double() - wanted.double()).abs().max()
    error = float(difference / wanted.double().abs().max().clamp(min=1e-30))
    return float("inf") if math.isnan(error) else error


def _pairs(
    device: str, dtype: torch.dtype, tokens: int, width: int, busy: list[int], experts: int = 16
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields name, result on the device and float64 reference."""
    top_k = min(4, len(busy))
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    choices_TK = torch.rand(tokens, len(busy), generator=generator).argsort(dim=1)[:, :top_k]
    experts_R = torch.tensor(busy)[choices_TK].reshape(-1).int()
    x_TD, weights_R = randn(tokens, width), randn(tokens * top_k)
    yield from _permutation(device, experts_R, experts, x_TD, weights_R, randn(tokens * top_k, width))
    counts_E = torch.bincount(experts_R, minlength=experts)
    yield from _grouped_product(device, counts_E, randn)


def _permutation(
    device: str, experts_R: Tensor, experts: int, x_TD: Tensor, weights_R: Tensor, rows_RD: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    from megablocks import ops

    tokens, rows = x_TD.shape[0], experts_R.numel()
    top_k = rows // tokens
    order_R = torch.sort(experts_R, stable=True).indices
    on = experts_R.to(device)
    bin_ids, indices = ops.sort(on, max(experts - 1, 1).bit_length())
    yield "sort", indices, order_R
    counts = ops.histogram(on, experts)
    yield "histogram", counts, torch.bincount(experts_R, minlength=experts)
    bins = ops.inclusive_cumsum(counts, 0).view(-1)

    x = x_TD.to(device).requires_grad_()
    gathered = ops.gather(x, indices, bin_ids, bins, top_k)
    gathered.backward(rows_RD.to(device))
    x_double, sorted_rows = x_TD.double(), rows_RD.double()
    yield "gather", gathered, x_double[order_R // top_k]
    gradient_TD = torch.zeros_like(x_double).index_add_(0, order_R // top_k, sorted_rows)
    yield "gather's gradient", _gradient(x), gradient_TD

    y, weights = rows_RD.to(device).requires_grad_(), weights_R.to(device).requires_grad_()
    scattered = ops.scatter(y, indices, bin_ids, weights, bins, top_k)
    scattered.backward(x_TD.to(device))
    scale_R1 = weights_R.double()[order_R].unsqueeze(1)
    out_TD = torch.zeros_like(x_double).index_add_(0, order_R // top_k, sorted_rows * scale_R1)
    yield "scatter", scattered, out_TD
    yield "scatter's gradient", _gradient(y), x_double[order_R // top_k] * scale_R1
    products_R = (sorted_rows * x_double[order_R // top_k]).sum(dim=1)
    weights_gradient_R = torch.empty(rows, dtype=torch.float64)
    weights_gradient_R[order_R] = products_R
    yield "scatter's gradient of weights", _gradient(weights), weights_gradient_R


def _grouped_product(
    device: str, counts_E: Tensor, randn: Callable[..., Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    grouped_gemm = importlib.import_module("grouped_gemm")  # the compiled package, or ours

    rows, inner, outer = int(counts_E.sum()), 256, 128
    a_RD, b_EDN, gradient_RN = randn(rows, inner), randn(len(counts_E), inner, outer), randn(rows, outer)
    a, b = a_RD.to(device).requires_grad_(), b_EDN.to(device).requires_grad_()
    out = grouped_gemm.ops.gmm(a, b, counts_E, False)
    out.backward(gradient_RN.to(device))
    parts = [
        (a_RD.double()[end - size : end], gradient_RN.double()[end - size : end], matrix)
        for size, end, matrix in zip(
            counts_E.tolist(), counts_E.cumsum(0).tolist(), b_EDN.double(), strict=True
        )
    ]
    yield "grouped product", out, torch.cat([part @ matrix for part, _, matrix in parts])
    yield (
        "grouped product's gradient of rows",
        _gradient(a),
        torch.cat([gradient @ matrix.t() for _, gradient, matrix in parts]),
    )
    yield (
        "grouped product's gradient of weights",
        _gradient(b),
        torch.stack([part.t() @ gradient for part, gradient, _ in parts]),
    )


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
