"""MegaBlocks' low-level operations in plain PyTorch, on any device, in place of its compiled extensions.

MegaBlocks imports two compiled modules, ``megablocks_ops`` and ``grouped_gemm``, and asks for a GPU when
Triton is imported. :func:`install` provides those that are missing; an installed compiled module is used as
it is. On a GPU, gather, scatter and the experts are MegaBlocks' own; on a CPU, which has neither Triton nor
grouped products, :mod:`train.cpu` replaces them. Everything above these operations is MegaBlocks' code.

Shapes: R routed rows (sorted by expert), D model, N outputs, E experts.
"""

import importlib
import importlib.util
import itertools
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from train.cpu import permutation
from train.cpu.dispatch import with_cpu_version
from train.cpu.grouped_glu import memory_optimized_grouped_glu
from train.cpu.triton_driver import give_triton_a_driver


def install() -> None:
    """Makes ``import megablocks`` work on this machine. Repeated calls are cheap."""
    give_triton_a_driver()
    for name, build in (("megablocks_ops", _megablocks_ops), ("grouped_gemm", _grouped_gemm)):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = build()
    kernels = importlib.import_module("megablocks.backend.kernels")
    glu = importlib.import_module("megablocks.layers.glu")
    for module, cpu_version in (
        (kernels, permutation.gather),
        (kernels, permutation.scatter),
        (kernels, permutation.scatter_wgrad),
        (glu, memory_optimized_grouped_glu),
    ):
        original = getattr(module, cpu_version.__name__)
        if not hasattr(original, "plain"):
            setattr(module, cpu_version.__name__, with_cpu_version(cpu_version)(original))


@with_cpu_version(permutation.sort)
def sort(x_R: Tensor, _end_bit: int, sorted_R: Tensor, places_R: Tensor) -> None:
    """Sorts small non-negative integers, stable and ascending, into ``sorted_R`` and ``places_R``."""
    values_R, order_R = torch.sort(x_R, stable=True)
    sorted_R.copy_(values_R)
    places_R.copy_(order_R)


def histogram(x_R: Tensor, bins: int) -> Tensor:
    """Counts of 0 .. bins - 1 in ``x_R``, as int32."""
    # Not torch.bincount, which makes the host wait for a GPU.
    counts = torch.zeros(int(bins), dtype=torch.int32, device=x_R.device)
    return counts.scatter_add_(0, x_R.long(), torch.ones_like(x_R, dtype=torch.int32))


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Running sum along ``dim``, each element included in its own sum."""
    out.copy_(torch.cumsum(x, dim))


def exclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Running sum along ``dim``, each element excluded from its own sum."""
    out.copy_(torch.cumsum(x, dim) - x)


def replicate_forward(x_NE: Tensor, ends_E: Tensor, out_NR: Tensor) -> None:
    """Writes column e of ``x_NE`` to the columns ``ends_E[e - 1]`` up to ``ends_E[e]`` of ``out_NR``."""
    columns_R = torch.arange(out_NR.shape[1], device=out_NR.device, dtype=ends_E.dtype)
    out_NR.copy_(x_NE[:, torch.searchsorted(ends_E, columns_R, right=True)])


def replicate_backward(grad_NR: Tensor, ends_E: Tensor, out_NE: Tensor) -> None:
    """Sums, for each input column, the columns that :func:`replicate_forward` copied it to."""
    columns_R = torch.arange(grad_NR.shape[1], device=grad_NR.device, dtype=ends_E.dtype)
    out_NE.zero_().index_add_(1, torch.searchsorted(ends_E, columns_R, right=True), grad_NR)


def gmm(a_RD: Tensor, b_EDN: Tensor, batch_sizes_E: Tensor, trans_b: bool = False) -> Tensor:
    """Grouped matrix product with gradients: the rows of expert e times ``b_EDN[e]``.

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
    """Grouped matrix product without gradients, written to ``c`` if given.

    With ``trans_a`` both operands are sorted rows, and the result has one matrix per expert: [E, D, N].
    """
    sizes = [int(size) for size in batch_sizes.tolist()]
    if trans_a:
        shape = [len(sizes), a.shape[1], b.shape[1]]
    else:
        shape = [a.shape[0], b.shape[1] if trans_b else b.shape[2]]
    out = a.new_empty(shape) if c is None else c
    for expert, (size, end) in enumerate(zip(sizes, itertools.accumulate(sizes), strict=True)):
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
