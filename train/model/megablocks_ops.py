"""Lets MegaBlocks run on any device without its compiled extension.

MegaBlocks asks for two compiled modules, ``megablocks_ops`` and ``grouped_gemm``, and for a GPU when
Triton is imported. :func:`install` supplies what is missing, in plain PyTorch, and leaves what is
there: a compiled module wins where it is installed, and Triton's kernels stay in charge of tensors on
a GPU. Everything above these leaf operations is MegaBlocks' own code.

Shapes: T tokens, K experts per token, R = T x K routed rows (sorted by expert), D model, E experts.
``indices_R`` holds, for each sorted row, its place t x K + k in the unsorted order.
"""

import functools
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from train.cpu.grouped_glu import grouped_glu


def install() -> None:
    """Makes ``import megablocks`` work here. Cheap to call again."""
    _give_triton_a_driver()
    for name, build in (("megablocks_ops", _megablocks_ops), ("grouped_gemm", _grouped_gemm)):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = build()
    kernels = importlib.import_module("megablocks.backend.kernels")
    for on_cpu in (gather, scatter, scatter_wgrad):
        _replace_on_cpu(kernels, on_cpu.__name__, on_cpu)
    glu = importlib.import_module("megablocks.layers.glu")
    _replace_on_cpu(glu, "memory_optimized_grouped_glu", memory_optimized_grouped_glu)


def sort(x_R: Tensor, _end_bit: int, sorted_R: Tensor, places_R: Tensor) -> None:
    """Stable ascending sort of small non-negative integers, written to ``sorted_R`` and ``places_R``."""
    if x_R.device.type == "cpu" and x_R.numel() and int(x_R.max()) < 256:
        # NumPy's stable sort of bytes is a radix sort, ten times as fast as torch.sort here.
        order = np.argsort(x_R.numpy().astype(np.uint8), kind="stable")
        places_R.copy_(torch.from_numpy(order))
        torch.index_select(x_R, 0, places_R, out=sorted_R)
        return
    values, order_R = torch.sort(x_R, stable=True)
    sorted_R.copy_(values)
    places_R.copy_(order_R)


def histogram(x_R: Tensor, bins: int) -> Tensor:
    """Counts of 0 .. bins - 1 in ``x_R``, as int32."""
    return torch.bincount(x_R, minlength=int(bins)).to(torch.int32)


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Running sum along ``dim``, each element included in its own sum."""
    out.copy_(torch.cumsum(x, dim))


def exclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Running sum along ``dim`` of the elements before each."""
    out.copy_(torch.cumsum(x, dim) - x)


def replicate_forward(x_NE: Tensor, ends_E: Tensor, out_NR: Tensor) -> None:
    """Writes column e of ``x_NE`` to the columns ``ends_E[e - 1]`` up to ``ends_E[e]`` of ``out_NR``."""
    columns_R = torch.arange(out_NR.shape[1], device=out_NR.device, dtype=ends_E.dtype)
    out_NR.copy_(x_NE[:, torch.searchsorted(ends_E, columns_R, right=True)])


def replicate_backward(grad_NR: Tensor, ends_E: Tensor, out_NE: Tensor) -> None:
    """Sums over the columns that :func:`replicate_forward` wrote from each column."""
    columns_R = torch.arange(grad_NR.shape[1], device=grad_NR.device, dtype=ends_E.dtype)
    out_NE.zero_().index_add_(1, torch.searchsorted(ends_E, columns_R, right=True), grad_NR)


def gather(
    x_TD: Tensor, indices_R: Tensor, _bin_ids: Tensor, weights_R: Tensor | None, _bins: Tensor, top_k: int
) -> Tensor:
    """Copies each token's row to its K places in expert order, times its weight if there are weights."""
    tokens_R = indices_R if top_k == 1 else indices_R // top_k
    if weights_R is None:
        return x_TD.index_select(0, tokens_R)
    return _weighted_sums(x_TD, tokens_R.view(-1, 1), weights_R.index_select(0, indices_R).view(-1, 1))


def scatter(
    x_RD: Tensor, indices_R: Tensor, _bin_ids: Tensor, weights_R: Tensor | None, _bins: Tensor, top_k: int
) -> Tensor:
    """Sums each token's K rows, times their weights if there are weights, back in token order."""
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
    # One fused pass that accumulates in fp32, where select, scale and sum would make three.
    weights_MK = None if weights_MK is None else weights_MK.to(rows_ND.dtype)
    return functional.embedding_bag(places_MK, rows_ND, mode="sum", per_sample_weights=weights_MK)


def memory_optimized_grouped_glu(
    x_RD: Tensor,
    w1_EFD: Tensor,
    v1_EFD: Tensor,
    w2_EFD: Tensor,
    batch_sizes_E: Tensor,
    activation_fn: Callable[[Tensor], Tensor],
) -> Tensor:
    """GLU experts with SiLU, see :func:`train.cpu.grouped_glu.grouped_glu`."""
    assert activation_fn is functional.silu, "the experts' activation is SiLU"
    return grouped_glu(x_RD, w1_EFD, v1_EFD, w2_EFD, batch_sizes_E)


def gmm(a_RD: Tensor, b_EDN: Tensor, batch_sizes_E: Tensor, trans_b: bool = False) -> Tensor:
    """Grouped matrix product with gradients: rows of expert e times ``b_EDN[e]``.

    Args:
        a_RD: rows sorted by expert.
        b_EDN: one matrix per expert; [E, N, D] with ``trans_b``.
        batch_sizes_E: rows per expert, on the CPU; zero is allowed.
        trans_b: transpose each expert's matrix.

    Returns:
        [R, N].
    """
    if torch.is_autocast_enabled(a_RD.device.type):
        dtype = torch.get_autocast_dtype(a_RD.device.type)
        a_RD, b_EDN = a_RD.to(dtype), b_EDN.to(dtype)
    result: Tensor = _GroupedMatmul.apply(a_RD, b_EDN, batch_sizes_E, trans_b)
    return result


def backend_gmm(
    a: Tensor,
    b: Tensor,
    batch_sizes: Tensor,
    trans_a: bool = False,
    trans_b: bool = False,
    c: Tensor | None = None,
) -> Tensor:
    """Grouped matrix product without gradients, written to ``c`` where given.

    With ``trans_a`` both sides are sorted rows and each expert's result is its own matrix: [E, D, N].
    """
    sizes = [int(size) for size in batch_sizes.tolist()]
    if trans_a:
        shape = [len(sizes), a.shape[1], b.shape[1]]
    else:
        shape = [a.shape[0], b.shape[1] if trans_b else b.shape[2]]
    out = a.new_empty(shape) if c is None else c
    ends = np.cumsum(sizes)
    for expert, (size, end) in enumerate(zip(sizes, ends.tolist(), strict=True)):
        rows = slice(end - size, end)
        if trans_a:
            torch.mm(a[rows].t(), b[rows], out=out[expert])
        elif size:
            torch.mm(a[rows], b[expert].t() if trans_b else b[expert], out=out[rows])
    return out


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool) -> Tensor:
        ctx.save_for_backward(a, b, batch_sizes)
        ctx.trans_b = trans_b
        return backend_gmm(a, b, batch_sizes, trans_b=trans_b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, batch_sizes = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = backend_gmm(grad, b, batch_sizes, trans_b=not ctx.trans_b)
        if ctx.needs_input_grad[1]:
            left, right = (grad, a) if ctx.trans_b else (a, grad)
            grad_b = backend_gmm(left, right, batch_sizes, trans_a=True)
        return grad_a, grad_b, None, None


def _inverse(permutation_R: Tensor) -> Tensor:
    inverse_R = torch.empty_like(permutation_R)
    places_R = torch.arange(permutation_R.numel(), dtype=inverse_R.dtype, device=inverse_R.device)
    return inverse_R.index_copy_(0, permutation_R.long(), places_R)


def _megablocks_ops() -> ModuleType:
    module = ModuleType("megablocks_ops", "Plain PyTorch in place of MegaBlocks' CUDA extension.")
    for operation in (
        sort,
        histogram,
        inclusive_cumsum,
        exclusive_cumsum,
        replicate_forward,
        replicate_backward,
    ):
        setattr(module, operation.__name__, operation)
    return module


def _grouped_gemm() -> ModuleType:
    module = ModuleType("grouped_gemm", "Plain PyTorch in place of the compiled grouped_gemm.")
    module.ops = SimpleNamespace(gmm=gmm)  # type: ignore[attr-defined]
    module.backend = SimpleNamespace(gmm=backend_gmm)  # type: ignore[attr-defined]
    return module


def _replace_on_cpu(module: ModuleType, name: str, on_cpu: Callable[..., Tensor]) -> None:
    """Makes ``module.name`` call ``on_cpu`` for tensors on the CPU, and the original for the rest."""
    original = getattr(module, name)
    if hasattr(original, "elsewhere"):
        return

    @functools.wraps(on_cpu)
    def by_device(x: Tensor, *args: Any) -> Tensor:
        return on_cpu(x, *args) if x.device.type == "cpu" else original(x, *args)

    by_device.elsewhere = original  # type: ignore[attr-defined]
    setattr(module, name, by_device)


class _NoGpu:
    """What Triton's autotuner asks of a driver, for machines where Triton finds none."""

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """A clock: the interpreter's kernels are tuned by their wall time in milliseconds."""

        def milliseconds(call: Callable[[], Any], quantiles: list[float], **_: Any) -> list[float]:
            start = time.perf_counter()
            call()
            return [(time.perf_counter() - start) * 1e3] * len(quantiles)

        return milliseconds


def _give_triton_a_driver() -> None:
    driver = importlib.import_module("triton.runtime.driver").driver
    try:
        driver.active.get_benchmarker()
    except RuntimeError:  # "0 active drivers": no GPU here
        driver.set_active(_NoGpu())
